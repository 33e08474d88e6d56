"""Clip, AdamW and EMA as a run does them equal torch's plain loops over tensors."""

import numpy as np
import pytest
import torch

from ops.bench.baselines.optimizer import PerTensorUpdate
from pgm_scale.config import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.ema import ExponentialMovingAverage
from tests.distributed import run_ranks

STEPS, ROWS, DECAY = 5, 8, 0.3
CLIPS_ALL, CLIPS_NONE = 0.5, 1e3  # norms are 5 to 9: DeepSpeed's own default of 1 would show


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 5))


def _loss(model: torch.nn.Module, step: int, first: int, rows: int) -> torch.Tensor:
    inputs = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(step))
    return model(inputs[first : first + rows]).pow(3).sum()


def _optimizer(clip: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-2, epsilon=1e-4, weight_decay=0.1, gradient_clip_norm=clip)


def _plain(clip: float) -> list[np.ndarray]:
    """Weights and averages after all steps."""
    model, config = _model(), _optimizer(clip)
    update = PerTensorUpdate(
        model.parameters(), config.learning_rate, config.betas, config.epsilon, 0.1, clip, DECAY
    )
    for step in range(STEPS):
        model.zero_grad()
        _loss(model, step, 0, ROWS).backward()
        update.step()
    return [tensor.detach().numpy() for tensor in (*model.parameters(), *update.average)]


def _trained(mesh: Mesh, stage: int, clip: float) -> list[tuple[int, int, np.ndarray]]:
    """The same of this rank's ranges, each with its place in `_plain` and its start."""
    rows = ROWS // mesh.data_ranks
    config = RunConfig(
        folder="",
        data=DataConfig("", ""),
        optimizer=_optimizer(clip),
        parallel=ParallelConfig(zero_stage=stage),  # type: ignore[arg-type]
        training=TrainingConfig(global_batch_sequences=ROWS, micro_batch_sequences=rows, precision="fp32"),
    )
    engine = Engine(_model(), config, mesh)
    ema = ExponentialMovingAverage(engine.state, DECAY)
    for step in range(STEPS):
        engine.backward(_loss(engine, step, mesh.data_rank * rows, rows))  # type: ignore[arg-type]
        assert engine.step(config.optimizer.learning_rate)
        ema.update()
    names = [name for name, _ in engine.module.named_parameters()]
    found = []
    for entry, average in zip(engine.state, ema.values, strict=True):
        place = names.index(entry.name)
        found.append((place, entry.start, entry.weight.numpy().copy()))
        found.append((place + len(names), entry.start, average.numpy().copy()))
    engine.close()
    return found


def _train_all(mesh: Mesh) -> dict:
    cases = [(stage, clip) for stage in (0, 1, 2, 3) for clip in (CLIPS_ALL, CLIPS_NONE)]
    return {case: mesh.gather(_trained(mesh, *case)) for case in cases}


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_equal_plain_torch(ranks: int) -> None:
    for (stage, clip), by_rank in run_ranks(ranks, _train_all).items():
        expected = [values.ravel() for values in _plain(clip)]
        covered = [np.zeros(len(values), bool) for values in expected]
        for place, start, values in (part for parts in by_rank for part in parts):
            span = slice(start, start + len(values))
            np.testing.assert_allclose(
                values, expected[place][span], rtol=0, atol=1e-6, err_msg=f"ZeRO-{stage}, clip {clip}"
            )
            covered[place][span] = True
        assert all(part.all() for part in covered)
