"""How many floating-point operations a forward pass takes: what model FLOPs utilisation divides by.

Matrix products and attention only, 2 operations a multiply-add. What happens once a call or a sequence whatever its
tokens (the time MLP, adaLN) and all element-wise work is left out. The backward pass takes twice the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    VQModelConfig,
)
from pgm_scale.models.blocks import MLP_RATIO
from pgm_scale.models.maskgit import feed_forward_size
from pgm_scale.models.stages import stream_rows
from pgm_scale.models.vq import VQModel


def forward_flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> float:
    """Expected forward FLOPs a token of a sequence of `length`, logits of every position included."""
    if isinstance(config, VQModelConfig):
        return _vq_flops(config, length) / length
    hidden = config.hidden_size
    output = 2 * hidden * vocab_size
    match config:
        case PartitionTransformerConfig():
            sizes = partition_sizes(config, length)
            processor_matrices = 1 if config.group_swap_processor == "linear" else 2 * MLP_RATIO

            def reads_other(matrices: int) -> float:
                """With so many matrices a query, and two more a key."""
                products = 2 * hidden**2 * (matrices * sizes.queries + 2 * sizes.keys)
                return products + sizes.queries * _attention(hidden, sizes.other_keys)

            encoder = config.num_encoder_blocks * sizes.keys * _block(hidden, sizes.own_keys)
            decoder = config.num_decoder_blocks * reads_other(2 + 2 * MLP_RATIO)
            group_swap = reads_other(processor_matrices + 1)
            return (encoder + group_swap + decoder + sizes.queries * output) / length
        case DiffusionTransformerConfig():
            return config.num_blocks * _block(hidden, length) + output
        case AutoregressiveTransformerConfig():
            return config.num_blocks * _block(hidden, (length + 1) / 2) + output
        case MaskGITTransformerConfig():  # without BOS: what it computes is shared out over the data's tokens
            codes, rows = length - 1, length - 1 + config.registers
            feed_forward = 2 * 3 * hidden * feed_forward_size(hidden)
            block = 2 * 4 * hidden**2 + feed_forward + _attention(hidden, rows)
            return (config.num_blocks * rows * block + codes * 2 * hidden * (vocab_size - 1)) / length


@cache
def _vq_flops(config: VQModelConfig, length: int) -> int:
    """Of an image of `length` values, the search for the nearest codes included; counted without memory."""
    with torch.device("meta"):
        model, pixels_BL = VQModel(config), torch.empty(1, length, dtype=torch.uint8)
    # The counter knows products of matrices on every device, but attention only on some.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels_BL, readout=lambda passed: passed)
    return counter.get_total_flops()


@dataclass(frozen=True)
class PartitionSizes:
    """Of a sequence in the Partition Transformer's training layout, whose groups have expected sizes.

    Attributes:
        keys, queries: tokens of the encoder's and of the decoder's stream.
        own_keys: how many keys a key's own group has on average, itself included.
        other_keys: how many keys the group has that a query reads.
    """

    keys: int
    queries: int
    own_keys: float
    other_keys: float


def partition_sizes(config: PartitionTransformerConfig, length: int) -> PartitionSizes:
    """With a number of queries in group 1 that is uniform on 0..Q, as a uniform time gives.

    Other mask schedules differ little: arccos has 0.348 Q other keys instead of Q / 3. Of images, each group has
    R/2 registers more, and group 0 has BOS.
    """
    keys, queries = (stream_rows(config, kind, length) for kind in ("group_swap", "output"))
    extra = keys - queries  # R + 1, or none
    fixed1, fixed0 = extra // 2, extra - extra // 2
    read_pairs = queries * (queries - 1) / 3 + queries * extra / 2  # (query, key of the other group)
    key_pairs = read_pairs / 2 + queries * extra / 4 + fixed1 * fixed0  # unordered, of keys in two groups
    return PartitionSizes(keys, queries, (keys**2 - 2 * key_pairs) / keys, read_pairs / queries)


def _block(hidden: int, keys: float) -> float:
    """Projections of q, k, v and the output, the MLP, and attention over `keys` keys a query."""
    return 2 * hidden**2 * (4 + 2 * MLP_RATIO) + _attention(hidden, keys)


def _attention(hidden: int, keys: float) -> float:
    return 4 * hidden * keys  # scores, and the sum over values
