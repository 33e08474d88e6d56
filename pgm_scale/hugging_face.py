"""`import pgm_scale.hugging_face`: from then on transformers' AutoModel loads exported folders with our classes."""

from pgm_scale.export.hugging_face import PGMScaleConfig, PGMScaleForCausalLM, PGMScaleModel, register

__all__ = ["PGMScaleConfig", "PGMScaleForCausalLM", "PGMScaleModel"]

register()
