"""Every token of a text is scored once, whatever its length, and what did not fit is counted."""

import pytest

from pgm_scale.evaluation.continuations import ContinuationEncoder, LengthCounts
from tests.evaluation.tiny_text import word_tokenizer

LENGTH = 8
BOS = 0


@pytest.fixture
def encoder() -> ContinuationEncoder:
    return ContinuationEncoder(word_tokenizer(), BOS, LENGTH)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_a_pair_that_fits(encoder: ContinuationEncoder) -> None:
    (item,) = encoder.pair(words(1, 2), " " + words(3))
    assert (item.context, item.targets) == ([BOS, 1, 2], [3])
    (empty,) = encoder.pair("", words(3))
    assert (empty.context, empty.targets) == ([BOS], [3])
    assert encoder.counts == LengthCounts()


def test_a_context_with_bos_keeps_one(encoder: ContinuationEncoder) -> None:
    (item,) = encoder.pair(words(BOS, 1), " " + words(3))
    assert item.context == [BOS, 1]


def test_spaces_at_the_seam_are_the_continuations() -> None:
    calls = []

    class Spy:
        def encode(self, text: str, add_special_tokens: bool):
            calls.append(text)
            return word_tokenizer().encode(text)

    ContinuationEncoder(Spy(), BOS, LENGTH).pair("w1  ", "w2")
    assert calls == ["w1", "w1  w2"]


def test_a_token_over_the_seam_is_not_lost(encoder: ContinuationEncoder) -> None:
    """`w1` and `2` are one word as one text; apart they are w1 and a word that is unknown, w0."""
    (item,) = encoder.pair("w1", "2")
    assert (item.context, item.targets) == ([BOS, 1], [0])


def test_a_long_context_loses_its_first_tokens(encoder: ContinuationEncoder) -> None:
    (item,) = encoder.pair(words(*range(1, 10)), " " + words(10, 11))
    assert (item.context, item.targets) == ([BOS, 5, 6, 7, 8, 9], [10, 11])
    assert encoder.counts == LengthCounts(truncated_contexts=1)


@pytest.mark.parametrize("targets", [7, 8, 13, 14, 15, 20])
def test_a_continuation_beyond_the_model_is_scored_in_windows(
    encoder: ContinuationEncoder, targets: int
) -> None:
    tokens = [1 + i % 20 for i in range(targets)]
    items = encoder.pair(words(21, 22), " " + words(*tokens))
    assert [token for item in items for token in item.targets] == tokens
    seen = [21, 22]
    for item in items:
        assert item.context[0] == BOS
        preceding = item.context[1:]
        assert preceding == seen[len(seen) - len(preceding) :]
        assert len(item.context) + len(item.targets) == min(LENGTH, 1 + len(seen) + len(item.targets))
        seen += item.targets
    assert len(items) == -(-targets // (LENGTH - 1))
    assert encoder.counts.windowed_texts == (targets > LENGTH - 1)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
def test_a_whole_text_is_cut_into_disjoint_windows(encoder: ContinuationEncoder, count: int) -> None:
    tokens = [1 + i % 20 for i in range(count)]
    items = encoder.whole(words(*tokens))
    assert [token for item in items for token in item.targets] == tokens
    assert all(item.context == [BOS] and len(item.targets) < LENGTH for item in items)
    assert encoder.counts.windowed_texts == (count >= LENGTH)


def test_nothing_to_score_is_counted(encoder: ContinuationEncoder) -> None:
    assert encoder.pair(words(1), "") == []
    assert encoder.whole("") == []
    assert encoder.counts == LengthCounts(empty_continuations=2)


def test_a_prompt_leaves_room(encoder: ContinuationEncoder) -> None:
    assert encoder.prompt(words(1, 2), 3) == [BOS, 1, 2]
    assert encoder.prompt(words(*range(1, 10)), 3) == [BOS, 6, 7, 8, 9]
    assert encoder.prompt(words(*range(1, 10)), 256) == [BOS, 7, 8, 9]
    assert encoder.counts.truncated_contexts == 2
