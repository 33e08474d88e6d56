"""The other processes of a run, as the checkpoint sees them: a rank, a count and one all-gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pgm_scale.errors import UserError

Result = TypeVar("Result")
_SHOWN_FAILURES = 4


def _gather_alone(value: Any) -> list[Any]:
    return [value]


def _unwatched(what: str) -> None:
    """Progress of a process that nobody watches."""


@dataclass(frozen=True)
class Peers:
    """Ranks that act together.

    Attributes:
        all_gather: takes a picklable object and returns those of all ranks, in rank order (a barrier too).
        progress: told what this rank is at, all along long work for which the others may wait.
    """

    rank: int = 0
    world_size: int = 1
    all_gather: Callable[[Any], list[Any]] = _gather_alone
    progress: Callable[[str], None] = _unwatched

    def each(self, action: Callable[[], Result]) -> list[Result]:
        """Run `action` on every rank and return all results; no rank goes on if one of them failed.

        Raises:
            UserError: on every rank, naming the failed ranks. A rank whose own failure is a bug (neither an
                `OSError` nor a `UserError`) raises that one, to keep its traceback.
        """
        result: Any = None
        failure: str | None = None
        cause: Exception | None = None
        try:
            result = action()
        except Exception as error:
            cause, failure = error, describe(error)
        outcomes = self.all_gather((result, failure))
        if cause is not None and not isinstance(cause, OSError | UserError):
            raise cause
        failures = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failures:
            raise UserError(self._summary(failures)) from cause
        return [value for value, _ in outcomes]

    def first(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 only; every rank gets its result, or its failure as a `UserError`."""
        results = self.each(lambda: action() if self.rank == 0 else None)
        return results[0]  # type: ignore[return-value]

    def _summary(self, failures: list[tuple[int, str]]) -> str:
        if self.world_size == 1:
            return failures[0][1]
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in failures[:_SHOWN_FAILURES])
        hidden = len(failures) - _SHOWN_FAILURES
        return shown + (f"; and {hidden} more ranks" if hidden > 0 else "")


ALONE = Peers()


def describe(error: Exception) -> str:
    """One line for an exception: an `OSError` by its reason and path, ours by its own text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
