"""Whether a run's model and objective are made for what is in the data, told before anything is built."""

from __future__ import annotations

from pgm_scale.config import RunConfig, VQModelConfig
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.models.vq import downsampling

_CONTENT_OF_OBJECTIVE = {"vq": "pixels", "image_pgm": "codes", "maskgit": "codes"}  # the others: text
_HOW = {"text": "prepare text", "codes": "prepare imagenet-vq", "pixels": "prepare images"}


def content_problems(config: RunConfig, manifest: DatasetManifest) -> list[str]:
    """What the objective and the model need of the training split, one line each."""
    images = manifest.images
    found = "text" if images is None else images.tokens
    needed = _CONTENT_OF_OBJECTIVE.get(config.objective.kind, "text")
    if found != needed:
        return [
            f"objective.kind {config.objective.kind} needs {needed}, but data.train has {found}; "
            f"give data of `pgm-scale {_HOW[needed]}`, or another objective"
        ]
    if images is None:
        return []
    model, classes = config.model, len(images.class_names)
    if not isinstance(model, VQModelConfig):
        num_classes = getattr(model, "num_classes", 0)
        if num_classes == classes:
            return []
        return [
            f"model.num_classes {num_classes}, but data.train has {classes} classes; "
            f"set model.num_classes={classes}"
        ]
    problems = []
    if model.image_channels != images.channels:
        problems.append(
            f"model.image_channels {model.image_channels}, but the images of data.train have {images.channels}; "
            f"set model.image_channels={images.channels}"
        )
    if images.side_pixels % downsampling(model):
        problems.append(
            f"model.channel_multipliers: {len(model.channel_multipliers)} levels need sides divisible by "
            f"{downsampling(model)}, but the images of data.train have {images.side_pixels}; "
            "use fewer, or prepare another --size"
        )
    return problems
