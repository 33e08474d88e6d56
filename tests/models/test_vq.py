"""The VQ autoencoder against its published names and counts, and against a functional form of FACTS 9."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgm_scale.config import MODEL_SIZES, VQModelConfig
from pgm_scale.models import vq
from pgm_scale.models.initialization import initial_values
from pgm_scale.models.vq import VQModel, VQPass, nearest_codes, unit_range

SMALL = VQModelConfig(
    codebook_size=19,
    code_size=4,
    channels=32,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=2,
    z_channels=12,
    image_channels=3,
)


@pytest.mark.parametrize(("size", "parameters"), [("vq-8", 70_109_835), ("vq-16", 71_883_403)])
def test_published_counts(size: str, parameters: int) -> None:
    """FACTS 6.8."""
    tree = MODEL_SIZES[size]
    with torch.device("meta"):
        model = VQModel(VQModelConfig(channel_multipliers=tree["channel_multipliers"]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def published_names(multipliers: tuple[int, ...], blocks: int) -> set[str]:
    """Without `codebook_used`; written down from FACTS 9, level by level."""
    levels, names = len(multipliers), ["quantize.embedding.weight"]

    def layers(*prefixes: str) -> None:
        names.extend(f"{prefix}.{part}" for prefix in prefixes for part in ("weight", "bias"))

    def residual(prefix: str, has_shortcut: bool) -> None:
        layers(*(f"{prefix}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")))
        if has_shortcut:
            layers(f"{prefix}.nin_shortcut")

    def attention(prefix: str) -> None:
        layers(*(f"{prefix}.{part}" for part in ("norm", "q", "k", "v", "proj_out")))

    layers("quant_conv", "post_quant_conv")
    for half in ("encoder", "decoder"):
        layers(f"{half}.conv_in", f"{half}.norm_out", f"{half}.conv_out")
        residual(f"{half}.mid.0", False)
        attention(f"{half}.mid.1")
        residual(f"{half}.mid.2", False)
    for level in range(levels):
        before = multipliers[level - 1] if level else 1
        for block in range(blocks):
            residual(f"encoder.conv_blocks.{level}.res.{block}", block == 0 and before != multipliers[level])
            if level == levels - 1:
                attention(f"encoder.conv_blocks.{level}.attn.{block}")
        if level < levels - 1:
            layers(f"encoder.conv_blocks.{level}.downsample.conv")
    for number, level in enumerate(reversed(range(levels))):
        before = multipliers[min(level + 1, levels - 1)]
        for block in range(blocks + 1):
            residual(f"decoder.conv_blocks.{number}.res.{block}", block == 0 and before != multipliers[level])
            if number == 0:
                attention(f"decoder.conv_blocks.{number}.attn.{block}")
        if level > 0:
            layers(f"decoder.conv_blocks.{number}.upsample.conv")
    return set(names)


@pytest.mark.parametrize("multipliers", [(1, 2, 2, 4), (1, 1, 2, 2, 4), (2,)])
def test_published_names(multipliers: tuple[int, ...]) -> None:
    with torch.device("meta"):
        state = VQModel(VQModelConfig(channel_multipliers=multipliers)).state_dict()
    assert set(state) == published_names(multipliers, 2)
    assert tuple(state["quant_conv.weight"].shape) == (8, 256, 1, 1)
    assert tuple(state["post_quant_conv.weight"].shape) == (256, 8, 1, 1)
    assert tuple(state["quantize.embedding.weight"].shape) == (16_384, 8)


class Published:
    """The passes of FACTS 9, read off a `state_dict` in float64."""

    def __init__(self, model: VQModel) -> None:
        self.state = {name: value.double() for name, value in model.state_dict().items()}
        self.levels = len(model.config.channel_multipliers)
        self.blocks = model.config.num_res_blocks

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        options = options or {"padding": weight.shape[-1] // 2}
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        variance, mean = torch.var_mean(groups, dim=2, keepdim=True, unbiased=False)
        normed = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        weight, bias = (self.state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return normed * weight + bias

    def swish_norm(self, name: str, x: Tensor) -> Tensor:
        normed = self.norm(name, x)
        return normed * torch.sigmoid(normed)

    def residual(self, name: str, x: Tensor) -> Tensor:
        inner = self.conv(f"{name}.conv1", self.swish_norm(f"{name}.norm1", x))
        inner = self.conv(f"{name}.conv2", self.swish_norm(f"{name}.norm2", inner))
        has_shortcut = f"{name}.nin_shortcut.weight" in self.state
        return inner + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        normed, shape = self.norm(f"{name}.norm", x), x.shape
        q, k, v = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(shape[1])).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(shape))

    def middle(self, half: str, x: Tensor) -> Tensor:
        x = self.attention(f"{half}.mid.1", self.residual(f"{half}.mid.0", x))
        return self.residual(f"{half}.mid.2", x)

    def level(self, name: str, blocks: int, attends: bool, x: Tensor) -> Tensor:
        for block in range(blocks):
            x = self.residual(f"{name}.res.{block}", x)
            if attends:
                x = self.attention(f"{name}.attn.{block}", x)
        return x

    def features(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(self.levels):
            name, last = f"encoder.conv_blocks.{level}", level == self.levels - 1
            x = self.level(name, self.blocks, last, x)
            if not last:
                x = self.conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder", x)
        x = self.conv("quant_conv", self.conv("encoder.conv_out", self.swish_norm("encoder.norm_out", x)))
        return x / x.square().sum(dim=1, keepdim=True).sqrt()

    def codebook(self) -> Tensor:
        rows = self.state["quantize.embedding.weight"]
        return rows / rows.square().sum(dim=1, keepdim=True).sqrt()

    def decoded(self, rows: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", rows)))
        for number in range(self.levels):
            name = f"decoder.conv_blocks.{number}"
            x = self.level(name, self.blocks + 1, number == 0, x)
            if number < self.levels - 1:
                doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"{name}.upsample.conv", doubled)
        return self.conv("decoder.conv_out", self.swish_norm("decoder.norm_out", x))


def randomised(config: VQModelConfig) -> VQModel:
    """All parameters random, so that biases, norms and lengths of codebook rows show."""
    torch.manual_seed(0)
    model = VQModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_passes_are_the_published_ones() -> None:
    model = randomised(SMALL)
    published = Published(model)
    pixels_BL = torch.randint(0, 256, (2, 16 * 16 * 3), dtype=torch.uint8)
    images = pixels_BL.double().view(2, 16, 16, 3).permute(0, 3, 1, 2) / 255 * 2 - 1
    passed = model(pixels_BL, readout=lambda p: p)
    assert isinstance(passed, VQPass)
    torch.testing.assert_close(passed.images_BCHW.double(), images, rtol=0, atol=1e-6)

    features = published.features(images)
    torch.testing.assert_close(passed.features_BhwC.permute(0, 3, 1, 2).double(), features, rtol=0, atol=1e-5)
    distances = (features[:, None] - published.codebook()[None, :, :, None, None]).square().sum(dim=2)
    codes = distances.argmin(dim=1)
    rows = published.codebook()[codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(passed.rows_BhwC.permute(0, 3, 1, 2).double(), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        passed.reconstruction_BCHW.double(), published.decoded(rows), rtol=0, atol=1e-4
    )
    assert torch.equal(passed.code_counts_K, torch.bincount(codes.flatten(), minlength=19))

    assert torch.equal(model.encode(unit_range(pixels_BL.view(2, 16, 16, 3))), codes.flatten(1))
    torch.testing.assert_close(model.decode(codes.flatten(1)), passed.reconstruction_BCHW, rtol=0, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 7 * 500, 1 << 24])
def test_nearest_codes_are_the_brute_force_ones(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(vq, "_SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    features_NC = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
    codebook_KC = F.normalize(torch.randn(500, 8, generator=generator), dim=1)
    distances_NK = (features_NC.double()[:, None] - codebook_KC.double()).square().sum(dim=2)
    nearest_N, second_N = distances_NK.topk(2, dim=1, largest=False).values.T
    assert (second_N - nearest_N).min() > 1e-6  # no tie that fp32 could see otherwise
    assert torch.equal(nearest_codes(features_NC, codebook_KC), distances_NK.argmin(dim=1))


def test_the_first_of_equally_near_codes_is_taken_and_autocast_does_not_round_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    features_NC = F.normalize(torch.randn(400, 8, generator=generator), dim=1)
    codebook_KC = F.normalize(torch.randn(333, 8, generator=generator), dim=1)
    once = nearest_codes(features_NC, codebook_KC)
    assert torch.equal(nearest_codes(features_NC, codebook_KC.repeat(3, 1)), once)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(features_NC, codebook_KC), once)
        assert not torch.equal((features_NC @ codebook_KC.T).argmax(dim=1), once)
    assert nearest_codes(features_NC[:0], codebook_KC).shape == (0,)


def test_initial_values_by_name() -> None:
    """Every parameter can be drawn by its name: convolutions as torch's default, unit codebook rows."""
    with torch.device("meta"):
        model = VQModel(SMALL)
    values = {name: initial_values(name, p, seed=1) for name, p in model.named_parameters()}
    torch.testing.assert_close(values["quantize.embedding.weight"].norm(dim=1), torch.ones(19))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = (module.in_channels * module.kernel_size[0] ** 2) ** -0.5
            assert 0.9 * bound < values[f"{name}.weight"].abs().max() <= bound, name
            assert 0.3 * bound < values[f"{name}.bias"].abs().max() <= bound, name
        if isinstance(module, torch.nn.GroupNorm):
            assert (values[f"{name}.weight"] == 1).all()
            assert (values[f"{name}.bias"] == 0).all()
