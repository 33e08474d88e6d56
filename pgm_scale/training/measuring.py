"""What the log tells of the steps since its last record: gathered step by step on each rank, then put together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pgm_scale.config import RunConfig
from pgm_scale.evaluation.time_buckets import TimeBuckets
from pgm_scale.models.flops import forward_flops_per_token
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.codebook_usage import CodebookUsage, usage_metrics
from pgm_scale.training.metrics import Throughput, memory_bytes, peak_flops
from pgm_scale.training.step import StepResult
from pgm_scale.watching.fingerprint import MODULUS


class Measurements:
    def __init__(self, config: RunConfig, vocab_size: int, length_tokens: int, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sequences = config.training.global_batch_sequences
        self._tokens_per_step = self._sequences * length_tokens
        self._peak_flops = peak_flops(mesh.device, config.training.precision)
        # Backward costs twice the forward (PaLM, appendix B).
        self._flops_per_token = 3 * forward_flops_per_token(config.model, vocab_size, length_tokens)
        self._throughput = Throughput()
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far; time counts from now."""
        self._buckets, self._codebook = TimeBuckets(), CodebookUsage()
        self._losses: list[float] = []
        self._fingerprint = 0
        self._throughput.restart()

    def add(self, result: StepResult) -> None:
        """A step: what it was trained on, and, if it was learnt from, what came out."""
        self._throughput.tokens += self._tokens_per_step
        self._fingerprint += result.fingerprint
        if result.instability is None:
            self._losses.append(result.loss)
            for terms in result.terms:
                self._buckets.add(terms)
                self._codebook.add(terms)

    def exclude(self, seconds: float) -> None:
        """Seconds that went into other things than training."""
        self._throughput.exclude(seconds)

    def record(self, step: int, newest: StepResult) -> dict[str, Any]:
        """Of all ranks, after `step` steps, of which `newest` is the last. Collective; begins anew."""
        mesh, buckets = self._mesh, TimeBuckets()
        buckets.merge(mesh.sum(self._buckets.state()))
        code_counts = self._codebook.state()
        if len(code_counts):
            code_counts = mesh.sum(code_counts)
        speed, peak = self._throughput.tokens_per_second(), self._peak_flops
        record = {
            "step": step,
            "samples": step * self._sequences,
            "loss": newest.loss,
            "loss_mean": float(np.mean(self._losses)) if self._losses else math.nan,
            "learning_rate": newest.learning_rate,
            "gradient_norm": newest.gradient_norm,
            "tokens_per_second": speed,
            "mfu": speed * self._flops_per_token / (peak * mesh.world_size) if peak else None,
            "memory_bytes": memory_bytes(mesh.device),
            **buckets.metrics(),
            **usage_metrics(code_counts),
            **self._data_record(newest),
        }
        self.restart()
        return record

    def _data_record(self, newest: StepResult) -> dict[str, Any]:
        """What identifies the data of these steps, and the samples of the newest one."""
        # Each rank's is below MODULUS, so that the sum is exact.
        total = self._mesh.sum(np.array([self._fingerprint % MODULUS], np.float64))[0]
        numbers = self._mesh.gather_numbers(np.array(newest.sample_numbers))
        return {
            "data_fingerprint": int(total) % MODULUS,
            "sample_numbers": [int(numbers[:, 0].min()), int(numbers[:, 1].max())],
        }
