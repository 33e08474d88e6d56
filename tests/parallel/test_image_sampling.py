"""Both image samplers, with guidance, on models that ranks hold parts of: the codes of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pgm_scale.config import (
    DataConfig,
    ImagePGMObjectiveConfig,
    MaskGITObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SamplerConfig,
    TrainingConfig,
)
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from tests.distributed import run_ranks
from tests.sampling.image_models import (
    CLASSES,
    CODES,
    LENGTH,
    MODELS,
    VOCABULARY,
    generate,
    image_model,
    known_images,
)

STAGE_UNITS = {"pgm": (5, 2), "maskgit": (2, 2)}


def _sampled(model: Any, kind: Any) -> np.ndarray:
    config = SamplerConfig(kind=kind, steps=4, guidance=1.5, temperature_warmup_steps=1)
    known_BL, labels = known_images([CODES, CODES, 7]), [0, CLASSES, 2]
    return generate(model, known_BL, labels, config, batch_sequences=2).tokens_BL


def _engine(name: str, local: Any, mesh: Mesh, parallel: ParallelConfig) -> Engine:
    config = RunConfig(
        folder="",
        data=DataConfig("", ""),
        model=local.config,
        objective=ImagePGMObjectiveConfig() if name == "pgm" else MaskGITObjectiveConfig(),
        optimizer=OptimizerConfig(),
        parallel=parallel,
        training=TrainingConfig(global_batch_sequences=2, micro_batch_sequences=1, precision="fp32"),
    )
    stage_units = STAGE_UNITS[name] if parallel.pipeline > 1 else ()
    engine = Engine.build(config, VOCABULARY.size, LENGTH, mesh, stage_units)
    wholes = {key: parameter.detach() for key, parameter in local.named_parameters()}
    engine.load_weights(
        [
            entry.part.take(wholes[entry.name])[entry.start : entry.start + entry.weight.numel()]
            for entry in engine.state
        ]
    )
    return engine


def _everything(mesh: Mesh, layouts: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for layout in layouts:
        for name in MODELS:
            local, parallel = image_model(name), ParallelConfig(**layout)
            engine = _engine(name, local, mesh.arranged(parallel), parallel)
            for kind in ("halton", "confidence"):
                with engine.evaluation(None) as model:
                    tokens_BL = _sampled(model, kind)
                assert np.array_equal(tokens_BL, _sampled(local, kind)), (layout, name, kind)
            engine.close()


def test_split_models_sample_the_same_images() -> None:
    layouts = [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2},
        {"zero_stage": 3},
    ]
    run_ranks(2, _everything, layouts)
