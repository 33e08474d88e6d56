"""A joint distribution small enough to enumerate, and stub models that know its exact conditionals."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from pgm_scale.config import PartitionTransformerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.models.readout import logits
from pgm_scale.sampling.ancestral import time_grid

LENGTH = 4
BOS, MASK, SIZE = 0, 3, 4  # tokens 0, 1, 2 are real; position 0 is always BOS
VOCABULARY = Vocabulary(size=SIZE, mask_id=MASK, bos_id=BOS, eos_id=BOS, pad_id=None)
_PLACES = SIZE ** np.arange(LENGTH)


def joint_distribution() -> np.ndarray:
    """p[x1, x2, x3] of the three free positions, far from independent."""
    return np.random.default_rng(3).dirichlet(np.full(27, 0.4)).reshape(3, 3, 3)


def sequences() -> np.ndarray:
    """int64 [27, L]: every sequence, in the order of `joint_distribution().ravel()`."""
    return np.array([(BOS, *free) for free in itertools.product(range(3), repeat=3)])


def conditionals(joint: np.ndarray) -> np.ndarray:
    """p[state, position, token]: each token's law given the state's clean tokens; a state is base-4 coded."""
    table = np.zeros((SIZE**LENGTH, LENGTH, SIZE))
    table[..., BOS] = 1.0  # states of probability 0, and the BOS position itself
    for state in itertools.product(range(SIZE), repeat=LENGTH):
        clean = np.array(state) != MASK
        weights = joint.ravel() * (sequences()[:, clean] == np.array(state)[clean]).all(axis=1)
        if weights.sum() == 0:
            continue
        for position in range(1, LENGTH):
            shares = np.bincount(sequences()[:, position], weights=weights, minlength=SIZE)
            table[state @ _PLACES, position] = shares / shares.sum()
    return table


class ExactPartition(PartitionTransformer):
    """Answers each query with the exact conditional given the tokens of the key segment of its index."""

    def __init__(self, joint: np.ndarray) -> None:
        nn.Module.__init__(self)
        self.config = PartitionTransformerConfig()
        self.vocab_size, self.length = SIZE, LENGTH
        self.table = torch.from_numpy(conditionals(joint)).log().float()
        self.places = torch.from_numpy(_PLACES)

    def forward(self, inputs, readout=logits, received=None):
        keys, queries = inputs.segments, inputs.query_segments
        state_S = torch.full((keys.count,), int(MASK * _PLACES.sum()))
        state_S.index_add_(0, keys.ids_T, (inputs.tokens_T - MASK) * self.places[inputs.positions_T])
        return readout(self.table[state_S[queries.ids_T], inputs.query_positions_Q], nn.Identity())


class ExactDiffusion(DiffusionTransformer):
    """The exact conditionals of every position given the tokens that are not masked."""

    def __init__(self, joint: np.ndarray) -> None:
        nn.Module.__init__(self)
        self.vocab_size, self.length = SIZE, LENGTH
        self.table = torch.from_numpy(conditionals(joint)).log().float()
        self.places = torch.from_numpy(_PLACES)

    def forward(self, tokens_BL, sigma_B=None, readout=logits, received=None):
        return readout(self.table[(tokens_BL * self.places).sum(dim=1)], nn.Identity())


def ancestral_law(joint: np.ndarray, start: tuple[int, ...], steps: int) -> np.ndarray:
    """Exact law of K-step ancestral sampling over `sequences()`: K transitions of a chain over all states.

    At each step a masked position opens independently with probability (t - s) / t and draws its conditional;
    what is masked in the end is drawn in one go. With few steps this is not the joint distribution.
    """
    table = conditionals(joint)
    law = {start: 1.0}
    times = time_grid(steps)
    for opens in [*(1 - times[1:] / times[:-1]), 1.0]:
        following: dict[tuple[int, ...], float] = {}
        for state, probability in law.items():
            choices = []
            for position, token in enumerate(state):
                shares = table[np.array(state) @ _PLACES, position]
                moves = [(value, opens * shares[value]) for value in range(3)] + [(MASK, 1 - opens)]
                choices.append(moves if token == MASK else [(token, 1.0)])
            for combination in itertools.product(*choices):
                weight = probability * np.prod([share for _, share in combination])
                if weight > 0:
                    after = tuple(value for value, _ in combination)
                    following[after] = following.get(after, 0.0) + weight
        law = following
    return np.array([law.get(tuple(row), 0.0) for row in sequences().tolist()])
