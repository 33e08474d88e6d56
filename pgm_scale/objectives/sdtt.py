"""Self-distillation through time (SDTT, arXiv 2410.21035; FACTS 5): one step of the student for two of its teacher.

A sequence is masked at time t. The teacher goes on from there by ancestral steps of dt, to t - dt and to t - 2 dt;
its distribution of a masked token is that of the step which opens the token, and the second step's for tokens that
stay masked. The student predicts all of them in one pass at t; the loss is the mean, over the masked tokens of the
global batch, of a divergence between the two. So a step of dt opens a masked token with probability dt / t, the
first pass is at t and the second at t - dt (the published code's grid was another one, FACTS 8.20).

Round r has dt = (1 - s) 2**r / sampling_steps, and its teacher is the student at the end of round r - 1. To which
round a sequence belongs, its time, its masks and its draws depend on (seed, sample number) alone, so the reading
thread lays out all three passes, and only the drawn tokens pass from the teacher's first pass to its second.

Of a PGM, group 1 is what is masked and group 0 what is clean. `one` distils the masked group, as published: the
student computes both groups, and one counts. `two` distils both (ours): group 0 is masked as well, in a sequence of
which group 1 is clean, at the time t' at which as many tokens are masked. The student's pass is the same one.

The teacher's distributions are kept as its last hidden states: `models.divergence` makes logits of a few at a time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pgm_scale.config import SDTTObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask, uniforms
from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.models.divergence import TeacherOutput
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.readout import Selected, TeacherDivergence, logits
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.objectives.base import (
    DrawSpec,
    Inputs,
    LossTerms,
    ModelCall,
    Objective,
    fp32,
    scorable,
    training_times,
)
from pgm_scale.objectives.mdlm import MDLMObjective
from pgm_scale.objectives.pgm import Partition, PGMObjective, pack
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.packed import packed_inputs


class Teacher(Protocol):
    """A frozen model under the student's layout (`parallel.frozen.FrozenModel`)."""

    def running(self) -> AbstractContextManager[nn.Module]:
        """The module, to call without gradients. Collective."""


@dataclass(frozen=True)
class Rollout(Inputs):
    """The teacher's two passes over V views: the batch itself, and for `two` groups also its complement.

    Attributes:
        tokens_VL: int64; what is masked is the mask, or, of a PGM, is not read.
        masked_VL, opened_VL: bool on the host: masked at t, and of these, opened by the first step.
        uniforms_O: float64, one for each opened token in row-major order.
        kept_N: int64; where the hidden state of each scored token is, behind one another those of the tokens that
            the first pass opens and those of the others.
    """

    tokens_VL: Tensor
    masked_VL: np.ndarray
    opened_VL: np.ndarray
    uniforms_O: Tensor
    kept_N: Tensor


@dataclass(frozen=True)
class SDTTInputs(Inputs):
    """The student's pass, the teacher's, and the N tokens that are scored, in the order of the views.

    Attributes:
        student: the arguments of the student's call.
        student_N: int64, the scored tokens in the student's hidden states.
        scored_N: int64, the same in the views, flattened.
        scored_V, mask_fraction_V: of each view, on the host.
    """

    student: PartitionInputs | NoisyTokens
    student_N: Tensor
    rollout: Rollout
    scored_N: Tensor
    scored_V: np.ndarray
    mask_fraction_V: np.ndarray


@dataclass(frozen=True)
class NoisyTokens(Inputs):
    """The arguments of a masked diffusion model without time conditioning."""

    noisy_BL: Tensor
    sigma_B: Tensor


