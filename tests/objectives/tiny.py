"""A model that is a table of random logits, small enough to sum over every mask of a sequence.

The table gives logits for each (visible tokens, position): any conditional p(x_i | x_visible), consistent with no
joint distribution. It answers in the layouts of all three networks, so every objective can be compared on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import nn

from pgm_scale.data import TokenBatch, Vocabulary
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.vocabulary import VocabularyLinear

LENGTH = 3
VOCABULARY = Vocabulary(size=3, mask_id=2, bos_id=0, eos_id=0, pad_id=None)
SEQUENCE = np.array([1, 0, 1])


class LogitsGiven(VocabularyLinear):
    """An output linear whose hidden states are the logits."""

    def __init__(self, vocab_size: int = VOCABULARY.size) -> None:
        super().__init__(vocab_size, vocab_size)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)
        self.double()  # the tables are fp64


class TableModel(nn.Module):
    """fp64 logits [visible tokens, position, V]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes = VOCABULARY.size**LENGTH
        table = 2 * torch.randn(codes, LENGTH, VOCABULARY.size, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table)
        self.places = torch.tensor([VOCABULARY.size**i for i in range(LENGTH)])

    def logits_of(self, noisy_BL: torch.Tensor) -> torch.Tensor:
        return self.table[(noisy_BL * self.places).sum(dim=-1)]


class MaskedTable(TableModel):
    def forward(self, tokens_BL: torch.Tensor, sigma_B: torch.Tensor, readout: Callable) -> torch.Tensor:
        return readout(self.logits_of(tokens_BL), LogitsGiven())


class PartitionTable(TableModel):
    def forward(self, inputs: PartitionInputs, readout: Callable) -> torch.Tensor:
        hidden = []
        keys = zip(
            inputs.tokens_T.split(inputs.segments.lengths),
            inputs.positions_T.split(inputs.segments.lengths),
            inputs.query_positions_Q.split(inputs.query_segments.lengths),
            strict=True,
        )
        for tokens, positions, query_positions in keys:
            visible = torch.full((1, LENGTH), VOCABULARY.mask_id)
            visible[0, positions] = tokens
            hidden.append(self.logits_of(visible)[0, query_positions])
        return readout(torch.cat(hidden), LogitsGiven())


def subsets() -> Iterator[np.ndarray]:
    """Every bool [L]."""
    for members in itertools.product([False, True], repeat=LENGTH):
        yield np.array(members)


ALL_SUBSETS = np.stack(list(subsets()))


def token_costs(in_S: np.ndarray) -> np.ndarray:
    """float64 [L]: -log p(x_i | x_{not S}) for each i, the mask's logit removed."""
    visible = torch.from_numpy(np.where(in_S, VOCABULARY.mask_id, SEQUENCE))
    logits_LV = TableModel().logits_of(visible[None])[0].detach().numpy()[:, : VOCABULARY.mask_id]
    log_p = logits_LV - np.log(np.exp(logits_LV).sum(axis=1, keepdims=True))
    return -log_p[np.arange(LENGTH), SEQUENCE]


def cost_A(in_S: np.ndarray) -> float:
    """A(S) of `pgm_scale.objectives.pgm`."""
    return float(token_costs(in_S)[in_S].sum())


def any_order_nll() -> float:
    """The chain rule's NLL averaged over all orders of the tokens, term by term."""
    totals = []
    for order in itertools.permutations(range(LENGTH)):
        hidden = np.ones(LENGTH, bool)
        total = 0.0
        for position in order:
            total += token_costs(hidden)[position]
            hidden[position] = False
        totals.append(total)
    return float(np.mean(totals))


def mean_cost_over_probability() -> Polynomial:
    """(1/q) E_{S ~ Bernoulli(q)} A(S), a polynomial in q since A of the empty set is 0."""
    q = Polynomial([0, 1])
    total = Polynomial([0.0])
    for in_S in ALL_SUBSETS:
        size = int(in_S.sum())
        if size:
            total = total + cost_A(in_S) * q ** (size - 1) * (1 - q) ** (LENGTH - size)
    return total


def bound_F(a: float, b: float) -> float:
    """F(a, b) of `pgm_scale.objectives.pgm`."""
    antiderivative = mean_cost_over_probability().integ()
    return float(np.real(antiderivative(b) - antiderivative(a)))


def copies(count: int) -> TokenBatch:
    """`count` copies of the sequence, numbered from 0."""
    tokens_BL = np.tile(SEQUENCE, (count, 1))
    return TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), np.arange(count))


def probability_of(groups_BL: np.ndarray, probability_B: np.ndarray) -> np.ndarray:
    """Probability of each row when its entries are independent coins."""
    p_B1 = probability_B[:, None]
    return np.where(groups_BL, p_B1, 1 - p_B1).prod(axis=1)
