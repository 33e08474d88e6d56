"""The autoregressive transformer: causal attention, no adaLN (FACTS 1.5); the key-value cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgm_scale.config import AutoregressiveTransformerConfig
from pgm_scale.models.blocks import Attend, OutputLayer, SelfAttentionBlock
from pgm_scale.models.layers import LOCAL_LAYERS, LayerBuilder, RotaryTable
from pgm_scale.models.readout import Readout, logits


class KeyValueCache:
    """Rotated keys and values of the tokens seen so far, in memory for the whole length; for use without grad.

    Attributes:
        length_tokens: how many tokens of each sequence are in it, the same for all blocks.
    """

    def __init__(
        self, num_blocks: int, size_BLND: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ):
        self.length_tokens = 0
        self._keys = [torch.empty(size_BLND, dtype=dtype, device=device) for _ in range(num_blocks)]
        self._values = [torch.empty_like(keys_BLND) for keys_BLND in self._keys]

    def extend(self, block: int, k_BnND: Tensor, v_BnND: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the old ones; returns the keys and values of all of them."""
        start, end = self.length_tokens, self.length_tokens + k_BnND.shape[1]
        self._keys[block][:, start:end] = k_BnND
        self._values[block][:, start:end] = v_BnND
        return self._keys[block][:, :end], self._values[block][:, :end]


class AutoregressiveTransformer(nn.Module):
    """Logits of the token after each position."""

    def __init__(
        self,
        config: AutoregressiveTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
    ):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.vocab_embed = layers.vocab_embedding(vocab_size, config.hidden_size)
        self.rotary_emb = RotaryTable(length, config.hidden_size // config.num_heads)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(config.hidden_size, config.num_heads, config.dropout, None, layers)
            for _ in range(config.num_blocks)
        )
        self.output_layer = OutputLayer(config.hidden_size, vocab_size, None, layers)

    def forward(
        self, tokens_Bn: Tensor, readout: Readout = logits, cache: KeyValueCache | None = None
    ) -> Any:
        """The readout of `[B, n, H]`; by default fp32 logits `[B, n, V]`.

        Args:
            tokens_Bn: int64 token ids from the start of the sequence or, with a cache, from where it ends.
            readout: what to make of the hidden states.
            cache: holds earlier tokens; these ones are added to it.
        """
        start = 0 if cache is None else cache.length_tokens
        end = start + tokens_Bn.shape[1]
        x_BnH = self.vocab_embed(tokens_Bn)
        rotary = self.rotary_emb(torch.arange(start, end, device=tokens_Bn.device), x_BnH.dtype)
        for index, block in enumerate(self.blocks):
            x_BnH = block(x_BnH, rotary, _causal_attention(cache, index))
        if cache is not None:
            cache.length_tokens = end
        return self.output_layer(x_BnH, None, readout)

    def new_cache(self, batch_sequences: int) -> KeyValueCache:
        """An empty cache for `batch_sequences` sequences, in the dtype and on the device of the weights."""
        block: Any = self.blocks[0]
        weight = block.norm1.weight
        head_size = self.config.hidden_size // self.config.num_heads
        size_BLND = (batch_sequences, self.length, block.local_heads, head_size)
        return KeyValueCache(len(self.blocks), size_BLND, weight.dtype, weight.device)


def _causal_attention(cache: KeyValueCache | None, block: int) -> Attend:
    """Every position reads itself and what is before it, the cached tokens included."""

    def attend(q_BnND: Tensor, k_BnND: Tensor, v_BnND: Tensor) -> Tensor:
        if cache is not None:
            k_BnND, v_BnND = cache.extend(block, k_BnND, v_BnND)
        q, k, v = (x.transpose(1, 2) for x in (q_BnND, k_BnND, v_BnND))
        new, all_ = q.shape[2], k.shape[2]
        mask = None
        if 1 < new < all_:  # torch's is_causal would align the triangle with the oldest keys
            mask = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == all_).transpose(1, 2)

    return attend
