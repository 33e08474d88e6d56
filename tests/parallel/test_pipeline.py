"""A pipeline against one process: training's losses and gradients, validation, samplers, and failures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    DataConfig,
    MDLMObjectiveConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PGMObjectiveConfig,
    RunConfig,
    SamplerConfig,
    TrainingConfig,
)
from pgm_scale.data.batch import TokenBatch
from pgm_scale.errors import UserError
from pgm_scale.evaluation.validation import validate
from pgm_scale.models import build_model
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec, loss_terms
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.sampling import known_prefixes, sample, sampler_kinds
from tests.distributed import run_ranks
from tests.models.builders import autoregressive_config, diffusion_config, partition_config
from tests.tiny_data import LENGTH, VOCABULARY

MICRO = 4


class MemorySplit:
    """Random sequences, read as a `TokenLoader` reads them; the odd ones end in padding."""

    manifest = SimpleNamespace(rows=20)

    def read(self, numbers_B: np.ndarray) -> TokenBatch:
        tokens_RL = np.random.default_rng(0).integers(0, VOCABULARY.mask_id, (self.manifest.rows, LENGTH))
        valid_RL = np.ones_like(tokens_RL, bool)
        valid_RL[1::2, -3:] = False
        return TokenBatch(tokens_RL[numbers_B], valid_RL[numbers_B], numbers_B)


SPLIT: Any = MemorySplit()


@dataclass(frozen=True)
class Case:
    """A model with its objective, the layout, and the units of each stage."""

    model: Any
    objective: ObjectiveConfig
    parallel: ParallelConfig
    stage_units: tuple[int, ...]

    def config(self, micro_batches: int = 1) -> RunConfig:
        return RunConfig(
            folder="",
            data=DataConfig("", ""),
            model=self.model,
            objective=self.objective,
            optimizer=OptimizerConfig(gradient_clip_norm=1e9),
            parallel=self.parallel,
            training=TrainingConfig(
                global_batch_sequences=MICRO * micro_batches,
                micro_batch_sequences=MICRO,
                precision="fp32",
            ),
        )

    def local(self, seed: int) -> Any:
        """The whole model with weights of which none is 0."""
        torch.manual_seed(seed)
        model = build_model(self.model, VOCABULARY.size, LENGTH)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        return model

    def kinds(self) -> list[str]:
        """The samplers of the model."""
        return sampler_kinds(self.local(0))


def _cases(**layout: Any) -> list[Case]:
    """The models cut before GroupSwap, in the decoder, and so that a stage has no block at all."""
    parallel = ParallelConfig(**layout)
    pgm, mdlm, ar = partition_config(), diffusion_config(time_conditioned=True), autoregressive_config()
    if parallel.sequence_parallel:
        mdlm = replace(mdlm, time_conditioned=False)
    three = parallel.pipeline == 3
    return [
        Case(pgm, PGMObjectiveConfig(), parallel, (1, 2, 4) if three else (3, 4)),
        Case(pgm, PGMObjectiveConfig(), parallel, (4, 1, 2) if three else (5, 2)),
        Case(mdlm, MDLMObjectiveConfig(), parallel, (1, 1, 2) if three else (2, 2)),
        Case(ar, AutoregressiveObjectiveConfig(), parallel, (1, 2, 1) if three else (3, 1)),
    ]


def _flat(engine: Engine, model: torch.nn.Module) -> list[torch.Tensor]:
    """A whole model's weights as this rank's `engine.state` has them."""
    wholes = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [
        entry.part.take(wholes[entry.name])[entry.start : entry.start + entry.weight.numel()]
        for entry in engine.state
    ]


def _engine(case: Case, mesh: Mesh, model: torch.nn.Module, micro_batches: int = 1) -> Engine:
    config = case.config(micro_batches)
    engine = Engine.build(config, VOCABULARY.size, LENGTH, mesh, case.stage_units)
    engine.load_weights(_flat(engine, model))
    return engine


def _trains(case: Case, mesh: Mesh, micro_batches: int) -> None:
    """Losses of each micro-batch on the last stage, and the norm of all gradients; fewer or more than stages."""
    objective, local = build_objective(case.objective, VOCABULARY), case.local(0)
    batches = [SPLIT.read(np.arange(MICRO * i, MICRO * (i + 1))) for i in range(micro_batches)]
    inputs = [objective.training_inputs(batch, DrawSpec(1, 8)) for batch in batches]
    expected = [loss_terms(objective, local, one).loss_S.sum() / 100 for one in inputs]
    sum(expected).backward()  # type: ignore[union-attr]
    norm = torch.nn.utils.get_total_norm([p.grad for p in local.parameters() if p.grad is not None])

    losses: list[float] = []

    def step(one: Any) -> MicroStep:
        def loss(result: Any) -> torch.Tensor:
            share = objective.terms(result, one).loss_S.sum() / 100
            losses.append(float(share.detach()))
            return share

        call = objective.call(one)
        return MicroStep(call.arguments, call.readout, lambda: None, loss)

    engine = _engine(case, mesh, local, micro_batches)
    engine.forward_backward([step(one) for one in inputs])
    assert engine.step(1e-3)
    expected_losses = [float(loss.detach()) for loss in expected] if mesh.is_last_stage else []
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert engine.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    engine.close()


def _evaluates(case: Case, mesh: Mesh) -> None:
    """Validation, with other weights and then with the training's own, and every sampler, on all ranks."""
    objective = build_objective(case.objective, VOCABULARY)
    engine = _engine(case, mesh, case.local(0))
    kept = [entry.weight.clone() for entry in engine.state]
    settings: dict[str, Any] = {"sequences": 7, "batch_sequences": MICRO, "device": mesh.device}
    for seed, weights in ((1, _flat(engine, case.local(1))), (0, None)):
        expected = validate(case.local(seed).eval(), objective, SPLIT, **settings)
        with engine.evaluation(weights) as model:
            found = validate(model, objective, SPLIT, sum_over_ranks=mesh.sum, **settings)
        assert found.nll_nats_per_token == pytest.approx(expected.nll_nats_per_token, rel=1e-6)
        assert found.sequences == expected.sequences == 7
    assert all(torch.equal(entry.weight, old) for entry, old in zip(engine.state, kept, strict=True))
    local = case.local(0)
    for kind in case.kinds():
        with engine.evaluation(None) as model:
            tokens_BL = _sampled(model, kind, mesh)
        assert np.array_equal(tokens_BL, _sampled(local, kind, mesh)), (kind, case)
        assert all(np.array_equal(tokens_BL, other) for other in mesh.gather(tokens_BL))
    _fails_on_all_stages(case, mesh, engine)
    engine.close()


