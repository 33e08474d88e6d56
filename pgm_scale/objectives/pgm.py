"""The partition objective (PGM paper section 3, eq. 8; FACTS 3.4), in three forms.

S is a set of n of the N = L positions; A(S) = sum over i in S of -log p(x_i | x_{not S}) is the cost of
predicting it from its complement. Averaging the chain rule over all orders of the tokens bounds -log p(x) by

    NELBO = sum_{n=1}^{N} (1/n) E_{|S|=n} A(S),

because the n-th last token of a random order is a uniform member of a uniform S. The same bound in continuous
time, with S drawn by coins of probability m, since int_0^1 C(N, n) m^(n-1) (1-m)^(N-n) dm = 1/n:

    NELBO = F(0, 1),    F(a, b) = int_a^b (1/m) E_{S ~ Bernoulli(m)} A(S) dm.

A partition shows two sets in one pass: S = group 1 and its complement, group 0. Each form weights the tokens
of a group so that either group alone estimates NELBO, and halves their sum. In the first two, t is uniform on
[s, 1] and g_i = 1 with probability 1 - alpha_t = (1-e) t.

published: weights 1/t and 1/(1-t). Group 0 has probability alpha_t, not 1-t, so its weight is too large by
    e / ((1-t) alpha_t): the mean loss is that of `bounded` plus
        1/(2(1-s)) int_s^1 e/((1-t) alpha_t) E_{S ~ Bernoulli(alpha_t)} A(S) dt,
    which diverges logarithmically at t = 1. It is here to reproduce the published runs.
bounded: weights 1/t <= 1/s and (1-e)/alpha_t < 1/e. The mean loss is
        [F((1-e) s, 1-e) + F(e, 1 - (1-e) s)] / (2 (1-s)),
    NELBO but for the ends of order s and e.
count: n, the size of group 1, is uniform on {0, ..., N} and stratified over the batch; group 1 is a uniform
    subset of that size. A size has probability 1/(N+1), so weights (N+1)/n and (N+1)/(N-n) make the mean loss
    exactly NELBO. They are at most N+1, and the weights of a group always sum to N+1: coins give n/t, with
    noise. In 2 of N+1 sequences a group is empty. Without those sizes the term n = N, prediction from no
    context, would never be trained, though the bound contains it and validation scores it (t near 1).

Pads count in N: they are fed, grouped and attended to, but not scored (FACTS 3.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import PGMObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.diffusion.draws import bernoulli_mask, stratified_uniform, uniform_subset
from pgm_scale.diffusion.schedule import LogLinearSchedule
from pgm_scale.models.partition_transformer import PartitionInputs, register_tokens, registers_in_group1
from pgm_scale.models.readout import TokenNLL
from pgm_scale.models.segments import Segments
from pgm_scale.objectives.base import (
    DrawSpec,
    Inputs,
    LossTerms,
    ModelCall,
    Objective,
    Rows,
    finite_targets,
    scorable,
    training_times,
    validation_times,
)


@dataclass(frozen=True)
class Partition:
    """Groups of a batch: bool [B, L], True in group 1, and the loss weights of (group 1, group 0), [B, 2]."""

    in_group1_BL: np.ndarray
    weight_B2: np.ndarray


@dataclass(frozen=True)
class PGMInputs(Inputs):
    """Packed inputs and, in the order of the queries (each sequence: group 1, then group 0), what to predict.

    Attributes:
        partition: the model's inputs.
        targets_Q: int64 tokens at the query positions.
        scored_B2L: bool, True where query l of sequence b belongs to the row (b, group 1) or (b, group 0).
        rows: 2 B rows in the order of the query segments.
    """

    partition: PartitionInputs
    targets_Q: torch.Tensor
    scored_B2L: torch.Tensor
    rows: Rows


class PGMObjective(Objective):
    """See the module's docstring for the three forms and their weights."""

    is_likelihood = True

    def __init__(self, config: PGMObjectiveConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.schedule = LogLinearSchedule()

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary).sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        return pack(batch, self.training_partition(batch, spec), self.vocabulary)

    def validation_inputs(self, batch: TokenBatch, spec: DrawSpec) -> PGMInputs:
        """The bound that MDLM reports: only group 1 counts, with weight 1/t (FACTS 3.4)."""
        t_B = validation_times(batch, spec, self.config.minimum_time)
        groups = self._independent_groups(batch, spec.seed, "validation/partition", t_B)
        weights = np.stack([self.schedule.weight(t_B), np.zeros_like(t_B)], axis=1)
        return pack(batch, Partition(groups, weights), self.vocabulary)

    def call(self, inputs: PGMInputs) -> ModelCall:
        return packed_call(inputs, self.vocabulary)

    def terms(self, nll_Q: torch.Tensor, inputs: PGMInputs) -> LossTerms:
        return packed_terms(nll_Q, inputs)

    def training_partition(self, batch: TokenBatch, spec: DrawSpec) -> Partition:
        """Groups and loss weights of the configured form."""
        if self.config.form == "count":
            return self._partition_of_uniform_size(batch, spec)
        t_B = training_times(batch, spec, self.config.minimum_time)
        groups = self._independent_groups(batch, spec.seed, "training/partition", t_B)
        complement_B = (
            1 / (1 - t_B) if self.config.form == "published" else self.schedule.complement_weight(t_B)
        )
        return Partition(groups, np.stack([self.schedule.weight(t_B), complement_B], axis=1) / 2)

    def _independent_groups(self, batch: TokenBatch, seed: int, stream: str, t_B: np.ndarray) -> np.ndarray:
        probability_B = self.schedule.mask_probability(t_B)
        return bernoulli_mask(seed, batch.sample_numbers_B, stream, probability_B, batch.tokens_BL.shape[1])

    @staticmethod
    def _partition_of_uniform_size(batch: TokenBatch, spec: DrawSpec) -> Partition:
        numbers_B, length = batch.sample_numbers_B, batch.tokens_BL.shape[1]
        u_B = stratified_uniform(spec.seed, numbers_B, spec.global_batch_sequences, "training/time")
        size_B = np.floor(u_B * (length + 1)).astype(np.int64)
        groups = uniform_subset(spec.seed, numbers_B, "training/partition", size_B, length)
        size_B2 = np.stack([size_B, length - size_B], axis=1)
        weights = np.where(size_B2 > 0, (length + 1) / (2 * np.maximum(size_B2, 1)), 0.0)
        return Partition(groups, weights)


