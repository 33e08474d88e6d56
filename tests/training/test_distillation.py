"""Distillations through the real engine: rounds, hand-over, resumes at any step, and every kind of layout."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml

from pgm_scale import config as configuration
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.errors import UserError
from pgm_scale.export import write_model_folder
from pgm_scale.loading import load
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.run_folder import RunFolder
from pgm_scale.training import loop
from pgm_scale.training.stability import Instability, RollBack, Stability
from pgm_scale.training.teacher_model import fill_in_model
from tests.distributed import run_ranks
from tests.parallel.persistence import partition_everything
from tests.tiny_data import tiny_config, write_tiny_data
from tests.training.test_runs import _assert_bitwise, _differences, _records, _state, _train

MDLM = {
    "kind": "diffusion_transformer",
    "hidden_size": 16,
    "num_heads": 2,
    "num_blocks": 2,
    "condition_size": 8,
    "dropout": 0.0,
}
ROUND = 3
# A student starts where its teacher is, with gradients near 0: Adam must not make steps of their rounding.
EPSILON = 1e-4
OBJECTIVE = {"kind": "sdtt", "sampling_steps": 16, "round_steps": ROUND, "minimum_time": 1e-3}


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        _train(mesh, config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"), pad=True)


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PGM and an MDLM, trained for a few steps."""
    folder = tmp_path_factory.mktemp("teachers")
    mdlm = tiny_config(data, folder / "mdlm", objective={"kind": "mdlm"}, model=MDLM)
    run_ranks(1, _train_all, [tiny_config(data, folder / "pgm"), mdlm])
    return folder


def distillation(data: Path, teachers: Path, run: Path, kind: str = "pgm", **changes: Any) -> RunConfig:
    objective = OBJECTIVE | {"teacher": str(teachers / kind)} | changes.pop("objective", {})
    training = {"steps": 8} | changes.pop("training", {})
    model = {"model": MDLM} if kind == "mdlm" else {}
    changes["optimizer"] = {"epsilon": EPSILON}
    return tiny_config(data, run, objective=objective, training=training, **model, **changes)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in _records(run)]


def test_starts_as_the_teacher_and_keeps_the_teacher_of_every_round(
    data: Path, teachers: Path, tmp_path: Path
) -> None:
    config = distillation(
        data, teachers, tmp_path / "run", checkpoint={"interval_steps": 100, "keep_last": 1}
    )
    run_ranks(1, _train_all, [config])
    assert CheckpointStore(tmp_path / "run").steps() == [0, 3, 6, 8]
    teacher = CheckpointStore(teachers / "pgm").read_full(6, "ema")
    for kind in ("weight", "ema"):
        student = CheckpointStore(tmp_path / "run").read_full(0, kind)
        assert all((student[name] == values).all() for name, values in teacher.items())
    assert [record["round"] for record in _records(tmp_path / "run")] == [0, 0, 0, 1, 1, 1, 2, 2]
    trained_with = RunFolder(teachers / "pgm").identity()
    origin = RunFolder(tmp_path / "run").identity().distilled_from
    assert origin is not None
    assert (origin.run_id, origin.step, origin.weights) == (trained_with.run_id, 6, "ema")
    assert load(tmp_path / "run").description.objective.kind == "pgm"  # what it is evaluated by


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"next_teacher": "ema", "groups": "two"},
        {"reset_optimizer": True, "reset_ema": True, "teacher_weights": "weight"},
    ],
)
def test_any_resume_is_bitwise_exact(data: Path, teachers: Path, tmp_path: Path, options: dict) -> None:
    """Stopped inside a round, at its first step and before its last one."""
    straight = distillation(data, teachers, tmp_path / "straight", objective=options)
    parts = [
        distillation(data, teachers, tmp_path / "parts", objective=options, training={"steps": steps})
        for steps in (1, 3, 5, 8)
    ]
    run_ranks(1, _train_all, [straight, *parts])
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    pairs = _differences(_state(tmp_path / "straight", 8), _state(tmp_path / "parts", 8))
    assert all(difference == 0 for _, difference in pairs)


def test_resets_change_the_run_and_nothing_before_the_second_round(
    data: Path, teachers: Path, tmp_path: Path
) -> None:
    names: dict[str, dict[str, Any]] = {
        "plain": {},
        "optimizer": {"reset_optimizer": True},
        "ema": {"reset_ema": True},
        "average": {"next_teacher": "ema"},
    }
    configs = [
        distillation(data, teachers, tmp_path / name, objective=options) for name, options in names.items()
    ]
    run_ranks(1, _train_all, configs)
    plain = _state(tmp_path / "plain", 3)
    for name in ("optimizer", "ema", "average"):
        assert all(difference == 0 for _, difference in _differences(plain, _state(tmp_path / name, 3)))
    after = {name: _state(tmp_path / name, 8) for name in names}
    changed = {
        name: {kind for (kind, _), difference in _differences(after["plain"], after[name]) if difference > 0}
        for name in ("optimizer", "ema", "average")
    }
    assert changed["optimizer"] == changed["average"] == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert changed["ema"] == {"ema"}


