import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.diffusion import draws

SEED, LENGTH = 7, 12


def _all_draws(numbers_B):
    fraction_B = (numbers_B % 5) / 4
    return [
        draws.uniforms(SEED, numbers_B, "a", 3),
        draws.stratified_uniform(SEED, numbers_B, 16, "a"),
        draws.sequential_uniform(SEED, numbers_B, "a"),
        draws.bernoulli_mask(SEED, numbers_B, "a", fraction_B, LENGTH),
        draws.uniform_subset(SEED, numbers_B, "a", numbers_B % LENGTH, LENGTH),
    ]


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(100, 110)), cut=st.integers(1, 9))
def test_draws_are_the_same_for_any_order_and_split_of_the_batch(order, cut):
    numbers_B = np.array(order)
    whole = _all_draws(np.sort(numbers_B))
    parts = [_all_draws(numbers_B[:cut]), _all_draws(numbers_B[cut:])]
    for whole_draw, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), whole_draw[numbers_B - 100])


def test_draws_never_change_between_versions_and_machines():
    words = draws.random_words(1, np.array([0, 2**40]), "training/time", 2)
    assert words.tolist() == [
        [11518201425972378268, 14141428299920002555],
        [15527775040573397040, 15172167862626892649],
    ]
    np.testing.assert_array_equal(
        draws.uniforms(1, np.array([2**40]), "training/time", 2)[0],
        draws.sample_generator(1, 2**40, "training/time").random(2),
    )


def test_seed_sample_and_stream_each_change_the_draw():
    first = draws.uniforms(1, np.arange(3), "a", 4)
    assert np.unique(first).size == first.size
    assert not np.intersect1d(first, draws.uniforms(2, np.arange(3), "a", 4)).size
    assert not np.intersect1d(first, draws.uniforms(1, np.arange(3), "b", 4)).size


@pytest.mark.parametrize("batch", [1, 6, 16])
def test_every_global_batch_has_one_time_in_each_stratum(batch):
    for start in (0, 5 * batch):
        u_B = draws.stratified_uniform(SEED, np.arange(start, start + batch), batch, "time")
        np.testing.assert_array_equal(np.floor(u_B * batch), np.arange(batch))


def test_stratified_uniform_never_rounds_up_to_the_next_stratum(monkeypatch):
    largest = np.nextafter(1.0, 0.0)
    monkeypatch.setattr(draws, "uniforms", lambda *_: np.full((512, 1), largest))
    u_B = draws.stratified_uniform(SEED, np.arange(512), 512, "time")
    assert (u_B < (np.arange(512) + 1) / 512).all()


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_sequential_uniform_stratifies_every_aligned_block(block):
    for start in (0, 3 * block):
        u_B = draws.sequential_uniform(SEED, np.arange(start, start + block), "time")
        np.testing.assert_array_equal(np.sort(np.floor(u_B * block)), np.arange(block))


def test_bernoulli_mask_has_its_probability():
    probability_B = np.repeat([0.0, 0.2, 0.7, 1.0], 500)
    mask = draws.bernoulli_mask(SEED, np.arange(2000), "mask", probability_B, 40)
    means = mask.reshape(4, -1).mean(axis=1)
    assert means[0] == 0
    assert means[3] == 1
    np.testing.assert_allclose(means[1:3], [0.2, 0.7], atol=0.015)


def test_uniform_subset_has_its_size_and_is_uniform():
    size_B = np.arange(6000) % 6
    subset = draws.uniform_subset(SEED, np.arange(6000), "subset", size_B, 5)
    np.testing.assert_array_equal(subset.sum(axis=1), size_B)
    pairs = subset[size_B == 2] @ (1 << np.arange(5))
    _, counts = np.unique(pairs, return_counts=True)
    assert len(counts) == 10
    assert counts.min() > 60  # 1000 draws of 10 pairs, standard deviation 9.5
