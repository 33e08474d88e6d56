"""The published samplers (FACTS 4): float64 noise over the whole vocabulary for every token that could be drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.bench.baselines.autoregressive_transformer import Cache, CachedAutoregressiveTransformer
from ops.bench.baselines.diffusion_transformer import DenseDiffusionTransformer
from ops.bench.baselines.partition_transformer import DensePartitionTransformer

LAST_TIME = 1e-5
SCHEDULE_EPSILON = 1e-3  # alpha_t = 1 - (1 - epsilon) t


def exponential_race(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens int64 `[...]` from log-probabilities `[..., V]`: argmax p / E with E exponential, in float64."""
    p = log_probabilities.double().exp()
    noise = torch.rand(p.shape, dtype=torch.float64, device=p.device, generator=generator)
    return (p / (1e-10 - (noise + 1e-10).log())).argmax(dim=-1)


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities in which the mask has none; changes `logits`."""
    logits[..., mask_id] = -torch.inf
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def sample_pgm_uniform(
    model: DensePartitionTransformer,
    batch_sequences: int,
    length: int,
    steps: int,
    bos_id: int,
    mask_id: int,
    generator: torch.Generator,
) -> Tensor:
    """Tokens `[B, L]`: the same number at every step, in a random order a row; `steps` must divide `length`.

    The clean tokens grow by concatenation, as published. The last step has one token fewer, as BOS is known.
    """
    assert length % steps == 0, (length, steps)
    device = model.vocab_embed.embedding.device
    noise_BL = torch.rand(batch_sequences, length - 1, device=device, generator=generator)
    order_BL = 1 + noise_BL.argsort(dim=1)
    tokens_BT = torch.full((batch_sequences, 1), bos_id, device=device)
    positions_BT = torch.zeros_like(tokens_BT)
    for targets_BQ in order_BL.split(length // steps, dim=1):
        lengths_B = torch.full((batch_sequences,), tokens_BT.shape[1], device=device)
        logits_BQV = model.infer(tokens_BT, positions_BT, lengths_B, targets_BQ)
        drawn_BQ = exponential_race(without_mask(logits_BQV, mask_id), generator)
        tokens_BT = torch.cat([tokens_BT, drawn_BQ], dim=1)
        positions_BT = torch.cat([positions_BT, targets_BQ], dim=1)
    return torch.empty_like(tokens_BT).scatter_(1, positions_BT, tokens_BT)


@torch.no_grad()
def sample_mdlm_cached(
    model: DenseDiffusionTransformer,
    batch_sequences: int,
    length: int,
    steps: int,
    bos_id: int,
    mask_id: int,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Tokens `[B, L]` and the number of forward passes: ancestral steps (`ddpm_cache`), BOS known.

    p_theta is kept while no token of the batch changes; a token is drawn for every position at every step.
    What is masked at the last time is drawn in one go ("noise removal").
    """
    device = model.vocab_embed.embedding.device
    tokens_BL = torch.full((batch_sequences, length), mask_id, device=device)
    tokens_BL[:, 0] = bos_id
    times = torch.linspace(1.0, LAST_TIME, steps + 1, dtype=torch.float64).tolist()
    log_p_BLV, forward_passes = None, 0
    for t, s in zip(times, [*times[1:], None], strict=True):
        if log_p_BLV is None:
            log_p_BLV = carry_over(without_mask(model(tokens_BL), mask_id), tokens_BL, mask_id)
            forward_passes += 1
        drawn_BL = exponential_race(log_p_BLV, generator)
        opens_BL = tokens_BL == mask_id
        if s is not None:
            alpha_t, alpha_s = (1 - (1 - SCHEDULE_EPSILON) * time for time in (t, s))
            coins_BL = torch.rand(tokens_BL.shape, dtype=torch.float64, device=device, generator=generator)
            opens_BL &= coins_BL < (alpha_s - alpha_t) / (1 - alpha_t)
        if opens_BL.any():
            log_p_BLV = None
        tokens_BL = torch.where(opens_BL, drawn_BL, tokens_BL)
    return tokens_BL, forward_passes


def carry_over(log_p_BLV: Tensor, tokens_BL: Tensor, mask_id: int) -> Tensor:
    """SUBS: what is not masked stays, with probability 1; changes its first argument."""
    is_clean_BL = tokens_BL != mask_id
    log_p_BLV[is_clean_BL] = -torch.inf
    log_p_BLV[is_clean_BL, tokens_BL[is_clean_BL]] = 0.0
    return log_p_BLV


@torch.no_grad()
def sample_autoregressive(
    model: CachedAutoregressiveTransformer,
    batch_sequences: int,
    length: int,
    bos_id: int,
    mask_id: int,
    generator: torch.Generator,
) -> Tensor:
    """Tokens `[B, L]` from left to right, with a key-value cache (the published code recomputes every prefix)."""
    device = model.vocab_embed.embedding.device
    tokens_BL = torch.full((batch_sequences, length), bos_id, device=device)
    cache: Cache | None = None
    for position in range(1, length):
        logits_B1V, cache = model(tokens_BL[:, position - 1 : position], cache)
        log_p_BV = without_mask(logits_B1V[:, 0], mask_id)
        tokens_BL[:, position] = exponential_race(log_p_BV, generator)
    return tokens_BL
