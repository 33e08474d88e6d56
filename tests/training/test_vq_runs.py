"""A VQ tokenizer trained through the real loop: it learns, uses its codebook, resumes and is shared out exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ops.parity_runs import differences
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import RunConfig
from pgm_scale.data.storage import SplitStorage
from pgm_scale.evaluation.run import EvaluationRequest, evaluate
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.loop import train_on_mesh
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.distributed import run_ranks
from tests.tiny_images import VQ, vq_config, write_blobs, write_pixel_split

HALF, WHOLE = 2, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs"))


def _train_all(mesh: Mesh, configs: list[RunConfig]) -> None:
    for config in configs:
        train_split, validation_split = SplitStorage(config.data.train), SplitStorage(config.data.validation)
        train_on_mesh(config, mesh, train_split, validation_split)


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_digits_and_uses_its_codebook(tmp_path: Path) -> None:
    """With unit features and codes of few dimensions, the plain loss keeps most of the codebook in use."""
    digits = load_digits()
    images_BHWC = (digits.images * 255 / 16).round().astype(np.uint8)[..., None]
    write_pixel_split(tmp_path / "train", images_BHWC[:1000], digits.target[:1000] % 2, "train")
    images_BHWC = images_BHWC[1000:1064]
    write_pixel_split(tmp_path / "validation", images_BHWC, digits.target[1000:1064] % 2, "validation")
    config = vq_config(
        tmp_path,
        tmp_path / "run",
        training={
            "steps": 60,
            "global_batch_sequences": 16,
            "micro_batch_sequences": 16,
            "ema_decay": 0.9,
            "log_interval_steps": 20,
        },
        optimizer={"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.0},
        validation={"interval_steps": 20, "sequences": 64, "samples": 2},
        checkpoint={"interval_steps": 60},
    )
    run_ranks(1, _train_all, [config])
    records = _records(tmp_path / "run")
    last, variance = records[-1], float((images_BHWC / 127.5).var())
    losses = [record["loss_mean"] for record in records]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert records[-1]["validation_loss"] < 0.75 * records[0]["validation_loss"]
    assert "validation_perplexity" not in last
    assert "cross_entropy_by_mask_fraction" not in last
    assert not (tmp_path / "run" / "samples").exists()
    assert all(record["codebook_usage"] > 0.6 for record in records)
    assert 5 < last["codebook_perplexity"] <= last["codebook_usage"] * VQ["codebook_size"]

    tokenizer = VQTokenizer.load(tmp_path / "run", "cpu")
    codes = tokenizer.encode(images_BHWC)
    assert codes.shape == (64, 16)
    error = float((((tokenizer.decode(codes).astype(float) - images_BHWC) / 127.5) ** 2).mean())
    assert error < variance / 2
    result = evaluate(EvaluationRequest(str(tmp_path / "run")))
    assert result["loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert result["loss_standard_error"] > 0
    assert result["loss"] > error  # the errors of the codes come on top
    assert "perplexity" not in result
    assert VQTokenizer.load(tmp_path / "run", "cpu").description() == tokenizer.description()


def _until(steps: int, data: Path, run: Path, stage: int, precision: str = "fp32") -> RunConfig:
    return vq_config(
        data,
        run,
        parallel={"zero_stage": stage},
        training={"steps": steps, "precision": precision},
        validation={"interval_steps": HALF, "sequences": 8},
        checkpoint={"interval_steps": HALF},
    )


def test_a_resume_is_bitwise_exact(data: Path, tmp_path: Path) -> None:
    pairs, configs = [], []
    for stage, precision in ((0, "fp32"), (1, "bf16")):
        straight, resumed = (tmp_path / f"{kind}-{stage}" for kind in ("straight", "resumed"))
        pairs.append((straight, resumed))
        for run, ends in ((straight, (WHOLE,)), (resumed, (HALF, WHOLE))):
            configs += [_until(steps, data, run, stage, precision) for steps in ends]
    run_ranks(1, _train_all, configs)
    for straight, resumed in pairs:
        found = differences(resumed, straight, WHOLE)
        assert set(found.values()) == {0.0}, found
        keys = ("loss", "codebook_usage", "codebook_perplexity", "validation_loss")
        for one, other in zip(_records(straight), _records(resumed), strict=True):
            assert [one.get(key) for key in keys] == [other.get(key) for key in keys]


def test_ranks_share_the_work_of_one(data: Path, tmp_path: Path) -> None:
    run_ranks(1, _train_all, [_until(WHOLE, data, tmp_path / "one", 0)])
    stages = (0, 2, 3)
    run_ranks(2, _train_all, [_until(WHOLE, data, tmp_path / f"two-{stage}", stage) for stage in stages])
    expected = _records(tmp_path / "one")
    moments = CheckpointStore(tmp_path / "one").read_full(WHOLE, "exp_avg")
    for stage in stages:
        run = tmp_path / f"two-{stage}"
        for found, record in zip(_records(run), expected, strict=True):
            for key in ("loss", "gradient_norm", "validation_loss"):
                if key in record:
                    assert found[key] == pytest.approx(record[key], rel=1e-4), (stage, key)
            # A feature between two codes may fall to the other one.
            assert found["codebook_usage"] == pytest.approx(record["codebook_usage"], abs=1.5 / 32)
            assert found["codebook_perplexity"] == pytest.approx(record["codebook_perplexity"], rel=2e-2)
        # Not the weights: a bias that a norm takes away has a gradient of rounding errors, which Adam blows up.
        found = CheckpointStore(run).read_full(WHOLE, "exp_avg")
        assert found.keys() == moments.keys()
        for name, values in found.items():
            assert float((values - moments[name]).norm()) < 1e-5 + 1e-3 * float(moments[name].norm()), name
