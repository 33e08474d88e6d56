"""What does not divide is told, all of it at once, before any process group exists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.config import DataConfig, ParallelConfig, RunConfig, TrainingConfig, VQModelConfig
from pgm_scale.parallel.layout import describe_layout, layout_problems, length_problems
from tests.models.builders import autoregressive_config, diffusion_config, maskgit_config, partition_config
from tests.tiny_data import tiny_config, write_tiny_data

PGM = replace(partition_config(), num_heads=4)  # 7 units: embedding, 2 blocks, GroupSwap, 2 blocks, output
TIMED = diffusion_config(time_conditioned=True)
MASKGIT = maskgit_config()
THIRDS = replace(MASKGIT, hidden_size=36, num_heads=3)


def _config(model: Any = PGM, batch: int = 8, micro: int = 2, **parallel: Any) -> RunConfig:
    training = TrainingConfig(global_batch_sequences=batch, micro_batch_sequences=micro)
    return RunConfig(
        "", DataConfig("", ""), model=model, training=training, parallel=ParallelConfig(**parallel)
    )


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (_config(), 1),
        (_config(zero_stage=0), 4),
        (_config(tensor=4, sequence_parallel=True, zero_stage=3), 4),
        (_config(tensor=2, pipeline=3, stage_units=(1, 1, 5)), 12),
        (_config(pipeline=7, offload_optimizer=True), 7),
        (_config(TIMED, tensor=2, pipeline=4), 8),
        (_config(MASKGIT, tensor=2, sequence_parallel=True, pipeline=2), 4),
    ],
)
def test_sound_layouts_have_no_problems(config: RunConfig, world_size: int) -> None:
    assert layout_problems(config, world_size) == []


@pytest.mark.parametrize(
    ("config", "world_size", "parts"),
    [
        (
            _config(tensor=4, pipeline=2),
            12,
            ["12 processes", "tensor 4 x parallel.pipeline 2 = 8", "a multiple of 8"],
        ),
        (_config(pipeline=2), 1, ["1 processes", "= 2"]),
        (_config(), 3, ["global_batch_sequences 8", "micro_batch_sequences 2 x 3 data-parallel ranks = 6"]),
        (_config(tensor=2, pipeline=2), 20, ["global_batch_sequences 8", "2 x 5 data-parallel ranks = 10"]),
        (_config(tensor=3), 3, ["model.num_heads 4", "parallel.tensor 3", "whole heads"]),
        (_config(THIRDS, tensor=3), 3, ["parallel.tensor 3", "256 hidden units", "hidden_size 36"]),
        (_config(sequence_parallel=True), 1, ["sequence_parallel needs parallel.tensor of at least 2"]),
        (_config(TIMED, tensor=2, sequence_parallel=True), 2, ["sequence_parallel", "time_conditioned"]),
        (_config(pipeline=8), 8, ["pipeline 8 exceeds the model's 7 units", "group_swap", "at most 7"]),
        (
            _config(pipeline=2, zero_stage=0),
            2,
            ["pipeline 2 needs parallel.zero_stage 1", "stage 0 replicates"],
        ),
        (
            _config(pipeline=2, zero_stage=2),
            2,
            ["pipeline 2 needs parallel.zero_stage 1", "stage 2", "micro-batch"],
        ),
        (
            _config(pipeline=2, zero_stage=3),
            2,
            ["pipeline 2 needs parallel.zero_stage 1", "stage 3", "micro-batch"],
        ),
        (
            _config(zero_stage=0, offload_optimizer=True),
            1,
            ["offload_optimizer needs parallel.zero_stage 1, 2 or 3"],
        ),
        (_config(pipeline=2, stage_units=(3, 3)), 2, ["stage_units [3, 3]", "7 units", "2 encoder_block"]),
        (_config(pipeline=2, stage_units=(0, 7)), 2, ["stage_units [0, 7]", "at least 1"]),
        (_config(pipeline=2, stage_units=(2, 2, 3)), 2, ["stage_units [2, 2, 3]", "2 numbers"]),
        (_config(VQModelConfig(), tensor=2), 2, ["parallel.tensor 2", "model.kind vq", "convolutions"]),
        (_config(VQModelConfig(), sequence_parallel=True), 1, ["sequence_parallel", "model.kind vq"]),
        (_config(VQModelConfig(), pipeline=2), 2, ["pipeline 2 exceeds the model's 1 units", "autoencoder"]),
    ],
)
@pytest.mark.fault(24)
def test_each_fault_is_one_line(config: RunConfig, world_size: int, parts: list[str]) -> None:
    (line,) = layout_problems(config, world_size)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_vq_model_has_no_blocks_to_recompute() -> None:
    config = _config(VQModelConfig(), zero_stage=3)
    assert layout_problems(config, 4) == []
    (line,) = layout_problems(replace(config, training=replace(config.training, recompute_blocks=True)), 4)
    assert line.startswith("training.recompute_blocks does not go with model.kind vq")


FAULTS = {
    "parallel.tensor": 4,
    "parallel.pipeline": 5,
    "parallel.zero_stage": 0,
    "parallel.sequence_parallel": True,
    "parallel.offload_optimizer": True,
    "parallel.stage_units": "[2,2,2]",
}
LINES = [
    "8 processes are not divisible by parallel.tensor 4 x parallel.pipeline 5 = 20",
    "model.num_heads 2 is not divisible by parallel.tensor 4",
    "parallel.sequence_parallel does not go with model.time_conditioned",
    "parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3, not 0",
    "parallel.pipeline 5 needs parallel.zero_stage 1",
    "parallel.pipeline 5 exceeds the model's 4 units",
    "parallel.stage_units [2, 2, 2] must be 5 numbers",
]


@pytest.mark.fault(24)
def test_all_faults_are_listed_at_once() -> None:
    values: dict[str, Any] = {key.removeprefix("parallel."): value for key, value in FAULTS.items()}
    problems = layout_problems(_config(TIMED, **values | {"stage_units": (2, 2, 2)}), 8)
    assert len(problems) == len(LINES)
    assert all(problem.startswith(line) for problem, line in zip(problems, LINES, strict=True))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8 ranks whose peers never come; meeting them is refused."""

    def meet(*_: Any, **__: Any) -> None:
        raise AssertionError("a process group was asked for")

    environment = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("init_process_group", "TCPStore"):
        monkeypatch.setattr(dist, name, meet)


