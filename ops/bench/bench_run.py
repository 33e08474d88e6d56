"""A training run without data or folder: what the loop does at each step, on one batch again and again."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ops.bench.models import VOCABULARY
from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from pgm_scale.data.batch import TokenBatch
from pgm_scale.objectives import build_objective
from pgm_scale.objectives.base import DrawSpec
from pgm_scale.parallel.engine import Engine
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training.checkpointing import Checkpointer
from pgm_scale.training.ema import ExponentialMovingAverage
from pgm_scale.training.stability import Stability
from pgm_scale.training.step import prepare_micro_batch, training_step


class BenchRun:
    """Model, engine, EMA and checkpointer of one rank; its checkpoints go below `folder`."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        model: ModelConfig,
        objective: ObjectiveConfig,
        sequences: int,
        length: int,
    ) -> None:
        self.mesh = mesh
        self.config = RunConfig(
            folder="",
            data=DataConfig("", ""),
            model=model,
            objective=objective,
            training=TrainingConfig(
                global_batch_sequences=sequences,
                micro_batch_sequences=sequences,
                precision="bf16" if mesh.device.type == "cuda" else "fp32",
            ),
            parallel=ParallelConfig(zero_stage=1),
        )
        self.engine = Engine.build(self.config, VOCABULARY.size, length, mesh)
        self.ema = ExponentialMovingAverage(self.engine.state, 0.999)
        self.checkpointer = Checkpointer(CheckpointStore(folder), self.engine, self.ema)
        self.stability = Stability(self.config.stability, folder / "roll_backs.json")
        self.objective = build_objective(objective, VOCABULARY)
        tokens_BL = np.random.default_rng(0).integers(0, VOCABULARY.mask_id, (sequences, length))
        batch = TokenBatch(tokens_BL, np.ones_like(tokens_BL, bool), np.arange(sequences))
        self.batch = prepare_micro_batch(self.objective, batch, DrawSpec(1, sequences))

    def step(self) -> float:
        """One training step; commits the save under way when it has been written. Returns its seconds."""
        start_s, checkpointer = perf_counter(), self.checkpointer
        result = training_step(
            0,
            self.engine,
            self.objective,
            iter([self.batch]),
            self.ema,
            self.config,
            self.mesh,
            checkpointer,
            self.stability,
            False,
        )
        if checkpointer.store.under_way is not None and result.agreed.save_ended:
            checkpointer.finish()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return perf_counter() - start_s
