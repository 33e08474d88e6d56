"""Tokens from logits: temperature, top-k, nucleus, and an exact inverse-CDF draw in float64.

One float64 uniform decides one token. Float32 noise would make every token rarer than about 1e-7 impossible,
which lowers the entropy and flatters generative perplexity (FACTS 8.24, arXiv 2409.02908). Inverting the CDF
needs one uniform a token where an exponential race needs V of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.models.vocabulary import OutputLinear

# Logits are made for this many queries at once: at V = 50,258, 13M logits, 51 MB in float32 and 103 MB in
# float64, however many tokens a step draws.
_CHUNK_QUERIES = 256


@dataclass(frozen=True)
class TokenRules:
    """What may be drawn, in order of application.

    The mask's own logit goes first, so it never takes part in the nucleus; then the temperature divides the
    logits, `top_k` keeps the k likeliest tokens (0 is off; ties with the k-th stay), and `top_p` keeps the
    likeliest tokens up to and including the one whose cumulative probability crosses p.

    Raises:
        UserError: a value outside its range.
    """

    mask_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"sampler.temperature {self.temperature} must be above 0; for greedy text set sampler.top_k=1"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampler.top_p {self.top_p} must be in (0, 1]; 1 turns it off")
        if self.top_k < 0:
            raise UserError(f"sampler.top_k {self.top_k} must not be negative; 0 turns it off")

    @classmethod
    def of(cls, config: SamplerConfig, mask_id: int) -> TokenRules:
        return cls(mask_id, config.temperature, config.top_p, config.top_k)

    def __call__(self, logits_QV: torch.Tensor) -> torch.Tensor:
        """Float64 weights [Q, V] proportional to the probability of each token; the largest in a row is 1.

        Raises:
            UserError: every logit of a query but the mask's is -inf, or one is NaN or +inf.
        """
        weights_QV = logits_QV.to(torch.float64, copy=True)
        weights_QV[:, self.mask_id] = -torch.inf
        highest_Q1 = weights_QV.amax(dim=-1, keepdim=True)
        if not bool(highest_Q1.isfinite().all()):
            raise UserError(
                "the model's logits are not finite, so no token can be drawn; check its checkpoint"
            )
        weights_QV.sub_(highest_Q1).div_(self.temperature).exp_()
        if 0 < self.top_k < weights_QV.shape[-1]:
            kth_Q1 = weights_QV.topk(self.top_k, dim=-1).values[:, -1:]
            weights_QV.masked_fill_(weights_QV < kth_Q1, 0.0)
        return weights_QV if self.top_p == 1 else _nucleus(weights_QV, self.top_p)


def _nucleus(weights_QV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero what lies outside the nucleus; by the stable sort, equal tokens leave from the highest id down."""
    sorted_QV, order_QV = weights_QV.sort(dim=-1, descending=True, stable=True)
    cumulative_QV = sorted_QV.cumsum(dim=-1)
    before_QV = cumulative_QV - sorted_QV  # mass of the likelier tokens: below p means p is not crossed yet
    kept_QV = before_QV < top_p * cumulative_QV[:, -1:]
    return torch.zeros_like(weights_QV).scatter_(-1, order_QV, sorted_QV * kept_QV)


def inverse_cdf(weights_QV: torch.Tensor, uniforms_Q: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [Q]: the first token whose cumulative weight exceeds uniform * total.

    Exact to float64: token j is drawn for an interval of uniforms as long as its probability, so a token of
    probability 1e-12 is reachable and one of weight 0 is not.
    """
    cumulative_QV = weights_QV.cumsum(dim=-1)
    thresholds_Q1 = uniforms_Q[:, None] * cumulative_QV[:, -1:]
    return torch.searchsorted(cumulative_QV, thresholds_Q1, right=True)[:, 0].clamp_(
        max=weights_QV.shape[-1] - 1
    )


@dataclass(frozen=True)
class TokenDraw:
    """A model readout that draws one token for each selected hidden state.

    It runs inside the output layer, so logits exist only for `rows_Q`, and for a chunk of them at a time.

    Attributes:
        weights: float32 logits [Q, V] to float64 weights [Q, V]; a `TokenRules` is one.
        uniforms_Q: float64 [Q] in [0, 1), one a token.
        rows_Q: int64 [Q] indices into the flattened leading dimensions of the hidden states; None takes all.
    """

    weights: Callable[[torch.Tensor], torch.Tensor]
    uniforms_Q: torch.Tensor
    rows_Q: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, output_linear: OutputLinear) -> torch.Tensor:
        hidden_QH = hidden.flatten(0, -2)
        if self.rows_Q is not None:
            hidden_QH = hidden_QH[self.rows_Q]
        drawn = [
            inverse_cdf(self.weights(output_linear(hidden_cH)), uniforms_c)
            for hidden_cH, uniforms_c in zip(
                hidden_QH.split(_CHUNK_QUERIES), self.uniforms_Q.split(_CHUNK_QUERIES), strict=True
            )
        ]
        return torch.cat(drawn)
