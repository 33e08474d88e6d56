"""The formats of published checkpoints, one file each; `llamagen_vq` is apart, as it is no language model."""

from __future__ import annotations

from pgm_scale.convert.formats import (
    autoregressive,
    maskgit,
    mdlm,
    mdlm_hugging_face,
    pgm_image,
    pgm_text,
    sdtt,
)
from pgm_scale.convert.formats.base import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (pgm_text, pgm_image, maskgit, mdlm, mdlm_hugging_face, autoregressive, sdtt)
}
