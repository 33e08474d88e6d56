import pytest

from data_prep.lm1b import LM1BSource, detokenise
from data_prep.readers import Reading, find_files

CASES = [
    ("see http : / / x.org now", "see http://x.org now"),
    ("see https : / / x.org now", "see https://x.org now"),
    ("it 's the dogs ' bowl", "it's the dogs ' bowl"),
    ("the end . A start", "the end. A start"),
    ("the end .", "the end."),
    ("why ? because", "why? because"),
    ("but why ?", "but why?"),
    ("stop ! now", "stop! now"),
    ("so stop !", "so stop!"),
    ("one , two : three ; four", "one, two: three; four"),
    ("and / or", "and/or"),
    ('he said " go away " then', 'he said "go away" then'),
    ("the ' odd one ' out", "the 'odd one' out"),
    ("' 1 + 1 '", "'1 + 1'"),
    ("a ( small ) b [ c ] d", "a (small) b [c] d"),
    ("for $ 5 or £ 3", "for $5 or £3"),
    # order: the full stop is attached before the quotes are, so it is not a lone word to them
    ('" It \'s over . "', '"It\'s over."'),
    # a stop after something that is not a bare word stays
    ("in U.S. . The", "in U.S. . The"),
    ("nothing to do", "nothing to do"),
    ("", ""),
]


@pytest.mark.parametrize(("before", "after"), CASES)
def test_detokenise(before, after):
    assert detokenise(before) == after


def test_splits_come_from_their_own_files_in_order(tmp_path):
    (tmp_path / "train.txt").write_text("one .\n\ntwo\n")
    (tmp_path / "test.txt").write_text("three\n")
    train, test = find_files([tmp_path / "train.txt"]), find_files([tmp_path / "test.txt"])
    source = LM1BSource(train, test, Reading("line"))
    assert list(source.documents()) == [("train", "one ."), ("train", "two"), ("validation", "three")]
    assert source.detokenise("a one .") == "a one."
