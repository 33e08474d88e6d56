"""MaskGIT through the real loop: it learns, a resume is bitwise exact, and any layout continues any other."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ops.parity_runs import differences, records
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.run_folder import load_run
from pgm_scale.training.loop import train_on_mesh
from tests.distributed import run_ranks
from tests.tiny_codes import CODE_VOCABULARY, CODEBOOK, maskgit_run, write_codes

HALF, WHOLE = 3, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(tmp_path_factory.mktemp("codes"))


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        train_on_mesh(config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation))


def _until(steps: int, data: Path, run: Path, **changes: Any) -> RunConfig:
    training = {"steps": steps, **changes.pop("training", {})}
    return maskgit_run(data, run, training=training, validation={"interval_steps": HALF}, **changes)


def test_a_resume_is_bitwise_exact_with_dropout(data: Path, tmp_path: Path) -> None:
    pairs, configs = [], []
    for stage, precision in ((0, "fp32"), (1, "bf16")):
        straight, resumed = (tmp_path / f"{kind}-{stage}" for kind in ("straight", "resumed"))
        pairs.append((straight, resumed))
        for run, ends in ((straight, (WHOLE,)), (resumed, (HALF, WHOLE))):
            for steps in ends:
                configs.append(
                    _until(
                        steps,
                        data,
                        run,
                        model={"dropout": 0.2},
                        parallel={"zero_stage": stage},
                        training={"precision": precision},
                    )
                )
    run_ranks(1, _train_all, configs)
    for straight, resumed in pairs:
        found = differences(resumed, straight, WHOLE)
        assert set(found.values()) == {0.0}, (straight, found)


def test_any_layout_goes_on_with_the_checkpoint_of_any_other(data: Path, tmp_path: Path) -> None:
    """From one process to tensor x pipeline parallel ranks, then to ZeRO-3."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    layouts: tuple[dict[str, Any], ...] = (
        {},
        {"tensor": 2, "pipeline": 2, "stage_units": [1, 3]},
        {"zero_stage": 3},
    )
    rate = {"learning_rate": 1e-3}  # Adam makes of the rounding of a small gradient up to this much
    steps = (2, 4, WHOLE)
    one, two, three = (
        _until(step, data, moved, parallel=parallel, optimizer=rate, checkpoint={"interval_steps": 2})
        for step, parallel in zip(steps, layouts, strict=True)
    )
    run_ranks(1, _train_all, [_until(WHOLE, data, straight, optimizer=rate), one])
    run_ranks(4, _train_all, [two])
    run_ranks(2, _train_all, [three])
    found = differences(moved, straight, WHOLE)
    assert all(found[name] < 1e-5 for name in ("loss", "gradient_norm", "weight", "exp_avg", "ema")), found
    model: Any = load_run(moved, weights="weight").model
    assert model.head.weight is model.tok_emb.weight
    assert model.tok_emb.weight.shape == (CODEBOOK + 1, 16)


def test_it_learns_codes_from_others_and_from_the_class(data: Path, tmp_path: Path) -> None:
    config = maskgit_run(
        data,
        tmp_path,
        training={"steps": 150, "micro_batch_sequences": 8, "log_interval_steps": 150, "ema_decay": 0.9},
        optimizer={"learning_rate": 1e-2},
        checkpoint={"interval_steps": 150},
        validation={"interval_steps": 150},
    )
    run_ranks(1, _train_all, [config])
    (record,) = records(tmp_path)
    # An image has one code, so any visible one tells all; without any, its class leaves 10 of 20.
    assert record["validation_nll"] < 1.0
    model = load_run(tmp_path).model
    hidden_BL = torch.full((2, 17), CODE_VOCABULARY.mask_id)
    probability = model(hidden_BL, torch.tensor([0, 1]))[..., :CODEBOOK].softmax(-1)
    assert float(probability[0, :, : CODEBOOK // 2].sum(-1).min()) > 0.9
    assert float(probability[1, :, CODEBOOK // 2 :].sum(-1).min()) > 0.9
    entropy = -(probability * probability.log()).sum(-1)
    assert float(entropy.mean()) > 0.5 * math.log(10)
