"""The runs that are killed: a small model, an awkward data set, and the layouts that they are moved through."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ops.parity_layouts import STAGE_UNITS, layout
from ops.parity_runs import Case
from pgm_scale.config import CheckpointConfig
from pgm_scale.config.parsing import to_yaml

Zero = Literal[0, 1, 2, 3]
SAMPLERS = {"PGM": "pgm_uniform", "MDLM": "ancestral"}
STEPS = 60


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work, as parts of the command line."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: Zero = 1
    micro_batch_sequences: int = 8

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return (
            f"TP{self.tensor} PP{self.pipeline} DP{self.data} ZeRO-{self.zero} "
            f"micro-batch {self.micro_batch_sequences}"
        )

    def overrides(self, workload: str) -> list[str]:
        units = ",".join(map(str, STAGE_UNITS[workload][self.pipeline]))
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.stage_units=[{units}]",
            f"parallel.zero_stage={self.zero}",
            f"training.micro_batch_sequences={self.micro_batch_sequences}",
        ]


_SHAPES: dict[int, list[tuple[int, int, int]]] = {
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 2)],
    4: [(2, 2, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)],
}


def random_layout(choice: random.Random, ranks: int) -> Layout:
    """One that the product takes: a pipeline needs ZeRO-1."""
    tensor, pipeline, data = choice.choice(_SHAPES[ranks])
    zero: Zero = 1 if pipeline > 1 else choice.choice((0, 1, 2, 3))
    return Layout(tensor, pipeline, data, zero, choice.choice((2, 4)) if data == 4 else choice.choice((4, 8)))


@dataclass(frozen=True)
class TrainedRun:
    """What is trained: `write` puts it into a configuration file.

    Attributes:
        dropout: its draws depend on the layout, so it is for runs that keep theirs.
    """

    workload: str = "PGM"
    seed: int = 1
    steps: int = STEPS
    save_interval_steps: int = 3
    validation_interval_steps: int = 10
    keep_last: int = 2
    dropout: float = 0.0
    learning_rate: float = 3e-3
    timeout_s: float = 30.0
    samples: int = 1

    def write(self, data: Path, path: Path) -> Path:
        """The configuration file, which leaves the folder and the layout to the command line."""
        case: Case = layout(self.workload)
        config = case.config(data, path.parent)
        config = dataclasses.replace(
            config,
            folder=str(path.parent / "unnamed"),
            model=dataclasses.replace(config.model, dropout=self.dropout),  # type: ignore[arg-type]
            optimizer=dataclasses.replace(config.optimizer, learning_rate=self.learning_rate),
            training=dataclasses.replace(config.training, steps=self.steps, seed=self.seed),
            checkpoint=CheckpointConfig(interval_steps=self.save_interval_steps, keep_last=self.keep_last),
            validation=dataclasses.replace(
                config.validation, interval_steps=self.validation_interval_steps, samples=self.samples
            ),
            sampler=dataclasses.replace(config.sampler, kind=SAMPLERS[self.workload], steps=4),  # type: ignore[arg-type]
            parallel=dataclasses.replace(config.parallel, timeout_s=self.timeout_s),
        )
        path.write_text(to_yaml(config))
        return path

    def arguments(self, config: Path, folder: Path, layout: Layout, asynchronous: bool) -> list[str]:
        """Of the command line."""
        places = [f"folder={folder}", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
        return ["train", str(config), *places, *layout.overrides(self.workload)]
