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
from pgm_scale.models.stages import Span, numbered, whole_span


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
    """Logits of the token after each position. A pipeline stage holds a `span` of its units (`models.stages`)."""

    def __init__(
        self,
        config: AutoregressiveTransformerConfig,
        vocab_size: int,
        length: int,
        layers: LayerBuilder = LOCAL_LAYERS,
        span: Span | None = None,
    ):
        super().__init__()
        self.config, self.vocab_size, self.length = config, vocab_size, length
        self.span = span = span or whole_span(config)
        hidden = config.hidden_size
        self.local_heads = config.num_heads // layers.tensor_parallel_size
        self.vocab_embed = layers.vocab_embedding(vocab_size, hidden) if 0 in span else None
        self.rotary_emb = RotaryTable(length, hidden // config.num_heads)
        self.blocks = numbered(
            {
                number: SelfAttentionBlock(hidden, config.num_heads, config.dropout, None, layers)
                for number in span.numbers(1, config.num_blocks)
            }
        )
        self.output_layer = (
            OutputLayer(hidden, vocab_size, None, layers) if 1 + config.num_blocks in span else None
        )

    def forward(
        self,
        tokens_Bn: Tensor,
        readout: Readout = logits,
        cache: KeyValueCache | None = None,
        received: Tensor | None = None,
    ) -> Any:
        """The readout of `[B, n, H]`; by default fp32 logits `[B, n, V]`.

        Args:
            tokens_Bn: int64 token ids from the start of the sequence or, with a cache, from where it ends.
            readout: what to make of the hidden states.
            cache: holds earlier tokens; these ones are added to it.
            received: the stream `[B * n, H]` of the stage before, in a stage that starts inside the model; one
                that ends inside returns its own.
        """
        start = 0 if cache is None else cache.length_tokens
        sequences, new = tokens_Bn.shape
        x_TH = received if self.vocab_embed is None else self.vocab_embed(tokens_Bn.flatten())
        assert x_TH is not None, "a stage without the embedding needs what the stage before it sends"
        positions_T = torch.arange(start, start + new, device=tokens_Bn.device).repeat(sequences)
        rotary = self.rotary_emb(positions_T, x_TH.dtype)
        for index, block in enumerate(self.blocks):
            x_TH = block(x_TH, rotary, _causal_attention(sequences, cache, index))
        if cache is not None:
            cache.length_tokens = start + new
        return x_TH if self.output_layer is None else self.output_layer(x_TH, None, readout, tokens_Bn.shape)

    def rows_before(self, unit: int, tokens_Bn: Tensor) -> int:
        """Rows of H that pass into a unit from the one before it."""
        return tokens_Bn.numel()

    def new_cache(self, batch_sequences: int) -> KeyValueCache:
        """An empty cache for `batch_sequences` sequences, in the dtype and on the device of the weights."""
        weight = next(self.parameters())
        head_size = self.config.hidden_size // self.config.num_heads
        size_BLND = (batch_sequences, self.length, self.local_heads, head_size)
        return KeyValueCache(len(self.blocks), size_BLND, weight.dtype, weight.device)


def _causal_attention(sequences: int, cache: KeyValueCache | None, block: int) -> Attend:
    """Every position reads itself and what is before it, the cached tokens included."""

    def attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor) -> Tensor:
        q_BnND, k_BnND, v_BnND = (x.unflatten(0, (sequences, -1)) for x in (q_TND, k_TND, v_TND))
        if cache is not None:
            k_BnND, v_BnND = cache.extend(block, k_BnND, v_BnND)
        q, k, v = (x.transpose(1, 2) for x in (q_BnND, k_BnND, v_BnND))
        new, all_ = q.shape[2], k.shape[2]
        mask = None
        if 1 < new < all_:  # torch's is_causal would align the triangle with the oldest keys
            mask = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == all_)
        return attended.transpose(1, 2).flatten(0, 1)

    return attend
