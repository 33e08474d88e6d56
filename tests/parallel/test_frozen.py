"""A frozen copy of the model against the engine's own evaluation, beside a training that must not notice it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgm_scale.checkpoint import CheckpointStore, Fragment
from pgm_scale.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.errors import UserError
from pgm_scale.models.divergence import TeacherOutput
from pgm_scale.models.readout import Readout, TeacherDivergence, TokenLogProbabilities, TokenNLL, logits
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.frozen import FrozenModel
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.tensor_slices import TensorSlice
from tests.distributed import run_ranks
from tests.models.builders import (
    HIDDEN,
    LENGTH,
    VOCAB,
    maskgit_config,
    pack_groups,
    partition_config,
    randomised,
)
from tests.parallel.persistence import partition_everything

MICRO, STEP, STAGE_UNITS = 2, 7, (4, 3)
TRAINED, STORED, AVERAGED = 0, 1, 2  # seeds of the weights that a training starts from, or a checkpoint has
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
PGM, MASKGIT = partition_config(dropout=0.1), maskgit_config(dropout=0.1)


@dataclass(frozen=True)
class Case:
    """A model's layout over the ranks that run it."""

    parallel: ParallelConfig
    precision: Any = "fp32"
    model: ModelConfig = PGM

    def config(self, ranks: int) -> RunConfig:
        data_ranks = ranks // (self.parallel.tensor * self.parallel.pipeline)
        return RunConfig(
            folder="",
            data=DataConfig("", ""),
            model=self.model,
            parallel=self.parallel,
            optimizer=OptimizerConfig(gradient_clip_norm=1e9),
            training=TrainingConfig(
                global_batch_sequences=2 * MICRO * data_ranks,
                micro_batch_sequences=MICRO,
                precision=self.precision,
            ),
        )

    def engine(self, mesh: Mesh) -> Engine:
        engine = Engine.build(self.config(mesh.world_size), VOCAB, LENGTH, mesh, STAGE_UNITS)
        engine.load_weights(flat(engine, self.whole(TRAINED)))
        return engine

    def frozen(self, mesh: Mesh) -> FrozenModel:
        generator = torch.get_rng_state()
        frozen = FrozenModel.build(self.config(mesh.world_size), VOCAB, LENGTH, mesh, STAGE_UNITS)
        assert torch.equal(torch.get_rng_state(), generator), "it takes no draws from the training"
        return frozen

    def whole(self, seed: int) -> nn.Module:
        return randomised(self.model, seed).eval()

    def arguments(self, number: int) -> tuple[Any, ...]:
        """Of the model's call for the micro-batch of that number."""
        tokens_BL, groups_BL = _drawn(number)
        if self.model is MASKGIT:
            return tokens_BL % (VOCAB - 1), torch.tensor([0, 4])
        return (pack_groups(tokens_BL, groups_BL)[0],)


