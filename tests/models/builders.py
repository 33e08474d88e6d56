"""Small models with nothing left at zero, and the packed layouts of a partition."""

from dataclasses import replace

import torch

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    MaskGITTransformerConfig,
    PartitionTransformerConfig,
)
from pgm_scale.models import build_model
from pgm_scale.models.partition_transformer import PartitionInputs
from pgm_scale.models.segments import Segments

VOCAB, LENGTH, HIDDEN, HEADS = 23, 12, 32, 2
CLASSES = 5
QUERY_MODES = ("learn", "learn+freqs", "learn+freqs+mean", "learn+freqs+logsumexp")


def partition_config(query="learn+freqs", processor="linear", dropout=0.0):
    return PartitionTransformerConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_encoder_blocks=2,
        num_decoder_blocks=2,
        condition_size=8,
        dropout=dropout,
        group_swap_query=query,
        group_swap_processor=processor,
    )


def image_config(registers=2, query="learn+freqs", processor="linear", dropout=0.0):
    """A class-conditional Partition Transformer."""
    return replace(partition_config(query, processor, dropout), num_classes=CLASSES, registers=registers)


def diffusion_config(time_conditioned=False):
    return DiffusionTransformerConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_blocks=2,
        condition_size=8,
        dropout=0.0,
        time_conditioned=time_conditioned,
    )


def maskgit_config(registers=1, dropout=0.0):
    return MaskGITTransformerConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_blocks=2,
        dropout=dropout,
        num_classes=CLASSES,
        registers=registers,
    )


def autoregressive_config():
    return AutoregressiveTransformerConfig(hidden_size=HIDDEN, num_heads=HEADS, num_blocks=2, dropout=0.0)


def randomised(config, seed=0):
    """The model with all its parameters drawn: at its initial values, gates, shifts and logits are zero."""
    torch.manual_seed(seed)
    model = build_model(config, VOCAB, LENGTH)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def pack_groups(tokens_BL, groups_BL, registers=0, classes_B=None, first_query=0):
    """The training layout, and for each packed query its (sequence, position in the row of tokens).

    The first half of the registers is in group 1, the other one in group 0; `first_query` tokens are keys only.
    """
    length = tokens_BL.shape[1]
    front = [1] * (registers // 2) + [0] * (registers // 2)
    front_tokens = torch.tensor([[-1 - r for r in range(registers)]] * len(tokens_BL)).long()
    tokens_BL = torch.cat([front_tokens, tokens_BL], 1)
    sequences, positions, lengths = [], [], []
    query_sequences, query_positions, query_lengths = [], [], []
    for b, groups in enumerate(groups_BL.tolist()):
        members = [[i for i, g in enumerate(front + groups) if g == group] for group in (0, 1)]
        for own, other in (members, members[::-1]):
            positions += own
            sequences += [b] * len(own)
            lengths.append(len(own))
            queries = [i for i in other if i >= registers + first_query]
            query_positions += queries
            query_sequences += [b] * len(queries)
            query_lengths.append(len(queries))
    assert max(positions) < registers + length
    rows, columns = torch.tensor(query_sequences), torch.tensor(query_positions)
    inputs = PartitionInputs(
        tokens_BL[torch.tensor(sequences), torch.tensor(positions)],
        torch.tensor(positions),
        Segments.of(lengths),
        columns,
        Segments.of(query_lengths),
        classes_B,
    )
    return inputs, (rows, columns - registers)


def assert_no_logit_reads_its_own_group(logits, tokens_BL, groups_BL):
    """Change each token in turn: of its row, the logits of its own group stay as they are, the others change.

    Args:
        logits: tokens [B, L] to logits [B, L, V], under the groups [B, L].
    """
    before_BLV = logits(tokens_BL)
    for changed in range(tokens_BL.shape[1]):
        other_tokens_BL = tokens_BL.clone()
        other_tokens_BL[:, changed] = (tokens_BL[:, changed] + 1) % VOCAB
        same_BL = (logits(other_tokens_BL) == before_BLV).all(-1)
        own_group_BL = groups_BL == groups_BL[:, changed : changed + 1]
        assert same_BL[own_group_BL].all()
        assert not same_BL[~own_group_BL].any()
