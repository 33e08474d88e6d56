"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pgm_scale_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self.request_s = Histogram(
            "pgm_scale_request_seconds",
            "from a request's arrival to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_s = Histogram(
            "pgm_scale_queue_seconds", "a sequence's wait for a slot", buckets=_SECONDS, registry=registry
        )
        self.step_s = Histogram(
            "pgm_scale_step_seconds", "forward passes or whole batches", buckets=_SECONDS, registry=registry
        )
        self.batch = Histogram(
            "pgm_scale_batch_sequences", "sequences in a step", buckets=_SEQUENCES, registry=registry
        )
        self.queued = Gauge("pgm_scale_queue_sequences", "sequences that wait for a slot", registry=registry)
        self.active = Gauge("pgm_scale_active_sequences", "sequences in slots", registry=registry)
        self.tokens = Counter("pgm_scale_generated_tokens", "tokens generated", registry=registry)
        self.disconnects = Counter(
            "pgm_scale_disconnects", "clients that left before their answer", registry=registry
        )

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