CASES = {
    1: [Case(ParallelConfig()), Case(ParallelConfig(), "bf16"), Case(ParallelConfig(zero_stage=0), "bf16")],
    2: [
        *(Case(ParallelConfig(zero_stage=stage)) for stage in (0, 1, 2, 3)),
        Case(ParallelConfig(zero_stage=1), "bf16"),
        Case(ParallelConfig(zero_stage=3), "bf16"),
        Case(ParallelConfig(zero_stage=3), model=MASKGIT),
        Case(ParallelConfig(tensor=2)),
        Case(ParallelConfig(tensor=2, sequence_parallel=True)),
        Case(ParallelConfig(tensor=2, zero_stage=0), "bf16"),
        Case(ParallelConfig(pipeline=2)),
    ],
    4: [
        Case(ParallelConfig(tensor=2, pipeline=2)),
        Case(ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
        Case(ParallelConfig(tensor=2, zero_stage=3)),
        Case(ParallelConfig(pipeline=2)),
    ],
}


def _drawn(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shape = (MICRO, LENGTH)
    return torch.randint(VOCAB - 1, shape, generator=generator), torch.randint(2, shape, generator=generator)


def flat(engine: Engine, model: nn.Module) -> list[Tensor]:
    """A whole model's weights as this rank's `engine.state` has them."""
    wholes = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [
        entry.part.take(wholes[entry.name])[entry.start : entry.start + entry.weight.numel()].clone()
        for entry in engine.state
    ]


def write_checkpoint(folder: Path, model: ModelConfig) -> None:
    """As one process of a run writes it."""
    fragments: list[Any] = []
    for kind, seed in (("weight", STORED), ("ema", AVERAGED)):
        for name, parameter in randomised(model, seed).named_parameters():
            part = TensorSlice.whole(tuple(parameter.shape))
            fragments.append((kind, Fragment(name, part, 0, parameter.detach().flatten())))
    CheckpointStore(folder).save(STEP, fragments, {})


def asked(frozen: FrozenModel, arguments: tuple[Any, ...], readout: Readout = logits) -> Tensor:
    with frozen.running() as module:
        return module(*arguments, readout=readout)


def _hidden(hidden: Tensor, _: OutputLinear) -> Tensor:
    """A readout: what a teacher leaves for a student's readout."""
    return hidden


def _log_probabilities(case: Case) -> TokenLogProbabilities:
    """All of them, of MaskGIT's vocabulary too."""
    shape = (MICRO, LENGTH - 1, VOCAB - 1) if case.model is MASKGIT else (MICRO * LENGTH, VOCAB)
    return TokenLogProbabilities(torch.arange(shape[-1]).expand(shape))


def _computes(case: Case, engine: Engine, frozen: FrozenModel, seed: int, *readouts: Readout) -> None:
    """The engine's bits with the weights of that seed, and nearly those of one process."""
    whole = case.whole(seed)
    with engine.evaluation(flat(engine, whole)) as module:
        expected = [module(*case.arguments(0), readout=readout) for readout in (logits, *readouts)]
    for readout, engines in zip((logits, *readouts), expected, strict=True):
        found = asked(frozen, case.arguments(0), readout)
        assert torch.equal(found, engines), (case, readout)
        with torch.no_grad():
            alone = whole(*case.arguments(0), readout=readout)
        error = float((found.float() - alone).abs().max() / alone.abs().max())
        assert error < TOLERANCE[case.precision], (case, readout, error)


def _fills(case: Case, engine: Engine, frozen: FrozenModel, folder: Path) -> None:
    """From the engine's weights, others beside its state, and both kinds of a checkpoint."""
    parameters = list(frozen._module.named_parameters())
    assert not any(parameter.any() or parameter.requires_grad for _, parameter in parameters)
    if engine.zero_stage == 3:
        of_engines: Any = engine.module.named_parameters()
        for (name, own), (_, of_engine) in zip(parameters, of_engines, strict=True):
            assert tuple(own.shape) == (-(-of_engine.ds_numel // engine.mesh.data_ranks),), name
    store = CheckpointStore(folder)
    frozen.load(lambda wanted: store.read(STEP, wanted))
    _computes(case, engine, frozen, STORED, _log_probabilities(case), _hidden)
    frozen.load(lambda wanted: store.read(STEP, wanted), "ema")
    _computes(case, engine, frozen, AVERAGED)
    before = [parameter.clone() for _, parameter in parameters]
    with pytest.raises(UserError, match="missing in the checkpoint"):
        frozen.load(lambda wanted: store.read(STEP, {**wanted, ("weight", "other"): ((1,), [])}))
    assert all(torch.equal(own, old) for (_, own), old in zip(parameters, before, strict=True))
    frozen.take(engine.state, flat(engine, case.whole(STORED)))
    _computes(case, engine, frozen, STORED)
    frozen.take(engine.state, [entry.weight for entry in engine.state])
    _computes(case, engine, frozen, TRAINED)


def _divergence(hidden: Tensor, teacher: OutputLinear | None) -> Readout:
    """A student's readout that needs the teacher's output linear."""
    assert teacher is not None, "the last stage has it"
    weights = torch.ones(hidden.shape[:-1])
    return TeacherDivergence(TeacherOutput(hidden, teacher), "reverse_kl", VOCAB - 1, weights)


@dataclass
class Training:
    """Some steps of an engine, with or without a frozen model that is asked in between."""

    case: Case
    engine: Engine
    readout: Callable[[int], Readout]

    def run(self, steps: int) -> list[tuple[float, ...]]:
        """Losses of a step's micro-batches on this rank, and the gradient norm."""
        engine, found = self.engine, []
        for step in range(steps):
            losses: list[float] = []
            first = (step * engine.mesh.data_ranks + engine.mesh.data_rank) * engine.micro_steps
            # Each is made, and the frozen model asked for it, after the micro-batch before.
            engine.forward_backward(self._micro_step(first + i, losses) for i in range(engine.micro_steps))
            assert engine.step(1e-2)
            found.append((*losses, engine.gradient_norm))
        return found

    def _micro_step(self, number: int, losses: list[float]) -> MicroStep:
        def loss(values: Tensor) -> Tensor:
            losses.append(float(values.detach().mean()))
            return values.mean() / self.engine.micro_steps / self.engine.mesh.data_ranks

        def begin() -> None:
            torch.manual_seed(number)

        return MicroStep(self.case.arguments(number), self.readout(number), begin, loss)


def _targets(case: Case, number: int) -> Readout:
    tokens_BL = _drawn(number)[0]
    return TokenNLL(tokens_BL[:, 1:] % (VOCAB - 1) if case.model is MASKGIT else tokens_BL.flatten(), None)


def _training_goes_on(case: Case, engine: Engine, frozen: FrozenModel) -> None:
    """It has the bits of one without a frozen model, which keeps its own."""
    alone = case.engine(engine.mesh)
    expected = Training(case, alone, partial(_targets, case)).run(2)
    alone.close()
    names, before = [entry.name for entry in engine.state], asked(frozen, case.arguments(0))

    def readout(number: int) -> Readout:
        asked(frozen, case.arguments(number))
        return _targets(case, number)

    assert Training(case, engine, readout).run(2) == expected
    for entry, other in zip(engine.state, alone.state, strict=True):
        assert torch.equal(entry.weight, other.weight), (case, entry.name)
    assert torch.equal(asked(frozen, case.arguments(0)), before)
    with engine.evaluation(None) as module:
        assert not torch.equal(module(*case.arguments(0)), before), "the training did change its own"
    assert [entry.name for entry in engine.state] == names
    assert all(parameter.grad is None for parameter in frozen._module.parameters())
    assert not set(frozen._module.parameters()) & set(engine.module.parameters())


def _both_linears(case: Case, engine: Engine, frozen: FrozenModel) -> None:
    """The student's readout calls the teacher's output linear: losses and gradients of one process."""
    mesh = engine.mesh
    engine.load_weights(flat(engine, case.whole(TRAINED)))
    frozen.take(engine.state, flat(engine, case.whole(STORED)))
    student, teacher = case.whole(TRAINED), case.whole(STORED)
    output_layer: Any = teacher.output_layer
    micro_batches = engine.micro_steps * mesh.data_ranks
    expected = []
    for number in range(micro_batches):
        hidden = teacher(*case.arguments(number), readout=_hidden).detach()
        readout = _divergence(hidden, output_layer.linear)
        expected.append(student(*case.arguments(number), readout=readout).mean())
    torch.stack(expected).mean().backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None]))

    def asking(number: int) -> Readout:
        hidden = asked(frozen, case.arguments(number), _hidden)
        return _divergence(hidden, frozen.output_linear) if mesh.is_last_stage else logits

    modules: Any = engine.module.modules()
    for module in modules:
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    ((*losses, found_norm),) = Training(case, engine, asking).run(1)
    own = expected[mesh.data_rank * engine.micro_steps :][: engine.micro_steps] if mesh.is_last_stage else []
    tolerance = TOLERANCE[case.precision]
    assert losses == pytest.approx([float(loss.detach()) for loss in own], rel=tolerance)
    assert found_norm == pytest.approx(norm, rel=tolerance)
    assert (frozen.output_linear is None) == (not mesh.is_last_stage)
    assert all(parameter.grad is None for parameter in frozen._module.parameters())


def _survives_a_failing_readout(case: Case, engine: Engine, frozen: FrozenModel) -> None:
    """ZeRO-3: its weights are cut again behind the call."""
    parameters = dict(frozen._module.named_parameters())

    def failing(hidden: Tensor, linear: Any) -> Tensor:
        def refuse(_: Tensor) -> Tensor:
            assert linear.weight.shape == (VOCAB, HIDDEN)
            raise UserError("not now")

        return linear(hidden, refuse)

    with pytest.raises(UserError, match="not now"):
        asked(frozen, case.arguments(0), failing)
    assert all(parameters[name] is own for name, own in frozen._module.named_parameters())
    _computes(case, engine, frozen, STORED)


def _everything(mesh: Mesh, folder: Path) -> None:
    partition_everything()
    for case in CASES[mesh.world_size]:
        arranged = mesh.arranged(case.parallel)
        engine, frozen = case.engine(arranged), case.frozen(arranged)
        _fills(case, engine, frozen, folder / case.model.kind)
        _training_goes_on(case, engine, frozen)
        if case.model is PGM:
            _both_linears(case, engine, frozen)
            if engine.zero_stage == 3 and arranged.tensor_ranks == 1:
                _survives_a_failing_readout(case, engine, frozen)
        engine.close()


@pytest.mark.parametrize("ranks", CASES)
def test_a_frozen_model_computes_what_the_engine_would(ranks: int, tmp_path: Path) -> None:
    for model in (PGM, MASKGIT):
        write_checkpoint(tmp_path / model.kind, model)
    run_ranks(ranks, _everything, tmp_path)
