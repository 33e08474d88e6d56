"""The Partition Transformer as published (FACTS 1): whole sequences under dense L x L masks, all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.bench.baselines.layers import (
    ROPE_BASE,
    ModulatedOutput,
    PublishedModel,
    Rotary,
    RotaryAngles,
    SelfAttentionBlock,
    TokenEmbedding,
    WeightNorm,
    ZeroTime,
    attention,
    feed_forward,
    modulate,
)
from pgm_scale.config import PartitionTransformerConfig


class DensePartitionTransformer(PublishedModel):
    """Training: every position attends to all L under a mask. Inference: padded rows of clean tokens."""

    def __init__(self, config: PartitionTransformerConfig, vocab_size: int, length: int) -> None:
        nn.Module.__init__(self)
        self.vocab_embed = TokenEmbedding(vocab_size, config.hidden_size)
        self.rotary_emb = RotaryAngles(length, config.hidden_size // config.num_heads)
        self.sigma_map = ZeroTime(config.condition_size)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, length)
        self.output_layer = ModulatedOutput(config, vocab_size)

    def forward(self, tokens_BL: Tensor, in_group1_BL: Tensor) -> Tensor:
        """Logits `[B, L, V]` of every position, from clean tokens and the group of each."""
        same_B1LL = (in_group1_BL[:, :, None] == in_group1_BL[:, None, :])[:, None]
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        return self._logits(tokens_BL, positions_BL, positions_BL, same_B1LL, ~same_B1LL)

    def infer(
        self, tokens_BT: Tensor, positions_BT: Tensor, lengths_B: Tensor, query_positions_BQ: Tensor
    ) -> Tensor:
        """Logits `[B, Q, V]` of the positions asked for, from rows whose first `lengths_B` tokens are real."""
        slots_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        valid_B11T = (slots_T < lengths_B[:, None])[:, None, None]
        return self._logits(tokens_BT, positions_BT, query_positions_BQ, valid_B11T, valid_B11T)

    def _logits(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        query_positions_BQ: Tensor,
        own_mask: Tensor,
        other_mask: Tensor,
    ) -> Tensor:
        condition = self.sigma_map()
        keys, queries = self.rotary_emb(positions_BT), self.rotary_emb(query_positions_BQ)
        encoded_BTH = self.encoder(self.vocab_embed(tokens_BT), keys, own_mask, condition)
        decoded_BQH = self.decoder(encoded_BTH, query_positions_BQ, queries, keys, other_mask, condition)
        return self.output_layer(decoded_BQH, condition)

    def training_loss(
        self, tokens_BL: Tensor, in_group1_BL: Tensor, weight_BL: Tensor, mask_id: int
    ) -> Tensor:
        """Mean over the tokens of weight * NLL, the mask's logit removed."""
        logits_BLV = self(tokens_BL, in_group1_BL)
        logits_BLV[..., mask_id] = -torch.inf
        log_p_BLV = logits_BLV.log_softmax(dim=-1)
        nll_BL = -log_p_BLV.gather(-1, tokens_BL[..., None])[..., 0]
        return (weight_BL * nll_BL).mean()


