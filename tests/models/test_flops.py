import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pgm_scale.models import segments
from pgm_scale.models.flops import forward_flops_per_token
from tests.models.builders import (
    LENGTH,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    pack_groups,
    partition_config,
    randomised,
)

TOKENS_1L = torch.zeros(1, LENGTH, dtype=torch.long)


def counted(model, *inputs):
    """Matrix products of one forward, without those on the constant condition, which are no token's."""
    # The math backend is made of matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = counter.get_flop_counts()
    conditions = [
        counts[name].values() for name in counts if name.endswith((".adaLN_modulation", ".sigma_map"))
    ]
    return counter.get_total_flops() - sum(flops for values in conditions for flops in values)


@pytest.mark.parametrize("processor", ["linear", "mlp4"])
def test_partition_transformer_over_all_group_sizes(monkeypatch, processor):
    monkeypatch.setattr(segments, "MAX_MASKED_PAIR_TOKENS", 0)  # masks compute more than the model needs
    config = partition_config(processor=processor)
    model = randomised(config)
    totals = []
    for size in range(LENGTH + 1):
        groups_1L = (torch.arange(LENGTH) < size).long()[None]
        totals.append(counted(model, pack_groups(TOKENS_1L, groups_1L)[0]))
    expected = forward_flops_per_token(config, VOCAB, LENGTH) * LENGTH
    assert sum(totals) / len(totals) == pytest.approx(expected)


def test_diffusion_transformer():
    config = diffusion_config()
    assert counted(randomised(config), TOKENS_1L) == forward_flops_per_token(config, VOCAB, LENGTH) * LENGTH


def test_autoregressive_transformer_counts_each_causal_pair_once():
    config = autoregressive_config()
    unused_pairs = LENGTH * (LENGTH - 1) / 2
    expected = (
        counted(randomised(config), TOKENS_1L) - config.num_blocks * 4 * config.hidden_size * unused_pairs
    )
    assert forward_flops_per_token(config, VOCAB, LENGTH) * LENGTH == expected
