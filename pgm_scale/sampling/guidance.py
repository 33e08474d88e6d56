"""Classifier-free guidance: logits are (1 + w) times those of the class less w times those of no class.

The output linear is affine, so that is the linear of (1 + w) h_class - w h_none: two hidden states become one
before anything of the vocabulary's size exists. Both come from one forward pass, whose guided rows are there twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.sampling.categorical import TokenDraw


def guidance_weights(config: SamplerConfig, step: int, steps_B: np.ndarray) -> np.ndarray:
    """float64 [B]: the weight w of step number `step` for rows that are decoded in `steps_B` steps (FACTS 2.3).

    `linear` rises from 0 at a row's first step to w at its last; a row with one step gets w.
    """
    if config.guidance_schedule == "constant":
        return np.full(len(steps_B), config.guidance)
    return np.where(steps_B > 1, config.guidance * step / np.maximum(steps_B - 1, 1), config.guidance)


@dataclass(frozen=True)
class GuidedRows:
    """The R rows of one forward pass: B rows with their classes, then the guided ones of them without a class.

    Rows whose weight is 0 or which have no class are not guided.

    Attributes:
        rows_R: int64, which of the B rows each is.
        classes_R: int64.
        weights_B: float64, 0 where a row is not guided.
    """

    rows_R: np.ndarray
    classes_R: np.ndarray
    weights_B: np.ndarray

    @classmethod
    def of(cls, labels_B: np.ndarray, weights_B: np.ndarray, num_classes: int) -> GuidedRows:
        """`num_classes` is the label of no class."""
        weights_B = np.where(labels_B < num_classes, weights_B, 0.0)
        guided = np.flatnonzero(weights_B)
        rows_R = np.concatenate([np.arange(len(labels_B)), guided])
        return cls(rows_R, np.concatenate([labels_B, np.full(len(guided), num_classes)]), weights_B)

    def readout(self, draw: TokenDraw, rows_Q: np.ndarray, places_P: np.ndarray) -> TokenDraw | GuidedDraw:
        """`draw` for the targets of the B rows, from the hidden states of all R.

        Args:
            rows_Q: int64, which of the B rows each target is in.
            places_P: int64, where the hidden states of the targets of all R rows are, in the order of the rows.
        """
        device = draw.uniforms_Q.device
        class_Q = torch.from_numpy(places_P[: len(rows_Q)]).to(device)
        if len(places_P) == len(rows_Q):
            return replace(draw, rows_Q=class_Q)
        weights_Q = self.weights_B[rows_Q]
        no_class_Q = places_P[: len(rows_Q)].copy()
        no_class_Q[weights_Q != 0] = places_P[len(rows_Q) :]
        return GuidedDraw(
            draw, class_Q, torch.from_numpy(no_class_Q).to(device), torch.from_numpy(weights_Q).to(device)
        )


@dataclass(frozen=True)
class GuidedDraw:
    """A readout that gives the guided hidden states of Q targets to another one, in fp32.

    Attributes:
        class_Q: int64 [Q] indices into the flattened leading dimensions of the hidden states.
        no_class_Q: likewise those without a class; those of `class_Q` themselves where nothing is guided.
        weights_Q: float64 [Q].
    """

    draw: TokenDraw
    class_Q: torch.Tensor
    no_class_Q: torch.Tensor
    weights_Q: torch.Tensor

    def __call__(self, hidden: torch.Tensor, output_linear: OutputLinear) -> torch.Tensor:
        hidden_PH = hidden.flatten(0, -2)
        class_QH = hidden_PH[self.class_Q].float()
        difference_QH = class_QH - hidden_PH[self.no_class_Q].float()
        # Written so, what is not guided stays the same bits.
        guided_QH = class_QH + self.weights_Q[:, None].float() * difference_QH
        return self.draw(guided_QH.to(hidden.dtype), output_linear)
