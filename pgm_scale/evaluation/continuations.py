"""Texts of a benchmark as tokens that fit a model: contexts cut, texts that are too long scored in windows.

Nothing is left out of a score for its length. Every window starts with BOS, which is part of the model's length L.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """Token ids: `context`, BOS first, and what is scored behind it; together at most L."""

    context: list[int]
    targets: list[int]


@dataclass
class LengthCounts:
    """What was too long, or empty; every result carries it."""

    truncated_contexts: int = 0
    windowed_texts: int = 0
    empty_continuations: int = 0


class ContinuationEncoder:
    """Encodes (context, continuation) pairs and whole texts for a model of `length` tokens, and counts."""

    def __init__(self, tokenizer: Tokenizer, bos_id: int, length: int) -> None:
        self.tokenizer, self.bos_id, self.length = tokenizer, bos_id, length
        self.counts = LengthCounts()

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def pair(self, context: str, continuation: str) -> list[Continuation]:
        """The windows whose scores add up to that of the continuation; none if it has no tokens.

        Spaces at the end of the context count as the continuation's, as lm-eval has it. The two are encoded as one
        text, or apart where a token would reach over the seam. A context that is too long loses its first tokens. A
        continuation of more than L - 1 tokens is cut into windows of nearly equal size, each behind as much of what
        precedes it as fits.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        context_tokens, targets = self._split(kept, continuation)
        if not targets:
            self.counts.empty_continuations += 1
            return []
        if context_tokens[:1] == [self.bos_id]:
            context_tokens = context_tokens[1:]
        room = self.length - 1
        windows = -(-len(targets) // room)
        self.counts.truncated_contexts += windows == 1 and len(context_tokens) + len(targets) > room
        self.counts.windowed_texts += windows > 1
        bounds = [len(targets) * number // windows for number in range(windows + 1)]
        return [
            self._behind(context_tokens + targets[:first], targets[first:last])
            for first, last in itertools.pairwise(bounds)
        ]

    def whole(self, text: str) -> list[Continuation]:
        """Disjoint windows of at most L - 1 tokens, each behind BOS alone; every token is in exactly one."""
        tokens, room = self.tokens(text), self.length - 1
        self.counts.windowed_texts += len(tokens) > room
        self.counts.empty_continuations += not tokens
        return [self._behind([], tokens[first : first + room]) for first in range(0, len(tokens), room)]

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """BOS and the last tokens of a prompt, so that `new_tokens` (at most half of L) fit behind it."""
        tokens = self.tokens(text)
        room = self.length - 1 - min(new_tokens, self.length // 2)
        self.counts.truncated_contexts += len(tokens) > room
        return [self.bos_id, *tokens[max(0, len(tokens) - room) :]]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_tokens = self.tokens(context)
        both = self.tokens(context + continuation)
        if both[: len(context_tokens)] == context_tokens:
            return context_tokens, both[len(context_tokens) :]
        return context_tokens, self.tokens(continuation)

    def _behind(self, preceding: list[int], targets: list[int]) -> Continuation:
        room = self.length - 1 - len(targets)
        return Continuation([self.bos_id, *preceding[max(0, len(preceding) - room) :]], targets)