@pytest.mark.usefixtures("launched")
@pytest.mark.fault(24)
def test_the_command_lists_faults_of_config_and_layout_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, run = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    model = configuration.to_mapping(TIMED)
    config = tiny_config(data, run, model=model, objective={"kind": "mdlm"})
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(config))
    overrides = [f"{key}={value}" for key, value in FAULTS.items()]
    assert main(["train", str(tmp_path / "run.yaml"), *overrides, "optimizer.warmup_steps=-1"]) == 2
    errors = capsys.readouterr().err
    assert "8 problem(s)" in errors
    assert "optimizer.warmup_steps: -1 must be at least 0" in errors
    assert all(line in errors for line in LINES)
    assert not run.exists()


@pytest.mark.usefixtures("launched")
@pytest.mark.fault(24)
def test_the_command_lists_faults_of_the_length_and_of_the_data_together(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, run = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    model = configuration.to_mapping(autoregressive_config())
    config = tiny_config(data, run, model=model, objective={"kind": "autoregressive"})
    (tmp_path / "run.yaml").write_text(configuration.to_yaml(config))
    overrides = ["parallel.tensor=2", "parallel.sequence_parallel=true", "training.micro_batch_sequences=1"]
    overrides += ["training.global_batch_sequences=8", "data.validation=nowhere"]
    assert main(["train", str(tmp_path / "run.yaml"), *overrides]) == 2
    errors = capsys.readouterr().err
    assert "nowhere" in errors
    assert "15 tokens of a micro-batch (1 x 15) are not divisible by parallel.tensor 2" in errors
    assert not run.exists()


@pytest.mark.parametrize(
    ("objective", "micro", "length", "tokens"),
    [
        ("pgm", 1, 5, 5),
        ("pgm", 3, 4, None),
        ("mdlm", 3, 5, 15),
        ("complementary_mdlm", 3, 5, None),  # 30: a mask and its complement
        ("autoregressive", 3, 5, None),  # 12: the last token is only a target
        ("autoregressive", 1, 4, 3),
    ],
)
def test_sequence_parallelism_needs_tokens_that_divide(
    objective: str, micro: int, length: int, tokens: int | None
) -> None:
    tree = {"folder": "", "data": {"train": "", "validation": ""}, "objective": {"kind": objective}}
    tree["training"] = {"micro_batch_sequences": micro}
    tree["parallel"] = {"tensor": 2, "sequence_parallel": True}
    config = configuration.parse(RunConfig, tree, [])
    problems = length_problems(config, length)
    assert len(problems) == (tokens is not None)
    assert all(f"the {tokens} tokens of a micro-batch" in line for line in problems)
    whole = replace(config, parallel=ParallelConfig(tensor=2))
    assert length_problems(whole, length) == []


def test_the_layout_is_told_in_a_line_with_its_padding() -> None:
    line = describe_layout(_config(tensor=4, pipeline=2, sequence_parallel=True), 16, 50258, (3, 4))
    assert line == (
        "layout: tensor 4 x pipeline 2 x data 2, ZeRO-1, sequence-parallel; stages of 3, 4 units; "
        "the vocabulary of 50258 is padded by 2 row(s) at its end"
    )
    assert (
        describe_layout(_config(tensor=2), 2, 50258, ()) == "layout: tensor 2 x pipeline 1 x data 1, ZeRO-1"
    )
