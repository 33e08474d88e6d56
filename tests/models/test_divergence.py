"""The chunked divergences against their definitions over all logits in float64, and what must hold of any."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.models import chunking, host_matmul
from pgm_scale.models.chunking import VocabularyRange
from pgm_scale.models.divergence import DivergenceKind, TeacherOutput, chunked_divergence
from pgm_scale.models.readout import TeacherDivergence
from pgm_scale.models.vocabulary import VocabularyLinear

QUERIES, HIDDEN, TEACHER_HIDDEN, VOCAB, EXCLUDED = 13, 6, 9, 17, 4
KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_CPU_CHUNK_LOGITS", 3 * 5 * VOCAB)  # 13 rows: 5, 5 and 3


def side(seed: int, size: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> TeacherOutput:
    """Hidden states and an output linear, of a student or a teacher, that all ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    linear = VocabularyLinear(size, VOCAB).to(dtype)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    hidden_QH = scale * torch.randn(QUERIES, size, generator=generator)
    return TeacherOutput(hidden_QH.to(dtype).requires_grad_(), linear)


def student_and_teacher(
    scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[TeacherOutput, TeacherOutput]:
    return side(0, HIDDEN, scale, dtype), side(1, TEACHER_HIDDEN, scale, dtype)


def draw_weights() -> Tensor:
    """Loss weights, every fourth 0."""
    weights_Q = torch.rand(QUERIES, generator=torch.Generator().manual_seed(2))
    weights_Q[::4] = 0.0
    return weights_Q


def divergence(
    student: TeacherOutput,
    teacher: TeacherOutput,
    kind: DivergenceKind,
    excluded_id: int | None = EXCLUDED,
    weights_Q: Tensor | None = None,
) -> Tensor:
    return TeacherDivergence(teacher, kind, excluded_id, weights_Q)(student.hidden, student.output_linear)


def all_logits(output: TeacherOutput) -> Tensor:
    return F.linear(output.hidden, output.output_linear.weight, output.output_linear.bias)


def definition(
    student_QV: Tensor, teacher_QV: Tensor, kind: DivergenceKind, excluded_id: int | None
) -> Tensor:
    """From the logits of both."""
    size = student_QV.shape[1]
    kept = torch.arange(size) != (-1 if excluded_id is None else excluded_id)
    log_s, log_t = (logits_QV.double()[:, kept].log_softmax(-1) for logits_QV in (student_QV, teacher_QV))
    summands = {
        "reverse_kl": log_s.exp() * (log_s - log_t),
        "forward_kl": log_t.exp() * (log_t - log_s),
        "mse": (log_s - log_t) ** 2 / size,
        "tvd": (log_s.exp() - log_t.exp()).abs() / 2,
    }
    return summands[kind].sum(-1)


def gradients(losses_Q: Tensor, weights_Q: Tensor, student: TeacherOutput) -> tuple[Tensor, ...]:
    linear = student.output_linear
    return torch.autograd.grad(
        0.37 * (weights_Q * losses_Q).sum(), (student.hidden, linear.weight, linear.bias)
    )


@every_kind
@pytest.mark.parametrize("excluded_id", [None, EXCLUDED])
@pytest.mark.parametrize("knows_weights", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_values_and_gradients_are_those_of_the_definition(
    kind: DivergenceKind,
    excluded_id: int | None,
    knows_weights: bool,
    onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_matmul, "onednn_is_faster", lambda: onednn)
    student, teacher = student_and_teacher(dtype=torch.float32 if onednn else torch.float64)
    weights_Q = draw_weights()
    losses_Q = divergence(student, teacher, kind, excluded_id, weights_Q if knows_weights else None)
    assert losses_Q.dtype == torch.float32
    expected_Q = definition(all_logits(student), all_logits(teacher), kind, excluded_id)
    torch.testing.assert_close(losses_Q.double(), expected_Q, rtol=2e-6, atol=2e-6)
    for actual, expected in zip(
        gradients(losses_Q, weights_Q, student), gradients(expected_Q, weights_Q, student), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert (actual != 0).any()


@every_kind
def test_gradients_are_finite_differences(kind: DivergenceKind) -> None:
    """Of the function itself, along one direction in all that the student has."""
    student, teacher = student_and_teacher()
    linear, weights_Q = student.output_linear, draw_weights()
    inputs = (student.hidden, linear.weight, linear.bias)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]

    def at(step: float) -> Tensor:
        hidden_QH, weight_VH, bias_V = (
            x.detach() + step * direction for x, direction in zip(inputs, along, strict=True)
        )
        with torch.no_grad():
            losses_Q = chunked_divergence(
                hidden_QH, weight_VH, bias_V, teacher, kind, EXCLUDED, weights_Q, VocabularyRange(VOCAB)
            )
        return (0.37 * weights_Q * losses_Q).double().sum()

    slopes = gradients(divergence(student, teacher, kind, weights_Q=weights_Q), weights_Q, student)
    slope = sum((d * direction).sum() for d, direction in zip(slopes, along, strict=True))
    torch.testing.assert_close((at(1e-3) - at(-1e-3)) / 2e-3, slope, rtol=5e-3, atol=5e-3)


@every_kind
def test_the_size_of_chunks_changes_nothing(kind: DivergenceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = student_and_teacher()
    weights_Q, seen = draw_weights(), []
    for rows in (1, 4, 100):
        monkeypatch.setattr(chunking, "_CPU_CHUNK_LOGITS", 3 * rows * VOCAB)
        losses_Q = divergence(student, teacher, kind, weights_Q=weights_Q)
        seen.append((losses_Q.detach(), *gradients(losses_Q, weights_Q, student)))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-6, atol=1e-6)


@every_kind
def test_shapes_of_hidden_states(kind: DivergenceKind) -> None:
    """Any."""
    student, teacher = student_and_teacher()
    flat_Q = divergence(student, teacher, kind)

    def shaped(output: TeacherOutput, *shape: int) -> TeacherOutput:
        hidden = output.hidden.detach()[: shape[0] * shape[1]].unflatten(0, shape)
        return TeacherOutput(hidden.requires_grad_(), output.output_linear)

    shaped_student = shaped(student, 3, 4)
    losses = divergence(shaped_student, shaped(teacher, 3, 4), kind, weights_Q=torch.ones(3, 4))
    torch.testing.assert_close(losses, flat_Q[:12].view(3, 4), rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    assert shaped_student.hidden.grad is not None
    assert shaped_student.hidden.grad.shape == (3, 4, HIDDEN)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("knows_weights", [True, False])
def test_no_hidden_state_at_all(onednn: bool, knows_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a rank whose sequences have nothing masked; it back-propagates with the others."""
    monkeypatch.setattr(host_matmul, "onednn_is_faster", lambda: onednn)
    student, teacher = (
        TeacherOutput(output.hidden.detach()[:0].requires_grad_(), output.output_linear)
        for output in student_and_teacher(dtype=torch.float32)
    )
    weights_Q = torch.ones(0)
    losses_Q = divergence(student, teacher, "reverse_kl", weights_Q=weights_Q if knows_weights else None)
    assert losses_Q.shape == (0,)
    assert not any(gradient.any() for gradient in gradients(losses_Q, weights_Q, student))


@every_kind
def test_the_teacher_gets_no_gradient(kind: DivergenceKind) -> None:
    for weights_Q in (None, draw_weights()):
        student, teacher = student_and_teacher()
        losses_Q = divergence(student, teacher, kind, weights_Q=weights_Q)
        (losses_Q if weights_Q is None else weights_Q * losses_Q).sum().backward()
        linear: nn.Module = teacher.output_linear  # type: ignore[assignment]
        assert all(x.grad is None for x in (teacher.hidden, *linear.parameters()))


@every_kind
def test_the_excluded_token_and_padding_say_nothing(kind: DivergenceKind) -> None:
    """Their weights may be anything, in student and teacher, and get gradients of 0."""
    size, seen = VOCAB - 3, []
    for garbage in (0.0, 1e4):
        student, teacher = student_and_teacher()
        for output in (student, teacher):
            with torch.no_grad():
                output.output_linear.bias[[EXCLUDED, *range(size, VOCAB)]] += garbage
        linear, weights_Q = student.output_linear, draw_weights()
        inputs = (student.hidden, linear.weight, linear.bias)
        losses_Q = chunked_divergence(*inputs, teacher, kind, EXCLUDED, weights_Q, VocabularyRange(size))
        d_hidden_QH, d_weight_VH, d_bias_V = gradients(losses_Q, weights_Q, student)
        assert not d_weight_VH[[EXCLUDED, *range(size, VOCAB)]].any()
        assert not d_bias_V[[EXCLUDED, *range(size, VOCAB)]].any()
        seen.append((losses_Q.detach(), d_hidden_QH))
    torch.testing.assert_close(*seen, rtol=0, atol=0)
    student_QV, teacher_QV = (all_logits(output)[:, :size] for output in (student, teacher))
    expected_Q = definition(student_QV, teacher_QV, kind, EXCLUDED)
    torch.testing.assert_close(losses_Q.double(), expected_Q, rtol=2e-6, atol=2e-6)
    expected_QH, *_ = gradients(expected_Q, weights_Q, student)
    torch.testing.assert_close(d_hidden_QH, expected_QH, rtol=1e-5, atol=1e-5)


@every_kind
def test_rows_of_weight_zero_have_values_and_no_gradients(kind: DivergenceKind) -> None:
    student, teacher = student_and_teacher()
    weights_Q = draw_weights()
    losses_Q = divergence(student, teacher, kind, weights_Q=weights_Q)
    assert (losses_Q[weights_Q == 0] > 0).all()
    d_hidden_QH, *_ = gradients(losses_Q, weights_Q, student)
    assert not d_hidden_QH[weights_Q == 0].any()
    assert d_hidden_QH[weights_Q > 0].any(1).all()

    nothing_Q = torch.zeros(QUERIES)
    losses_Q = divergence(student, teacher, kind, weights_Q=nothing_Q)
    assert not any(gradient.any() for gradient in gradients(losses_Q, nothing_Q, student))


def test_a_loss_that_is_not_the_weighted_sum_is_refused() -> None:
    student, teacher = student_and_teacher()
    losses_Q = divergence(student, teacher, "reverse_kl", weights_Q=draw_weights())
    with pytest.raises(RuntimeError, match="not a multiple"):
        losses_Q.sum().backward()


@every_kind
def test_probabilities_that_underflow(kind: DivergenceKind) -> None:
    """Logits of thousands: most probabilities are 0 in fp32, and their logarithms are not."""
    student, teacher = student_and_teacher(scale=500.0, dtype=torch.float32)
    weights_Q = draw_weights()
    student_QV, teacher_QV = all_logits(student), all_logits(teacher)
    assert (student_QV.softmax(-1) == 0).float().mean() > 0.8
    losses_Q = divergence(student, teacher, kind, weights_Q=weights_Q)
    expected_Q = definition(student_QV, teacher_QV, kind, EXCLUDED)
    torch.testing.assert_close(losses_Q.double(), expected_Q, rtol=1e-5, atol=1e-6)
    for actual, expected in zip(
        gradients(losses_Q, weights_Q, student), gradients(expected_Q, weights_Q, student), strict=True
    ):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@every_kind
def test_a_student_that_is_its_teacher(kind: DivergenceKind) -> None:
    """Exactly 0, as at the start of a round: no gradient out of rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        student, weights_Q = side(0, HIDDEN, dtype=dtype), draw_weights()
        losses_Q = divergence(student, student, kind, weights_Q=weights_Q)
        assert not losses_Q.any()
        assert not any(gradient.any() for gradient in gradients(losses_Q, weights_Q, student))


def test_bounds_and_symmetries() -> None:
    for scale in (0.01, 1.0, 30.0):
        student, teacher = student_and_teacher(scale)
        forward = {kind: divergence(student, teacher, kind) for kind in KINDS}
        backward = {kind: divergence(teacher, student, kind) for kind in KINDS}
        for kind, losses_Q in forward.items():
            assert (losses_Q >= -1e-6).all(), kind
        assert (forward["tvd"] <= 1 + 1e-6).all()
        pairs: dict[DivergenceKind, DivergenceKind] = {
            "reverse_kl": "forward_kl",
            "forward_kl": "reverse_kl",
            "mse": "mse",
            "tvd": "tvd",
        }
        for kind, mirrored in pairs.items():
            torch.testing.assert_close(forward[kind], backward[mirrored], rtol=1e-5, atol=1e-6)
        # Pinsker's inequality
        assert (forward["tvd"] <= (forward["reverse_kl"] / 2).clamp_min(0).sqrt() + 1e-5).all()


@every_kind
def test_bf16(kind: DivergenceKind) -> None:
    """Logits are rounded to bf16 and all that follows is not; under autocast the same."""
    student, teacher = student_and_teacher(dtype=torch.bfloat16)
    weights_Q = draw_weights()
    losses_Q = divergence(student, teacher, kind, weights_Q=weights_Q)
    expected_Q = definition(all_logits(student), all_logits(teacher), kind, EXCLUDED)
    torch.testing.assert_close(losses_Q.double(), expected_Q, rtol=1e-5, atol=1e-6)
    actual = gradients(losses_Q, weights_Q, student)
    for own, expected in zip(actual, gradients(expected_Q, weights_Q, student), strict=True):
        assert own.dtype == torch.bfloat16
        assert (own - expected).float().norm() < 0.01 * expected.float().norm()

    wide, wide_teacher = (
        TeacherOutput(output.hidden.detach().float().requires_grad_(), output.output_linear.float())  # type: ignore[attr-defined]
        for output in (student, teacher)
    )
    with torch.autocast("cpu", torch.bfloat16):
        cast_Q = divergence(wide, wide_teacher, kind, weights_Q=weights_Q)
    torch.testing.assert_close(cast_Q, losses_Q, rtol=0, atol=0)
    for own, expected in zip(gradients(cast_Q, weights_Q, wide), actual, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, expected.float(), rtol=0, atol=0)


class Sharded(VocabularyLinear):
    """As under ZeRO-3: outside a call of the module its weights are not there."""

    def __init__(self, whole: VocabularyLinear) -> None:
        super().__init__(whole.in_features, whole.out_features)
        self.wholes = [parameter.detach().clone() for parameter in whole.parameters()]
        self.calls = 0
        self.release()

    def gather(self) -> None:
        for parameter, whole in zip(self.parameters(), self.wholes, strict=True):
            parameter.data = whole

    def release(self) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.new_empty(0)

    def forward(self, hidden: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.calls += 1
        self.gather()
        result = super().forward(hidden, compute)
        self.release()
        return result


@every_kind
@pytest.mark.parametrize("knows_weights", [True, False])
def test_weights_that_are_there_only_inside_a_call(kind: DivergenceKind, knows_weights: bool) -> None:
    student, teacher = student_and_teacher(dtype=torch.float32)
    weights_Q = draw_weights()
    given = weights_Q if knows_weights else None
    expected_Q = divergence(student, teacher, kind, weights_Q=given)
    expected = gradients(expected_Q, weights_Q, student)

    linears = [Sharded(output.output_linear) for output in (student, teacher)]  # type: ignore[arg-type]
    sharded, sharded_teacher = (
        TeacherOutput(output.hidden, linear)
        for output, linear in zip((student, teacher), linears, strict=True)
    )
    losses_Q = divergence(sharded, sharded_teacher, kind, weights_Q=given)
    assert not any(parameter.numel() for linear in linears for parameter in linear.parameters())
    linears[0].gather()  # as ZeRO-3 does before a module's backward pass; the teacher has none
    actual = gradients(losses_Q, weights_Q, sharded)
    torch.testing.assert_close((losses_Q, *actual), (expected_Q, *expected), rtol=0, atol=0)
    assert [linear.calls for linear in linears] == [1, 1 if knows_weights else 2]


@every_kind
def test_without_gradients_none_are_computed(kind: DivergenceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking._ChunkedLosses, "apply", None)
    student, teacher = student_and_teacher()
    with torch.no_grad():
        losses_Q = divergence(student, teacher, kind, weights_Q=draw_weights())
    expected_Q = definition(all_logits(student), all_logits(teacher), kind, EXCLUDED)
    torch.testing.assert_close(losses_Q.double(), expected_Q, rtol=2e-6, atol=2e-6)
