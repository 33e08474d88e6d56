"""SDTT's students and teachers as Hugging Face folders: config.json is the Hydra configuration (FACTS 9).

Keys: those of `mdlm`, which is Lightning's; of a wrapped teacher `backbone.` is there twice. Raw weights only.
"""

from __future__ import annotations

from dataclasses import replace

from pgm_scale.convert.checkpoint import HyperParameters
from pgm_scale.convert.formats import mdlm
from pgm_scale.trained_model import ModelDescription

_TOKENIZERS = {50_258: "gpt2", 30_522: "bert-base-uncased"}  # by the rows of the token table


def _hyper_parameters(description: ModelDescription) -> HyperParameters:
    size = description.vocabulary.size
    tokenizer = {"tokenizer": {"name": _TOKENIZERS[size]}} if size in _TOKENIZERS else {}
    return {"model": mdlm.model_section(description), "parameterization": {"name": "sdtt"}} | tokenizer


FORMAT = replace(
    mdlm.FORMAT,
    name="sdtt",
    layout="hugging_face",
    is_told_by=lambda hyper_parameters: isinstance(hyper_parameters.get("model"), dict),
    hyper_parameters=_hyper_parameters,
)
