import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.models import segments
from pgm_scale.models.segments import Segments, segment_attention

HEADS, HEAD_SIZE = 2, 8
PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)


def masked_oracle(q, k, v, queries, keys):
    """One dense softmax over everything, with the rows that may read nothing set to 0."""
    allowed = queries.ids_T[:, None] == keys.ids_T
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -1e30).softmax(-1) * allowed
    return torch.einsum("nqk,knd->qnd", weights, v)


def draw(pairs, dtype=torch.float32, device="cpu"):
    queries, keys = (Segments.of(lengths, device) for lengths in zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(len(pairs))
    q, k, v = (
        torch.randn(n, HEADS, HEAD_SIZE, generator=generator).to(device, dtype).requires_grad_()
        for n in (queries.total_tokens, keys.total_tokens, keys.total_tokens)
    )
    return q, k, v, queries, keys


def assert_like_oracle(attention, pairs, tolerance=1e-5, **kind):
    q, k, v, queries, keys = draw(pairs, **kind)
    actual = attention(q, k, v, queries, keys)
    expected = masked_oracle(q.float(), k.float(), v.float(), queries, keys)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad((actual.float() * weight).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=tolerance, rtol=tolerance)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_any_lengths_equal_a_masked_softmax(pairs):
    assert_like_oracle(segment_attention, pairs)


@pytest.mark.parametrize("backend", [segments.looped_attention, segments.padded_attention])
@settings(deadline=None, max_examples=30)
@given(pairs=PAIRS)
def test_each_backend_on_segments_without_empty_ones(backend, pairs):
    assert_like_oracle(backend, [(n + 1, m + 1) for n, m in pairs])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_two_segments_of_any_length_a_sequence(queries, keys, data):
    splits = data.draw(st.lists(st.tuples(st.integers(0, queries), st.integers(0, keys)), min_size=1))
    pairs = [pair for n, m in splits for pair in ((n, m), (queries - n, keys - m))]
    assert_like_oracle(segments.paired_attention, pairs)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_uniform_segments_are_one_batch(count, query_length, key_length):
    assert_like_oracle(segments.uniform_attention, [(query_length, key_length)] * count)


@pytest.mark.parametrize(
    ("pairs", "backend"),
    [
        ([(3, 5), (3, 5)], "uniform_attention"),
        ([(0, 5), (3, 5), (3, 5)], "uniform_attention"),
        ([(3, 5), (4, 4)], "paired_attention"),
        ([(3, 5), (4, 4), (1, 1)], "looped_attention"),
        ([(3, 5), (4, 2), (6, 0), (1, 7)], "paired_attention"),
        ([(100, 28), (29, 101)], "looped_attention"),
    ],
)
def test_the_backend_follows_the_lengths(monkeypatch, pairs, backend):
    called = []

    def record(name, backend):
        def recorded(*arguments):
            called.append(name)
            return backend(*arguments)

        monkeypatch.setattr(segments, name, recorded)

    for name in ("uniform_attention", "paired_attention", "looped_attention"):
        record(name, getattr(segments, name))
    segment_attention(*draw(pairs))
    assert called == [backend]


@pytest.mark.parametrize("pairs", [[(3, 0), (2, 4), (0, 2)], [(3, 0), (0, 2)], [(5, 0)], [(3, 0), (0, 3)]])
def test_queries_without_keys_get_zero_and_zero_gradients(pairs):
    q, k, v, queries, keys = draw(pairs)
    out = segment_attention(q, k, v, queries, keys)
    out.square().sum().backward()
    without_keys = torch.tensor([m == 0 for _, m in pairs])[queries.ids_T]
    without_queries = torch.tensor([n == 0 for n, _ in pairs])[keys.ids_T]
    assert (out[without_keys] == 0).all()
    assert (q.grad[without_keys] == 0).all()
    assert (k.grad[without_queries] == 0).all()
    assert (v.grad[without_queries] == 0).all()
    if len(pairs) == 3:
        assert (out[~without_keys] != 0).all()
        assert (v.grad[~without_queries] != 0).any()


@pytest.mark.parametrize("pairs", [[(3, 0), (2, 4), (0, 2)], [(3, 0), (0, 3), (1, 2), (2, 1)]])
def test_no_kernel_meets_a_softmax_over_nothing(monkeypatch, pairs):
    kernel = torch.nn.functional.scaled_dot_product_attention

    def checked(q, k, v, attn_mask=None):
        assert k.shape[-2] > 0
        assert attn_mask is None or attn_mask.any(dim=-1).all()
        return kernel(q, k, v, attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", checked)
    segment_attention(*draw(pairs))


def test_segments_describe_themselves():
    ragged = Segments.of([2, 0, 3])
    assert (ragged.count, ragged.total_tokens, ragged.max_length) == (3, 5, 3)
    assert ragged.offsets_S1.tolist() == [0, 2, 2, 5]
    assert ragged.offsets_S1.dtype == torch.int32
    assert ragged.ids_T.tolist() == [0, 0, 2, 2, 2]
    assert [Segments.of(x).is_uniform for x in ([2, 2], [2, 3], [0, 0], [])] == [True, False, False, False]
    assert [Segments.of(x).pair_length for x in ([3, 1, 0, 4], [3, 1, 1], [3, 1, 2, 3], [])] == [4, 0, 0, 0]
    assert ragged.to("cpu") == ragged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on GPUs only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pairs", [[(300, 70), (1, 200), (90, 3)], [(5, 0), (7, 9), (0, 4)]])
def test_gpu_backends_equal_a_masked_softmax(dtype, pairs):
    assert_like_oracle(
        segment_attention, pairs, 3e-2 if dtype == torch.bfloat16 else 1e-4, dtype=dtype, device="cuda"
    )
