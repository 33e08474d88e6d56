"""Every ZeRO stage takes the same steps as a plain torch loop, and its fp32 state can be read and rewritten."""

import numpy as np
import pytest
import torch

from pgm_scale.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from tests.distributed import run_ranks

STEPS, ROWS, WIDTH = 4, 8, 7
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.01, gradient_clip_norm=0.5)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 13), torch.nn.Tanh(), torch.nn.Linear(13, 5))


def _rows(step: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def _plain_torch() -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    model = _model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay
    )
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(_rows(step)).pow(3).sum() / ROWS
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: p.detach().numpy() for name, p in model.named_parameters()}


def _engine(mesh: Mesh, stage: int, precision: str, micro: int) -> Engine:
    config = RunConfig(
        folder="",
        data=DataConfig("", ""),
        optimizer=OPTIMIZER,
        parallel=ParallelConfig(zero_stage=stage),  # type: ignore[arg-type]
        training=TrainingConfig(
            global_batch_sequences=ROWS,
            micro_batch_sequences=micro,
            precision=precision,  # type: ignore[arg-type]
        ),
    )
    return Engine(_model(), config, mesh)


def _take_step(engine: Engine, mesh: Mesh, step: int, micro: int, dtype: torch.dtype) -> tuple[float, float]:
    rows, total = _rows(step), 0.0
    for micro_step in range(engine.micro_steps):
        first = (micro_step * mesh.data_ranks + mesh.data_rank) * micro
        loss = engine(rows[first : first + micro].to(dtype)).float().pow(3).sum() / ROWS
        engine.backward(loss)
        total += float(loss.detach())
    assert engine.step(OPTIMIZER.learning_rate)
    return float(mesh.sum(np.array([total]))[0]), engine.gradient_norm


def _whole(engine: Engine, mesh: Mesh) -> dict[str, np.ndarray]:
    """All fp32 weights, put together from every rank's fragments; a gap or an overlap fails."""
    found: dict[str, np.ndarray] = {}
    for fragments in mesh.gather(
        [(e.name, e.part.global_shape, e.start, e.weight.numpy()) for e in engine.state]
    ):
        for name, shape, start, values in fragments:
            whole = found.setdefault(name, np.full(int(np.prod(shape)), np.nan, np.float32))
            assert engine.zero_stage == 0 or np.isnan(whole[start : start + len(values)]).all()
            whole[start : start + len(values)] = values
    assert not any(np.isnan(whole).any() for whole in found.values())
    return found


def _refuses_infinite_gradients(engine: Engine, mesh: Mesh, micro: int, dtype: torch.dtype) -> None:
    """A finite loss whose gradient is infinite on one rank changes no weight on any rank."""
    before = _whole(engine, mesh)
    for _ in range(engine.micro_steps):
        output = engine(_rows(7)[:micro].to(dtype)).float()
        bad = (output * 0).sum().sqrt() if mesh.data_rank == mesh.data_ranks - 1 else output.sum()
        assert torch.isfinite(bad)
        engine.backward(bad)
    assert not engine.step(OPTIMIZER.learning_rate)
    after = _whole(engine, mesh)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def _train(mesh: Mesh) -> dict:
    results = {}
    for stage in (0, 1, 2, 3):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for micro in (ROWS // mesh.data_ranks, ROWS // mesh.data_ranks // 2):
                engine = _engine(mesh, stage, precision, micro)
                dtype = torch.float32 if stage == 0 else dtype  # ZeRO-0 keeps fp32 weights under autocast
                if stage == 0:
                    autocast = engine(_rows(0)[:micro]).dtype
                    assert autocast == (torch.bfloat16 if precision == "bf16" else torch.float32)
                taken = [_take_step(engine, mesh, step, micro, dtype) for step in range(STEPS)]
                weights = _whole(engine, mesh)
                probe = _rows(99).to(dtype)
                with torch.no_grad(), engine.evaluation(None) as module:
                    before = module(probe).clone()
                with engine.evaluation([torch.zeros_like(e.weight) for e in engine.state]) as module:
                    assert module(probe).abs().max() == 0
                with engine.evaluation(None) as module:
                    assert torch.equal(module(probe), before)
                _refuses_infinite_gradients(engine, mesh, micro, dtype)
                results[stage, precision, micro] = (taken, weights)
                engine.close()
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_zero_stage_equals_plain_torch(ranks: int) -> None:
    losses, norms, weights = _plain_torch()
    for (stage, precision, micro), (taken, found) in run_ranks(ranks, _train).items():
        case = f"ZeRO-{stage} {precision} micro {micro}"
        tolerance = 1e-5 if precision == "fp32" else 0.05  # bf16 keeps 8 bits of each product
        np.testing.assert_allclose(
            [t[0] for t in taken], losses, rtol=tolerance, atol=tolerance, err_msg=case
        )
        np.testing.assert_allclose([t[1] for t in taken], norms, rtol=tolerance, atol=tolerance, err_msg=case)
        for name, expected in weights.items():
            np.testing.assert_allclose(
                found[name],
                expected.ravel(),
                rtol=0,
                atol=1e-5 if precision == "fp32" else 0.02,
                err_msg=case,
            )
