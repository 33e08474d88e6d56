"""MaskGIT of ImageNet codes: the PGM authors' baseline, and Halton-MaskGIT's releases, in the same plain files.

Keys: ours, and `head.weight`, which is `tok_emb.weight` again (FACTS 2.1, 9).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pgm_scale.config import (
    MODEL_SIZES,
    MaskGITObjectiveConfig,
    MaskGITTransformerConfig,
    ModelConfig,
    SamplerConfig,
)
from pgm_scale.convert.checkpoint import HyperParameters
from pgm_scale.convert.formats.base import (
    HEAD_SIZE,
    Contents,
    DerivedKey,
    Format,
    Shapes,
    code_images,
    code_vocabulary,
    numbered,
    shape_of,
)

_VQ8_CODES = 1024  # of 256 pixels; smaller grids are of VQ-16
# No tensor tells the heads: those of the named sizes by width, as one is not of heads of 64.
_NUM_HEADS: dict[int, int] = {
    size["hidden_size"]: size["num_heads"]
    for name, size in MODEL_SIZES.items()
    if name.startswith("maskgit-")
}


def _describe(shapes: Shapes, hyper_parameters: HyperParameters) -> Contents:
    rows, hidden_size = shape_of(shapes, "tok_emb.weight", 2)
    codes, _ = shape_of(shapes, "pos_emb.weight", 2)
    num_classes = shape_of(shapes, "cls_emb.weight", 2)[0] - 1
    model = MaskGITTransformerConfig(
        hidden_size=hidden_size,
        num_heads=_NUM_HEADS.get(hidden_size, max(1, hidden_size // HEAD_SIZE)),
        num_blocks=numbered(shapes, "transformer.layers."),
        num_classes=num_classes,
        registers=shape_of(shapes, "reg_tokens.weight", 2)[0] if "reg_tokens.weight" in shapes else 0,
    )
    return Contents(
        model,
        MaskGITObjectiveConfig(),
        SamplerConfig(kind="halton", steps=32, guidance_schedule="constant"),
        code_vocabulary(rows + 1),  # its table has no row for BOS
        codes + 1,
        code_images(codes + 1, num_classes, 8 if codes == _VQ8_CODES else 16),
    )


def _token_table(model: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["tok_emb.weight"]


FORMAT = Format(
    name="maskgit",
    layout="image",
    prefix="",
    marks=("tok_emb.weight", "transformer.layers.0.attn.wq.weight"),
    not_marks=(),
    describe=_describe,
    fits=lambda model: isinstance(model, MaskGITTransformerConfig),
    hyper_parameters=lambda _: {},
    derived=(DerivedKey("head.weight", "last_norm.mlp.1.bias", _token_table),),
)
