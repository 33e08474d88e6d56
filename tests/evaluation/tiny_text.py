"""Tiny random models of text as exported folders, and Hugging Face judges, on the tokens of `tests.tiny_data`."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    AutoregressiveTransformerConfig,
    D3PMObjectiveConfig,
    DiffusionTransformerConfig,
    MDLMObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
    SamplerConfig,
)
from pgm_scale.data.manifest import TOKENIZER_NAME
from pgm_scale.export.folder import write_model_folder
from pgm_scale.files import sha256_file
from pgm_scale.models import build_model
from pgm_scale.trained_model import ModelDescription, Origin, TrainedModel
from tests.tiny_data import LENGTH, VOCABULARY

KINDS: dict[str, tuple[ModelConfig, ObjectiveConfig, SamplerConfig]] = {
    "pgm": (
        PartitionTransformerConfig(
            hidden_size=16, num_heads=2, num_encoder_blocks=1, num_decoder_blocks=1, condition_size=8
        ),
        PGMObjectiveConfig(),
        SamplerConfig(kind="pgm_uniform", steps=4),
    ),
    "mdlm": (
        DiffusionTransformerConfig(hidden_size=16, num_heads=2, num_blocks=2, condition_size=8),
        MDLMObjectiveConfig(),
        SamplerConfig(kind="ancestral_cached", steps=4),
    ),
    "d3pm": (
        DiffusionTransformerConfig(
            hidden_size=16, num_heads=2, num_blocks=2, condition_size=8, time_conditioned=True
        ),
        D3PMObjectiveConfig(),
        SamplerConfig(kind="ancestral", steps=4),
    ),
    "ar": (
        AutoregressiveTransformerConfig(hidden_size=16, num_heads=2, num_blocks=2),
        AutoregressiveObjectiveConfig(),
        SamplerConfig(kind="autoregressive", steps=4),
    ),
}


def word_tokenizer(words: int = VOCABULARY.size - 1) -> Tokenizer:
    """The words w0, w1, ...; w0 is BOS and EOS."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def export_tiny(kind: str, folder: Path, seed: int = 0, length: int = LENGTH) -> Path:
    """An exported folder of random weights, none of which is 0."""
    config, objective, sampler = KINDS[kind]
    torch.manual_seed(seed)
    model = build_model(config, VOCABULARY.size, length).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(parents=True)
    word_tokenizer().save(str(source / TOKENIZER_NAME))
    description = ModelDescription(
        config,
        objective,
        sampler,
        VOCABULARY,
        length,
        sha256_file(source / TOKENIZER_NAME),
        None,
        Origin("tiny", "abcdef", 7, "ema", f"{seed:064d}"),
    )
    write_model_folder(folder, TrainedModel(model, description, source), "card")
    return folder


def hugging_face_judge(folder: Path, words: int = VOCABULARY.size - 1, positions: int = LENGTH) -> Path:
    """A random GPT-2 of one block over `words` words."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=words,
        n_positions=positions,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(words), eos_token="w0", bos_token="w0"
    )
    tokenizer.save_pretrained(folder)
    return folder
