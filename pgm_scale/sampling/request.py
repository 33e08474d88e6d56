"""What the command line asks of a run's model: settings for all runs, and those for one kind of run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pgm_scale.config import QUIRKS
from pgm_scale.errors import UserError
from pgm_scale.sampling.output import OutputFormat

# The command-line option of a field, where it is not the field's name.
_FLAGS = {
    "prompts": "--prompt",
    "template": "--infill",
    "output_format": "--format",
    "vq_path": "--vq",
    "inpaint_path": "--inpaint",
}


@dataclass(frozen=True)
class TextOptions:
    """At most one of `prompts` and `template`; `output_format` None means that of the output's suffix."""

    prompts: list[str] | None = None
    template: str | None = None
    output_format: OutputFormat | None = None


@dataclass(frozen=True)
class ImageOptions:
    """None means the run's own setting; of `inpaint_path`, either `box` is generated or all but `keep_box`.

    Attributes:
        box, keep_box: pixels, `x0,y0,x1,y1`.
        quirks: names between commas, or `none`.
    """

    classes: list[str] | None = None
    guidance: float | None = None
    guidance_schedule: Literal["constant", "linear"] | None = None
    temperature_warmup_steps: int | None = None
    choice_temperature: float | None = None
    quirks: str | None = None
    vq_path: str | None = None
    inpaint_path: str | None = None
    box: str | None = None
    keep_box: str | None = None
    columns: int | None = None


@dataclass(frozen=True)
class SampleRequest:
    """None means the run's own setting. `known_path` replaces what `text` and `images` say is known."""

    known_path: str | None = None
    count: int = 1
    step: int | None = None  # of the checkpoint
    kind: str | None = None
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 1
    batch_sequences: int = 32
    output_path: str | None = None
    weights: Literal["ema", "weight"] = "ema"
    text: TextOptions = TextOptions()
    images: ImageOptions = ImageOptions()


def parse_quirks(text: str) -> tuple[str, ...]:
    """`sampler.quirks` of the option `--quirks`: names between commas, or `none`, which turns off the run's.

    Raises:
        UserError: there is no such quirk.
    """
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in QUIRKS:
            raise UserError(
                f"--quirks {text}: {name!r} is not one of {', '.join(QUIRKS)}; give these between commas, or none"
            )
    return tuple(names)


def check_choice_temperature(given: float | None, kind: str) -> None:
    """Raises: UserError: it was given to a sampler that chooses no positions by confidence."""
    if given is not None and kind != "confidence":
        raise UserError(f"--choice-temperature is of --sampler confidence, not of {kind}; leave it out")


def refuse_options(options: TextOptions | ImageOptions, run: str, content: str) -> None:
    """A `UserError` that lists the options which were given, if any, to a run that has no use for them."""

    given = [
        _FLAGS.get(option.name, f"--{option.name.replace('_', '-')}")
        for option in fields(options)
        if getattr(options, option.name) != option.default
    ]
    if given:
        raise UserError(
            f"{run} is a run of {content}, for which there is no {', '.join(given)}; leave that out"
        )
