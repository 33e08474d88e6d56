import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pgm_scale.config import VQModelConfig
from pgm_scale.models import segments
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.models.vq import Attention, VQModel
from tests.models.builders import (
    LENGTH,
    VOCAB,
    autoregressive_config,
    diffusion_config,
    image_config,
    pack_groups,
    partition_config,
    randomised,
)

TOKENS_1L = torch.zeros(1, LENGTH, dtype=torch.long)


def counted(model, *inputs):
    """Matrix products of one forward, without those on the constant condition, which are no token's."""
    # The math backend is made of matrix products, which the counter knows on every device; it does not know the
    # product with GELU that a CPU computes without gradients.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
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


@pytest.mark.parametrize("registers", [0, 4])
def test_partition_transformer_of_images_over_all_numbers_of_codes_in_a_group(monkeypatch, registers):
    monkeypatch.setattr(segments, "MAX_MASKED_PAIR_TOKENS", 0)
    config = image_config(registers)
    model = randomised(config)
    totals = []
    for codes in range(LENGTH):
        groups_1L = ((torch.arange(LENGTH) > 0) & (torch.arange(LENGTH) <= codes)).long()[None]
        inputs, _ = pack_groups(TOKENS_1L, groups_1L, registers, torch.tensor([1]), first_query=1)
        totals.append(counted(model, inputs))
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


def test_vq_model():
    """Its convolutions one by one, its attention, and a product of each feature with each code."""
    config = VQModelConfig(
        codebook_size=50, code_size=4, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, z_channels=8
    )
    model, total = VQModel(config), 0

    def convolution(module, _, out):
        nonlocal total
        total += 2 * out[0].numel() * module.in_channels * module.kernel_size[0] ** 2

    def attention(module, _, out):
        nonlocal total
        total += 4 * out[0, 0].numel() ** 2 * out.shape[1]

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention)
    length = 8 * 8 * 3
    model(torch.zeros(1, length, dtype=torch.uint8), readout=lambda passed: passed)
    total += 2 * (4 * 4) * 50 * 4
    assert forward_flops_per_token(config, 256, length) * length == pytest.approx(total)