class SDTTObjective(Objective):
    """See the module's docstring. `teacher` is set by the training loop, which owns its weights."""

    is_likelihood = True  # validation is that of the student's pretraining

    def __init__(
        self, config: SDTTObjectiveConfig, vocabulary: Vocabulary, likelihood: PGMObjective | MDLMObjective
    ) -> None:
        """`likelihood` is the objective that the student was pretrained with."""
        self.config, self.vocabulary, self.likelihood = config, vocabulary, likelihood
        self.is_partition = isinstance(likelihood, PGMObjective)
        self.schedule = LogLinearSchedule()
        self.teacher: Teacher | None = None

    def step_time(self, step: int) -> float:
        """dt of the teacher's steps, in the round of a training step."""
        rounds = step // self.config.round_steps
        return (1 - self.config.minimum_time) * 2.0**rounds / self.config.sampling_steps

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return self.likelihood.scored_tokens(batch)

    def loss_tokens(self, batch: TokenBatch, inputs: SDTTInputs) -> int:
        """The masked ones."""
        return int(inputs.scored_V.sum())

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> Any:
        return self.likelihood.validation_inputs(batch, spec)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> SDTTInputs:
        numbers_B, length = batch.sample_numbers_B, batch.tokens_BL.shape[1]
        t_B = training_times(batch, spec, self.config.minimum_time)
        probability_B = self.schedule.mask_probability(t_B)
        masked_BL = bernoulli_mask(spec.seed, numbers_B, "training/partition", probability_B, length)
        step_times_B = np.array(
            [self.step_time(n // spec.global_batch_sequences) for n in numbers_B.tolist()]
        )
        views = [_View(masked_BL, step_times_B / t_B, "sdtt")]
        if self.config.groups == "two":
            # Group 0 is masked with probability alpha_t, as a sequence is at time alpha_t / (1 - epsilon).
            time_B = self.schedule.alpha(t_B) / self.schedule.mask_probability(1.0)
            views.append(_View(~masked_BL, step_times_B / time_B, "sdtt/complement"))
        masked_VL = np.concatenate([view.masked_BL for view in views])
        scored_VL = masked_VL & np.tile(scorable(batch, self.vocabulary), (len(views), 1))
        scored_N = np.flatnonzero(scored_VL)
        student, rows_BL = self._student(batch, masked_BL)
        return SDTTInputs(
            student=student,
            student_N=torch.from_numpy(np.tile(rows_BL, (len(views), 1)).ravel()[scored_N]),
            rollout=self._rollout(batch, views, scored_N, spec.seed),
            scored_N=torch.from_numpy(scored_N),
            scored_V=scored_VL.sum(axis=1),
            mask_fraction_V=masked_VL.mean(axis=1),
        )

    def call(self, inputs: Any) -> ModelCall:
        """Let the teacher make its two passes, and then the student one. Collective over the teacher's ranks."""
        if not isinstance(inputs, SDTTInputs):
            return self.likelihood.call(inputs)
        student = inputs.student
        arguments = (student.noisy_BL, student.sigma_B) if isinstance(student, NoisyTokens) else (student,)
        taught = self._teach(inputs.rollout)
        if taught is None:  # a pipeline stage without the output layer calls no readout
            return ModelCall(arguments, logits)
        weights_N = torch.ones(inputs.student_N.shape, device=inputs.student_N.device)
        divergence = TeacherDivergence(taught, self.config.divergence, self.vocabulary.mask_id, weights_N)
        return ModelCall(arguments, Selected(inputs.student_N, divergence))

    def terms(self, result: Any, inputs: Any) -> LossTerms:
        """The divergence of each view, summed over its tokens."""
        if not isinstance(inputs, SDTTInputs):
            return self.likelihood.terms(result, inputs)
        views, length = inputs.rollout.masked_VL.shape
        # Into a table, whose rows are summed in a fixed order on a GPU too.
        table = torch.zeros(views * length, device=result.device).index_put((inputs.scored_N,), result)
        sequences = views if self.config.groups == "one" else views // 2
        return LossTerms(
            loss_S=table.view(views, length).sum(dim=1),
            cross_entropy_S=None,
            scored_tokens_S=inputs.scored_V,
            mask_fraction_S=inputs.mask_fraction_V,
            sequence_S=np.arange(views) % sequences,
        )

    def _student(
        self, batch: TokenBatch, masked_BL: np.ndarray
    ) -> tuple[PartitionInputs | NoisyTokens, np.ndarray]:
        """The student's arguments, and int64 [B, L]: where in its hidden states it predicts each token."""
        sequences, length = masked_BL.shape
        first_B1 = length * np.arange(sequences)[:, None]
        if not self.is_partition:
            noisy_BL = np.where(masked_BL, self.vocabulary.mask_id, batch.tokens_BL)
            rows_BL = first_B1 + np.arange(length)
            noisy = NoisyTokens(torch.from_numpy(noisy_BL), fp32(np.zeros(sequences)))
            return noisy, rows_BL
        packed = pack(batch, Partition(masked_BL, np.ones((sequences, 2))), self.vocabulary)
        # Queries are those of group 1, then those of group 0, each in the order of their positions.
        query_order_BL = np.argsort(~masked_BL, axis=1, kind="stable")
        return packed.partition, first_B1 + np.argsort(query_order_BL, axis=1, kind="stable")

    def _rollout(self, batch: TokenBatch, views: list[_View], scored_N: np.ndarray, seed: int) -> Rollout:
        numbers_B, length = batch.sample_numbers_B, batch.tokens_BL.shape[1]
        masked_VL = np.concatenate([view.masked_BL for view in views])
        opens_VL = np.concatenate(
            [
                uniforms(seed, numbers_B, f"{view.stream}/opened", length) < view.opening_B[:, None]
                for view in views
            ]
        )
        opened_VL = masked_VL & opens_VL
        uniforms_VL = np.concatenate(
            [uniforms(seed, numbers_B, f"{view.stream}/token", length) for view in views]
        )
        place_VL = np.zeros(masked_VL.size, np.int64)
        kept = np.concatenate([np.flatnonzero(opened_VL), np.flatnonzero(masked_VL & ~opened_VL)])
        place_VL[kept] = np.arange(len(kept))
        tokens_VL = np.tile(batch.tokens_BL, (len(views), 1))
        return Rollout(
            tokens_VL=torch.from_numpy(np.where(masked_VL, self.vocabulary.mask_id, tokens_VL)),
            masked_VL=masked_VL,
            opened_VL=opened_VL,
            uniforms_O=torch.from_numpy(uniforms_VL[opened_VL]),
            kept_N=torch.from_numpy(place_VL[scored_N]),
        )

    def _teach(self, rollout: Rollout) -> TeacherOutput | None:
        """What the teacher says of the scored tokens; None on stages without its output layer."""
        assert self.teacher is not None, "the training loop has not set the teacher"
        opened_VL, later_VL = rollout.opened_VL, rollout.masked_VL & ~rollout.opened_VL
        device = rollout.tokens_VL.device
        with self.teacher.running() as teacher:
            first = _Step(
                _selection(opened_VL[rollout.masked_VL], device),
                TokenDraw(TokenRules((self.vocabulary.mask_id,)), rollout.uniforms_O),
            )
            tokens_O = self._predict(teacher, rollout.tokens_VL, rollout.masked_VL, rollout.masked_VL, first)
            tokens_VL = rollout.tokens_VL.flatten()
            tokens_VL[_selection(opened_VL, device)] = tokens_O
            second = _Step(None, None)
            self._predict(teacher, tokens_VL.view(rollout.tokens_VL.shape), later_VL, later_VL, second)
        if first.kept is None or second.kept is None:
            return None
        hidden_MH = torch.cat([first.kept, second.kept])
        assert second.output_linear is not None
        return TeacherOutput(hidden_MH[rollout.kept_N], second.output_linear)

    def _predict(
        self, model: Any, tokens_VL: Tensor, masked_VL: np.ndarray, target_VL: np.ndarray, step: _Step
    ) -> Tensor:
        if self.is_partition:
            return model(packed_inputs(tokens_VL, ~masked_VL, target_VL), readout=step)
        readout = Selected(_selection(target_VL, tokens_VL.device), step)
        return model(tokens_VL, torch.zeros(len(tokens_VL), device=tokens_VL.device), readout=readout)


@dataclass(frozen=True)
class _View:
    """A mask of the batch, the probability that the teacher's first step opens a masked token, and its stream."""

    masked_BL: np.ndarray
    opening_B: np.ndarray
    stream: str


class _Step:
    """The readout of a teacher's pass: keeps hidden states of its targets, and draws the tokens that it opens."""

    def __init__(self, opened_O: Tensor | None, draw: TokenDraw | None) -> None:
        """`opened_O`: int64, which of the targets are opened; None keeps all and draws none."""
        self._opened_O, self._draw = opened_O, draw
        self.kept: Tensor | None = None
        self.output_linear: OutputLinear | None = None

    def __call__(self, hidden: Tensor, output_linear: OutputLinear) -> Tensor:
        hidden_QH = hidden.flatten(0, -2)
        self.kept = hidden_QH if self._opened_O is None else hidden_QH[self._opened_O]
        self.output_linear = output_linear
        if self._draw is None:
            return _no_token(hidden)
        # One call of the linear, for any number of tokens and for none: under ZeRO-3 each is a gather of all ranks.
        return output_linear(self.kept, partial(self._drawn, self._draw, output_linear))

    @staticmethod
    def _drawn(draw: TokenDraw, output_linear: OutputLinear, hidden_OH: Tensor) -> Tensor:
        return draw(hidden_OH, output_linear) if len(hidden_OH) else _no_token(hidden_OH)


def _no_token(hidden: Tensor) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=hidden.device)


def _selection(chosen: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen)).to(device)
