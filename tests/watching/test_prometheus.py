"""Prometheus' own parser reads what we write."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgm_scale.watching.heartbeat import Heartbeat
from pgm_scale.watching.prometheus import prometheus_text
from tests.watching.test_heartbeat import heartbeat


def parsed(beat: Heartbeat) -> dict[str, tuple[float, dict[str, str]]]:
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(prometheus_text(beat)):
        assert family.type == "gauge"
        assert family.documentation
        (sample,) = family.samples
        found[sample.name] = (sample.value, sample.labels)
    return found


def test_values_and_labels_come_back() -> None:
    beat = heartbeat(
        run='a "quoted" \\n\\ name\nof two lines {}',
        run_id="abc",
        job="7_1",
        tokens_per_second=12345.678901234,
        gradient_norm=1e-12,
        learning_rate=3e-4,
        mfu=0.5,
        slowest_rank_ratio=1.25,
        last_checkpoint_step=4,
    )
    expected = {
        "running": 1,
        "step": 5,
        "loss": 2.5,
        "tokens_per_second": 12345.678901234,
        "gradient_norm": 1e-12,
        "learning_rate": 3e-4,
        "mfu": 0.5,
        "last_checkpoint_step": 4,
        "heartbeat_unix_seconds": 1000.5,
        "restarts": 1,
        "slowest_rank_ratio": 1.25,
    }
    labels = {"run": beat.run, "run_id": "abc", "job": "7_1"}
    assert parsed(beat) == {f"pgm_scale_{name}": (value, labels) for name, value in expected.items()}


def test_what_is_not_known_is_left_out() -> None:
    names = parsed(heartbeat(loss=float("nan"), mfu=None)).keys()
    assert not {"pgm_scale_loss", "pgm_scale_mfu", "pgm_scale_slowest_rank_ratio"} & names
    assert "pgm_scale_step" in names


@pytest.mark.parametrize("state", ["finished", "failed", "stopped:preempted"])
def test_an_ended_run_is_not_running(state: str) -> None:
    assert parsed(heartbeat(state=state))["pgm_scale_running"][0] == 0