def pack(
    batch: TokenBatch,
    partition: Partition,
    vocabulary: Vocabulary,
    registers: int = 0,
    first_target: int = 0,
    classes_B: np.ndarray | None = None,
) -> PGMInputs:
    """Sort each sequence by group: keys as (group 0, group 1), queries as (group 1, group 0).

    Args:
        registers: R of the model, whose registers are keys in front of the tokens.
        first_target: so many first tokens of each sequence are keys only, and neither predicted nor scored.
        classes_B: int64, for a class-conditional model.
    """
    sequences, targets = len(batch.tokens_BL), batch.tokens_BL.shape[1] - first_target

    def with_registers(front_R: np.ndarray, values_BL: np.ndarray) -> np.ndarray:
        return np.concatenate([np.broadcast_to(front_R, (sequences, registers)), values_BL], axis=1)

    tokens_BC = with_registers(register_tokens(registers), batch.tokens_BL)  # columns are true positions
    in_group1_BC = with_registers(registers_in_group1(registers), partition.in_group1_BL)
    key_order_BC = np.argsort(in_group1_BC, axis=1, kind="stable")
    keys1_B = in_group1_BC.sum(axis=1)
    keys_B2 = np.stack([tokens_BC.shape[1] - keys1_B, keys1_B], axis=1)

    in_group1_BL = partition.in_group1_BL[:, first_target:]
    query_order_BL = np.argsort(~in_group1_BL, axis=1, kind="stable")
    queries1_B = in_group1_BL.sum(axis=1)
    queries_B2 = np.stack([queries1_B, targets - queries1_B], axis=1)
    tokens_BL = finite_targets(batch.tokens_BL, vocabulary)[:, first_target:]
    scored_BL = np.take_along_axis(scorable(batch, vocabulary)[:, first_target:], query_order_BL, axis=1)
    first_BL = np.arange(targets) < queries1_B[:, None]
    scored_B2L = np.stack([scored_BL & first_BL, scored_BL & ~first_BL], axis=1)
    rows = Rows.of(
        weight_S=partition.weight_B2.ravel(),
        scored_tokens_S=scored_B2L.sum(axis=2).ravel(),
        mask_fraction_S=queries_B2.ravel() / targets,
        sequence_S=np.repeat(np.arange(sequences), 2),
    )
    packed = PartitionInputs(
        tokens_T=torch.from_numpy(np.take_along_axis(tokens_BC, key_order_BC, axis=1).ravel()),
        positions_T=torch.from_numpy(key_order_BC.ravel()),
        segments=Segments.of(keys_B2.ravel().tolist(), "cpu"),
        query_positions_Q=torch.from_numpy((registers + first_target + query_order_BL).ravel()),
        query_segments=Segments.of(queries_B2.ravel().tolist(), "cpu"),
        classes_B=None if classes_B is None else torch.from_numpy(classes_B),
    )
    targets_BL = np.take_along_axis(tokens_BL, query_order_BL, axis=1)
    return PGMInputs(packed, torch.from_numpy(targets_BL.ravel()), torch.from_numpy(scored_B2L), rows)


def packed_call(inputs: PGMInputs, vocabulary: Vocabulary) -> ModelCall:
    """The NLL of each query, the mask's own logit removed."""
    weight_B2 = inputs.rows.weight_S.view(-1, 2, 1)
    weight_Q = (inputs.scored_B2L * weight_B2).sum(dim=1).flatten()
    return ModelCall((inputs.partition,), TokenNLL(inputs.targets_Q, vocabulary.mask_id, weight_Q))


def packed_terms(nll_Q: torch.Tensor, inputs: PGMInputs) -> LossTerms:
    """The loss of each (sequence, group)."""
    scored_B2L = inputs.scored_B2L
    # A fixed-shape sum: the same bits on every run, unlike a scatter on a GPU.
    nll_B2 = (nll_Q.view(scored_B2L.shape[0], 1, -1) * scored_B2L).sum(dim=-1)
    return inputs.rows.terms(nll_B2.flatten())
