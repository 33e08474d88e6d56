"""The models of a run, one class a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PartitionTransformerConfig:
    """Partition Transformer (FACTS 1): group-wise encoder, GroupSwap, cross-attention decoder."""

    kind: Literal["partition_transformer"] = "partition_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_encoder_blocks: int = 8
    num_decoder_blocks: int = 8
    condition_size: int = 128
    dropout: float = 0.1
    group_swap_query: Literal["learn", "learn+freqs", "learn+freqs+mean", "learn+freqs+logsumexp"] = (
        "learn+freqs"
    )
    group_swap_processor: Literal["linear", "mlp4"] = "linear"
    num_classes: int = 0  # above 0 the condition is an embedding of the class, not of the time (FACTS 2.1)
    registers: int = 0  # learned tokens without content, half of them in each group


@dataclass(frozen=True)
class DiffusionTransformerConfig:
    """MDLM's bidirectional transformer; `time_conditioned` feeds sigma instead of the constant 0."""

    kind: Literal["diffusion_transformer"] = "diffusion_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_blocks: int = 12
    condition_size: int = 128
    dropout: float = 0.1
    time_conditioned: bool = False


@dataclass(frozen=True)
class AutoregressiveTransformerConfig:
    """Causal transformer without adaptive norms."""

    kind: Literal["autoregressive_transformer"] = "autoregressive_transformer"
    hidden_size: int = 768
    num_heads: int = 12
    num_blocks: int = 12
    dropout: float = 0.1


@dataclass(frozen=True)
class MaskGITTransformerConfig:
    """Halton-MaskGIT's bidirectional transformer over VQ codes of a class (FACTS 2.1)."""

    kind: Literal["maskgit_transformer"] = "maskgit_transformer"
    hidden_size: int = 1024
    num_heads: int = 16
    num_blocks: int = 24
    dropout: float = 0.1
    num_classes: int = 1000
    registers: int = 1


@dataclass(frozen=True)
class VQModelConfig:
    """LlamaGen's VQ autoencoder (FACTS 9): one factor of 2 less than `channel_multipliers` a side."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = 16_384
    code_size: int = 8
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    image_channels: int = 3


TransformerConfig = (
    PartitionTransformerConfig
    | DiffusionTransformerConfig
    | AutoregressiveTransformerConfig
    | MaskGITTransformerConfig
)
ModelConfig = TransformerConfig | VQModelConfig
