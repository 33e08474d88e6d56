"""Next-token cross-entropy (FACTS 3.6): the first token is given, every later valid one is scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgm_scale.config import AutoregressiveObjectiveConfig
from pgm_scale.data.batch import TokenBatch
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.readout import TokenNLL
from pgm_scale.objectives.base import (
    DrawSpec,
    Inputs,
    LossTerms,
    ModelCall,
    Objective,
    Rows,
    finite_targets,
    scorable,
)


@dataclass(frozen=True)
class NextTokenInputs(Inputs):
    """int64 [B, L-1] tokens and the tokens one place on; bool [B, L-1] where those are scored; B rows."""

    tokens_BL: torch.Tensor
    targets_BL: torch.Tensor
    scored_BL: torch.Tensor
    rows: Rows


class AutoregressiveObjective(Objective):
    """Exact NLL given the first token; nothing is drawn, so training and validation inputs are the same."""

    is_likelihood = True

    def __init__(self, config: AutoregressiveObjectiveConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def scored_tokens(self, batch: TokenBatch) -> np.ndarray:
        return scorable(batch, self.vocabulary)[:, 1:].sum(axis=1)

    def training_inputs(self, batch: TokenBatch, spec: DrawSpec) -> NextTokenInputs:
        scored = scorable(batch, self.vocabulary)[:, 1:]
        sequences = len(scored)
        rows = Rows.of(
            weight_S=np.ones(sequences),
            scored_tokens_S=scored.sum(axis=1),
            mask_fraction_S=np.zeros(sequences),
            sequence_S=np.arange(sequences),
        )
        return NextTokenInputs(
            tokens_BL=torch.from_numpy(batch.tokens_BL[:, :-1].copy()),
            targets_BL=torch.from_numpy(finite_targets(batch.tokens_BL[:, 1:], self.vocabulary)),
            scored_BL=torch.from_numpy(scored),
            rows=rows,
        )

    validation_inputs = training_inputs

    def call(self, inputs: NextTokenInputs) -> ModelCall:
        readout = TokenNLL(inputs.targets_BL, self.vocabulary.mask_id, inputs.scored_BL.float())
        return ModelCall((inputs.tokens_BL,), readout)

    def terms(self, nll_BL: torch.Tensor, inputs: NextTokenInputs) -> LossTerms:
        return inputs.rows.terms((nll_BL * inputs.scored_BL).sum(dim=1))
