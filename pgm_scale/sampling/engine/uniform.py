"""The uniform PGM sampler for rows that know equally many tokens: dense, in decoding order, nothing gathered.

All rows then have the same number of clean tokens at every step. Tokens are kept in the order in which they are
decoded, which is known from the start, so that the clean ones are a prefix and the positions of keys and queries
are slices; attention does not mind the order. No step waits for the device.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pgm_scale.sampling.batch import SamplingBatch
from pgm_scale.sampling.categorical import TokenDraw, TokenRules
from pgm_scale.sampling.engine.first_block import GrowingAttention
from pgm_scale.sampling.engine.graphs import StepGraphs
from pgm_scale.sampling.engine.layouts import DenseLayout
from pgm_scale.sampling.engine.partition import FoldedPartitionTransformer
from pgm_scale.sampling.pgm_uniform import equal_steps, sample_uniform

# Tokens are padded to a multiple of this many. oneDNN compiles a kernel for each new number of rows (1 to 2 ms)
# and keeps 1,024 of them: at 8 tokens a step and L = 1024, 128 steps of ten linears threw each other out, which
# cost a quarter of the run. Padded to 16 they fit, and the padding costs 1% of the linears.
PADDED_TOKENS = 16


class UniformSampler:
    """The tokens of `sample_uniform`; buffers and graphs are kept for batches of the same size."""

    def __init__(self, model: FoldedPartitionTransformer):
        self.model = model
        self._decoder: OrderedDecoder | None = None

    def __call__(self, batch: SamplingBatch) -> tuple[Tensor, int]:
        step_BL = equal_steps(batch)
        known_B = (~batch.unknown_BL).sum(axis=1)
        if known_B[0] == 0 or (known_B != known_B[0]).any():
            return sample_uniform(self.model, batch)
        # Known tokens, whose step is -1, come first.
        order_BL = np.argsort(step_BL, axis=1, kind="stable")
        decoded_by_K = np.bincount(step_BL[0] + 1, minlength=1).cumsum().tolist()
        if self._decoder is None or self._decoder.shape != step_BL.shape:
            self._decoder = None  # its buffers, before there are new ones
            self._decoder = OrderedDecoder(self.model, batch.rules, step_BL.shape, batch.device)
        self._decoder.load(batch, order_BL)
        return self._decoder.decode(decoded_by_K), len(decoded_by_K) - 1


class OrderedDecoder:
    """Decodes batches of `shape` rows and tokens, in buffers that it keeps."""

    def __init__(
        self,
        model: FoldedPartitionTransformer,
        rules: TokenRules,
        shape: tuple[int, int],
        device: torch.device,
    ):
        self.model, self.rules, self.shape = model, rules, shape
        rows, length = shape
        factors_L, embedding_VH = model.rotation.table_L, model.embedding_VH
        hidden = embedding_VH.shape[1]
        size_BLND = (rows, length, model.config.num_heads, model.rotation.head_size)
        self.positions_BL = torch.empty(shape, dtype=torch.int64, device=device)
        self.tokens_BL = torch.empty_like(self.positions_BL)
        self.uniforms_BL = torch.empty(shape, dtype=torch.float64, device=device)
        self.factors_BL = factors_L.new_empty(rows, length, *factors_L.shape[1:])
        self.embedded_BLH = embedding_VH.new_zeros(rows, length, hidden)
        self.first_attention = GrowingAttention(size_BLND, device)
        self.graphs = StepGraphs(device, capturable=model.group_swap.queries_LND is not None)

    def load(self, batch: SamplingBatch, order_BL: np.ndarray) -> None:
        """Put a batch into the buffers, in decoding order."""
        self.positions_BL.copy_(batch.on_device(order_BL))
        self.factors_BL.copy_(self.model.rotation.table_L[self.positions_BL])
        self.tokens_BL.copy_(batch.canvas_BL().gather(1, self.positions_BL))
        self.uniforms_BL.copy_(batch.on_device(batch.uniforms_BL("token")).gather(1, self.positions_BL))

    def decode(self, decoded_by_K: list[int]) -> Tensor:
        """Tokens `[B, L]` by position; at step k those up to `decoded_by_K[k]` are clean, the next ones targets."""
        seen = 0
        for clean, end in pairwise(decoded_by_K):
            self.graphs.run((seen, clean, end), partial(self._step, seen, clean, end))
            seen = clean
        return torch.empty_like(self.tokens_BL).scatter_(1, self.positions_BL, self.tokens_BL)

    def _step(self, seen: int, clean: int, end: int) -> None:
        """Read the tokens `[:clean]`, of which those from `seen` on are new, and draw the tokens `[clean:end]`."""
        targets = slice(clean, end)
        draw = TokenDraw(self.rules, self.uniforms_BL[:, targets].flatten())
        positions_Q = self.positions_BL[:, targets].flatten()
        padded = min(-(-clean // PADDED_TOKENS) * PADDED_TOKENS, self.shape[1])
        factors_T = self.factors_BL[:, :padded].flatten(0, 1)
        layout = DenseLayout(self.shape[0], tokens=clean)
        encoded_TH = self._encode(slice(seen, clean), padded, factors_T, layout)
        drawn_Q = self.model.predict(encoded_TH, factors_T, positions_Q, layout, draw)
        self.tokens_BL[:, targets] = drawn_Q.view(self.shape[0], -1)

    def _encode(self, new: slice, padded: int, factors_T: Tensor, layout: DenseLayout) -> Tensor:
        first, *others = self.model.encoder
        new_BmH = self.model.embed(self.tokens_BL[:, new])
        self.embedded_BLH[:, new] = new_BmH
        projected = first.project(new_BmH.flatten(0, 1), self.factors_BL[:, new].flatten(0, 1))
        self.first_attention.add(*projected, start=new.start)
        read_TND = self.first_attention.results(padded).to(new_BmH.dtype)
        x_TH = first.finish(self.embedded_BLH[:, :padded].flatten(0, 1), read_TND)
        for block in others:
            x_TH = block(x_TH, factors_T, layout.attend)
        return x_TH
