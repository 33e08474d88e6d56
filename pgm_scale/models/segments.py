"""Attention between consecutive segments of packed tensors: query segment j reads only key segment j.

Group-wise attention in the packed layout is a list of small dense attentions, so no L x L mask exists and
the work is what the groups need: half of a dense mask's for two equal groups. `segment_attention` picks a
backend from what the host knows (the lengths) and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, compress

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here a CPU is faster with one masked attention over whole sequences than with one a group. Forward +
# backward in CPU ms on one core, heads of 64, random group sizes, self / cross attention:
#   sequences x tokens, heads    looped_attention   paired_attention   padded_attention
#   64 x 16, 2                   14.7 / 14.1         1.9 /  1.8         8.5 /   8.8
#   16 x 64, 2                    6.2 /  5.2         2.8 /  2.6         9.6 /   8.6
#   8 x 128, 2                    5.0 /  4.7         3.5 /  4.4        10.6 /  12.3
#   4 x 256, 2                    5.9 /  4.2         6.1 /  5.8        12.1 /  11.9
#   2 x 1024, 4                    53 /   36          99 /   77         118 /   101
MAX_MASKED_PAIR_TOKENS = 128


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of a packed `[T, ...]` tensor; any of them may be empty.

    Attributes:
        lengths: tokens of each segment, known to the host so that no code path asks the device for them.
        offsets_S1: int32 `[S + 1]` on the compute device; segment j is rows `offsets[j]:offsets[j + 1]`.
    """

    lengths: tuple[int, ...]
    offsets_S1: Tensor = field(compare=False, repr=False)

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Segments:
        lengths = tuple(int(length) for length in lengths)
        offsets_S1 = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, offsets_S1.to(device, non_blocking=True))

    @cached_property
    def count(self) -> int:
        return len(self.lengths)

    @cached_property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all segments have the same length, greater than 0."""
        return len(set(self.lengths)) == 1 and self.lengths[0] > 0

    @cached_property
    def pair_length(self) -> int:
        """Tokens of every pair of neighbouring segments (the two groups of a sequence); 0 if they differ."""
        pairs = {n + m for n, m in zip(self.lengths[::2], self.lengths[1::2], strict=False)}
        return pairs.pop() if len(pairs) == 1 and self.count % 2 == 0 else 0

    @cached_property
    def ids_T(self) -> Tensor:
        """int64 `[T]`: the segment of each packed row."""
        lengths_S = self.offsets_S1.diff().long()
        segments_S = torch.arange(self.count, device=lengths_S.device)
        # With the size given, a GPU does not have to report the sum back.
        return torch.repeat_interleave(segments_S, lengths_S, output_size=self.total_tokens)

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.lengths, self.offsets_S1.to(device, non_blocking=True))


def segment_attention(
    q_QND: Tensor, k_TND: Tensor, v_TND: Tensor, query_segments: Segments, key_segments: Segments
) -> Tensor:
    """Scaled dot-product attention of every query segment over the key segment of the same index.

    Args:
        q_QND: packed queries `[Q, N, D]`, Q = `query_segments.total_tokens`.
        k_TND: packed keys `[T, N, D]`, T = `key_segments.total_tokens`.
        v_TND: packed values, as the keys.
        query_segments: where the queries' segments lie.
        key_segments: where the keys' segments lie; as many as the queries'.

    Returns:
        `[Q, N, D]`. A query whose key segment is empty gets exactly 0, and zero gradients.
    """
    assert query_segments.count == key_segments.count, (query_segments.count, key_segments.count)
    on_cpu = q_QND.device.type == "cpu"
    if query_segments.is_uniform and key_segments.is_uniform:
        return uniform_attention(q_QND, k_TND, v_TND, query_segments, key_segments)
    pair_lengths = (query_segments.pair_length, key_segments.pair_length)
    if on_cpu and min(pair_lengths) > 0 and max(pair_lengths) <= MAX_MASKED_PAIR_TOKENS:
        return paired_attention(q_QND, k_TND, v_TND, query_segments, key_segments)
    if 0 in query_segments.lengths or 0 in key_segments.lengths:
        return _around_empty_segments(q_QND, k_TND, v_TND, query_segments, key_segments)
    if on_cpu:
        return looped_attention(q_QND, k_TND, v_TND, query_segments, key_segments)
    if q_QND.dtype in (torch.bfloat16, torch.float16):
        return variable_length_attention(q_QND, k_TND, v_TND, query_segments, key_segments)
    return padded_attention(q_QND, k_TND, v_TND, query_segments, key_segments)


def _around_empty_segments(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Attend without the pairs that have an empty side, so that no backend ever meets one.

    Kernels disagree about a softmax over nothing (0, NaN, or a NaN gradient only); here it is 0 by
    construction. Costs a copy of q, k and v, in batches that hold an empty segment.
    """
    kept_S = [n > 0 and m > 0 for n, m in zip(queries.lengths, keys.lengths, strict=True)]
    if not any(kept_S):
        # The empty sums keep q, k and v in the graph: their projections get a zero gradient, not none at all.
        return torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())

    def keep(x: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
        kept = torch.cat(list(compress(x.split(segments.lengths), kept_S)))
        return kept, Segments.of(compress(segments.lengths, kept_S), x.device)

    (q_kept, kept_queries), (k_kept, kept_keys), (v_kept, _) = keep(q, queries), keep(k, keys), keep(v, keys)
    attended = segment_attention(q_kept, k_kept, v_kept, kept_queries, kept_keys)
    parts = iter(attended.split(kept_queries.lengths))
    return torch.cat(
        [
            next(parts) if kept else q.new_zeros(n, *q.shape[1:])
            for kept, n in zip(kept_S, queries.lengths, strict=True)
        ]
    )


def uniform_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """All query segments of one length and all key segments of one length: a single batched attention."""
    q, k, v = (
        x.unflatten(0, (queries.count, x.shape[0] // queries.count)).transpose(1, 2) for x in (q, k, v)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def paired_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """A batch of sequences, each of two segments, under a mask `[B, L, M]`: for short sequences on a CPU.

    Twice the operations or more, but one call; takes empty segments too. See `MAX_MASKED_PAIR_TOKENS`.
    """
    sequences = queries.count // 2
    query_ids_BL, key_ids_BM = queries.ids_T.view(sequences, -1), keys.ids_T.view(sequences, -1)
    mask_BLM = query_ids_BL[:, :, None] == key_ids_BM[:, None, :]
    if 0 in keys.lengths:
        # A softmax needs something to read: these rows read everything, and their outputs are dropped.
        without_keys_BL = ~mask_BLM.any(dim=-1)
        mask_BLM |= without_keys_BL[..., None]
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BLM[:, None]).transpose(1, 2)
    if 0 in keys.lengths:
        attended = attended.masked_fill(without_keys_BL[..., None, None], 0.0)
    return attended.flatten(0, 1)


def looped_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """One attention a segment: the fewest operations, and a CPU pays little for a call."""
    parts = zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1)
            for part in parts
        ]
    )


def padded_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Segments padded to a batch, with a key mask: for fp32 on a GPU, which has no variable-length kernel."""

    def pad(x: Tensor, segments: Segments) -> Tensor:
        size = (segments.count * segments.max_length, *x.shape[1:])
        padded = x.new_zeros(size).index_copy(0, _padded_rows(segments), x)
        return padded.unflatten(0, (segments.count, segments.max_length)).transpose(1, 2)

    slots_M = torch.arange(keys.max_length, device=k.device)
    mask_S11M = (slots_M < keys.offsets_S1.diff()[:, None])[:, None, None]
    attended = F.scaled_dot_product_attention(
        pad(q, queries), pad(k, keys), pad(v, keys), attn_mask=mask_S11M
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, _padded_rows(queries))


def _padded_rows(segments: Segments) -> Tensor:
    """int64 `[T]`: the row that each packed row takes in the padded, flattened batch."""
    ids_T = segments.ids_T
    rows_T = torch.arange(segments.total_tokens, device=ids_T.device)
    return ids_T * segments.max_length + rows_T - segments.offsets_S1[ids_T]


def variable_length_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """The fused GPU kernel over packed segments, bf16 and fp16."""
    from torch.nn.attention.varlen import varlen_attn  # loads torch._dynamo, 1.6 s of a start

    out = varlen_attn(q, k, v, queries.offsets_S1, keys.offsets_S1, queries.max_length, keys.max_length)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are asked for
    return out
