"""ZeRO-3 that partitions tiny models too: it would keep parameters as small as theirs whole on every rank."""

from typing import Any

from pgm_scale.config import RunConfig
from pgm_scale.parallel import engine, weight_shards
from pgm_scale.parallel.mesh import Mesh


def partition_everything() -> None:
    """In this rank's process, from now on."""
    original = engine.deepspeed_config

    def changed(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
        settings = original(config, mesh)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    engine.deepspeed_config = changed
    weight_shards.WHOLE_BELOW_ELEMENTS = 0
