import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import tokenizers
from data_prep.tokenizers import (
    END_OF_TEXT,
    encode,
    load_tokenizer,
    open_tokenizer,
    sample_texts,
    size_to_train,
    train_bpe,
    vocabulary_of,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.errors import UserError
from tests.data_prep.conftest import random_text

TEXTS = [random_text(seed, 200) for seed in range(30)]


def bert_like() -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mask", "hello", "[", "]"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def test_trained_bpe_has_the_ids_of_gpt2s_convention():
    content = train_bpe(TEXTS, 400)
    assert content == train_bpe(TEXTS, 400)
    tokenizer = open_tokenizer(content, "x")
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert vocabulary_of(tokenizer, "wrap", "x") == Vocabulary(401, 400, 0, 0, None)
    assert vocabulary_of(tokenizer, "pad", "x") == Vocabulary(401, 400, 0, 0, 0)
    texts = [TEXTS[0], " ünï\n\t 𝄞", ""]
    ids = list(encode(tokenizer, texts))
    assert [tokenizer.decode(i, skip_special_tokens=False) for i in ids] == texts


def test_bert_like_tokenizers_keep_their_own_mask():
    tokenizer = open_tokenizer(bert_like().to_str().encode(), "x")
    assert vocabulary_of(tokenizer, "pad", "x") == Vocabulary(9, 4, 2, 3, 0)
    assert vocabulary_of(tokenizer, "wrap", "x").pad_id is None


def test_special_tokens_in_a_text_are_text():
    tokenizer = open_tokenizer(bert_like().to_str().encode(), "x")
    assert list(encode(tokenizer, ["hello [MASK]"])) == [[6, 7, 5, 8]]
    tokenizer = open_tokenizer(train_bpe([*TEXTS, END_OF_TEXT], 300), "x")
    (ids,) = encode(tokenizer, [f"a {END_OF_TEXT}"])
    assert 0 not in ids


def test_batches_do_not_show(monkeypatch):
    tokenizer = open_tokenizer(train_bpe(TEXTS, 300), "x")
    whole = list(encode(tokenizer, TEXTS))
    monkeypatch.setattr(tokenizers, "_BATCH_CHARACTERS", 3000)
    assert list(encode(tokenizer, TEXTS)) == whole
    assert list(encode(tokenizer, [])) == []


def test_the_training_sample_is_bounded_and_does_not_depend_on_order():
    texts = [f"{n} " + "x" * (n % 50) for n in range(5000)]
    sample = sample_texts(texts, limit_characters=20_000)
    assert 5_000 <= sum(map(len, sample)) <= 20_000
    assert set(sample) == set(sample_texts(reversed(texts), limit_characters=20_000))
    assert sample_texts(texts) == texts


def test_loading_by_file_and_by_folder(tmp_path):
    file = tmp_path / "tokenizer.json"
    content = train_bpe(TEXTS, 300)
    file.write_bytes(content)
    assert load_tokenizer(str(file)) == load_tokenizer(str(tmp_path)) == content
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    file.write_bytes(tokenizer.to_str().encode())
    assert json.loads(load_tokenizer(str(file))) == json.loads(content)


def test_loading_a_folder_with_the_older_files(tmp_path):
    bert_words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(bert_words))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = open_tokenizer(load_tokenizer(str(tmp_path)), "x")
    assert vocabulary_of(tokenizer, "pad", "x") == Vocabulary(7, 4, 2, 3, 0)
    assert list(encode(tokenizer, ["Hellos"])) == [[5, 6]]


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    def offline(name, file):
        raise ConnectionError("a long story\n" * 10)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for specification, message in [
        ("gpt2", "the hub did not give it.*train:bpe"),
        ("no/such/path/at/all", "the hub did not give it.*train:bpe"),
        (str(tmp_path / "tokenizer.json"), "not a tokenizer.json"),
        (str(tmp_path / "empty"), "no fast tokenizer"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            load_tokenizer(specification)
        assert "\n" not in str(raised.value)
    no_end = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="none of the end tokens"):
        vocabulary_of(no_end, "wrap", "x")


def test_size_to_train():
    assert size_to_train("gpt2") is None
    assert size_to_train("train:bpe:1024") == 1024
    for bad in ("train:bpe:", "train:bpe:256", "train:bpe:-5", "train:wordpiece:1000", "train:bpe:1e4"):
        with pytest.raises(UserError, match="train:bpe:<size>"):
            size_to_train(bad)
