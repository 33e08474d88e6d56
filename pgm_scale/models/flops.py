"""How many floating-point operations a forward pass takes: what model FLOPs utilisation divides by.

Matrix products and attention only, 2 operations a multiply-add. What happens once a call whatever the tokens
(the time MLP, adaLN) and all element-wise work is left out. The backward pass takes twice the forward.
"""

from __future__ import annotations

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
)
from pgm_scale.models.blocks import MLP_RATIO


def forward_flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> float:
    """Expected forward FLOPs a token of a sequence of `length`, logits of every position included.

    Group sizes are expected ones: with a size uniform on 0..L, as a uniform time gives, a token shares its
    group with (2L + 1)/3 tokens on average, itself included, and the other group has (L - 1)/3.
    """
    hidden = config.hidden_size
    output = 2 * hidden * vocab_size
    match config:
        case PartitionTransformerConfig():
            own_keys, other_keys = (2 * length + 1) / 3, (length - 1) / 3
            processor_matrices = 1 if config.group_swap_processor == "linear" else 2 * MLP_RATIO
            group_swap = 2 * hidden**2 * (processor_matrices + 3) + _attention(hidden, other_keys)
            decoder = config.num_decoder_blocks * _block(hidden, other_keys)
            return config.num_encoder_blocks * _block(hidden, own_keys) + group_swap + decoder + output
        case DiffusionTransformerConfig():
            return config.num_blocks * _block(hidden, length) + output
        case AutoregressiveTransformerConfig():
            return config.num_blocks * _block(hidden, (length + 1) / 2) + output


def _block(hidden: int, keys: float) -> float:
    """Projections of q, k, v and the output, the MLP, and attention over `keys` keys a query."""
    return 2 * hidden**2 * (4 + 2 * MLP_RATIO) + _attention(hidden, keys)


def _attention(hidden: int, keys: float) -> float:
    return 4 * hidden * keys  # scores, and the sum over values
