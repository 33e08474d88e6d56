"""What an objective is: host-side draws and layout, one call of the model, and the loss terms of its rows.

A row is what one weight belongs to: a sequence, or one group of a sequence. The trainer divides the sum of
`loss_S` by the scored tokens of the global batch, so any split of a batch sums to the same loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import sequential_uniform, stratified_uniform
from pgm_scale.models.readout import Readout

Self = TypeVar("Self", bound="Inputs")


@dataclass(frozen=True)
class DrawSpec:
    """What the draws depend on besides the sample number: the run's seed and the batch to stratify over."""

    seed: int
    global_batch_sequences: int


@dataclass
class LossTerms:
    """Sums over the scored tokens of each row.

    Attributes:
        loss_S: fp32, differentiable; of objectives of tokens the weighted negative log-likelihood in nats.
        cross_entropy_S: fp32 negative log-likelihood in nats without weights, detached; None of a VQ model.
        scored_tokens_S: int64 tokens in the row's sums.
        mask_fraction_S: float64 share of the sequence's positions that the row has to predict.
        sequence_S: int64 index in the batch of the sequence that the row belongs to.
        code_counts_K: int64 histogram of the codes that a VQ model chose, for the log; None of other models.
    """

    loss_S: torch.Tensor
    cross_entropy_S: torch.Tensor | None
    scored_tokens_S: np.ndarray
    mask_fraction_S: np.ndarray
    sequence_S: np.ndarray
    code_counts_K: torch.Tensor | None = None

    def loss_of_sequences(self, sequences: int) -> np.ndarray:
        """float64 [B]: the weighted loss of each of the batch's `sequences`, summed over its rows."""
        loss_S = self.loss_S.detach().double().cpu().numpy()
        return np.bincount(self.sequence_S, weights=loss_S, minlength=sequences)


@dataclass(frozen=True)
class Inputs:
    """Base of an objective's inputs: `to` moves every field that lives on a device."""

    def to(self: Self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
            elif hasattr(value, "to"):
                moved[field.name] = value.to(device)
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Rows(Inputs):
    """The rows of a batch: their weights on the device, and what the log says of them on the host."""

    weight_S: torch.Tensor
    scored_tokens_S: np.ndarray
    mask_fraction_S: np.ndarray
    sequence_S: np.ndarray

    @classmethod
    def of(
        cls,
        weight_S: np.ndarray,
        scored_tokens_S: np.ndarray,
        mask_fraction_S: np.ndarray,
        sequence_S: np.ndarray,
    ) -> Rows:
        return cls(fp32(weight_S), scored_tokens_S.astype(np.int64), mask_fraction_S, sequence_S)

    def terms(self, nll_S: torch.Tensor, loss_S: torch.Tensor | None = None) -> LossTerms:
        """Loss terms of the rows' NLL sums; the loss is the weighted NLL unless it is given."""
        loss_S = self.weight_S * nll_S if loss_S is None else loss_S
        return LossTerms(loss_S, nll_S.detach(), self.scored_tokens_S, self.mask_fraction_S, self.sequence_S)


@dataclass(frozen=True)
class ModelCall:
    """The one forward pass of an objective: `model(*arguments, readout=readout)`.

    It is data, so that a pipeline stage can run its part of the model without the readout or the loss.
    """

    arguments: tuple[Any, ...]
    readout: Readout


class Objective(Protocol):
    """A loss in three steps: pure host-side `*_inputs`, the model's `call`, and `terms` of what it returns.

    Attributes:
        is_likelihood: the validation loss is the NLL or a bound on it, so that its exponential is a perplexity.
    """

    is_likelihood: bool

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        """int64 [B]: what the loss of each sequence is divided by."""

    def loss_tokens(self, batch: TokenBatch, inputs: Any) -> int:
        """What the training loss of the batch is divided by, unless it is its scored tokens."""
        return int(self.scored_tokens(batch).sum())

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> Any:
        """Host tensors with `.to(device)`; a pure function of its arguments."""

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> Any:
        """As `training_inputs`, for a bound on the NLL whose draws depend on (seed, sample number) alone."""

    def call(self, inputs: Any) -> ModelCall:
        """How to call the model; every tensor in it is one of the inputs or made from them."""

    def terms(self, result: Any, inputs: Any) -> LossTerms:
        """The loss terms, from what the call's readout returned."""


def loss_terms(objective: Objective, model: Callable[..., Any], inputs: Any) -> LossTerms:
    """Call the model once on an objective's inputs, which must be on the model's device."""
    call = objective.call(inputs)
    return objective.terms(model(*call.arguments, readout=call.readout), inputs)


def fp32(values: np.ndarray) -> torch.Tensor:
    """The tensor that the model and the loss take, of values that the host computed in float64."""
    return torch.from_numpy(values.astype(np.float32))


def scorable(batch: TokenBatch, vocabulary: Vocabulary) -> np.ndarray:
    """bool [B, L]: the valid tokens but for a mask id in the data, which no model gives any probability."""
    return batch.valid_BL & (batch.tokens_BL != vocabulary.mask_id)


def finite_targets(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Tokens with any mask id replaced: it is never scored, but its infinite NLL times 0 would be NaN."""
    return np.where(tokens == vocabulary.mask_id, int(vocabulary.mask_id == 0), tokens)


def training_times(batch: TokenBatch, spec: DrawSpec, minimum_time: float) -> np.ndarray:
    """float64 [B]: t = s + (1 - s) u, with u stratified over the global batch (FACTS 3.1)."""
    u_B = stratified_uniform(spec.seed, batch.sample_numbers_B, spec.global_batch_sequences, "training/time")
    # Rounding must not lift t to 1, where the published weight 1 / (1 - t) of a partition is infinite.
    return np.minimum(minimum_time + (1 - minimum_time) * u_B, np.nextafter(1.0, 0.0))


def validation_times(batch: TokenBatch, spec: DrawSpec, minimum_time: float) -> np.ndarray:
    """float64 [B]: t = s + (1 - s) u, with u stratified over any aligned block of 2**k sample numbers."""
    return minimum_time + (1 - minimum_time) * sequential_uniform(
        spec.seed, batch.sample_numbers_B, "validation/time"
    )
