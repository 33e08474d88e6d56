"""Learning-rate schedules."""

import math

import pytest

from pgm_scale.config import OptimizerConfig
from pgm_scale.parallel.optimizer import learning_rate


def test_warm_up_is_linear_and_never_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_and_cosine_reach_the_final_ratio() -> None:
    for schedule, half in (("linear", 0.55), ("cosine", 0.55)):
        config = OptimizerConfig(
            learning_rate=1.0,
            warmup_steps=0,
            schedule=schedule,  # type: ignore[arg-type]
            final_ratio=0.1,
        )
        assert learning_rate(config, 0, 100) == pytest.approx(1.0)
        assert learning_rate(config, 50, 100) == pytest.approx(half)
        assert learning_rate(config, 100, 100) == pytest.approx(0.1)
        assert learning_rate(config, 1000, 100) == pytest.approx(0.1)
    quarter = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(quarter, 25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
