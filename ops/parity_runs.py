"""Small training runs in any layout, through the real loop, and what it takes to compare two of them.

The runs are made to be awkward: rows of random valid length, so that ranks hold different token counts; a prime
vocabulary, which no tensor-parallel size divides; several micro-batches; stages cut where a PGM's pipeline passes
one stream, both streams, and the decoder's alone. Images have codes and labels at random.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, models

from ops.code_split import write_code_split
from pgm_scale.checkpoint.fragments import KINDS
from pgm_scale.checkpoint.store import CheckpointStore
from pgm_scale.config import (
    AutoregressiveObjectiveConfig,
    AutoregressiveTransformerConfig,
    CheckpointConfig,
    D3PMObjectiveConfig,
    DataConfig,
    DiffusionTransformerConfig,
    ImagePGMObjectiveConfig,
    MaskGITObjectiveConfig,
    MaskGITTransformerConfig,
    MDLMObjectiveConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from pgm_scale.data.manifest import DatasetManifest, Vocabulary
from pgm_scale.data.storage import SplitStorage
from pgm_scale.data.writers import shard_name, write_shard
from pgm_scale.files import sha256_file
from pgm_scale.models.segments import Segments
from pgm_scale.objectives.pgm import PGMInputs
from pgm_scale.parallel.mesh import Mesh
from pgm_scale.training import loop
from pgm_scale.training.step import MicroBatch, StepResult

LENGTH_TOKENS = 16
VOCABULARY = Vocabulary(size=23, mask_id=22, bos_id=0, eos_id=0, pad_id=None)
CODEBOOK, GRID_SIDE, CLASSES = 21, 4, ("a", "b", "c")
IMAGE_VOCABULARY = Vocabulary(
    size=CODEBOOK + 2, mask_id=CODEBOOK, bos_id=CODEBOOK + 1, eos_id=CODEBOOK + 1, pad_id=None
)
STEPS = 5
GLOBAL_BATCH_SEQUENCES = 16
LEARNING_RATE = 3e-3
# Of each step; the fp32 state of KINDS is compared after the last one.
METRICS = ("loss", "gradient_norm", "validation_nll")

Draws = dict[str, str]  # "step/sample number" -> hash of what a rank trained on for that sample

_SIZE = {"hidden_size": 16, "num_heads": 4, "dropout": 0.0}
_PARTITION: dict[str, Any] = {**_SIZE, "num_encoder_blocks": 2, "num_decoder_blocks": 2, "condition_size": 8}
_DIFFUSION: dict[str, Any] = {**_SIZE, "num_blocks": 4, "condition_size": 8}
WORKLOADS: dict[str, tuple[ModelConfig, ObjectiveConfig]] = {
    "PGM": (PartitionTransformerConfig(**_PARTITION), PGMObjectiveConfig()),
    "MDLM": (DiffusionTransformerConfig(**_DIFFUSION), MDLMObjectiveConfig()),
    "AR": (AutoregressiveTransformerConfig(**_SIZE, num_blocks=4), AutoregressiveObjectiveConfig()),  # type: ignore[arg-type]
    "D3PM": (DiffusionTransformerConfig(**_DIFFUSION, time_conditioned=True), D3PMObjectiveConfig()),
    "image PGM": (
        PartitionTransformerConfig(**_PARTITION, num_classes=len(CLASSES), registers=4),
        ImagePGMObjectiveConfig(),
    ),
    "MaskGIT": (
        MaskGITTransformerConfig(**_SIZE, num_blocks=4, num_classes=len(CLASSES), registers=3),  # type: ignore[arg-type]
        MaskGITObjectiveConfig(),
    ),
    "PGM mlp4 mean": (
        PartitionTransformerConfig(
            **_PARTITION, group_swap_query="learn+freqs+mean", group_swap_processor="mlp4"
        ),
        PGMObjectiveConfig(form="bounded"),
    ),
}


@dataclass(frozen=True)
class Case:
    """A workload in a layout; `data` counts its data-parallel ranks."""

    workload: str
    parallel: ParallelConfig
    data: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute_blocks: bool = False
    micro_batch_sequences: int = 4

    @property
    def world_size(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def name(self) -> str:
        """One line, different for different cases."""
        parallel = self.parallel
        options = [
            "SP" if parallel.sequence_parallel else "",
            "recompute" if self.recompute_blocks else "",
            "offload" if parallel.offload_optimizer else "",
            f"stages {'+'.join(map(str, parallel.stage_units))}" if parallel.stage_units else "",
            "" if self.precision == "fp32" else self.precision,
            "" if self.micro_batch_sequences == 4 else f"micro {self.micro_batch_sequences}",
        ]
        layout = f"TP{parallel.tensor} PP{parallel.pipeline} DP{self.data} ZeRO-{parallel.zero_stage}"
        return " ".join([self.workload, layout, *filter(None, options)])

    def config(self, data: Path, runs: Path) -> RunConfig:
        """The run of this case in a folder of its own in `runs`, on the data of `write_data`."""
        model, objective = WORKLOADS[self.workload]
        data = data / ("images" if getattr(model, "num_classes", 0) else "text")
        return RunConfig(
            folder=str(runs / self.name.replace(" ", "_")),
            data=DataConfig(str(data / "train"), str(data / "validation")),
            model=model,
            objective=objective,
            # Adam divides a gradient by its own size, so it turns the rounding of a gradient near 0 into a
            # difference of up to the learning rate in a weight. The larger the rate, the sooner the gates of the
            # blocks leave 0, before which their inner gradients are nothing.
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0, weight_decay=0.01),
            training=TrainingConfig(
                steps=STEPS,
                global_batch_sequences=GLOBAL_BATCH_SEQUENCES,
                micro_batch_sequences=self.micro_batch_sequences,
                precision=self.precision,
                recompute_blocks=self.recompute_blocks,
                log_interval_steps=1,
            ),
            parallel=self.parallel,
            checkpoint=CheckpointConfig(interval_steps=STEPS),
            validation=ValidationConfig(interval_steps=STEPS, sequences=24, samples=0),
        )


def write_data(folder: Path) -> Path:
    """Splits `train` and `validation` of `text`, and of the codes of `images`."""
    for seed, (split, rows) in enumerate({"train": 100, "validation": 24}.items()):
        for kind, write in (("text", _write_text), ("images", _write_images)):
            part = folder / kind / split
            part.mkdir(parents=True)
            write(part, split, rows, np.random.default_rng(seed))
    return folder


def _write_images(folder: Path, split: str, rows: int, generator: np.random.Generator) -> None:
    """Rows of BOS and random codes, whose VQ is never loaded."""
    tokens = generator.integers(0, CODEBOOK, (rows, 1 + GRID_SIDE**2)).astype(np.uint16)
    tokens[:, 0] = IMAGE_VOCABULARY.bos_id
    labels = generator.integers(0, len(CLASSES), rows)
    write_code_split(folder, split, tokens, labels, IMAGE_VOCABULARY, CLASSES, shard_format="tar")


def _write_text(folder: Path, split: str, rows: int, generator: np.random.Generator) -> None:
    """Random tokens, in rows of random valid length."""
    tokenizer = folder / "tokenizer.json"
    words = {f"w{word}": word for word in range(VOCABULARY.mask_id)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tokenizer))
    tokens = generator.integers(1, VOCABULARY.mask_id, (rows, LENGTH_TOKENS)).astype(np.uint16)
    valid = generator.integers(4, LENGTH_TOKENS + 1, rows)
    DatasetManifest(
        format="tar",
        split=split,
        vocabulary=VOCABULARY,
        tokenizer_sha256=sha256_file(tokenizer),
        length_tokens=LENGTH_TOKENS,
        token_dtype="uint16",
        packing="pad",
        source={},
        documents=rows,
        rows=rows,
        tokens=int(valid.sum()),
        shards=(write_shard(folder, shard_name(0, "tar"), "tar", tokens, valid),),
    ).save(folder)


def train_recorded(mesh: Mesh, config: RunConfig) -> list[Draws]:
    """Train, and return what every rank trained on. Collective."""
    seen: Draws = {}
    with patch.object(loop, "training_step", partial(_recorded_step, loop.training_step, seen)):
        loop.train_on_mesh(
            config, mesh, SplitStorage(config.data.train), SplitStorage(config.data.validation)
        )
    return mesh.gather(seen)


def train_all(mesh: Mesh, configs: Sequence[RunConfig]) -> list[list[Draws]]:
    return [train_recorded(mesh, config) for config in configs]


def _recorded_step(training_step: Any, seen: Draws, step: int, *arguments: Any) -> StepResult:
    """`training_step`, which takes the stream of micro-batches as its fourth argument."""
    engine, objective, stream, *rest = arguments
    return training_step(step, engine, objective, _recorded(stream, seen, step), *rest)


def _recorded(stream: Iterator[MicroBatch], seen: Draws, step: int) -> Iterator[MicroBatch]:
    for batch in stream:
        digests = sequence_digests(batch.inputs, len(batch.sample_numbers_B))
        for number, digest in zip(batch.sample_numbers_B.tolist(), digests, strict=True):
            assert f"{step}/{number}" not in seen
            seen[f"{step}/{number}"] = digest
        yield batch


def sequence_digests(inputs: Any, sequences: int) -> list[str]:
    """A hash, for each sequence of an objective's inputs, of all that they hold of it: noise, targets, weights.

    PGM's are packed, all of a sequence before all of the next; the others are one copy of the batch or several.
    """
    hashes = [hashlib.sha256() for _ in range(sequences)]
    for name, values in _arrays(inputs):
        if isinstance(inputs, PGMInputs):
            shares = values.reshape(sequences, -1)
        else:
            shares = values.reshape(-1, sequences, *values.shape[1:]).swapaxes(0, 1)
        for sequence_hash, share in zip(hashes, shares, strict=True):
            sequence_hash.update(f"{name} {share.dtype} {share.shape}".encode() + share.tobytes())
    return [sequence_hash.hexdigest()[:16] for sequence_hash in hashes]


def _arrays(inputs: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor and array of nested inputs but the row's place in its batch; segments as their lengths."""
    for field in dataclasses.fields(inputs):
        name, value = prefix + field.name, getattr(inputs, field.name)
        if isinstance(value, Segments):
            yield name, np.array(value.lengths)
        elif dataclasses.is_dataclass(value):
            yield from _arrays(value, f"{name}.")
        elif isinstance(value, torch.Tensor | np.ndarray) and field.name != "sequence_S":
            yield name, np.asarray(value)