LAYOUTS = [
    ("ZeRO-0", 2, {"zero_stage": 0}),
    ("ZeRO-1", 2, {"zero_stage": 1}),
    ("ZeRO-2", 2, {"zero_stage": 2}),
    ("ZeRO-3", 2, {"zero_stage": 3}),
    ("TP", 2, {"tensor": 2}),
    ("SP", 2, {"tensor": 2, "sequence_parallel": True}),
    ("PP", 2, {"pipeline": 2}),
]


@pytest.mark.parametrize(
    ("kind", "options"), [("pgm", {"divergence": "mse"}), ("pgm", {"groups": "two"}), ("mdlm", {})]
)
def test_every_layout_is_the_same_distillation(
    data: Path, teachers: Path, tmp_path: Path, kind: str, options: dict
) -> None:
    run_ranks(1, _train_all, [distillation(data, teachers, tmp_path / "alone", kind, objective=options)])
    configs = [
        distillation(data, teachers, tmp_path / name, kind, objective=options, parallel=layout)
        for name, _, layout in LAYOUTS
    ]
    run_ranks(2, _train_all, configs)
    alone, records = _state(tmp_path / "alone", 8), _records(tmp_path / "alone")
    for name, _, _ in LAYOUTS:
        for mine, theirs in zip(records, _records(tmp_path / name), strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4, abs=1e-6), (name, mine["step"])
        for (kind_of, parameter), difference in _differences(alone, _state(tmp_path / name, 8)):
            assert difference < 1e-4, (name, kind_of, parameter)


def _train_partitioned(mesh: Mesh, config: RunConfig) -> None:
    partition_everything()
    _train(mesh, config)


@pytest.mark.parametrize("kind", ["pgm", "mdlm"])
def test_zero_3_ranks_ask_for_different_numbers_of_tokens(
    data: Path, teachers: Path, tmp_path: Path, kind: str
) -> None:
    """Of one sequence each, of which the teacher's first step often opens none: all gather the same weights."""
    sizes = {"micro_batch_sequences": 1, "global_batch_sequences": 4}
    alone, zero_3 = (
        distillation(data, teachers, tmp_path / name, kind, training=sizes, parallel=layout)
        for name, layout in (("alone", {}), ("ZeRO-3", {"zero_stage": 3, "timeout_s": 60}))
    )
    run_ranks(1, _train_all, [alone])
    run_ranks(2, _train_partitioned, zero_3)
    np.testing.assert_allclose(losses(tmp_path / "ZeRO-3"), losses(tmp_path / "alone"), rtol=1e-4, atol=1e-6)


def test_a_step_may_mask_nothing(data: Path, teachers: Path, tmp_path: Path) -> None:
    config = distillation(
        data,
        teachers,
        tmp_path / "run",
        objective={"minimum_time": 0.0, "sampling_steps": 1 << 10, "round_steps": 10},
        training={"steps": 60, "micro_batch_sequences": 1, "global_batch_sequences": 1},
        validation={"interval_steps": 60},
        checkpoint={"interval_steps": 60},
    )
    run_ranks(1, _train_all, [config])
    assert 0.0 in losses(tmp_path / "run")


def test_layouts_change_at_every_resume(data: Path, teachers: Path, tmp_path: Path) -> None:
    """One process, then tensor and pipeline parallel, then ZeRO-3, each resumed inside a round."""
    straight = distillation(data, teachers, tmp_path / "straight")
    chain = [
        distillation(data, teachers, tmp_path / "chain", parallel=layout, training={"steps": steps})
        for steps, layout in ((2, {}), (5, {"tensor": 2, "pipeline": 2}), (7, {"zero_stage": 3}), (8, {}))
    ]
    run_ranks(1, _train_all, [straight, chain[0]])
    for ranks, config in zip((4, 2, 1), chain[1:], strict=True):
        run_ranks(ranks, _train_all, [config])
    np.testing.assert_allclose(
        losses(tmp_path / "chain"), losses(tmp_path / "straight"), rtol=1e-4, atol=1e-6
    )


def test_bf16_distils(data: Path, teachers: Path, tmp_path: Path) -> None:
    configs = [
        distillation(data, teachers, tmp_path / str(stage), training={"precision": "bf16"}, parallel=layout)
        for stage, layout in enumerate([{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 3}])
    ]
    run_ranks(2, _train_all, configs)
    for stage in range(3):
        assert np.isfinite(losses(tmp_path / str(stage))).all()
        assert min(losses(tmp_path / str(stage))) >= -1e-3


def test_an_exported_teacher_gives_the_same_student(data: Path, teachers: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "exported", load(teachers / "pgm"), "card")
    configs = [
        distillation(data, teachers, tmp_path / name, objective={"teacher": str(teacher)})
        for name, teacher in (("run", teachers / "pgm"), ("folder", tmp_path / "exported"))
    ]
    run_ranks(1, _train_all, configs)
    _assert_bitwise(tmp_path / "run", tmp_path / "folder", 8)


