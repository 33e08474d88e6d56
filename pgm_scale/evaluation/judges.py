"""Judges: autoregressive models that score the samples of others, or give features of them.

A Hugging Face causal LM from a local folder, or one of our own autoregressive runs or exports. Nothing is ever
downloaded. A judge computes in fp32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from pgm_scale.evaluation.extra import require
from pgm_scale.files import read_bounded, sha256_file
from pgm_scale.loading import load
from pgm_scale.model_folder import CONFIG_NAME, MODEL_TYPE
from pgm_scale.models.autoregressive import AutoregressiveTransformer
from pgm_scale.models.readout import Selected, TokenNLL
from pgm_scale.run_folder import RunFolder
from pgm_scale.sampling.output import load_tokenizer
from pgm_scale.trained_model import TrainedModel

# Logits held at once: 0.5 GB in fp32 on a CPU, 4 GB on a GPU.
_CPU_LOGITS = 1 << 27
_GPU_LOGITS = 1 << 30
_HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt")


class Judge(Protocol):
    """A causal language model with its tokenizer.

    Attributes:
        record: what it is, with a hash of its weights and tokenizer, in plain JSON values.
        eos_id: which also pads.
        max_tokens: the longest sequence that it takes.
    """

    record: dict[str, Any]
    eos_id: int
    max_tokens: int

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens in the text recognised."""

    def why_not_shared(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> str | None:
        """None if the judge gives every token of `tokenizer` but the mask the same id; else what differs."""

    def token_nll(self, tokens_BL: np.ndarray, batch_sequences: int) -> Iterator[np.ndarray]:
        """fp32 NLL in nats of tokens 1 to L - 1, [b, L - 1], of one batch after the other."""

    def features(self, tokens: list[list[int]], batch_sequences: int) -> Iterator[np.ndarray]:
        """fp32 [b, H]: the last hidden state of the last token of each sequence, batch after batch."""


def load_judge(path: str, device: torch.device) -> Judge:
    """The judge in a folder, whatever kind it is.

    Raises:
        UserError: no model there, one that is not autoregressive, or a missing package.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"--judge {path} is no folder; give a local folder of a Hugging Face causal LM, or one of our AR runs"
        )
    if _is_ours(folder):
        return OwnJudge(folder, device)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"--judge {path} has neither a config.json nor a run in it; give a Hugging Face causal LM or an AR run"
        )
    return HuggingFaceJudge(folder, device)


def _is_ours(folder: Path) -> bool:
    if RunFolder(folder).identity_path.is_file():
        return True
    try:
        tree = json.loads(read_bounded(folder / CONFIG_NAME))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("model_type") == MODEL_TYPE


class OwnJudge:
    """An autoregressive run or export, with EMA weights where it has them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._trained: TrainedModel = load(folder, device=device)
        if not isinstance(self._trained.model, AutoregressiveTransformer):
            raise UserError(
                f"--judge {folder} is a {type(self._trained.model).__name__}, which gives no next-token "
                "probabilities; give an autoregressive run"
            )
        self._tokenizer = load_tokenizer(self._trained.tokenizer_path)
        description, self._device = self._trained.description, device
        self.eos_id = description.vocabulary.eos_id
        self.max_tokens = description.length_tokens
        self.record = {
            "kind": "pgm_scale",
            "path": str(folder),
            "sha256": description.origin.checkpoint_sha256,
            "step": description.origin.step,
            "weights": description.origin.weights,
            "precision": "fp32",
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [
            encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def why_not_shared(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> str | None:
        return _difference(
            tokenizer, vocabulary, self._tokenizer.id_to_token, self._trained.description.vocabulary.size
        )

    def token_nll(self, tokens_BL: np.ndarray, batch_sequences: int) -> Iterator[np.ndarray]:
        mask_id = self._trained.description.vocabulary.mask_id
        for start in range(0, len(tokens_BL), batch_sequences):
            tokens = torch.from_numpy(tokens_BL[start : start + batch_sequences]).to(self._device)
            with torch.inference_mode():
                nll = self._trained.model(tokens[:, :-1], readout=TokenNLL(tokens[:, 1:], mask_id))
            yield nll.float().cpu().numpy()

    def features(self, tokens: list[list[int]], batch_sequences: int) -> Iterator[np.ndarray]:
        for padded_bL, last_rows_b in _padded(tokens, batch_sequences, self.eos_id):
            readout = Selected(last_rows_b.to(self._device), lambda hidden, output_linear: hidden)
            with torch.inference_mode():
                hidden_bH = self._trained.model(padded_bL.to(self._device), readout=readout)
            yield hidden_bH.float().cpu().numpy()


class HuggingFaceJudge:
    """A causal LM that `transformers` reads from a local folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        transformers = require("transformers", "--judge")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32
            )
        except Exception as error:  # whatever a foreign folder makes the library raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--judge {folder}: transformers cannot load it as a causal LM: {reason}; give a complete folder"
            ) from None
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"--judge {folder}: its tokenizer has no EOS token, which pads; set eos_token")
        self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.eos_id = int(self._tokenizer.eos_token_id)
        self.max_tokens = _longest(self._model.config)
        self._vocabulary_size = int(self._model.get_input_embeddings().num_embeddings)
        self.record = {
            "kind": "huggingface",
            "path": str(folder),
            "sha256": folder_sha256(folder),
            "model_type": self._model.config.model_type,
            "precision": "fp32",
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, verbose=False)["input_ids"]

    def why_not_shared(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> str | None:
        tokens = self._tokenizer.convert_ids_to_tokens(range(len(self._tokenizer)))
        return _difference(tokenizer, vocabulary, dict(enumerate(tokens)).get, self._vocabulary_size)

    def token_nll(self, tokens_BL: np.ndarray, batch_sequences: int) -> Iterator[np.ndarray]:
        limit = _CPU_LOGITS if self._device.type == "cpu" else _GPU_LOGITS
        batch = max(1, min(batch_sequences, limit // (tokens_BL.shape[1] * self._vocabulary_size)))
        for start in range(0, len(tokens_BL), batch):
            tokens = torch.from_numpy(tokens_BL[start : start + batch]).to(self._device)
            with torch.inference_mode():
                logits_bLV = self._model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
                nll = F.cross_entropy(logits_bLV.transpose(1, 2), tokens[:, 1:], reduction="none")
            yield nll.cpu().numpy()

    def features(self, tokens: list[list[int]], batch_sequences: int) -> Iterator[np.ndarray]:
        for padded_bL, last_rows_b in _padded(tokens, batch_sequences, self.eos_id):
            with torch.inference_mode():
                output = self._model.base_model(input_ids=padded_bL.to(self._device), use_cache=False)
            yield output.last_hidden_state.flatten(0, 1)[last_rows_b.to(self._device)].float().cpu().numpy()


def _padded(
    tokens: list[list[int]], batch_sequences: int, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches int64 [b, L], padded on the right, where a causal model does not look; rows of their last tokens."""
    for start in range(0, len(tokens), batch_sequences):
        batch = [sequence or [pad_id] for sequence in tokens[start : start + batch_sequences]]
        length = max(map(len, batch))
        padded = [sequence + [pad_id] * (length - len(sequence)) for sequence in batch]
        last = [row * length + len(sequence) - 1 for row, sequence in enumerate(batch)]
        yield torch.tensor(padded), torch.tensor(last)


def _longest(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 1 << 30  # positions are not limited


def _difference(
    tokenizer: Tokenizer, vocabulary: Vocabulary, judge_token: Any, judge_size: int
) -> str | None:
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i != vocabulary.mask_id}
    for token_id, token in sorted(tokens.items()):
        theirs = judge_token(token_id) if token_id < judge_size else None
        if theirs != token:
            return f"token {token_id} is {token!r} of the model and {theirs!r} of the judge"
    return None


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of a model folder's weights, settings and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _HASHED_SUFFIXES:
            digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()