def same_draws(found: Sequence[Draws], reference: Draws, parallel: ParallelConfig) -> bool:
    """Whether the model copies share out the reference's samples, in the same steps and with the same bits.

    `found` is one a rank, in rank order (tensor-parallel, then data-parallel ranks, then stages); all ranks of a
    model copy have to see the same.
    """
    data = len(found) // (parallel.tensor * parallel.pipeline)
    shares: list[Draws] = list(found[: parallel.tensor * data : parallel.tensor])
    alike = all(draws == shares[rank // parallel.tensor % data] for rank, draws in enumerate(found))
    merged = {key: digest for share in shares for key, digest in share.items()}
    return alike and merged == reference and sum(map(len, shares)) == len(reference)


def differences(run: Path, reference: Path, step: int = STEPS) -> dict[str, float]:
    """How far two runs are from each other; NaN where either has one.

    Largest absolute differences of METRICS over the steps and of KINDS over the elements at `step`, and

        weight_rms: root mean square over all elements, which a few elements of unlucky rounding do not tilt.
        exp_avg_relative: of the first moment of a tensor, norm of the difference over norm; the worst tensor.
            Adam's update does not know the size of a gradient, and the gradients within blocks are small: one that
            is summed twice, or not at all, shows here.
    """
    found, expected = records(run), records(reference)
    assert [record["step"] for record in found] == [record["step"] for record in expected], run
    result = {
        metric: _largest(
            abs(a[metric] - b[metric]) for a, b in zip(found, expected, strict=True) if metric in b
        )
        for metric in METRICS
    }
    for kind in KINDS:
        ours, theirs = (CheckpointStore(folder).read_full(step, kind) for folder in (run, reference))
        assert ours.keys() == theirs.keys(), (run, kind)
        gaps = {name: ours[name] - theirs[name] for name in theirs}
        result[kind] = _largest(gap.abs().max() for gap in gaps.values())
        if kind == "weight":
            elements = torch.cat([gap.flatten() for gap in gaps.values()])
            result["weight_rms"] = float(elements.square().mean().sqrt())
        if kind == "exp_avg":
            result["exp_avg_relative"] = _largest(gaps[name].norm() / theirs[name].norm() for name in theirs)
    return result


def records(run: Path) -> list[dict[str, Any]]:
    """The run's metrics, one a step; a validation loss that is no likelihood has the name of one that is."""
    text = (run / "metrics.jsonl").read_text().replace('"validation_loss"', '"validation_nll"')
    return [json.loads(line) for line in text.splitlines()]


def _largest(values: Iterable[Any]) -> float:
    return float(np.max([float(value) for value in values]))  # unlike `max` it keeps a NaN
