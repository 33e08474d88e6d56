"""Text from left to right, whatever the order of decoding."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pgm_scale.sampling.run_text import known_template
from pgm_scale.serve.bodies import CompletionBody, InfillBody
from pgm_scale.serve.errors import ApiError
from pgm_scale.serve.text import LeftToRight, Template, TextRows, answer_of, hole_texts
from tests.serve.tiny_service import LENGTH, VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = VOCABULARY.eos_id


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def template_of(prompt: str, unknown: int) -> Template:
    tokens = encoded(prompt)
    return Template(np.array([0, *tokens, *[-1] * unknown]), 1 + len(tokens))


def read(
    template: Template, tokens: list[int], order: list[int], stops: list[str], group: int = 1
) -> tuple[list[str], str]:
    """What is sent when the unknown tokens come in this order, so many at a time."""
    reader = LeftToRight(template, TOKENIZER, EOS, stops)
    sent = []
    for start in range(0, len(order), group):
        part = order[start : start + group]
        sent.append(
            reader.take([template.first + place for place in part], [tokens[place] for place in part])
        )
    return sent, reader.finish_reason


@pytest.mark.parametrize("stops", [[], ["b"], ["bcd", "c"], ["zz"], ["é", "\n\n"]])
@pytest.mark.parametrize("text", ["abcdéfg", "é€𝄞é", "a\n\nb", "zzz"])
@pytest.mark.parametrize("with_eos", [False, True])
def test_a_stream_in_any_order_puts_together_the_whole_text(
    stops: list[str], text: str, with_eos: bool
) -> None:
    tokens = encoded(text)
    if with_eos:
        tokens[len(tokens) // 2] = EOS
    template = template_of("p", len(tokens))
    whole = np.array([0, *encoded("p"), *tokens])
    answer = answer_of(template, whole, TOKENIZER, EOS, stops)
    kept = TOKENIZER.decode(tokens[: tokens.index(EOS)] if with_eos else tokens)
    ends = [(kept.find(stop) + len(stop), kept.find(stop)) for stop in stops if stop in kept]
    expected = kept[: min(ends)[1]] if ends else kept
    assert answer.text == expected
    assert answer.finish_reason == ("stop" if ends or with_eos else "length")
    generator = np.random.default_rng(1)
    for group in (1, 2, 3):
        order = generator.permutation(len(tokens)).tolist()
        sent, reason = read(template, tokens, order, stops, group)
        assert "".join(sent) == expected
        assert reason == answer.finish_reason


def test_text_is_sent_as_soon_as_a_prefix_is_complete() -> None:
    sent, _ = read(template_of("p", 4), encoded("abcd"), [2, 0, 1, 3], [])
    assert sent == ["", "a", "bc", "d"]
    sent, _ = read(template_of("p", 2), encoded("é"), [0, 1], [])  # two bytes of one character
    assert sent == ["", "é"]
    sent, _ = read(
        template_of("p", 4), encoded("abxy"), [0, 1, 2, 3], ["xy!"]
    )  # could become the stop string
    assert sent == ["", "", "a", "bxy"]


def test_words_that_a_tokenizer_joins_by_spaces_are_joined_to_the_prompt() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "b": 1, "##c": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    template = Template(np.array([0, 1, -1, -1]), 2)
    assert answer_of(template, np.array([0, 1, 1, 2]), tokenizer, None).text == " bc"


def test_a_template_is_read_as_the_command_line_reads_it() -> None:
    rows = TextRows(TOKENIZER, VOCABULARY, LENGTH)
    for text in ("ab{3}cd{2}", "{1}", "{4}x{0}y", "a{2}{3}b"):
        expected = known_template(text, TOKENIZER, LENGTH, VOCABULARY.bos_id)[0]
        known_L = rows.infill(InfillBody(template=text)).known_L
        np.testing.assert_array_equal(known_L, expected[: len(known_L)])
        assert (expected[len(known_L) :] == -1).all()
    segments = InfillBody.model_validate({"segments": [{"text": "a{2}"}, {"hole": 2}]})
    assert rows.infill(segments).known_L.tolist() == [0, *encoded("a{2}"), -1, -1]


def test_holes_are_told_one_by_one() -> None:
    template = Template(np.array([0, -1, -1, 5, -1]), 1)
    tokens = np.array([0, *encoded("xy"), 5, *encoded("z")])
    assert hole_texts(template, tokens, TOKENIZER) == ["xy", "z"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * LENGTH},
        {"prompt": "a" * 10_000},
        {"prompt": "a", "max_tokens": LENGTH - 1},
        {"prompt": [VOCABULARY.mask_id]},
        {"prompt": [VOCABULARY.size]},
        {"prompt": [-1]},
    ],
)
def test_prompts_that_do_not_fit_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ApiError) as caught:
        TextRows(TOKENIZER, VOCABULARY, LENGTH).completions(CompletionBody.model_validate(body))
    assert caught.value.status in (400, 413, 422)


def test_a_prompt_may_fill_all_but_what_is_asked_for() -> None:
    body = CompletionBody(prompt=["a" * (LENGTH - 3)], max_tokens=2)
    (template,) = TextRows(TOKENIZER, VOCABULARY, LENGTH).completions(body)
    assert (len(template.known_L), template.first, template.generated_tokens) == (LENGTH, LENGTH - 2, 2)
