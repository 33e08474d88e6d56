"""LlamaGen's VQ autoencoder: an image to a grid of codes and back (FACTS 9).

Parameters have the published names, so a published `state_dict` loads as it is. Features and codebook rows are
l2-normalised wherever they meet: a code is a direction. Suffixes beside those of `models`: B images, C channels,
h and w a map of features or codes, K codes of the codebook, N features of a whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.config import VQModelConfig
from pgm_scale.models.initialization import fill_with, initialise, ones, uniform, zeros
from pgm_scale.models.readout import Readout

NORM_GROUPS = 32
# Scores computed at once by the search for the nearest codes: 64 MiB of fp32.
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class VQPass:
    """What a readout of the VQ model gets: all that the training loss is made of.

    Attributes:
        images_BCHW: fp32 in [-1, 1], what went in.
        reconstruction_BCHW: fp32; its gradient reaches the encoder past the quantiser (straight-through).
        features_BhwC: fp32, the encoder's, normalised.
        rows_BhwC: fp32, the normalised codebook rows nearest to them.
        code_counts_K: int64, how often each code was nearest.
    """

    images_BCHW: Tensor
    reconstruction_BCHW: Tensor
    features_BhwC: Tensor
    rows_BhwC: Tensor
    code_counts_K: Tensor


class VQModel(nn.Module):
    """Encoder, quantiser and decoder of square images."""

    def __init__(self, config: VQModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.code_size)
        self.quant_conv = convolution(config.z_channels, config.code_size, 1)
        self.post_quant_conv = convolution(config.code_size, config.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """Pixels a code, along a side."""
        return downsampling(self.config)

    def forward(self, pixels_BL: Tensor, readout: Readout) -> object:
        """What `readout` makes of the `VQPass` of int64 values 0 to 255, in the order (row, column, channel)."""
        images_BCHW = self._images(pixels_BL)
        features_BhwC = self._features(images_BCHW)
        codebook_KC = self.quantize.embedding()
        codes_N = nearest_codes(features_BhwC.detach().flatten(0, 2), codebook_KC.detach())
        rows_BhwC = F.embedding(codes_N, codebook_KC).view(features_BhwC.shape)
        straight_BhwC = features_BhwC + (rows_BhwC - features_BhwC).detach()
        counts_K = torch.zeros(len(codebook_KC), dtype=torch.int64, device=codes_N.device)
        counts_K.scatter_add_(0, codes_N, torch.ones_like(codes_N))
        reconstruction_BCHW = self._reconstruct(straight_BhwC)
        return readout(VQPass(images_BCHW, reconstruction_BCHW, features_BhwC, rows_BhwC, counts_K))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """int64 codes `[B, h * w]`, row by row, of images in [-1, 1]."""
        features_BhwC = self._features(images_BCHW)
        codes_N = nearest_codes(features_BhwC.flatten(0, 2), self.quantize.embedding())
        return codes_N.view(len(images_BCHW), -1)

    def decode(self, codes_BL: Tensor) -> Tensor:
        """fp32 images `[B, C, H, W]`, in [-1, 1] up to the decoder's error, of the int64 codes of square grids."""
        side = math.isqrt(codes_BL.shape[1])
        rows_BLC = F.embedding(codes_BL, self.quantize.embedding())
        return self._reconstruct(rows_BLC.unflatten(1, (side, side)))

    def _images(self, pixels_BL: Tensor) -> Tensor:
        channels = self.config.image_channels
        side = math.isqrt(pixels_BL.shape[1] // channels)
        return unit_range(pixels_BL.view(-1, side, side, channels))

    def _features(self, images_BCHW: Tensor) -> Tensor:
        maps_BChw = self.quant_conv(self.encoder(images_BCHW.to(self.quant_conv.weight.dtype)))
        return F.normalize(maps_BChw.float().permute(0, 2, 3, 1), dim=-1)

    def _reconstruct(self, rows_BhwC: Tensor) -> Tensor:
        maps_BChw = rows_BhwC.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(maps_BChw)).float()


def downsampling(config: VQModelConfig) -> int:
    """Pixels a code, along a side."""
    return 2 ** (len(config.channel_multipliers) - 1)


