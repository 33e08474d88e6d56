"""Sampling: against the published loop, against MDLM with the same care, against the machine; tokens/s on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ops.bench.baselines.autoregressive_transformer import CachedAutoregressiveTransformer
from ops.bench.baselines.partition_transformer import DensePartitionTransformer
from ops.bench.baselines.sampler import sample_autoregressive, sample_pgm_uniform
from ops.bench.machine import Machine
from ops.bench.measure import Row, Side, Target, ratio, take_turns
from ops.bench.models import LENGTH, MDLM, PGM, VOCABULARY, with_random_weights
from pgm_scale.config import (
    MODEL_SIZES,
    AutoregressiveTransformerConfig,
    PartitionTransformerConfig,
    SamplerConfig,
    TransformerConfig,
)
from pgm_scale.models import build_model
from pgm_scale.models.blocks import MLP_RATIO
from pgm_scale.sampling import SampleResult, SamplingBatch, known_prefixes, sample
from pgm_scale.sampling.ancestral import opening_steps
from pgm_scale.sampling.engine.values import few_queries

SEQUENCES, STEPS, WARM_UP_STEPS = 2, 128, 8
REPEATS = 3
SEED = 1
CUDA_SEQUENCES, CUDA_BATCHES = 32, 4


def rows(machine: Machine) -> Iterator[Row]:
    return cuda_rows(machine) if machine.device.type == "cuda" else cpu_rows(machine)


def cpu_rows(machine: Machine) -> Iterator[Row]:
    pgm, mdlm = (
        with_random_weights(build_model(config, VOCABULARY.size, LENGTH)).eval() for config in (PGM, MDLM)
    )
    dense = DensePartitionTransformer.from_state(pgm.state_dict(), PGM, LENGTH).eval()
    sides = [
        Side("PGM", partial(ours, pgm, "pgm_uniform"), SEQUENCES * pgm_flops(PGM, STEPS), "fp32 matmul"),
        Side("dense masks, fp64 noise", partial(published_pgm, dense)),
        Side("MDLM", partial(ours, mdlm, "ancestral_cached"), mdlm_flops(), "fp32 matmul"),
    ]
    for side in sides:  # a short run of each; a full one would take as long as a repeat
        side.run(steps=WARM_UP_STEPS)  # type: ignore[call-arg]
    seconds = take_turns(sides, REPEATS, warm_ups=0)
    fractions, work = machine.fractions(sides, seconds), {side.name: side.work for side in sides if side.work}
    sizes = f"L 1024, H 256, V 50,258, batch {SEQUENCES}, {STEPS} steps"
    for what, slow, target in (
        ("against dense masks and fp64 noise", "dense masks, fp64 noise", Target(1.9, 2.5)),
        ("against our MDLM of 8 blocks", "MDLM", Target(3.6, 3.9)),
    ):
        compared = {name: seconds[name] for name in ("PGM", slow)}
        note = f"{work['MDLM'] / work['PGM']:.2f}x the FLOPs" if slow == "MDLM" else ""
        value = ratio(seconds, slow, "PGM")
        yield Row(f"sampling, PGM 4/4, {what}; {sizes}", value, "x", target, compared, work, note=note)
    yield Row(
        f"sampling, PGM 4/4, of the matmul peak; {sizes}",
        fractions["PGM"],
        "of peak",
        Target(0.45, 0.6),
        {"PGM": seconds["PGM"]},
        {"PGM": work["PGM"]},
        fractions,
        "fp32 matmul",
        note="FLOPs that the engine needs, by formula; what it avoids does not count",
    )
    yield autoregressive_row()


def autoregressive_row() -> Row:
    """Ours against the baseline, both with a KV cache; says what a PGM is up against."""
    config = AutoregressiveTransformerConfig(hidden_size=256, num_heads=4, num_blocks=8)
    model = with_random_weights(build_model(config, VOCABULARY.size, LENGTH)).eval()
    plain = CachedAutoregressiveTransformer.from_state(model.state_dict(), config, LENGTH).eval()

    def published() -> None:
        generator = torch.Generator().manual_seed(SEED)
        sample_autoregressive(plain, SEQUENCES, LENGTH, VOCABULARY.bos_id, VOCABULARY.mask_id, generator)

    sides = [Side("AR", partial(ours, model, "autoregressive")), Side("plain AR", published)]
    seconds = take_turns(sides, repeats=1, warm_ups=0)
    tokens_per_second = SEQUENCES * (LENGTH - 1) / statistics.median(seconds["AR"])
    return Row(
        f"sampling, AR of 8 blocks with a KV cache, against a plain one; L 1024, H 256, batch {SEQUENCES}",
        ratio(seconds, "plain AR", "AR"),
        "x",
        seconds=seconds,
        note=f"{tokens_per_second:,.0f} tokens/s",
    )


def cuda_rows(machine: Machine) -> Iterator[Row]:
    """Tokens/s of the published size; the later batches of a call replay the graphs of the second one."""
    config: Any = PartitionTransformerConfig(
        **{k: v for k, v in MODEL_SIZES["pgm-6-6-1024"].items() if k != "kind"}
    )
    for length, target in ((LENGTH, Target(30_000, 60_000)), (4096, None)):
        model = with_random_weights(build_model(config, VOCABULARY.size, length)).eval()
        model = model.to(machine.device, torch.bfloat16)
        call = partial(ours, model, "pgm_uniform", length=length, device=machine.device)
        call(sequences=CUDA_SEQUENCES)
        results: list[SampleResult] = [
            call(sequences=CUDA_SEQUENCES * CUDA_BATCHES, batch_sequences=CUDA_SEQUENCES)
            for _ in range(REPEATS)
        ]
        seconds = [result.elapsed_s for result in results]
        flops = CUDA_SEQUENCES * CUDA_BATCHES * pgm_flops(config, STEPS, length)
        side = Side("PGM", call, flops, "bf16 matmul")
        yield Row(
            f"sampling, PGM 6/6-1024, bf16, L {length}, batch {CUDA_SEQUENCES}, {STEPS} steps",
            statistics.median(result.tokens_per_second for result in results),
            "tokens/s",
            target,
            {"PGM": seconds},
            {"PGM": flops},
            machine.fractions([side], {"PGM": seconds}),
            "bf16 matmul",
            note=f"{CUDA_BATCHES} batches a call",
        )


def ours(
    model: nn.Module,
    kind: Any,
    steps: int = STEPS,
    sequences: int = SEQUENCES,
    batch_sequences: int = CUDA_SEQUENCES,
    length: int = LENGTH,
    device: torch.device | str = "cpu",
) -> SampleResult:
    return sample(
        model,
        VOCABULARY,
        length,
        SamplerConfig(kind=kind, steps=steps),
        known_BL=known_prefixes([[]] * sequences, length, VOCABULARY.bos_id),
        seed=SEED,
        batch_sequences=batch_sequences,
        device=device,
    )


def published_pgm(model: Any, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(SEED)
    sample_pgm_uniform(model, SEQUENCES, LENGTH, steps, VOCABULARY.bos_id, VOCABULARY.mask_id, generator)


def pgm_flops(
    config: PartitionTransformerConfig, steps: int, length: int = LENGTH, vocab_size: int = VOCABULARY.size
) -> float:
    """FLOPs of one row of the uniform sampler in `sampling.engine`, BOS known: matrix products and attention.

    2 operations a multiply-add; the zeros of `attend_averaging`'s block-diagonal queries are not counted.
    """
    hidden, unknown = config.hidden_size, length - 1
    steps = min(steps, unknown)
    matrix, mlp = 2 * hidden**2, 2 * MLP_RATIO
    seen, flops = 0, 0.0
    for number in range(steps):
        clean, end = (1 + -(-k * unknown // steps) for k in (number, number + 1))
        new, queries = clean - seen, end - clean
        flops += matrix * (3 * new + (1 + mlp) * clean) + 4 * hidden * new * (seen + clean)  # first block
        flops += (config.num_encoder_blocks - 1) * (matrix * (4 + mlp) * clean + 4 * hidden * clean**2)
        flops += matrix * queries * (1 + config.num_decoder_blocks * (2 + mlp))
        flops += (config.num_decoder_blocks + 1) * _reading_flops(config, queries, clean)
        flops += 2 * hidden * vocab_size * queries
        seen = clean
    return flops


def _reading_flops(config: TransformerConfig, queries: int, tokens: int) -> float:
    """Keys, values and attention of `queries` over `tokens`, in the cheaper order of `engine.values`."""
    hidden, heads = config.hidden_size, config.num_heads
    keys_and_scores = 2 * hidden**2 * tokens + 2 * hidden * tokens * queries
    if few_queries(queries, heads, hidden):
        return keys_and_scores + 2 * hidden * tokens * heads * queries + 2 * hidden**2 * queries
    return keys_and_scores + 2 * hidden**2 * tokens + 2 * hidden * tokens * queries


def mdlm_flops() -> float:
    """FLOPs of a batch of `engine.cached_ancestral`, by the same rules, for this seed's opening steps."""
    known_BL = known_prefixes([[]] * SEQUENCES, LENGTH, VOCABULARY.bos_id)
    config = SamplerConfig(kind="ancestral_cached", steps=STEPS)
    batch = SamplingBatch(known_BL, np.arange(SEQUENCES), SEED, VOCABULARY, config, torch.device("cpu"))
    step_BL = opening_steps(batch)
    hidden, matrix, mlp = MDLM.hidden_size, 2 * MDLM.hidden_size**2, 2 * MLP_RATIO
    attention = 4 * hidden * LENGTH**2
    first = matrix * (1 + mlp) * LENGTH + attention
    middle = (MDLM.num_blocks - 2) * (matrix * (4 + mlp) * LENGTH + attention)
    flops = 3.0 * matrix * LENGTH * SEQUENCES
    for number in np.unique(step_BL[step_BL >= 0]):
        targets_B = (step_BL == number).sum(axis=1)
        rows, asked = np.count_nonzero(targets_B), int(targets_B.max())
        last = matrix * (2 + mlp) * asked + _reading_flops(MDLM, asked, LENGTH)
        flops += rows * (first + middle + last)
        flops += targets_B.sum() * (3 * matrix + 2 * hidden * VOCABULARY.size)
    return float(flops)
