"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """Limits of one server.

    Attributes:
        max_batch_sequences: decoded together.
        max_queue_sequences: that may wait; a request that would make it more is refused with 429.
        max_wait_ms: how long an idle server waits for company before it samples a whole batch; not for PGMs of
            text, which others join at any step.
        timeout_s: of a request, from its arrival to its last token; then 503.
        grace_s: how long running requests may go on after SIGTERM; those that wait get 503 at once.
        max_request_sequences: prompts times n, or classes times n.
        max_steps: of a request.
        max_body_bytes: of a request; more is 413.
    """

    max_batch_sequences: int = 64
    max_queue_sequences: int = 256
    max_wait_ms: float = 5.0
    timeout_s: float = 120.0
    grace_s: float = 30.0
    max_request_sequences: int = 64
    max_steps: int = 4096
    max_body_bytes: int = 1 << 20
