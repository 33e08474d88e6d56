"""Tokens from logits: temperature, top-k, nucleus, and the draw (`inverse_cdf`).

One float64 uniform decides one token. Float32 noise would make every token rarer than about 1e-7 impossible,
which lowers the entropy and flatters generative perplexity (FACTS 8.24, arXiv 2409.02908). Inverting the CDF
needs one uniform a token where an exponential race needs V of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.models.vocabulary import OutputLinear
from pgm_scale.sampling.inverse_cdf import inverse_cdf

# Logits are made for this many queries at once: at V = 50,258, 13M logits, 51 MB in float32, and as much for
# their weights, however many tokens a step draws.
_CHUNK_QUERIES = 256


@dataclass(frozen=True)
class TokenRules:
    """What may be drawn, in order of application.

    The tokens that are never drawn go first, so they take no part in the nucleus; then the temperature divides the
    logits, `top_k` keeps the k likeliest tokens (0 is off; ties with the k-th stay), and `top_p` keeps the
    likeliest tokens up to and including the one whose cumulative probability crosses p.

    Attributes:
        excluded_ids: the tokens that are never drawn: the mask, then others, which may lie beyond the logits (the
            MaskGIT transformer has no BOS).

    Raises:
        UserError: a value outside its range.
    """

    excluded_ids: tuple[int, ...]
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
    def of(cls, config: SamplerConfig, excluded_ids: tuple[int, ...]) -> TokenRules:
        return cls(excluded_ids, config.temperature, config.top_p, config.top_k)

    @property
    def mask_id(self) -> int:
        return self.excluded_ids[0]

    def __call__(self, logits_QV: torch.Tensor) -> torch.Tensor:
        """Weights [Q, V] proportional to the probability of each token, in the logits' dtype.

        NaN in a row whose logits, but for those excluded, are all -inf, or hold a NaN or +inf.

        Args:
            logits_QV: may be overwritten.
        """
        for token in self.excluded_ids:
            logits_QV[:, token : token + 1] = -torch.inf
        if self.temperature != 1:
            logits_QV.div_(self.temperature)
        if 0 < self.top_k < logits_QV.shape[-1]:
            kth_Q1 = logits_QV.topk(self.top_k, dim=-1).values[:, -1:]
            logits_QV.masked_fill_(logits_QV < kth_Q1, -torch.inf)
        weights_QV = logits_QV.softmax(dim=-1)
        return weights_QV if self.top_p == 1 else _nucleus(weights_QV, self.top_p)


def _nucleus(weights_QV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero what lies outside the nucleus; by the stable sort, equal tokens leave from the highest id down."""
    sorted_QV, order_QV = weights_QV.sort(dim=-1, descending=True, stable=True)
    cumulative_QV = sorted_QV.cumsum(dim=-1, dtype=torch.float64)
    before_QV = cumulative_QV - sorted_QV  # mass of the likelier tokens: below p means p is not crossed yet
    left_out_QV = before_QV >= top_p * cumulative_QV[:, -1:]
    return weights_QV.scatter_(-1, order_QV, sorted_QV.masked_fill_(left_out_QV, 0.0))


class TokenWeights(Protocol):
    """From logits [Q, V], which may be overwritten, to weights [Q, V] in proportion to probabilities."""

    @property
    def mask_id(self) -> int: ...

    def __call__(self, logits_QV: torch.Tensor) -> torch.Tensor: ...


# Token ids int64 [Q], and the weights [Q, V] they were drawn with.
_Drawn = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TokenDraw:
    """A model readout that draws one token for each selected hidden state.

    It runs inside the output layer, so logits exist only for `rows_Q`, and for a chunk of them at a time.

    Where no token has a weight, because logits are not finite, it gives the mask, which is never drawn: so that
    nobody has to wait for the device before the sequences are finished.

    Attributes:
        weights: what may be drawn, and how often; a `TokenRules` is one.
        uniforms_Q: float64 [Q] in [0, 1), one a token.
        rows_Q: int64 [Q] indices into the flattened leading dimensions of the hidden states; None takes all.
    """

    weights: TokenWeights
    uniforms_Q: torch.Tensor
    rows_Q: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, output_linear: OutputLinear) -> torch.Tensor:
        return torch.cat([tokens_c for tokens_c, _ in self._chunks(hidden, output_linear)])

    def _chunks(self, hidden: torch.Tensor, output_linear: OutputLinear) -> Iterator[_Drawn]:
        hidden_QH = hidden.flatten(0, -2)
        if self.rows_Q is not None:
            hidden_QH = hidden_QH[self.rows_Q]
        for hidden_cH, uniforms_c in zip(
            hidden_QH.split(_CHUNK_QUERIES), self.uniforms_Q.split(_CHUNK_QUERIES), strict=True
        ):
            yield self._drawn(self.weights(output_linear(hidden_cH)), uniforms_c)

    def _drawn(self, weights_QV: torch.Tensor, uniforms_Q: torch.Tensor) -> _Drawn:
        tokens_Q = inverse_cdf(weights_QV, uniforms_Q)
        is_possible_Q = weights_QV.gather(1, tokens_Q[:, None])[:, 0] > 0
        return torch.where(is_possible_Q, tokens_Q, self.weights.mask_id), weights_QV


class ScoredTokenDraw(TokenDraw):
    """A `TokenDraw` that also says how likely its tokens were: float64 [2, Q], ids and log-probabilities.

    One tensor, because a pipeline's last stage passes on one; float64 holds ids and fp32 numbers exactly. The
    log-probability is that of the draw: under the temperature, top-k and nucleus.
    """

    def __call__(self, hidden: torch.Tensor, output_linear: OutputLinear) -> torch.Tensor:
        scored = [
            torch.stack([tokens_c.double(), _log_probabilities(weights_cV, tokens_c).double()])
            for tokens_c, weights_cV in self._chunks(hidden, output_linear)
        ]
        return torch.cat(scored, dim=1)


def _log_probabilities(weights_QV: torch.Tensor, tokens_Q: torch.Tensor) -> torch.Tensor:
    """fp32 [Q] of tokens drawn with these weights."""
    return weights_QV.gather(1, tokens_Q[:, None])[:, 0].log() - weights_QV.sum(dim=-1).log()
