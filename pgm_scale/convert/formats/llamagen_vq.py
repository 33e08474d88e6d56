"""LlamaGen's VQ tokenizer, as published: one file {model, ema?}, to the folder that `VQTokenizer.load` reads.

Keys: ours, and the buffer `quantize.codebook_used`, which tells what training chose: left out on the way in, zeros
on the way out (FACTS 9).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pgm_scale.convert.checkpoint import ForeignCheckpoint
from pgm_scale.errors import UserError
from pgm_scale.export.folder import new_folder
from pgm_scale.trained_model import Weights
from pgm_scale.vq_tokenizer import VQTokenizer

NAME = "llamagen-vq"
_CODEBOOK_USED = "quantize.codebook_used"
_CODEBOOK_USED_SIZE = 65_536


def import_vq(
    checkpoint: ForeignCheckpoint, format_name: str | None, weights: Weights, output: Path
) -> VQTokenizer:
    """Write the folder: it appears whole, or not at all.

    Raises:
        UserError: another format was asked for, the weights are no VQ tokenizer's, or it cannot be written.
    """
    if format_name not in (None, NAME):
        raise UserError(f"{checkpoint.path} is not {format_name} but {NAME}; leave out --from")
    tensors = checkpoint.tensors
    if weights == "ema" and checkpoint.average_by_key is not None:
        tensors = checkpoint.average_by_key
    vq = VQTokenizer.of_tensors(tensors, checkpoint.path)
    with new_folder(output) as staged:
        vq.save(staged)
    return vq


def published_vq(vq: VQTokenizer) -> dict[str, Tensor]:
    """All published keys, in fp32, the buffer in its place behind the codebook."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in vq.model.state_dict().items():
        tensors[name] = tensor.detach().cpu().contiguous()
        if name == "quantize.embedding.weight":
            tensors[_CODEBOOK_USED] = torch.zeros(_CODEBOOK_USED_SIZE)
    return tensors
