"""Sampling from a run or an exported model: what the command line asks for, in one call."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pgm_scale.config import SamplerConfig
from pgm_scale.errors import UserError
from pgm_scale.files import check_regular
from pgm_scale.loading import load, read_images
from pgm_scale.sampling import SAMPLERS, SampleResult, fitting_sampler, sample
from pgm_scale.sampling.request import SampleRequest, check_choice_temperature, parse_quirks, refuse_options
from pgm_scale.sampling.run_text import TextJob
from pgm_scale.trained_model import TrainedModel

if TYPE_CHECKING:
    from pgm_scale.sampling.run_images import ImageJob


def sample_run(folder: str, request: SampleRequest) -> SampleResult:
    """Generate from a run's newest good checkpoint or an exported model, and print or write what comes of it."""
    job_type = _job_type(folder, request)
    job_type.check(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load(folder, step=request.step, weights=request.weights, device=device)
    config = _sampler(run, request)
    job = job_type(run, request, device)
    known_BL, labels_B = job.inputs(None if request.known_path is None else _known_tokens(request.known_path))
    result = sample(
        run.model,
        run.description.vocabulary,
        run.description.length_tokens,
        config,
        known_BL=known_BL,
        labels_B=labels_B,
        seed=request.seed,
        batch_sequences=request.batch_sequences,
        device=device,
    )
    job.write(result.tokens_BL)
    samples, origin = len(result.tokens_BL), run.description.origin
    where = f", in {request.output_path}" if request.output_path else ""
    print(
        f"{samples} sample(s) from {origin.summary}{where}: "
        f"{result.tokens_per_second:,.0f} tokens/s, {samples / result.elapsed_s:,.2f} samples/s, "
        f"{result.forward_passes} forward passes",
        file=sys.stderr,
    )
    return result


def print_kinds() -> None:
    for kind, (models, sampler) in SAMPLERS.items():
        summary = (sampler.__doc__ or "").strip().splitlines()[0]
        print(f"{kind:18} {' or '.join(model.__name__ for model in models):42} {summary}")


def _job_type(folder: str, request: SampleRequest) -> type[TextJob] | type[ImageJob]:
    """By what the run was trained on; options for the other kind of run are refused."""
    images = read_images(folder)
    if images is None:
        refuse_options(request.images, folder, "text")
        return TextJob
    if images.tokens != "codes":
        raise UserError(
            f"{folder} is the run of a VQ tokenizer, which has no sampler; give a run trained on codes"
        )
    refuse_options(request.text, folder, "images")
    from pgm_scale.sampling.run_images import ImageJob  # needs pillow, which text does without

    return ImageJob


def _sampler(run: TrainedModel, request: SampleRequest) -> SamplerConfig:
    config = fitting_sampler(run.description.sampler, run.model)
    if request.kind is not None:
        if request.kind not in SAMPLERS:
            raise UserError(f"--sampler {request.kind} is not one of {', '.join(SAMPLERS)}")
        config = replace(config, kind=request.kind)  # type: ignore[arg-type]
    images = request.images
    check_choice_temperature(images.choice_temperature, config.kind)
    given: dict[str, Any] = {
        "steps": request.steps,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "guidance": images.guidance,
        "guidance_schedule": images.guidance_schedule,
        "temperature_warmup_steps": images.temperature_warmup_steps,
        "choice_temperature": images.choice_temperature,
        "quirks": None if images.quirks is None else parse_quirks(images.quirks),
    }
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _known_tokens(path: str) -> np.ndarray:
    try:
        check_regular(path)
        known_BL = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # so it allocates nothing that a header claims
    except Exception as error:  # what a garbled header leads to has no base class
        raise UserError(f"cannot read {path}: {error}; give an int array in .npy") from None
    if not isinstance(known_BL, np.ndarray) or not np.issubdtype(known_BL.dtype, np.integer):
        raise UserError(f"{path} does not hold one array of integers (-1 where to generate)")
    return known_BL
