"""`pgm-scale export`: a run's checkpoint as a folder, and how far what was written is from what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgm_scale import config as configuration
from pgm_scale.config import RunConfig, VQModelConfig
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.errors import UserError
from pgm_scale.export.card import CardFacts, model_card
from pgm_scale.export.folder import MAX_SHARD_BYTES, check_free, write_model_folder
from pgm_scale.export.parity import ROWS, LogitDifference, probe_logits
from pgm_scale.files import read_bounded
from pgm_scale.model_folder import is_model_folder, load_folder
from pgm_scale.run_folder import RunFolder, load_run
from pgm_scale.trained_model import TrainedModel, Weights

# Sections of the configuration that a card shows: what was learnt from what, with no places and no names.
_CARD_SECTIONS = ("objective", "optimizer", "training", "sampler")
# Of a record: about the machine, not about the model.
_MACHINE_METRICS = ("unix_time_s", "data_wait_s", "checkpoint_s", "memory_bytes")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportRequest:
    """`metrics_path`: an eval JSON for the card."""

    output: str
    step: int | None = None
    weights: Weights = "ema"
    dtype: str = "fp32"
    max_shard_bytes: int = MAX_SHARD_BYTES
    metrics_path: str | None = None


def export_run(run_folder: str, request: ExportRequest, say: Callable[[str], None] = print) -> None:
    """Write the folder and say how far its logits are from the run's, loaded in each type.

    Raises:
        UserError: no run, a VQ tokenizer's run, an output that exists, or an fp32 export with other logits.
    """
    run, output = RunFolder(run_folder), Path(request.output)
    check_free(output)
    if is_model_folder(run.path):
        raise UserError(f"{run.path} is an exported model already; give the folder of a run")
    config = run.config()
    if isinstance(config.model, VQModelConfig):
        raise UserError(
            f"{run.path} trains a VQ tokenizer, which has no logits; give the run itself where a tokenizer is "
            "asked for (`--vq`), or save it with pgm_scale.vq_tokenizer.VQTokenizer"
        )
    evaluation = _evaluation(request.metrics_path)
    trained = load_run(run.path, step=request.step, weights=request.weights)
    card = _card(run, config, trained, request.dtype, evaluation)
    expected = probe_logits(trained)
    write_model_folder(
        output,
        trained,
        card,
        dtype=DTYPES[request.dtype],
        max_shard_bytes=request.max_shard_bytes,
        check=lambda folder: _report(folder, expected, request.dtype, say),
    )
    origin = trained.description.origin
    say(f"{output}: step {origin.step} of {run.path}, {origin.weights_name} weights, {request.dtype}")


def _report(folder: Path, expected: Tensor, stored: str, say: Callable[[str], None]) -> None:
    """One line a type. What is stored in fp32 and loaded in fp32 must be the model, to the bit."""
    for name, dtype in DTYPES.items():
        difference = LogitDifference.of(expected, probe_logits(load_folder(folder, dtype=dtype)))
        if stored == name == "fp32" and difference.max_absolute != 0:
            raise UserError(
                f"the exported model's logits differ from the run's by {difference.max_absolute:.2g}; nothing was "
                "exported: try again, and report it if that does not help"
            )
        say(
            f"parity, stored in {stored}, loaded in {name}: largest logit difference {difference.max_absolute:.3g} "
            f"to the run in fp32, {difference.relative_rms:.2%} of their spread {difference.spread:.3g} (RMS; "
            f"{ROWS} rows of random tokens)"
        )


def _card(
    run: RunFolder, config: RunConfig, trained: TrainedModel, dtype: str, evaluation: dict[str, Any]
) -> str:
    tree = configuration.to_mapping(config)
    facts = CardFacts(
        parameters=sum(p.numel() for p in trained.model.parameters()),
        dtype=dtype,
        data=_manifest(config.data.train),
        settings={section: tree[section] for section in _CARD_SECTIONS},
        metrics=_last_metrics(run.metrics_path, trained.description.origin.step),
        evaluation=evaluation,
        distilled_from=run.identity().distilled_from,
    )
    return model_card(config.name, trained.description, facts)


def _manifest(split: str) -> DatasetManifest | None:
    """None where the data have moved, or are remote: a model can be exported without them."""
    try:
        return DatasetManifest.load(split)
    except UserError:
        return None


def _last_metrics(path: Path, step: int | None) -> dict[str, Any]:
    """The newest value of each metric in the records up to the step."""
    metrics: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if step is None or record["step"] <= step:
                    metrics |= {key: value for key, value in record.items() if value is not None}
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut
    return {key: value for key, value in metrics.items() if key not in _MACHINE_METRICS}


def _evaluation(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        tree = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--metrics {path}: {error}; give a JSON file of `pgm-scale eval`") from None
    if not isinstance(tree, dict):
        raise UserError(f"--metrics {path}: not a JSON object; give a JSON file of `pgm-scale eval`")
    return tree
