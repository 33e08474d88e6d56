"""How far two forms of one model are apart: their logits on fixed pseudo-random rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.models.partition_transformer import PartitionTransformer
from pgm_scale.models.row_logits import row_logits
from pgm_scale.sampling import class_count
from pgm_scale.trained_model import TrainedModel

ROWS = 4
MAX_LOGITS = 1 << 26  # of all rows together, 256 MiB in fp32: rows of large models are cut to fewer tokens
SEED = 20


@dataclass(frozen=True)
class LogitDifference:
    """How far logits are apart. Softmax does not see a shift of all logits of a position; here it counts.

    Attributes:
        max_absolute: the largest difference.
        relative_rms: root mean square of the differences over the standard deviation of the first ones.
        spread: that standard deviation, over the tokens, of all positions together.
    """

    max_absolute: float
    relative_rms: float
    spread: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> LogitDifference:
        """Of logits `[..., V]` of equal shape."""
        difference = (second - first).float()
        spread = (first - first.mean(dim=-1, keepdim=True)).square().mean().sqrt().item()
        rms = difference.square().mean().sqrt().item()
        relative = rms / spread if spread else (0.0 if rms == 0 else float("inf"))
        return cls(difference.abs().max().item(), relative, spread)


@torch.inference_mode()
def probe_logits(trained: TrainedModel) -> Tensor:
    """fp32 logits on the host, of rows of tokens that depend on the vocabulary and the length alone.

    Half of the tokens of each row are masked; a Partition Transformer gets unmasked rows and a random partition.
    """
    description, model = trained.description, trained.model
    vocabulary, length = description.vocabulary, description.length_tokens
    if description.images is None:
        length = min(length, max(2, MAX_LOGITS // (ROWS * vocabulary.size)))
    generator = torch.Generator().manual_seed(SEED)
    tokens_BL = _random_rows(vocabulary, length, generator)
    masked_BL = torch.rand(tokens_BL.shape, generator=generator) < 0.5
    masked_BL[:, 0] = False
    classes = class_count(model)
    classes_B = torch.randint(classes + 1, (ROWS,), generator=generator) if classes else None
    groups_BL: Tensor | None = None
    if isinstance(model, PartitionTransformer):
        groups_BL = masked_BL.long()
    elif description.model.kind != "autoregressive_transformer":
        tokens_BL = tokens_BL.masked_fill(masked_BL, vocabulary.mask_id)
    sigma_B = (
        torch.rand(ROWS, generator=generator)
        if getattr(description.model, "time_conditioned", False)
        else None
    )
    device = next(model.parameters()).device
    optional = [None if x is None else x.to(device) for x in (groups_BL, classes_B, sigma_B)]
    return row_logits(model, tokens_BL.to(device), vocabulary.mask_id, *optional).float().cpu()


def _random_rows(vocabulary: Vocabulary, length: int, generator: torch.Generator) -> Tensor:
    """int64 `[ROWS, length]`: BOS and any tokens but BOS and the mask."""
    reserved = {vocabulary.mask_id, vocabulary.bos_id}
    ids = torch.tensor([token for token in range(vocabulary.size) if token not in reserved])
    tokens_BL = ids[torch.randint(len(ids), (ROWS, length), generator=generator)]
    tokens_BL[:, 0] = vocabulary.bos_id
    return tokens_BL
