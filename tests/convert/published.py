"""Checkpoints in the published layouts, written from FACTS 1.5, 2.1 and 9 alone, with random weights."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pgm_scale.config import VQModelConfig
from pgm_scale.models.vq import VQModel

VOCAB, LENGTH, HIDDEN, CONDITION, CLASSES = 24, 12, 128, 16, 5
BLOCKS = 2
GRID_CODES = 9
Named = Iterable[tuple[str, tuple[int, ...]]]


def linear(name: str, rows: int, columns: int) -> Named:
    return [(f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,))]


def mlp_and_modulation(name: str, d: int, c: int | None) -> Named:
    rest = [*linear(f"{name}.mlp.0", 4 * d, d), *linear(f"{name}.mlp.2", d, 4 * d)]
    return rest if c is None else [*rest, *linear(f"{name}.adaLN_modulation", 6 * d, c)]


def self_block(name: str, d: int, c: int | None) -> Named:
    yield f"{name}.norm1.weight", (d,)
    yield f"{name}.attn_qkv.weight", (3 * d, d)
    yield f"{name}.attn_out.weight", (d, d)
    yield f"{name}.norm2.weight", (d,)
    yield from mlp_and_modulation(name, d, c)


def cross_block(name: str, d: int, c: int) -> Named:
    for norm in ("q_norm1", "kv_norm1", "norm2"):
        yield f"{name}.{norm}.weight", (d,)
    yield f"{name}.attn_q.weight", (d, d)
    yield f"{name}.attn_kv.weight", (2 * d, d)
    yield f"{name}.attn_out.weight", (d, d)
    yield from mlp_and_modulation(name, d, c)


def time_mlp(c: int) -> Named:
    return [*linear("sigma_map.mlp.0", c, 256), *linear("sigma_map.mlp.2", c, c)]


def output_layer(vocab: int, d: int, c: int | None) -> Named:
    yield "output_layer.norm_final.weight", (d,)
    yield from linear("output_layer.linear", vocab, d)
    if c is not None:
        yield from linear("output_layer.adaLN_modulation", 2 * d, c)


def group_swap(d: int) -> Named:
    yield "decoder.group_swap.base_embedding", (1, d)
    for part, rows in (("pre_query_norm", 0), ("query_processor", d), ("hidden_to_key_value", 2 * d)):
        weight = (d,) if rows == 0 else (rows, d)
        yield f"decoder.group_swap.{part}.weight", weight
        yield f"decoder.group_swap.{part}.bias", (rows or d,)
    yield from linear("decoder.group_swap.output_linear", d, d)


def pgm_parameters(
    vocab: int = VOCAB, d: int = HIDDEN, c: int = CONDITION, encoder: int = BLOCKS, decoder: int = BLOCKS
) -> Named:
    yield "vocab_embed.embedding", (vocab, d)
    yield from time_mlp(c)
    for i in range(encoder):
        yield from self_block(f"encoder.blocks.{i}", d, c)
    yield from group_swap(d)
    for j in range(decoder):
        yield from cross_block(f"decoder.layers.{j}", d, c)
    yield from output_layer(vocab, d, c)


def image_pgm_parameters(
    vocab: int = VOCAB, d: int = HIDDEN, encoder: int = BLOCKS, decoder: int = BLOCKS, classes: int = CLASSES
) -> Named:
    """The condition is as wide as the model, and its table is in the place of the time MLP."""
    for name, shape in pgm_parameters(vocab, d, d, encoder, decoder):
        if name == "sigma_map.mlp.0.weight":
            yield "cls_embed.embedding_table.weight", (classes + 1, d)
        elif not name.startswith("sigma_map"):
            yield name, shape
    yield "reg_tokens.weight", (2, d)


def mdlm_parameters(vocab: int = VOCAB, d: int = HIDDEN, c: int = CONDITION, blocks: int = BLOCKS) -> Named:
    yield "vocab_embed.embedding", (vocab, d)
    yield from time_mlp(c)
    for i in range(blocks):
        yield from self_block(f"blocks.{i}", d, c)
    yield from output_layer(vocab, d, c)


def ar_parameters(vocab: int = VOCAB, d: int = HIDDEN, blocks: int = BLOCKS) -> Named:
    yield "vocab_embed.embedding", (vocab, d)
    for i in range(blocks):
        yield from self_block(f"blocks.{i}", d, None)
    yield from output_layer(vocab, d, None)


def maskgit_parameters(
    rows: int, d: int, blocks: int, inner: int, codes: int, classes: int = CLASSES, registers: int = 1
) -> Named:
    yield "cls_emb.weight", (classes + 1, d)
    yield "tok_emb.weight", (rows, d)
    yield "pos_emb.weight", (codes, d)
    for i in range(blocks):
        name = f"transformer.layers.{i}"
        yield from linear(f"{name}.mlp.1", 6 * d, d)
        yield f"{name}.ln1.weight", (d,)
        for matrix in ("wq", "wk", "wv", "wo"):
            yield f"{name}.attn.{matrix}.weight", (d, d)
        yield f"{name}.ln2.weight", (d,)
        for matrix, shape in (("w1", (inner, d)), ("w2", (d, inner)), ("w3", (inner, d))):
            yield f"{name}.ff.{matrix}.weight", shape
    yield "last_norm.norm_final.weight", (d,)
    yield "last_norm.norm_final.bias", (d,)
    yield from linear("last_norm.mlp.1", 2 * d, d)
    yield "head.bias", (rows,)
    yield "reg_tokens.weight", (registers, d)


def drawn(parameters: Named, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.1
        + (1.0 if "norm" in name or ".ln" in name else 0.0)
        for name, shape in parameters
    }


def with_rotary(state: dict[str, Tensor], after: str, head: int = 64) -> dict[str, Tensor]:
    """The buffer in its published place."""
    inv_freq = 1.0 / (10000 ** (torch.arange(0, head, 2).float() / head))
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        full[name] = tensor
        if name == after:
            full["rotary_emb.inv_freq"] = inv_freq
    return full


def prefixed(state: dict[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def fast_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB - 1)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", bos_token="w22")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def hydra_config(**model: Any) -> Any:
    """With an interpolation that is resolved by nobody, and a list."""
    tree = {
        "mode": "train",
        "data": {"tokenizer_name_or_path": "gpt2", "cache_dir": "${oc.env:HOME}/cache"},
        "model": {"hidden_size": HIDDEN, "cond_dim": CONDITION, "length": LENGTH, "n_heads": 2, **model},
        "sampling": {"steps": [128, 64], "length": "${model.length}"},
        "optim": {"lr": 3e-4, "beta2": None},
        "time_conditioning": False,
    }
    return OmegaConf.create(tree)


def lightning_content(
    state: dict[str, Tensor], average: dict[str, Tensor] | None, config: Any, tokenizer: Any = None
) -> dict[str, Any]:
    """`state` by published names without prefix; the average's values are a list in order."""
    content = {
        "epoch": 3,
        "global_step": 50_000,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": prefixed(state, "backbone."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.5)}},
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 1e-4}],
            }
        ],
        "lr_schedulers": [{"last_epoch": 7, "lr_lambdas": [{"value": 0.5}]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": config, "tokenizer": tokenizer, "vocab_size": VOCAB},
        "sampler": {"random_state": {"epoch": 0, "counter": np.int64(7), "order": np.arange(4)}},
    }
    if average is not None:
        shadow = [value for name, value in average.items() if name != "rotary_emb.inv_freq"]
        content["ema"] = {"decay": 0.9999, "num_updates": 50_000, "shadow_params": shadow}
    return content


def save(content: Any, path: Path, legacy: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def write_lightning(
    path: Path, state: dict[str, Tensor], average: dict[str, Tensor] | None = None, **model: Any
) -> Path:
    return save(lightning_content(state, average, hydra_config(**model), fast_tokenizer()), path)


def write_image(path: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    named = prefixed(state, prefix)
    content = {"iter": 500_400, "global_epoch": 100, "model_state_dict": named, "optimizer_state_dict": None}
    return save(content, path)


def write_hugging_face(folder: Path, state: dict[str, Tensor], config: Any, binary: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if binary:
        save(OrderedDict(state), folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MDLM_HF_CONFIG = {
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "vocab_size": VOCAB,
    "model_length": LENGTH,
    "hidden_dim": HIDDEN,
    "cond_dim": CONDITION,
    "n_blocks": BLOCKS,
    "n_heads": 2,
    "dropout": 0.1,
    "time_conditioning": False,
}
SDTT_CONFIG = {
    "mode": "train",
    "tokenizer": {"name": "gpt2"},
    "model": {
        "type": "ddit",
        "hidden_size": HIDDEN,
        "n_blocks": BLOCKS,
        "n_heads": 2,
        "cond_dim": CONDITION,
        "length": LENGTH,
        "dropout": "${defaults.dropout}",
    },
    "parameterization": {"name": "multi-round-sdtt", "num_distill_steps": 2},
}


def pgm_text_state(seed: int = 1) -> dict[str, Tensor]:
    return with_rotary(drawn(pgm_parameters(), seed), "vocab_embed.embedding")


def mdlm_state(seed: int = 1) -> dict[str, Tensor]:
    return with_rotary(drawn(mdlm_parameters(), seed), "sigma_map.mlp.2.bias")


def ar_state(seed: int = 1) -> dict[str, Tensor]:
    return with_rotary(drawn(ar_parameters(), seed), "vocab_embed.embedding")


def image_pgm_state(seed: int = 1) -> dict[str, Tensor]:
    return with_rotary(drawn(image_pgm_parameters(), seed), "vocab_embed.embedding")


def maskgit_state(seed: int = 1, hidden: int = 24, inner: int = 256) -> dict[str, Tensor]:
    """`head.weight` is the token table again, in front of the head's bias."""
    state = drawn(maskgit_parameters(VOCAB - 1, hidden, BLOCKS, inner, GRID_CODES), seed)
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "head.bias":
            full["head.weight"] = state["tok_emb.weight"]
        full[name] = tensor
    return full


def vq_state(seed: int = 1) -> dict[str, Tensor]:
    """Of the authors' architecture, small; the buffer in its published place."""
    torch.manual_seed(seed)
    config = VQModelConfig(
        codebook_size=VOCAB - 2,
        code_size=4,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        z_channels=8,
    )
    state: dict[str, Tensor] = {}
    for name, tensor in VQModel(config).state_dict().items():
        state[name] = tensor.clone()
        if name == "quantize.embedding.weight":
            state["quantize.codebook_used"] = torch.arange(65_536.0)
    return state
