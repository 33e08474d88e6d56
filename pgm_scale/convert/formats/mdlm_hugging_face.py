"""MDLM as a Hugging Face folder: config.json with `model_type` mdlm, and raw weights (FACTS 9).

Keys: those of `mdlm`, which is Lightning's.
"""

from __future__ import annotations

from dataclasses import replace

from pgm_scale.config import DiffusionTransformerConfig
from pgm_scale.convert.checkpoint import HyperParameters
from pgm_scale.convert.formats import mdlm
from pgm_scale.trained_model import ModelDescription


def _hyper_parameters(description: ModelDescription) -> HyperParameters:
    model = description.model
    assert isinstance(model, DiffusionTransformerConfig)
    return {
        "model_type": "mdlm",
        "vocab_size": description.vocabulary.size,
        "model_length": description.length_tokens,
        "hidden_dim": model.hidden_size,
        "cond_dim": model.condition_size,
        "n_blocks": model.num_blocks,
        "n_heads": model.num_heads,
        "dropout": model.dropout,
        "time_conditioning": model.time_conditioned,
    }


FORMAT = replace(
    mdlm.FORMAT,
    name="mdlm-hf",
    layout="hugging_face",
    is_told_by=lambda hyper_parameters: hyper_parameters.get("model_type") == "mdlm",
    hyper_parameters=_hyper_parameters,
)
