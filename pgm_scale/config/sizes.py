"""Named sizes of models: what `model.size` stands for."""

from __future__ import annotations

from typing import Any


def _pgm_size(encoder: int, decoder: int, hidden: int, head: int = 64) -> dict[str, Any]:
    return {
        "kind": "partition_transformer",
        "hidden_size": hidden,
        "num_heads": hidden // head,
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


def _stack_size(kind: str, blocks: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"kind": kind, "hidden_size": hidden, "num_heads": heads, "num_blocks": blocks}


def _image_pgm_size(encoder: int, decoder: int) -> dict[str, Any]:
    return _pgm_size(encoder, decoder, 1024) | {"condition_size": 1024, "num_classes": 1000, "registers": 2}


# `model.size` names one of these; keys given beside it win. Heads are 64 wide, but for SDTT's 24 x 1536.
MODEL_SIZES: dict[str, dict[str, Any]] = {
    **{f"pgm-{e}-{m}-{h}": _pgm_size(e, m, h) for e, m, h in [(6, 6, 768), (8, 8, 768), (6, 6, 1024)]},
    **{f"pgm-{e}-{m}-{h}": _pgm_size(e, m, h) for e, m, h in [(8, 4, 768), (10, 2, 768), (4, 8, 768)]},
    "pgm-10-6-768": _pgm_size(10, 6, 768),
    # By their parameters with 50,258 tokens: 202,708,818; 1,261,921,618; 7,024,895,314; 30,791,920,978;
    # 69,277,648,210. The widths and depths are those of language models of these sizes, in heads of 128.
    "pgm-0.2b": _pgm_size(8, 8, 768),
    "pgm-1.3b": _pgm_size(10, 10, 2048, head=128),
    "pgm-7b": _pgm_size(16, 16, 4096, head=128),
    "pgm-30b": _pgm_size(24, 24, 7168, head=128),
    "pgm-70b": _pgm_size(42, 42, 8192, head=128),
    "mdlm-12-768": _stack_size("diffusion_transformer", 12, 768, 12),
    "mdlm-24-1024": _stack_size("diffusion_transformer", 24, 1024, 16),
    "mdlm-24-1536": _stack_size("diffusion_transformer", 24, 1536, 24),
    "ar-12-768": _stack_size("autoregressive_transformer", 12, 768, 12),
    "image-pgm-12-12": _image_pgm_size(12, 12),
    "image-pgm-14-10": _image_pgm_size(14, 10),
    "maskgit-tiny": _stack_size("maskgit_transformer", 6, 384, 6),
    # The published 6 heads do not divide a width of 512; the parameters' shapes are the same with 8.
    "maskgit-small": _stack_size("maskgit_transformer", 12, 512, 8),
    "maskgit-base": _stack_size("maskgit_transformer", 12, 768, 12),
    "maskgit-large": _stack_size("maskgit_transformer", 24, 1024, 16),
    "maskgit-xlarge": _stack_size("maskgit_transformer", 28, 1152, 16),
    "vq-8": {"kind": "vq", "channel_multipliers": (1, 2, 2, 4)},
    "vq-16": {"kind": "vq", "channel_multipliers": (1, 1, 2, 2, 4)},
}
