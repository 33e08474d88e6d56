"""Whole runs through the real engine: any ZeRO stage and number of ranks is the same run, also across resumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UnstableError, UserError
from pgm_scale.objectives.base import LossTerms
from pgm_scale.objectives.pgm import PGMObjective
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from tests.distributed import run_ranks
from tests.tiny_data import tiny_config, write_tiny_data

DROPOUT = {"dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("padded"), pad=True)


def _train(mesh: Mesh, config: RunConfig) -> None:
    train_split, validation_split = SplitStorage(config.data.train), SplitStorage(config.data.validation)
    train_on_mesh(config, mesh, train_split, validation_split)


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        _train(mesh, config)


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timings = ("tokens_per_second", "data_wait_s", "checkpoint_s", "memory_bytes", "unix_time_s")
    return [
        {k: v for k, v in json.loads(line).items() if k not in timings and not k.startswith("slowest_")}
        for line in lines
    ]


def _state(run: Path, step: int) -> dict[tuple[str, str], np.ndarray]:
    store = CheckpointStore(run)
    return {
        (kind, name): tensor.numpy() for kind in KINDS for name, tensor in store.read_full(step, kind).items()
    }


def _differences(a: dict, b: dict) -> Iterator[tuple[tuple[str, str], float]]:
    assert a.keys() == b.keys()
    for key in a:
        yield key, float(np.abs(a[key] - b[key]).max())


def _assert_bitwise(first: Path, second: Path, step: int) -> None:
    assert all(difference == 0 for _, difference in _differences(_state(first, step), _state(second, step)))
    assert _records(first) == _records(second)


@pytest.mark.parametrize(("ranks", "stages"), [(1, (0, 1, 2, 3)), (2, (0, 1, 3))])
def test_resume_is_bitwise_exact(data: Path, tmp_path: Path, ranks: int, stages: tuple[int, ...]) -> None:
    configs, pairs = [], []
    for stage in stages:
        for precision in ("fp32", "bf16") if ranks == 1 else ("fp32",):
            straight = tmp_path / f"straight-{stage}-{precision}"
            resumed = tmp_path / f"resumed-{stage}-{precision}"
            pairs.append((straight, resumed))
            for run, ends in ((straight, (6,)), (resumed, (3, 6))):
                for steps in ends:
                    configs.append(
                        tiny_config(
                            data,
                            run,
                            parallel={"zero_stage": stage},
                            training={"steps": steps, "precision": precision},
                            model=DROPOUT,
                            validation={"interval_steps": 3},
                        )
                    )
    run_ranks(ranks, _train_all, configs)
    for straight, resumed in pairs:
        _assert_bitwise(straight, resumed, 6)


def test_every_layout_trains_the_same_run(padded: Path, tmp_path: Path) -> None:
    """Padded data, so that the ranks have different token counts; the last checkpoint of each is compared."""

    def config(run: str, stage: int, micro: int, steps: int = 6) -> RunConfig:
        return tiny_config(
            padded,
            tmp_path / run,
            parallel={"zero_stage": stage},
            training={"micro_batch_sequences": micro, "steps": steps},
            # Adam turns a rounding difference in a tiny gradient into a difference of up to this rate.
            optimizer={"learning_rate": 1e-3},
        )

    run_ranks(1, _train_all, [config("one", 1, 8), config("accumulated", 2, 1), config("moved", 0, 2, 3)])
    run_ranks(
        2, _train_all, [config(f"two-{stage}", stage, 2) for stage in (0, 1, 2, 3)] + [config("moved", 3, 4)]
    )
    reference = _records(tmp_path / "one")
    state = _state(tmp_path / "one", 6)
    for run in ("accumulated", "moved", "two-0", "two-1", "two-2", "two-3"):
        records = _records(tmp_path / run)
        assert len(records) == 6
        for found, expected in zip(records, reference, strict=True):
            assert found["samples"] == expected["samples"]
            for key in ("loss", "gradient_norm", "validation_nll"):
                if key in expected:
                    assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (run, key)
        for (kind, name), difference in _differences(_state(tmp_path / run, 6), state):
            assert difference < 1e-5, (run, kind, name)


OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("partition_transformer", {"kind": "pgm", "form": "published"}),
    ("partition_transformer", {"kind": "pgm", "form": "bounded"}),
    ("diffusion_transformer", {"kind": "mdlm"}),
    ("diffusion_transformer", {"kind": "complementary_mdlm"}),
    ("diffusion_transformer", {"kind": "d3pm"}),
    ("autoregressive_transformer", {"kind": "autoregressive"}),
]


def test_every_objective_learns(data: Path, tmp_path: Path) -> None:
    def config(number: int, model: str, objective: dict[str, Any]) -> RunConfig:
        size = {"kind": model, "hidden_size": 16, "num_heads": 2, "dropout": 0.0}
        partition = {"num_encoder_blocks": 1, "num_decoder_blocks": 1}
        return tiny_config(
            data,
            tmp_path / str(number),
            model={**size, **(partition if model == "partition_transformer" else {"num_blocks": 1})},
            objective=objective,
            training={"steps": 120, "micro_batch_sequences": 8, "log_interval_steps": 120, "ema_decay": 0.9},
            optimizer={"learning_rate": 3e-2},
            checkpoint={"interval_steps": 120},
            validation={"interval_steps": 120},
        )

    run_ranks(1, _train_all, [config(number, *case) for number, case in enumerate(OBJECTIVES)])
    for number, (_, objective) in enumerate(OBJECTIVES):
        (record,) = _records(tmp_path / str(number))
        # A row repeats one token, so any context tells it; without context it costs ln 22 = 3.09 nats.
        assert record["validation_nll"] < 2.2, objective
        assert (tmp_path / str(number) / "samples" / "step_00000120.txt").stat().st_size > 20


def _train_with_a_nan(mesh: Mesh, config: RunConfig) -> str:
    """Rank 1 meets a NaN in the fifth step; returns the error and proves that all ranks have one."""
    calls = 0
    terms_of = PGMObjective.terms

    def poisoned(self: PGMObjective, *arguments: Any) -> LossTerms:
        nonlocal calls
        calls += 1
        terms = terms_of(self, *arguments)
        if calls == 5 and mesh.rank == 1:
            terms.loss_S = terms.loss_S * float("nan")
        return terms

    PGMObjective.terms = poisoned  # type: ignore[method-assign, assignment]
    try:
        _train(mesh, config)
    except UnstableError as error:
        messages = mesh.gather(str(error))
        assert len(set(messages)) == 1
        return messages[0]
    finally:
        PGMObjective.terms = terms_of  # type: ignore[method-assign]
    raise AssertionError("the NaN was trained on")


def test_a_nan_on_one_rank_stops_all_before_the_update(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data, tmp_path, training={"micro_batch_sequences": 4}, checkpoint={"interval_steps": 4}
    )
    message = run_ranks(2, _train_with_a_nan, config)
    assert "at step 4" in message
    assert "rank 1 (samples 36 to 39)" in message
    assert "rank 0" not in message
    assert CheckpointStore(tmp_path).steps() == [4]
    assert [record["step"] for record in _records(tmp_path)] == [1, 2, 3, 4]


def test_a_changed_setting_is_refused_with_a_diff(data: Path, tmp_path: Path) -> None:
    from pgm_scale.run_folder import RunFolder

    folder, split = RunFolder(tmp_path), SplitStorage(data / "train")
    first = tiny_config(data, tmp_path)
    identity = folder.create_or_match(first, split.manifest, split.tokenizer_path())
    allowed = tiny_config(data, tmp_path, parallel={"zero_stage": 3}, training={"steps": 9})
    assert folder.create_or_match(allowed, split.manifest, split.tokenizer_path()) == identity
    changed = tiny_config(data, tmp_path, training={"seed": 5, "global_batch_sequences": 16})
    with pytest.raises(UserError, match=r"(?s)global_batch_sequences: the run has 8, now it is 16.*seed"):
        folder.create_or_match(changed, split.manifest, split.tokenizer_path())
    other = SplitStorage(data / "validation")
    with pytest.raises(UserError, match="training shards differs"):
        folder.create_or_match(first, other.manifest, other.tokenizer_path())
