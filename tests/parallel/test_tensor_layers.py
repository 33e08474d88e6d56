"""Models of tensor-parallel layers against the same models of plain ones: outputs, gradients, padding, bf16."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgm_scale.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PartitionTransformerConfig,
    RunConfig,
    TrainingConfig,
    TransformerConfig,
)
from pgm_scale.models.divergence import DivergenceKind, TeacherOutput
from pgm_scale.models.initialization import is_split, tensor_slice
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import Readout, TeacherDivergence, TokenLogProbabilities, TokenNLL, logits
from pgm_scale.models.segments import Segments
from pgm_scale.models.stages import whole_span
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.parallel.construction import build_part, layer_builder, materialize
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.host_device import megatron_device
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.parallel.micro_step import MicroStep
from pgm_scale.tensor_slices import TensorSlice
from tests.distributed import run_ranks
from tests.models.builders import (
    LENGTH,
    QUERY_MODES,
    autoregressive_config,
    diffusion_config,
    image_config,
    maskgit_config,
    pack_groups,
    partition_config,
)

HEADS, SEQUENCES, TOLERANCE = 4, 3, 1e-5
CPU = torch.device("cpu")
DIVERGENCES: tuple[DivergenceKind, ...] = ("reverse_kl", "forward_kl", "mse", "tvd")


@dataclass(frozen=True)
class EveryReadout:
    """All that is ever asked of an output linear, one after the other in a flat tensor."""

    vocab_size: int

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        last, shape = self.vocab_size - 1, hidden.shape[:-1]
        targets = torch.randint(2, last, shape, generator=generator)
        ids = torch.randint(self.vocab_size, (*shape, 3), generator=generator)
        # The model's own linear, beneath other hidden states: as a teacher it gets no gradient.
        teacher = TeacherOutput(torch.randn(hidden.shape, generator=generator), output_linear)
        readouts: tuple[Readout, ...] = (
            logits,
            TokenNLL(targets, None),
            TokenNLL(targets, last),
            TokenNLL(targets, 1),
            TokenLogProbabilities(ids),
            TeacherDivergence(teacher, "reverse_kl", last),
        )
        return torch.cat([readout(hidden, output_linear).flatten() for readout in readouts])


@dataclass(frozen=True)
class Case:
    """A model and its vocabulary; 3 sequences of 12 tokens, of the PGM's groups two empty."""

    config: ModelConfig
    vocab_size: int = 23

    @property
    def arguments(self) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(3)
        tokens_BL = torch.randint(self.vocab_size, (SEQUENCES, LENGTH), generator=generator)
        if isinstance(self.config, PartitionTransformerConfig):
            groups_BL = torch.randint(2, (SEQUENCES, LENGTH), generator=generator)
            groups_BL[0], groups_BL[1] = 0, 1
            classes_B = torch.tensor([4, 0, 5]) if self.config.num_classes else None
            return (pack_groups(tokens_BL, groups_BL, self.config.registers, classes_B)[0],)
        if self.config.kind == "diffusion_transformer":
            return tokens_BL, torch.tensor([0.0, 0.3, 4.0])
        if self.config.kind == "maskgit_transformer":
            return tokens_BL % self.predicted, torch.tensor([0, 5, 2])
        return (tokens_BL,)

    @property
    def predicted(self) -> int:
        """Tokens that have a logit: for MaskGIT all but BOS."""
        return self.vocab_size - (self.config.kind == "maskgit_transformer")

    def model(self, layers: LayerBuilder) -> nn.Module:
        """Every parameter drawn anew: at the initial values, gates, shifts and logits are 0."""
        span = whole_span(self.config)
        model = build_part(self.config, self.vocab_size, LENGTH, layers, span, recomputes=False)
        materialize(model, 1, CPU, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            part = tensor_slice(parameter)
            whole = torch.randn(part.global_shape, generator=generator) * 0.2 + float("norm" in name)
            parameter.data.view(-1)[: part.numel] = part.take(whole)
        return model


def _four_heads(config: TransformerConfig) -> Any:
    return dataclasses.replace(config, num_heads=HEADS)


PGM = _four_heads(partition_config())
MODELS = [
    *(
        _four_heads(partition_config(query, processor))
        for query in QUERY_MODES
        for processor in ("linear", "mlp4")
    ),
    _four_heads(image_config(registers=4)),  # 16 keys and 12 queries a sequence: 4 ranks cut within sequences
    _four_heads(diffusion_config()),
    _four_heads(diffusion_config(time_conditioned=True)),
    _four_heads(maskgit_config()),
    _four_heads(autoregressive_config()),
]
# 23 tokens leave the last rank one row short; 5 leave one of 4 ranks with none, and one with half of its own.
CASES = [Case(config) for config in MODELS] + [
    Case(PGM, 24),
    Case(PGM, 5),
    Case(MODELS[-4], 5),
    Case(MODELS[-2], 6),
    Case(MODELS[-1], 5),
]


def put_together(mesh: Mesh, slices: dict[str, TensorSlice], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors out of the parts of all ranks, which cover each element once, or are whole and equal."""
    wholes: dict[str, Tensor] = {}
    for parts in mesh.gather([(name, slices[name], values[name].detach().numpy()) for name in slices]):
        for name, part, array in parts:
            flat = torch.from_numpy(array).flatten()
            assert not flat[part.numel :].any(), f"{name}: rows that pad the vocabulary are not 0"
            if part.is_whole:
                whole = wholes.setdefault(name, flat.view(part.global_shape))
                torch.testing.assert_close(flat, whole.flatten(), rtol=0, atol=TOLERANCE, msg=name)
                continue
            whole = wholes.setdefault(name, torch.full(part.global_shape, torch.nan))
            place = whole.view(-1, part.stride)[:, part.offset : part.offset + part.run]
            assert place.isnan().all(), f"{name}: two ranks hold the same elements"
            place.copy_(flat[: part.numel].view(place.shape))
    assert not any(whole.isnan().any() for whole in wholes.values())
    return wholes


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def _back_propagate(result: Tensor) -> None:
    """A random linear function of the result."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(9)) / 100
    (result * weights).sum().backward()


def _compare(mesh: Mesh, case: Case, layers: LayerBuilder) -> None:
    where = f"{case}, {mesh.tensor_ranks} ranks, sequence parallel {layers.own_tokens(torch.zeros(4)).shape[0] < 4}"
    readout = EveryReadout(case.predicted)
    local, split = case.model(LOCAL_LAYERS), case.model(layers)
    slices = {name: tensor_slice(p) for name, p in split.named_parameters()}
    assert sum(map(is_split, split.parameters())) > len(slices) // 3
    if layers.sequence_parallel:  # type: ignore[attr-defined]
        from pgm_scale.parallel.tensor_layers import sum_partial_gradients

        sum_partial_gradients(split, mesh.groups.tensor)  # type: ignore[union-attr]
    torch.manual_seed(0)
    expected = local(*case.arguments, readout=readout)
    _back_propagate(expected)
    torch.manual_seed(0)  # with dropout, the same elements
    with megatron_device():
        actual = split(*case.arguments, readout=readout)
        _back_propagate(actual)
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{where}: {m}"
    )
    wholes = put_together(mesh, slices, gradients_of(split))
    for name, gradient in gradients_of(local).items():
        scale = 1 + float(gradient.abs().max())
        error = float((wholes[name] - gradient).abs().max()) / scale
        assert error < TOLERANCE, f"{where}, gradient of {name}: {error}"


def _whole_sequences(mesh: Mesh, layers: Any) -> None:
    """In evaluation, token counts that the ranks do not divide; behind it, sequence parallelism is back."""
    from pgm_scale.parallel.tensor_layers import whole_sequences

    tokens_BL = torch.arange(7)[None]
    inference = PartitionInputs(
        torch.arange(5),
        torch.tensor([0, 3, 7, 2, 1]),
        Segments.of([3, 0, 2]),
        torch.arange(3, 10),
        Segments.of([1, 2, 4]),
    )
    calls = {PGM: (inference,), MODELS[-4]: (tokens_BL, None), MODELS[-1]: (tokens_BL,)}
    calls[MODELS[-2]] = (tokens_BL, torch.tensor([3]))
    for config, arguments in calls.items():
        local, split = (Case(config).model(builder).eval() for builder in (LOCAL_LAYERS, layers))
        with megatron_device(), torch.no_grad(), whole_sequences(split, layers):
            assert layers.all_tokens(tokens_BL) is layers.own_tokens(tokens_BL) is tokens_BL
            torch.testing.assert_close(split(*arguments), local(*arguments), rtol=TOLERANCE, atol=TOLERANCE)
            if config is MODELS[-1]:
                cache = split.new_cache(1)  # type: ignore[operator]
                steps = [split(tokens_BL[:, i : i + 1], cache=cache) for i in range(7)]
                torch.testing.assert_close(
                    torch.cat(steps, dim=1), local(tokens_BL), rtol=TOLERANCE, atol=TOLERANCE
                )
        assert layers.own_tokens(torch.zeros(mesh.tensor_ranks)).shape == (1,)
    _compare(mesh, CASES[0], layers)


def _own_draws(mesh: Mesh, layers: LayerBuilder) -> None:
    """What ranks hold parts of is dropped independently, after which all ranks draw the same again."""

    def draws(needed: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(5)
        with layers.own_draws(CPU, needed):
            inside = torch.rand(4).tolist()
        return inside, torch.rand(4).tolist()

    for needed in (False, True):
        assert draws(needed) == draws(needed)
        inside, behind = zip(*mesh.gather(draws(needed)), strict=True)
        assert len(set(map(tuple, inside))) == (mesh.tensor_ranks if needed else 1)
        assert len(set(map(tuple, behind))) == 1
    case = Case(_four_heads(maskgit_config(dropout=0.3)))
    model = case.model(layers)
    torch.manual_seed(1)
    with megatron_device():
        outputs = mesh.gather(model(*case.arguments).detach().numpy().tobytes())
    assert len(set(outputs)) == 1


def _divergence(layers: LayerBuilder, kind: DivergenceKind, vocab_size: int) -> None:
    """With loss weights, between linears that are split alike; the last token, beside the padding, excluded."""

    def losses_and_gradients(builder: LayerBuilder) -> list[Any]:
        student, teacher = (builder.vocab_linear(8, vocab_size) for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        wholes = []
        for linear in (student, teacher):
            linear.to(dtype=torch.float64)
            for parameter in linear.parameters():
                part = tensor_slice(parameter)
                whole = torch.randn(part.global_shape, generator=generator, dtype=torch.float64)
                parameter.data.zero_().view(-1)[: part.numel] = part.take(whole)
        student_hidden, teacher_hidden = torch.randn(2, 7, 8, generator=generator, dtype=torch.float64)
        weights_Q = torch.rand(7, generator=generator)
        weights_Q[2] = 0.0
        output = TeacherOutput(teacher_hidden.requires_grad_(), teacher)  # type: ignore[arg-type]
        readout = TeacherDivergence(output, kind, vocab_size - 1, weights_Q)
        losses_Q = readout(student_hidden.requires_grad_(), student)  # type: ignore[arg-type]
        (3.0 * weights_Q * losses_Q).sum().backward()
        assert all(x.grad is None for x in (teacher_hidden, *teacher.parameters()))
        for parameter in student.parameters():
            assert parameter.grad is not None
            part, gradient = tensor_slice(parameter), parameter.grad.flatten()
            assert not gradient[part.numel :].any()
            wholes.append((part, gradient[: part.numel]))
        return [losses_Q.detach(), student_hidden.grad, *wholes]

    losses_Q, d_hidden_QH, *d_wholes = losses_and_gradients(LOCAL_LAYERS)
    own_losses_Q, own_d_hidden_QH, *d_parts = losses_and_gradients(layers)
    torch.testing.assert_close(own_losses_Q, losses_Q, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(own_d_hidden_QH, d_hidden_QH, rtol=TOLERANCE, atol=TOLERANCE)
    for (_, whole), (part, own) in zip(d_wholes, d_parts, strict=True):
        expected = part.take(whole.view(part.global_shape))
        torch.testing.assert_close(own, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _engine(mesh: Mesh, case: Case, parallel: ParallelConfig, precision: Any) -> Engine:
    config = RunConfig(
        folder="",
        data=DataConfig("", ""),
        model=case.config,
        parallel=parallel,
        optimizer=OptimizerConfig(weight_decay=0.1, gradient_clip_norm=1e9),
        training=TrainingConfig(
            global_batch_sequences=SEQUENCES, micro_batch_sequences=SEQUENCES, precision=precision
        ),
    )
    return Engine(case.model(layer_builder(mesh, parallel)), config, mesh, layer_builder(mesh, parallel))


def _step(case: Case, loss: list[float]) -> MicroStep:
    targets = torch.randint(
        case.vocab_size - 1, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(6)
    )

    def mean(nll: Tensor) -> Tensor:
        loss.append(float(nll.detach().mean()))
        return nll.mean()

    return MicroStep(case.arguments, TokenNLL(targets, case.vocab_size - 1), lambda: None, mean)


def _padding_stays_zero(mesh: Mesh, parallel: ParallelConfig) -> None:
    """Through updates with weight decay, though every other weight moves."""
    for case in (Case(PGM), Case(PGM, 5)):
        engine = _engine(mesh, case, parallel, "fp32")
        slices = {name: tensor_slice(p) for name, p in engine.module.named_parameters()}
        before = put_together(mesh, slices, dict(engine.module.named_parameters()))
        for _ in range(3):
            engine.forward_backward([_step(case, [])])
            assert engine.step(0.01)
        after = put_together(mesh, slices, dict(engine.module.named_parameters()))
        for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
            assert (before[name] != after[name]).all(), name
        engine.close()


def _autocast(mesh: Mesh, parallel: ParallelConfig) -> None:
    """ZeRO-0 in bf16, where the linears cast: near the fp32 gradients of one process, and not the same."""
    case = Case(PGM)
    local = case.model(LOCAL_LAYERS)
    exact: list[float] = []
    step = _step(case, exact)
    step.loss(local(*step.arguments, readout=step.readout)).backward()
    engine = _engine(mesh, case, parallel, "bf16")
    losses: list[float] = []
    engine.forward_backward([_step(case, losses)])
    slices = {name: tensor_slice(p) for name, p in engine.module.named_parameters()}
    wholes = put_together(mesh, slices, gradients_of(engine.module))
    assert all(whole.dtype == torch.float32 for whole in wholes.values())
    assert 0 < abs(losses[0] - exact[0]) < 0.02 * exact[0]
    for name, gradient in gradients_of(local).items():
        error = float((wholes[name] - gradient).norm() / gradient.norm())
        # 0.045 to 0.055 at worst, by the order in which the same sums are rounded to bf16
        assert error < 0.08, f"{name}, {parallel}: {error}"
    assert engine.step(0.01)
    squares = sum(float(whole.double().square().sum()) for whole in wholes.values())
    assert engine.gradient_norm == pytest.approx(squares**0.5, rel=1e-5)
    engine.close()


def _everything(mesh: Mesh) -> None:
    for sequence_parallel in (False, True):
        parallel = ParallelConfig(mesh.world_size, sequence_parallel=sequence_parallel)
        arranged = mesh.arranged(parallel)
        layers: Any = layer_builder(arranged, parallel)
        for case in CASES:
            if not (sequence_parallel and getattr(case.config, "time_conditioned", False)):
                _compare(arranged, case, layers)
        if sequence_parallel:
            _whole_sequences(arranged, layers)
        else:
            _compare(arranged, Case(dataclasses.replace(PGM, dropout=0.2)), layers)
            _own_draws(arranged, layers)
            for kind in DIVERGENCES:
                for vocab_size in (23, 5):
                    _divergence(layers, kind, vocab_size)
        _padding_stays_zero(arranged, parallel)
        _autocast(arranged, dataclasses.replace(parallel, zero_stage=0))


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_models_equal_those_of_one_process(ranks: int) -> None:
    run_ranks(ranks, _everything)
