"""Generation: one call, `sample`, for every model, prompt and infilling.

`known_BL` says which tokens are given (-1: generate this one), so that unconditional sampling (only BOS at
position 0 is known), prompting (a prefix is known) and infilling (anything is known) are the same call; of text and
of images, whose tokens are BOS and the codes of a grid.

A batch goes `sample` -> a sampler from `SAMPLERS` -> `decode.decode` (the shared loop; a plan says at which
step each position is decoded) -> the model -> `categorical.TokenDraw` (its readout, which draws the tokens).
`engine` has the fast forms of models and samplers, which give the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pgm_scale.config import SamplerConfig, out_of_range
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.models.autoregressive import AutoregressiveTransformer
from pgm_scale.models.dit import DiffusionTransformer
from pgm_scale.models.maskgit import MaskGITTransformer
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.sampling.analytic import sample_analytic
from pgm_scale.sampling.ancestral import sample_ancestral, sample_ancestral_cached
from pgm_scale.sampling.autoregressive import sample_autoregressive
from pgm_scale.sampling.batch import Sampler, SamplingBatch
from pgm_scale.sampling.codes import check_quirks
from pgm_scale.sampling.confidence import sample_confidence
from pgm_scale.sampling.engine import batch_sampler
from pgm_scale.sampling.halton import sample_halton
from pgm_scale.sampling.pgm_naive import sample_naive
from pgm_scale.sampling.pgm_non_uniform import sample_non_uniform
from pgm_scale.sampling.pgm_uniform import sample_uniform

UNKNOWN = -1

# `sampler.kind`: the models it samples from, and how. The first one that fits a model is its usual one.
SAMPLERS: dict[str, tuple[tuple[type[nn.Module], ...], Sampler]] = {
    "halton": ((PartitionTransformer, MaskGITTransformer), sample_halton),
    "confidence": ((PartitionTransformer, MaskGITTransformer), sample_confidence),
    "pgm_uniform": ((PartitionTransformer,), sample_uniform),
    "pgm_non_uniform": ((PartitionTransformer,), sample_non_uniform),
    "pgm_naive": ((PartitionTransformer,), sample_naive),
    "ancestral_cached": ((DiffusionTransformer,), sample_ancestral_cached),
    "ancestral": ((DiffusionTransformer,), sample_ancestral),
    "analytic": ((DiffusionTransformer,), sample_analytic),
    "autoregressive": ((AutoregressiveTransformer,), sample_autoregressive),
}
# These need classes, and alone have guidance, a warm-up of the temperature, and quirks.
IMAGE_KINDS = ("halton", "confidence")


@dataclass(frozen=True)
class SampleResult:
    """Completed sequences and what they cost.

    Attributes:
        tokens_BL: int64 on the host; the known tokens are as given.
        forward_passes: of the model, over all batches.
        elapsed_s: wall time, from the first batch's start to the last one's tokens on the host.
        tokens_per_second: generated tokens (known ones do not count) over `elapsed_s`.
    """

    tokens_BL: np.ndarray
    forward_passes: int
    elapsed_s: float
    tokens_per_second: float


def sample(
    model: nn.Module,
    vocabulary: Vocabulary,
    length: int,
    config: SamplerConfig,
    *,
    known_BL: np.ndarray,
    seed: int,
    batch_sequences: int,
    first_sample_number: int = 0,
    labels_B: np.ndarray | None = None,
    device: torch.device | str,
) -> SampleResult:
    """Generate every unknown token of `known_BL`, `batch_sequences` rows at a time.

    Row i is sample number `first_sample_number + i`. Its draws are a function of (seed, sample number,
    position) alone, so its text does not depend on the batch size nor on the rows beside it. (The exception: a
    matmul may round differently in another shape, and a uniform may lie just there in the CDF.)

    Args:
        model: on `device`; put into eval mode for the call (no dropout) and given back as it was.
        length: L, the number of positions of a row.
        known_BL: int64 [B, L]; -1 where a token is to be generated.
        labels_B: int64 [B], the class of each row for a class-conditional model (its `num_classes` stands for
            no class); None for others.

    Raises:
        UserError: the sampler does not fit the model, a value is out of range, or logits are not finite.
    """
    sampler = _sampler_for(config.kind, model)
    device = torch.device(device)
    _check_model(model, vocabulary, length)
    _check_request(vocabulary, length, config, known_BL, batch_sequences)
    _check_labels(model, labels_B, known_BL, vocabulary.bos_id)
    _check_settings(config, model)
    finished: list[np.ndarray] = []
    forward_passes = 0
    started_s = time.perf_counter()
    with torch.inference_mode(), _evaluation_mode(model):
        generate = batch_sampler(sampler, model)
        for start in range(0, len(known_BL), batch_sequences):
            known_bL = known_BL[start : start + batch_sequences].astype(np.int64)
            numbers_b = first_sample_number + start + np.arange(len(known_bL))
            labels_b = (
                None if labels_B is None else labels_B[start : start + batch_sequences].astype(np.int64)
            )
            batch = SamplingBatch(known_bL, numbers_b, seed, vocabulary, config, device, labels_b)
            tokens_bL, passes = generate(batch)
            finished.append(_checked(tokens_bL.cpu().numpy(), vocabulary.mask_id))
            forward_passes += passes
    elapsed_s = time.perf_counter() - started_s
    tokens_BL = np.concatenate(finished)
    return SampleResult(tokens_BL, forward_passes, elapsed_s, float((known_BL < 0).sum() / elapsed_s))


def fitting_sampler(config: SamplerConfig, model: nn.Module) -> SamplerConfig:
    """`config`, or, when its kind is for another model, the same settings with the model's usual kind.

    Images are sampled by Halton or confidence unless `sample` is asked otherwise: the default kind is for text.
    """
    kinds = sampler_kinds(model)
    if class_count(model):
        kinds = [kind for kind in kinds if kind in IMAGE_KINDS]
    if config.kind in kinds or not kinds:
        return config
    return replace(config, kind=kinds[0])  # type: ignore[arg-type]


def sampler_kinds(model: nn.Module) -> list[str]:
    """The kinds of samplers that fit a model, its usual one first."""
    return [
        kind
        for kind, (models, _) in SAMPLERS.items()
        if isinstance(model, models) and (class_count(model) or kind not in IMAGE_KINDS)
    ]


def class_count(model: Any) -> int:
    """The number of classes that a model is conditioned on; 0 for a model without classes."""
    return getattr(getattr(model, "config", None), "num_classes", 0)


def known_prefixes(prompts: Sequence[Sequence[int]], length: int, bos_id: int) -> np.ndarray:
    """`known_BL` for prompts: BOS, then the prompt's tokens, then unknown. An empty prompt is unconditional.

    Raises:
        UserError: a prompt leaves no position to generate.
    """
    known_BL = np.full((len(prompts), length), UNKNOWN, dtype=np.int64)
    for number, (known_L, prompt) in enumerate(zip(known_BL, prompts, strict=True)):
        if len(prompt) + 1 >= length:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and with BOS the model holds {length}; shorten it"
            )
        known_L[: len(prompt) + 1] = [bos_id, *prompt]
    return known_BL


def _sampler_for(kind: str, model: nn.Module) -> Sampler:
    fitting = sampler_kinds(model)
    if kind not in fitting:
        classes = "with" if class_count(model) else "without"
        raise UserError(
            f"sampler.kind {kind} does not fit the model, a {type(model).__name__} {classes} classes; "
            f"{'choose one of ' + ', '.join(fitting) if fitting else 'no sampler fits it'}"
        )
    return SAMPLERS[kind][1]


def _check_model(model: Any, vocabulary: Vocabulary, length: int) -> None:
    if model.vocab_size != vocabulary.size:
        raise UserError(
            f"the model has {model.vocab_size} tokens and the vocabulary {vocabulary.size}, masks included; "
            "give the tokenizer that the model was trained with"
        )
    if length > model.length:
        raise UserError(
            f"length {length} exceeds the model's {model.length}; ask for at most that many tokens"
        )


def _check_request(
    vocabulary: Vocabulary, length: int, config: SamplerConfig, known_BL: np.ndarray, batch_sequences: int
) -> None:
    if known_BL.ndim != 2 or known_BL.shape[1] != length or not len(known_BL):
        raise UserError(
            f"known tokens have shape {known_BL.shape}; they must be (rows, {length}), rows above 0"
        )
    if known_BL.min() < UNKNOWN or known_BL.max() >= vocabulary.size:
        raise UserError(
            f"known tokens reach from {known_BL.min()} to {known_BL.max()}; the vocabulary has ids 0 to "
            f"{vocabulary.size - 1}, and -1 asks for a token: check the tokenizer"
        )
    if (known_BL == vocabulary.mask_id).any():
        raise UserError(
            f"a known token is the mask id {vocabulary.mask_id}; write -1 where a token is to be generated"
        )
    if config.steps < 1 or batch_sequences < 1:
        raise UserError(
            f"sampler.steps {config.steps} and the batch size {batch_sequences} must both be at least 1"
        )


def _check_settings(config: SamplerConfig, model: nn.Module) -> None:
    problems = out_of_range("sampler", config)
    if problems:
        raise UserError("; ".join(problems))
    if config.kind in IMAGE_KINDS:
        check_quirks(config, model)
        return
    for name, off in (("guidance", 0.0), ("temperature_warmup_steps", 0), ("quirks", ())):
        if getattr(config, name) != off:
            raise UserError(
                f"sampler.{name} needs kind {' or '.join(IMAGE_KINDS)}, not {config.kind}; leave it at {off}"
            )


def _check_labels(model: nn.Module, labels_B: np.ndarray | None, known_BL: np.ndarray, bos_id: int) -> None:
    classes, rows = class_count(model), len(known_BL)
    if labels_B is None and not classes:
        return
    if labels_B is None:
        raise UserError(
            f"the model needs the class of each row; give labels, 0 to {classes - 1}, or {classes} for none"
        )
    if not classes:
        raise UserError("labels are given, but the model has no classes; leave them out")
    if labels_B.shape != (rows,) or not np.issubdtype(labels_B.dtype, np.integer):
        raise UserError(
            f"labels are {labels_B.dtype} of shape {labels_B.shape}; give one whole number for each of {rows} rows"
        )
    if labels_B.min() < 0 or labels_B.max() > classes:
        raise UserError(
            f"labels reach from {labels_B.min()} to {labels_B.max()}; the model has classes 0 to {classes - 1}, "
            f"and {classes} stands for none"
        )
    if (known_BL[:, 0] != bos_id).any():
        raise UserError(
            f"rows of an image model start with BOS, {bos_id}; put it into column 0 of all known tokens"
        )
    if (known_BL[:, 1:] == bos_id).any():
        raise UserError(f"a known code is BOS, {bos_id}, which stands in column 0 only; give codes behind it")


def _checked(tokens_bL: np.ndarray, mask_id: int) -> np.ndarray:
    """A mask is never drawn: it stands where logits were not finite (`categorical.TokenDraw`)."""
    if (tokens_bL == mask_id).any():
        raise UserError("the model's logits are not finite, so no token can be drawn; check its checkpoint")
    return tokens_bL


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
