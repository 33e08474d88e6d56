"""What is known of a foreign model, and what the user says over it, to a `ModelDescription`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pgm_scale import config as configuration
from pgm_scale.config.parsing import apply_override
from pgm_scale.convert.checkpoint import HyperParameters
from pgm_scale.convert.formats.base import Contents
from pgm_scale.convert.tokenizers import Companion
from pgm_scale.errors import UserError
from pgm_scale.model_folder import grid_problems, read_tree
from pgm_scale.trained_model import ModelDescription, Origin

_SETTABLE = ("model", "objective", "sampler", "vocabulary", "length_tokens", "images")
# Files that we write say what published ones do not, under a key of their own beside the published ones.
_OWN_KEY = "pgm_scale"
_OWN = ("objective", "sampler", "vocabulary", "length_tokens")


def own_words(description: ModelDescription) -> HyperParameters:
    """What our files say besides the published hyper-parameters, as plain values."""
    tree = configuration.to_mapping(description)
    return {_OWN_KEY: {key: tree[key] for key in _OWN}}


def describe(
    contents: Contents,
    hyper_parameters: HyperParameters,
    origin: Origin,
    given: Companion,
    settings: Sequence[str],
) -> ModelDescription:
    """Of what the format knows, over it what a file of ours says, and over that the settings.

    Raises:
        UserError: all settings that are unknown, of a wrong type, or do not go together.
    """
    description = ModelDescription(
        contents.model,
        contents.objective,
        contents.sampler,
        contents.vocabulary,
        contents.length_tokens,
        given.sha256,
        contents.images,
        origin,
    )
    tree, problems = configuration.to_mapping(description), list[str]()
    own = hyper_parameters.get(_OWN_KEY)
    if isinstance(own, Mapping):
        tree |= {key: own[key] for key in _OWN if key in own}
    for setting in settings:
        if setting.partition("=")[0].split(".")[0] in _SETTABLE:
            apply_override(tree, setting, problems)
        else:
            problems.append(f"{setting}: not one of {', '.join(_SETTABLE)}")
    parsed, faults = read_tree(tree)
    problems += faults
    if parsed is not None:
        parsed = _with_images(parsed, given, any(setting.startswith("images.") for setting in settings))
        problems += _problems(parsed, given)
    if problems or parsed is None:
        raise UserError(
            f"{origin.source} is of a model that cannot be; use --set KEY=VALUE: {'; '.join(problems)}"
        )
    return parsed


def _with_images(description: ModelDescription, given: Companion, as_set: bool) -> ModelDescription:
    """Sides that follow from the length and the tokenizer."""
    images, vq = description.images, given.vq
    if images is None or as_set or images.grid_side < 1:
        return description
    side = math.isqrt(max(1, description.length_tokens - 1))
    pixels_a_code = images.side_pixels // images.grid_side if vq is None else vq.downsampling
    channels = images.channels if vq is None else vq.config.image_channels
    sides = replace(images, grid_side=side, side_pixels=side * pixels_a_code, channels=channels)
    return replace(description, images=sides)


def _problems(description: ModelDescription, given: Companion) -> list[str]:
    problems, vocabulary = grid_problems(description), description.vocabulary
    if vocabulary.size <= len({vocabulary.mask_id, vocabulary.bos_id}):
        problems.append(f"vocabulary: {vocabulary.size} rows leave no token but the mask and BOS")
    if given.largest_id is not None and given.largest_id >= vocabulary.size:
        problems.append(
            f"--tokenizer has token {given.largest_id}, the model {vocabulary.size} rows; give the one it was "
            "trained with"
        )
    if given.vq is not None and given.vq.config.codebook_size + 2 != vocabulary.size:
        problems.append(
            f"--tokenizer has {given.vq.config.codebook_size} codes, the model {vocabulary.size - 2}"
        )
    return problems
