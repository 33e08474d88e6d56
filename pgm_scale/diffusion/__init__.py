"""Noise schedule and the reproducible draws (time, partition, mask)."""

from pgm_scale.diffusion.schedule import LogLinearSchedule

__all__ = ["LogLinearSchedule"]