def _refused(mesh: Mesh, config: RunConfig) -> str:
    with pytest.raises(UserError) as refusal:
        _train(mesh, config)
    return str(refusal.value)


def test_another_model_is_refused_before_a_run_begins(data: Path, teachers: Path, tmp_path: Path) -> None:
    config = distillation(data, teachers, tmp_path / "run", model={"hidden_size": 32})
    message = run_ranks(1, _refused, config)
    assert message.startswith("objective.teacher: ")
    assert "model.hidden_size: the teacher has 16, now it is 32" in message
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_lost_teacher_is_named_and_the_first_one_is_not_missed(
    data: Path, teachers: Path, tmp_path: Path
) -> None:
    first = distillation(data, teachers, tmp_path / "run", training={"steps": 4})
    gone = distillation(
        data, teachers, tmp_path / "run", objective={"teacher": str(tmp_path / "gone")}, training={"steps": 5}
    )
    run_ranks(1, _train_all, [first, gone])
    (tmp_path / "run" / "checkpoints" / "step_00000003").rename(tmp_path / "lost")
    third = distillation(data, teachers, tmp_path / "run", training={"steps": 6})
    message = run_ranks(1, _refused, third)
    assert "lost the checkpoint of step 3" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["distilled_from"]["step"] == 6


def test_the_model_is_the_teachers_but_for_what_is_given(data: Path, teachers: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    tree = configuration.to_mapping(distillation(data, teachers, tmp_path / "run", "mdlm"))
    del tree["model"]
    path.write_text(yaml.safe_dump(tree))
    config = configuration.load(path, ["model.dropout=0.25"], complete=fill_in_model)
    theirs = configuration.to_mapping(RunFolder(teachers / "mdlm").config().model)
    assert configuration.to_mapping(config.model) == theirs | {"dropout": 0.25}
    for teacher, problem in (
        ("nowhere", "is neither a run nor an exported folder"),
        ("s3://a/b", "copy the"),
    ):
        with pytest.raises(UserError, match=problem):
            configuration.load(path, [f"objective.teacher={teacher}"], complete=fill_in_model)
    given = ["objective.teacher=nowhere", "model.size=mdlm-12-768"]
    model = configuration.load(path, given, complete=fill_in_model).model
    assert configuration.to_mapping(model)["hidden_size"] == 768


@pytest.mark.parametrize(("rounds", "fits"), [(4, True), (5, False), (10**9, False)])
def test_sampling_steps_are_halved_in_every_round(
    data: Path, teachers: Path, tmp_path: Path, rounds: int, fits: bool
) -> None:
    config = distillation(data, teachers, tmp_path / "run")  # of 16 sampling steps
    training = dataclasses.replace(config.training, steps=rounds * ROUND)
    problems = configuration.inconsistencies(dataclasses.replace(config, training=training))
    assert fits == (not any("cannot be halved" in problem for problem in problems))


def _train_with_a_refused_step(mesh: Mesh, config: RunConfig, bad_step: int) -> None:
    calls, judge_of = 0, Stability.judge

    def judge(self: Stability, loss: float, gradient_norm: float) -> Instability | None:
        """Asked once a step, and again of one that it refuses."""
        nonlocal calls
        calls += 1
        if calls in (bad_step + 1, bad_step + 2):
            return Instability("non_finite", "the loss is not finite")
        return judge_of(self, loss, gradient_norm)

    with patch.object(Stability, "judge", judge):
        _train(mesh, config)


def _train_knowing(mesh: Mesh, config: RunConfig, known: tuple[RollBack, ...]) -> None:
    with patch.object(loop, "read_roll_backs", lambda *_: known):
        _train(mesh, config)


@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_roll_back_keeps_the_teacher_of_the_round(
    data: Path, teachers: Path, tmp_path: Path, bad_step: int
) -> None:
    """Back to the round's first step: the run is one that never had the data, with the teachers of that one."""
    options = {
        "objective": {"next_teacher": "ema", "reset_optimizer": True, "reset_ema": True},
        "checkpoint": {"interval_steps": 100},
        "stability": {"on_non_finite": "roll_back"},
    }
    without = tmp_path / "without"
    known = (RollBack(bad_step, 3, (3, bad_step), "by hand"),)
    run_ranks(
        1,
        _train_with_a_refused_step,
        distillation(data, teachers, tmp_path / "run", **options),  # type: ignore[arg-type]
        bad_step,
    )
    run_ranks(1, _train_knowing, distillation(data, teachers, without, **options), known)  # type: ignore[arg-type]
    assert "on all ranks" in (tmp_path / "run" / "roll_backs.json").read_text()
    assert losses(tmp_path / "run") == losses(without)
    pairs = _differences(_state(tmp_path / "run", 8), _state(without, 8))
    assert all(difference == 0 for _, difference in pairs)
