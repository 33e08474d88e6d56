import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pgm_scale.errors import UserError
from pgm_scale.sampling.output import OutputFormat, chosen_format, load_tokenizer, to_text, write_samples
from pgm_scale.sampling.statistics import unigram_entropy

TOKENS_BL = np.array([[0, 1, 2], [0, 2, 2]])


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    words = Tokenizer(models.WordLevel({"<s>": 0, "blå": 1, "sky": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def test_text_keeps_special_tokens(tokenizer):
    assert to_text(TOKENS_BL, tokenizer) == ["<s> blå sky", "<s> sky sky"]


def test_three_formats(tokenizer, tmp_path):
    write_samples(tmp_path / "a.txt", TOKENS_BL, "text", tokenizer, first_sample_number=7)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == (
        "=== sample 7 ===\n<s> blå sky\n\n=== sample 8 ===\n<s> sky sky\n\n"
    )
    write_samples(tmp_path / "a.jsonl", TOKENS_BL, "jsonl", tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {"sample_number": 1, "text": "<s> sky sky", "tokens": [0, 2, 2]}
    write_samples(tmp_path / "a.npy", TOKENS_BL, "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), TOKENS_BL)
    write_samples(tmp_path / "b.jsonl", TOKENS_BL, "jsonl")
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["text"] is None


def test_the_suffix_decides_unless_a_format_is_given():
    for path, expected in (
        ("a.npy", "npy"),
        ("b/a.JSONL", "jsonl"),
        ("a.txt", "text"),
        ("npy", "text"),
        (None, "text"),
    ):
        assert chosen_format(None, path) == expected
    formats: tuple[OutputFormat, ...] = ("text", "jsonl", "npy")
    for given in formats:
        assert chosen_format(given, None) == chosen_format(given, "a.out") == given
    assert chosen_format("npy", "a.npy") == "npy"
    for given, path in zip(formats, ("a.npy", "a.txt", "a.jsonl"), strict=True):
        with pytest.raises(UserError, match=f"--out {path} is no file of --format {given}; leave one"):
            chosen_format(given, path)


def test_what_cannot_be_written_is_one_message(tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        write_samples(tmp_path / "a.txt", TOKENS_BL, "text")
    with pytest.raises(UserError, match="cannot write"):
        write_samples(tmp_path / "absent" / "a.npy", TOKENS_BL, "npy")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "absent.json")


def test_unigram_entropy_is_the_mean_of_row_entropies_in_nats():
    assert unigram_entropy(np.array([[5, 5, 5, 5]])) == 0
    expected = (math.log(3) + (2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))) / 2
    assert unigram_entropy(TOKENS_BL) == pytest.approx(expected)