def unit_range(pixels_BHWC: Tensor) -> Tensor:
    """fp32 `[B, C, H, W]` in [-1, 1] of pixel values 0 to 255."""
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def nearest_codes(features_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """int64 [N]: the codebook row with the least squared distance to each feature, the first one of equals.

    All are unit vectors, for which ||z - e||^2 = 2 - 2 z.e: the search is one product of matrices, in pieces of
    bounded memory, and the greatest entry of each row.
    """
    rows = min(max(1, _SCORES_AT_ONCE // len(codebook_KC)), len(features_NC))
    scores_rK = features_NC.new_empty(rows, len(codebook_KC))

    def search(piece_rC: Tensor) -> Tensor:
        # Autocast, which would round the scores to bf16, leaves products with `out` alone.
        return torch.mm(piece_rC, codebook_KC.T, out=scores_rK[: len(piece_rC)]).argmax(dim=1)

    return torch.cat([search(piece_rC) for piece_rC in features_NC.split(max(1, rows))])


class Codebook(nn.Module):
    """`forward` gives the normalised rows, fp32 `[K, C]`; a module, so that ZeRO-3 gathers them for it."""

    def __init__(self, codes: int, size: int):
        super().__init__()
        self.weight = initialise(nn.Parameter(torch.empty(codes, size)), unit_rows)

    def forward(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1)


def unit_rows(whole: Tensor, generator: torch.Generator | None) -> Tensor:
    """Directions without a preferred one; of length 1, so that the learning rate is a share of it."""
    return whole.copy_(F.normalize(whole.normal_(generator=generator), dim=-1))


class Quantizer(nn.Module):
    def __init__(self, codes: int, size: int):
        super().__init__()
        self.embedding = Codebook(codes, size)


class Encoder(nn.Module):
    """Levels from the highest resolution to the lowest, then the middle: images to maps of `z_channels`."""

    def __init__(self, config: VQModelConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = convolution(config.image_channels, config.channels, 3)
        self.conv_blocks = nn.ModuleList()
        for before, width in pairwise([config.channels, *widths]):
            last = len(self.conv_blocks) == len(widths) - 1
            level = Level(before, width, config.num_res_blocks, attends=last)
            if not last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = convolution(widths[-1], config.z_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The middle, then levels from the lowest resolution to the highest, each with one block more."""

    def __init__(self, config: VQModelConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        self.conv_in = convolution(config.z_channels, widths[0], 3)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for before, width in pairwise([widths[0], *widths]):
            level = Level(before, width, config.num_res_blocks + 1, attends=not self.conv_blocks)
            if len(self.conv_blocks) < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = convolution(widths[-1], config.image_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, at the lowest each with attention behind it, and the way to the next."""

    def __init__(self, before: int, width: int, blocks: int, attends: bool):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(before if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attends else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class ResidualBlock(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = convolution(before, width, 3)
        self.norm2 = group_norm(width)
        self.conv2 = convolution(width, width, 3)
        self.nin_shortcut = convolution(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return self.nin_shortcut(x) + inner


class Attention(nn.Module):
    """One head over all places of a map, scaled by 1/sqrt(channels)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q = convolution(width, width, 1)
        self.k = convolution(width, width, 1)
        self.v = convolution(width, width, 1)
        self.proj_out = convolution(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # One head: [B, C, h, w] -> [B, 1, h * w, C].
        q, k, v = (linear(normed).flatten(2).mT.unsqueeze(1) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT
        return x + self.proj_out(attended.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the side; the published padding is one row below and one column to the right."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = convolution(width, width, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = convolution(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)])


def group_norm(width: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)
    fill_with(norm.weight, ones)
    fill_with(norm.bias, zeros)
    return norm


def convolution(
    before: int, width: int, kernel: int, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """Weights and bias start in U(-1/sqrt(fan in), 1/sqrt(fan in)), torch's default; the side is kept."""
    conv = nn.Conv2d(before, width, kernel, stride, kernel // 2 if padding is None else padding)
    for parameter in conv.parameters():
        fill_with(parameter, uniform((before * kernel**2) ** -0.5))
    return conv