def _sampled(model: Any, kind: Any, mesh: Mesh) -> np.ndarray:
    known_BL = known_prefixes([[], [4, 5], [7]], LENGTH, VOCABULARY.bos_id)
    config = SamplerConfig(kind=kind, steps=5)
    return sample(
        model, VOCABULARY, LENGTH, config, known_BL=known_BL, seed=3, batch_sequences=2, device=mesh.device
    ).tokens_BL


def _fails_on_all_stages(case: Case, mesh: Mesh, engine: Engine) -> None:
    """Logits that are not finite are found in the last stage alone; afterwards the pipeline works again."""
    broken = case.local(0)
    broken.output_layer.linear.bias.data.fill_(torch.nan)
    kind = case.kinds()[0]
    with engine.evaluation(_flat(engine, broken)) as model, pytest.raises(UserError, match="not finite"):
        _sampled(model, kind, mesh)
    with engine.evaluation(None) as model:
        expected = _sampled(case.local(0), kind, mesh)
        assert np.array_equal(_sampled(model, kind, mesh), expected)


def _everything(mesh: Mesh, layout: dict[str, Any]) -> None:
    for number, case in enumerate(_cases(**layout)):
        arranged = mesh.arranged(case.parallel)
        for micro_batches in (1, 2, 5) if number == 0 else (3,):
            _trains(case, arranged, micro_batches)
        _evaluates(case, arranged)


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2},
        {"pipeline": 3},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    ],
    ids=["PP2", "PP3", "TP2 x PP2", "TP2 x PP2 with sequence parallelism"],
)
def test_a_pipeline_equals_one_process(layout: dict[str, Any]) -> None:
    run_ranks(layout.get("tensor", 1) * layout["pipeline"], _everything, layout)
