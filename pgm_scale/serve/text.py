"""Texts to rows of tokens, and rows back to texts: all at once, or from left to right as they are decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pgm_scale.data.manifest import Vocabulary
from pgm_scale.sampling import UNKNOWN
from pgm_scale.serve.bodies import CompletionBody, InfillBody, Segment
from pgm_scale.serve.errors import ApiError

# A prompt with more characters than this for each position of the model is refused before it is tokenized.
_CHARACTERS_A_TOKEN = 64
_UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Template:
    """A row before it is decoded.

    Attributes:
        known_L: int64, BOS first, -1 where a token is to be generated.
        first: position of the first token that belongs to the answer; those before are its context.
    """

    known_L: np.ndarray
    first: int

    @property
    def generated_tokens(self) -> int:
        return int((self.known_L < 0).sum())


class TextRows:
    """Makes templates for one model."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, length: int) -> None:
        self.tokenizer, self.vocabulary, self.length = tokenizer, vocabulary, length

    def completions(self, body: CompletionBody) -> list[Template]:
        """One for each prompt.

        Raises:
            ApiError: a prompt is too long, or holds ids that are no tokens.
        """
        templates = []
        for prompt in body.prompt:
            tokens = self._encode(prompt, "prompt") if isinstance(prompt, str) else self._checked(prompt)
            first = 1 + len(tokens)
            if first + body.max_tokens > self.length:
                raise ApiError(
                    400,
                    f"the model holds {self.length} tokens: 1 for the start, {len(tokens)} of the prompt and "
                    f"max_tokens {body.max_tokens} are more; shorten the prompt or the completion",
                    param="prompt",
                    code="context_length_exceeded",
                )
            templates.append(self._template([*tokens, *[UNKNOWN] * body.max_tokens], first))
        return templates

    def infill(self, body: InfillBody) -> Template:
        """The row of a template or of segments; it ends where they end.

        Raises:
            ApiError: neither or both are given, there is no hole, or it is too long.
        """
        if (body.template is None) == (body.segments is None):
            raise ApiError(422, "give either template or segments", param="template", code="invalid_value")
        segments = _segments(body.template) if body.template is not None else body.segments or []
        tokens: list[int] = []
        for segment in segments:
            if (segment.text is None) == (segment.hole is None):
                raise ApiError(
                    422, "a segment has either text or hole", param="segments", code="invalid_value"
                )
            if segment.text is not None:
                tokens += self._encode(segment.text, "text")
            else:
                tokens += [UNKNOWN] * min(segment.hole or 0, self.length)
            if 1 + len(tokens) > self.length:
                raise ApiError(
                    400,
                    f"the text and its holes take more than the model's {self.length} tokens; shorten it",
                    param="template",
                    code="context_length_exceeded",
                )
        if UNKNOWN not in tokens:
            raise ApiError(
                422,
                "there is no hole; {4} in a template stands for 4 tokens to generate",
                param="template",
                code="invalid_value",
            )
        return self._template(tokens, first=1)

    def _template(self, tokens: Sequence[int], first: int) -> Template:
        return Template(np.array([self.vocabulary.bos_id, *tokens], np.int64), first)

    def _encode(self, text: str, what: str) -> list[int]:
        if len(text) > _CHARACTERS_A_TOKEN * self.length:
            raise ApiError(
                413, f"the {what} has {len(text)} characters, far more than the model holds", param=what
            )
        return self._checked(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _checked(self, ids: list[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self.vocabulary.size or token == self.vocabulary.mask_id:
                raise ApiError(422, f"{token} is not the id of a token", param="prompt", code="invalid_value")
        return ids


def _segments(template: str) -> list[Segment]:
    """The pieces of a template, as `sampling.run_text.known_template` takes it apart."""
    pieces = re.split(r"\{(\d+)\}", template)
    holes = [min(int(piece[:12]), 1 << 20) for piece in pieces[1::2]]
    segments = [Segment(text=pieces[0])]
    for hole, piece in zip(holes, pieces[2::2], strict=True):
        segments += [Segment(hole=hole)] if hole else []
        segments.append(Segment(text=piece))
    return segments


@dataclass(frozen=True)
class Answer:
    """The text of a row, and why it ends: at a stop, or because all is generated."""

    text: str
    finish_reason: str
    tokens: int


class LeftToRight:
    """The text of one row as its positions become known, in any order.

    What `take` returns, put together, is the text of the answer, which ends before the first end-of-text token or
    stop string. Characters that later tokens could still change are held back: bytes that are no character yet, and
    what could be the start of a stop string. (With a tokenizer whose text of a prefix is no prefix of its text, as
    WordPiece's clean-up makes "don't" of "do not", the tail that comes last may repeat or lack a character.)

    Args:
        stop_token: of generated tokens only; None for none.
    """

    def __init__(
        self, template: Template, tokenizer: Tokenizer, stop_token: int | None, stops: Sequence[str] = ()
    ) -> None:
        self.template, self.tokenizer, self.stop_token, self.stops = template, tokenizer, stop_token, stops
        self.tokens_L = template.known_L.copy()
        self.end = template.first  # of the decoded prefix, stop token left out
        self.sent, self.finish_reason = 0, ""
        self._held = max((len(stop) for stop in stops), default=1) - 1
        self._context = self._decode(template.known_L[1 : template.first])

    def take(self, positions: Sequence[int], tokens: Sequence[int]) -> str:
        """What is new at the end of the text, now that these tokens are known."""
        self.tokens_L[list(positions)] = tokens
        if self.finish_reason or not self._advance():
            return ""
        text, has_ended = self._text(), self.finish_reason or self.end == len(self.tokens_L)
        stable = text if has_ended else text.rstrip(_UNFINISHED_CHARACTER)
        cut = _first_stop(stable, self.stops)
        if cut is not None:
            self.finish_reason = "stop"
            stable = stable[:cut]
        elif has_ended:
            self.finish_reason = self.finish_reason or "length"
        else:
            stable = stable[: max(0, len(stable) - self._held)]
        new = stable[self.sent :]
        self.sent += len(new)
        return new

    @property
    def generated_tokens(self) -> int:
        """In the decoded prefix, a stop token left out."""
        return int((self.template.known_L[: self.end] < 0).sum())

    def _advance(self) -> bool:
        """Whether the decoded prefix has grown or ended."""
        before = self.end
        while self.end < len(self.tokens_L) and self.tokens_L[self.end] >= 0:
            is_generated = self.template.known_L[self.end] < 0
            if is_generated and self.tokens_L[self.end] == self.stop_token:
                self.finish_reason = "stop"
                return True
            self.end += 1
        return self.end > before

    def _text(self) -> str:
        """Of the answer; decoded behind its context, so that a tokenizer that joins words by spaces does so."""
        whole = self._decode(self.tokens_L[1 : self.end])
        if whole.startswith(self._context):
            return whole[len(self._context) :]
        return self._decode(self.tokens_L[self.template.first : self.end])

    def _decode(self, tokens_L: np.ndarray) -> str:
        return self.tokenizer.decode(tokens_L.tolist(), skip_special_tokens=False)


def answer_of(
    template: Template,
    tokens_L: np.ndarray,
    tokenizer: Tokenizer,
    stop_token: int | None,
    stops: Sequence[str] = (),
) -> Answer:
    """The whole text of a decoded row, exactly what a stream of it puts together."""
    reader = LeftToRight(template, tokenizer, stop_token, stops)
    positions = np.flatnonzero((template.known_L < 0) & (tokens_L >= 0))
    text = reader.take(positions.tolist(), tokens_L[positions].tolist())
    return Answer(text, reader.finish_reason, reader.generated_tokens)


def hole_texts(template: Template, tokens_L: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What was generated in each run of unknown positions."""
    unknown = np.flatnonzero(template.known_L < 0)
    holes = np.split(unknown, np.flatnonzero(np.diff(unknown) > 1) + 1)
    return [tokenizer.decode(tokens_L[hole].tolist(), skip_special_tokens=False) for hole in holes]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the text ends: at the start of the stop string that is complete first."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1] if found else None
