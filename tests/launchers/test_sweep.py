import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.sweep import expand


def test_all_combinations_in_order() -> None:
    words = ["c.yaml", "optimizer.learning_rate=1e-4,3e-4", "training.seed=1,2", "name=x"]
    found = expand(words)
    assert [suffix for _, suffix in found] == [
        "learning_rate=1e-4-seed=1",
        "learning_rate=1e-4-seed=2",
        "learning_rate=3e-4-seed=1",
        "learning_rate=3e-4-seed=2",
    ]
    assert found[1][0] == ("c.yaml", "optimizer.learning_rate=1e-4", "training.seed=2", "name=x")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optimizer.betas=[0.9,0.99],[0.9,0.95]", ["[0.9,0.99]", "[0.9,0.95]"]),
        ("parallel.stage_units=[1,2]", ["[1,2]"]),
        ("name='a,b','c'", ["'a,b'", "'c'"]),
        ("model={a: [1,2], b: 3}", ["{a: [1,2], b: 3}"]),
        ("training.seed=1,", ["1", ""]),
    ],
)
def test_commas_that_belong_to_a_value(word: str, values: list[str]) -> None:
    key = word.partition("=")[0]
    assert [words[0] for words, _ in expand([word])] == [f"{key}={value}" for value in values]


def test_other_words_stay_whole() -> None:
    words = ("a,b.yaml", "--draws", "1,2", "--steps=1,2", "runs/x,y")
    assert expand(words) == [(words, "")]


@given(st.lists(st.text("ab=,.[]'{}-", max_size=8), max_size=4))
def test_nothing_is_lost(words: list[str]) -> None:
    """Joined by commas again, the values of each word are the word."""
    found = [chosen for chosen, _ in expand(words)]
    for index, word in enumerate(words):
        values = list(dict.fromkeys(chosen[index] for chosen in found))
        key = values[0].partition("=")[0] + "=" if len(values) > 1 else ""
        joined = key + ",".join(value.removeprefix(key) for value in values)
        assert joined == word or len(set(word.split(","))) < len(word.split(","))


def test_suffixes_are_names_of_folders() -> None:
    (_, suffix), _ = expand(["data.train=s3://bucket/a b,other"])
    assert suffix == "train=s3_bucket_a_b"
