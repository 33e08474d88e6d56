"""Sampling from a run folder: what the command line asks for, in one call."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.run_folder import LoadedRun, load_run
from pgm_scale.sampling import SAMPLERS, UNKNOWN, SampleResult, fitting_sampler, known_prefixes, sample
from pgm_scale.sampling.output import OutputFormat, load_tokenizer, render_samples, write_samples


@dataclass(frozen=True)
class SampleRequest:
    """At most one of `prompts`, `template` and `known_path`; None elsewhere means the run's own setting."""

    prompts: list[str] | None = None
    template: str | None = None
    known_path: str | None = None
    count: int = 1
    kind: str | None = None
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 1
    batch_sequences: int = 32
    output_format: OutputFormat = "text"
    output_path: str | None = None
    weights: Literal["ema", "weight"] = "ema"


def sample_run(folder: str, request: SampleRequest) -> SampleResult:
    """Generate from a run's newest good checkpoint, print or write the samples, and say how fast it was."""
    if request.output_format == "npy" and request.output_path is None:
        raise UserError("npy samples cannot be printed; add --out FILE")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(folder, weights=request.weights, device=device)
    tokenizer = load_tokenizer(run.tokenizer_path)
    result = sample(
        run.model,
        run.identity.vocabulary,
        run.identity.length_tokens,
        _sampler(run, request),
        known_BL=_known(run, tokenizer, request),
        seed=request.seed,
        batch_sequences=request.batch_sequences,
        device=device,
    )
    if request.output_path:
        write_samples(Path(request.output_path), result.tokens_BL, request.output_format, tokenizer)
    else:
        sys.stdout.write(render_samples(result.tokens_BL, request.output_format, tokenizer).decode())
    print(
        f"{len(result.tokens_BL)} sample(s) from step {run.step} ({run.weights} weights): "
        f"{result.tokens_per_second:,.0f} tokens/s, {result.forward_passes} forward passes",
        file=sys.stderr,
    )
    return result


def print_kinds() -> None:
    for kind, (model, sampler) in SAMPLERS.items():
        summary = (sampler.__doc__ or "").strip().splitlines()[0]
        print(f"{kind:18} {model.__name__:26} {summary}")


def _sampler(run: LoadedRun, request: SampleRequest) -> SamplerConfig:
    config = fitting_sampler(run.config.sampler, run.model)
    if request.kind is not None:
        if request.kind not in SAMPLERS:
            raise UserError(f"--sampler {request.kind} is not one of {', '.join(SAMPLERS)}")
        config = replace(config, kind=request.kind)  # type: ignore[arg-type]
    names = ("steps", "temperature", "top_p", "top_k")
    given: dict[str, Any] = {name: getattr(request, name) for name in names}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _known(run: LoadedRun, tokenizer: Tokenizer, request: SampleRequest) -> np.ndarray:
    length, bos_id = run.identity.length_tokens, run.identity.vocabulary.bos_id
    if request.known_path:
        try:
            known_BL = np.load(request.known_path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {request.known_path}: {error}; give an int array in .npy") from None
        if not isinstance(known_BL, np.ndarray) or not np.issubdtype(known_BL.dtype, np.integer):
            raise UserError(
                f"{request.known_path} does not hold one array of integers (-1 where to generate)"
            )
    elif request.template:
        known_BL = known_template(request.template, tokenizer, length, bos_id)
    else:
        texts = request.prompts or [""]
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        known_BL = known_prefixes(prompts, length, bos_id)
    return np.repeat(known_BL, request.count, axis=0)


def known_template(template: str, tokenizer: Tokenizer, length: int, bos_id: int) -> np.ndarray:
    """`known_BL` [1, length] of a text in which {N} stands for N unknown tokens; what follows it is unknown.

    Raises:
        UserError: the text and its gaps are longer than the model.
    """
    tokens = [bos_id]
    for index, piece in enumerate(re.split(r"\{(\d+)\}", template)):
        if index % 2:
            tokens += [UNKNOWN] * min(int(piece[:12]), length + 1)  # too many is told below
        else:
            tokens += tokenizer.encode(piece, add_special_tokens=False).ids
    if len(tokens) > length:
        raise UserError(
            f"the template takes {len(tokens)} tokens with BOS, the model holds {length}; shorten it"
        )
    return np.array([tokens + [UNKNOWN] * (length - len(tokens))], np.int64)