class Encoder(nn.Module):
    def __init__(self, config: PartitionTransformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(config.num_encoder_blocks))

    def forward(self, x_BTH: Tensor, rotary: Rotary, mask: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTH = block(x_BTH, rotary, mask, condition)
        return x_BTH


class Decoder(nn.Module):
    def __init__(self, config: PartitionTransformerConfig, length: int) -> None:
        super().__init__()
        self.group_swap = GroupSwap(config, length)
        self.layers = nn.ModuleList(CrossAttentionBlock(config) for _ in range(config.num_decoder_blocks))

    def forward(
        self,
        encoded_BTH: Tensor,
        query_positions_BQ: Tensor,
        queries: Rotary,
        keys: Rotary,
        mask: Tensor,
        condition: Tensor,
    ) -> Tensor:
        x_BQH = self.group_swap(encoded_BTH, query_positions_BQ, queries, keys, mask)
        for layer in self.layers:
            x_BQH = layer(x_BQH, encoded_BTH, queries, keys, mask, condition)
        return x_BQH


class GroupSwap(nn.Module):
    """Queries from positions alone, keys and values from the other group (FACTS 1.3)."""

    position_LH: Tensor

    def __init__(self, config: PartitionTransformerConfig, length: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.query = config.num_heads, config.group_swap_query
        self.base_embedding = nn.Parameter(torch.randn(1, hidden))
        self.pre_query_norm = nn.LayerNorm(hidden)
        self.query_processor: nn.Module = nn.Linear(hidden, hidden)
        if config.group_swap_processor == "mlp4":
            self.query_processor = nn.Sequential(
                nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden)
            )
        self.hidden_to_key_value = nn.Linear(hidden, 2 * hidden)
        self.output_linear = nn.Linear(hidden, hidden)
        frequencies_K = ROPE_BASE ** (-torch.arange(0, hidden, 2, dtype=torch.float64) / hidden)
        angles_LK = torch.arange(length)[:, None] * frequencies_K
        table_LH = torch.cat([angles_LK.cos(), angles_LK.sin()], dim=-1).float()
        self.register_buffer("position_LH", table_LH, persistent=False)

    def forward(
        self, encoded_BTH: Tensor, query_positions_BQ: Tensor, queries: Rotary, keys: Rotary, mask: Tensor
    ) -> Tensor:
        x_BQH = self.base_embedding.expand(*query_positions_BQ.shape, -1)
        if "freqs" in self.query:
            x_BQH = x_BQH + self.position_LH[query_positions_BQ]
        if self.query.endswith("mean"):
            x_BQH = x_BQH + masked_mean(encoded_BTH, mask[:, 0])
        elif self.query.endswith("logsumexp"):
            x_BQH = x_BQH + masked_logsumexp(encoded_BTH, mask[:, 0])
        q = self.query_processor(self.pre_query_norm(x_BQH))
        k, v = self.hidden_to_key_value(encoded_BTH).chunk(2, dim=-1)
        return self.output_linear(attention(q, k, v, self.num_heads, queries, keys, mask))


def masked_mean(x_BTH: Tensor, mask_BQT: Tensor) -> Tensor:
    """`[B, Q, H]`, 0 where a mask's row is empty."""
    counts_BQ1 = mask_BQT.sum(dim=-1, keepdim=True).clamp(min=1)
    return mask_BQT.to(x_BTH.dtype) @ x_BTH / counts_BQ1


def masked_logsumexp(x_BTH: Tensor, mask_BQT: Tensor) -> Tensor:
    """`[B, Q, H]`, 0 where a mask's row is empty; holds `[B, Q, T, H]` (the published models use no such query)."""
    is_empty_BQ1 = ~mask_BQT.any(dim=-1, keepdim=True)
    read_BQT1 = (mask_BQT | is_empty_BQ1)[..., None]
    sums_BQH = x_BTH[:, None].masked_fill(~read_BQT1, -torch.inf).logsumexp(dim=2)
    return sums_BQH.masked_fill(is_empty_BQ1, 0.0)


class CrossAttentionBlock(nn.Module):
    """Reads the encoder's output, projected to keys and values in each block; no self-attention."""

    def __init__(self, config: PartitionTransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, nn.Dropout(config.dropout)
        self.q_norm1, self.kv_norm1, self.norm2 = WeightNorm(hidden), WeightNorm(hidden), WeightNorm(hidden)
        self.attn_q = nn.Linear(hidden, hidden, bias=False)
        self.attn_kv = nn.Linear(hidden, 2 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = feed_forward(hidden)
        self.adaLN_modulation = nn.Linear(config.condition_size, 6 * hidden)

    def forward(
        self,
        x_BQH: Tensor,
        encoded_BTH: Tensor,
        queries: Rotary,
        keys: Rotary,
        mask: Tensor,
        condition: Tensor,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        q = self.attn_q(modulate(self.q_norm1(x_BQH), shift1, scale1))
        k, v = self.attn_kv(self.kv_norm1(encoded_BTH)).chunk(2, dim=-1)
        attended = attention(q, k, v, self.num_heads, queries, keys, mask)
        x_BQH = x_BQH + gate1 * self.dropout(self.attn_out(attended))
        return x_BQH + gate2 * self.dropout(self.mlp(modulate(self.norm2(x_BQH), shift2, scale2)))
