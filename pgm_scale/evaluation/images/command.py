"""What the command line gives to `pgm-scale eval-images`, and what it writes."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.run import (
    Comparison,
    SamplingRequest,
    evaluate_images,
    evaluate_reconstruction,
)
from pgm_scale.evaluation.images.work import write_file
from pgm_scale.files import check_writable, finite
from pgm_scale.parallel.launch import Launch
from pgm_scale.sampling.request import parse_quirks

_SAMPLER_FIELDS = (
    "steps",
    "guidance",
    "guidance_schedule",
    "temperature",
    "temperature_warmup_steps",
    "choice_temperature",
    "top_k",
)


def eval_images(options: argparse.Namespace, launch: Launch) -> None:
    """Evaluate, and on rank 0 write the result as JSON and print one line of it.

    Raises:
        UserError: bad input, or too little memory on the GPU.
    """
    output = Path(options.out).absolute()
    check_writable("--out", output)
    if options.save_reference:
        check_writable("--save-reference", Path(options.save_reference).absolute())
    comparison = Comparison(
        reference=options.reference,
        work=Path(options.work or f"{output}.work"),
        features=options.features,
        inception_path=options.inception,
        save_reference=options.save_reference,
        batch_images=options.batch,
        timeout_s=options.timeout,
    )
    try:
        result = _evaluate(options, comparison, launch)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch {options.batch}: the GPU is out of memory; lower --batch and start again, "
            "which keeps what is done"
        ) from None
    if result is not None:
        write_file(output, (json.dumps(finite(result), indent=2) + "\n").encode())
        print(summary(result))


def _evaluate(options: argparse.Namespace, comparison: Comparison, launch: Launch) -> dict[str, Any] | None:
    if options.reconstruction:
        if options.run_folder or not options.vq:
            raise UserError(
                "--reconstruction evaluates a tokenizer: give --vq PATH and no RUN (PATH may be a run)"
            )
        return evaluate_reconstruction(options.vq, comparison, launch)
    if not options.run_folder:
        raise UserError("give the folder of a run to sample from, or --vq PATH --reconstruction")
    settings = {name: getattr(options, name) for name in _SAMPLER_FIELDS} | {"kind": options.sampler}
    settings["quirks"] = None if options.quirks is None else parse_quirks(options.quirks)
    request = SamplingRequest(
        count=options.count,
        settings={name: value for name, value in settings.items() if value is not None},
        labels=options.labels,
        classifier=options.classifier,
        vq_path=options.vq,
        seed=options.seed,
        precision=options.precision,
        weights=options.weights,
        step=options.step,
    )
    return evaluate_images(options.run_folder, request, comparison, launch)


def summary(result: dict[str, Any]) -> str:
    """One line for people: the numbers of a result."""
    numbers = {name: value for name, value in result.items() if isinstance(value, float)}
    shown = [
        f"{name} {value:.4g}"
        for name, value in numbers.items()
        if math.isfinite(value) and not name.endswith("_standard_deviation")
    ]
    return f"{result['count']:,} images against {result['reference']['name']}: {', '.join(shown)}"
