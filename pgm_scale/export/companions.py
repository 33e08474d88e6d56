"""The small files that transformers reads beside the weights."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from pgm_scale import config as configuration
from pgm_scale.sampling.output import load_tokenizer
from pgm_scale.trained_model import ModelDescription, TrainedModel

MASK_TOKEN = "[MASK]"


def tokenizer_config(trained: TrainedModel) -> dict[str, Any]:
    """tokenizer_config.json of a text model: what AutoTokenizer makes of tokenizer.json.

    A mask that is the row after the tokenizer's last token gets a name, for which transformers adds just that row.
    """
    tokenizer, vocabulary = load_tokenizer(trained.tokenizer_path), trained.description.vocabulary
    names = {
        "bos_token": tokenizer.id_to_token(vocabulary.bos_id),
        "eos_token": tokenizer.id_to_token(vocabulary.eos_id),
        "pad_token": None if vocabulary.pad_id is None else tokenizer.id_to_token(vocabulary.pad_id),
        "mask_token": _mask_token(tokenizer, vocabulary.mask_id),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # no token types
        "model_max_length": trained.description.length_tokens,
        "clean_up_tokenization_spaces": False,  # else decoding would not give the text back
        **{name: token for name, token in names.items() if token is not None},
    }


def _mask_token(tokenizer: Tokenizer, mask_id: int) -> str | None:
    name = tokenizer.id_to_token(mask_id)
    if name is None and mask_id == tokenizer.get_vocab_size() and tokenizer.token_to_id(MASK_TOKEN) is None:
        return MASK_TOKEN
    return name


def generation_config(description: ModelDescription) -> dict[str, Any]:
    """generation_config.json: our sampler's settings, and those of them that transformers' `generate` has too."""
    sampler, vocabulary = description.sampler, description.vocabulary
    return {
        "do_sample": True,
        "temperature": sampler.temperature,
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "max_length": description.length_tokens,
        "use_cache": False,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.eos_id if vocabulary.pad_id is None else vocabulary.pad_id,
        "sampler": configuration.to_mapping(sampler),
    }
