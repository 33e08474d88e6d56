"""A heartbeat in Prometheus' text format, for the textfile collector of its node exporter.

The collector serves a file as long as it lies there: ask `pgm_scale_running` before you trust the others, and
`time() - pgm_scale_heartbeat_unix_seconds` before you trust that.
"""

from __future__ import annotations

import math

from pgm_scale.watching.heartbeat import Heartbeat

PROMETHEUS_NAME = "metrics.prom"


def prometheus_text(heartbeat: Heartbeat) -> str:
    """One gauge a value that is known, with the labels run, run_id and job."""
    labels = {"run": heartbeat.run, "run_id": heartbeat.run_id or "", "job": heartbeat.job or ""}
    written = ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items())
    lines = []
    for name, (meaning, value) in _gauges(heartbeat).items():
        if value is not None and math.isfinite(value):
            full = f"pgm_scale_{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} gauge", f"{full}{{{written}}} {value!r}"]
    return "\n".join(lines) + "\n"


def _gauges(beat: Heartbeat) -> dict[str, tuple[str, float | None]]:
    return {
        "running": ("1 while the run has said nothing of an end, else 0.", int(beat.is_active)),
        "step": ("Finished training steps.", beat.step),
        "loss": ("Training loss of the newest step, nats per token.", beat.loss),
        "tokens_per_second": ("Tokens trained on per second, all ranks.", beat.tokens_per_second),
        "gradient_norm": ("Norm of the gradient before clipping.", beat.gradient_norm),
        "learning_rate": ("Learning rate of the newest record.", beat.learning_rate),
        "mfu": ("Model FLOPs utilization, 0 to 1.", beat.mfu),
        "last_checkpoint_step": ("Step of the newest committed checkpoint.", beat.last_checkpoint_step),
        "heartbeat_unix_seconds": ("When the run last made progress.", beat.unix_time_s),
        "restarts": ("Sessions of the run before this one.", beat.restarts),
        "slowest_rank_ratio": (
            "Own seconds of the slowest rank over the median of the others of its stage.",
            beat.slowest_rank_ratio,
        ),
    }


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
