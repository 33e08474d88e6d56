"""The model card: README.md of an exported folder, whose front matter the hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import yaml

from pgm_scale import config as configuration
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.trained_model import ModelDescription, Origin

_DIFFUSION = ("partition_transformer", "diffusion_transformer")
_USE = """## Use

With pgm-scale:

```python
import pgm_scale

trained = pgm_scale.load("FOLDER")  # int8=True: a quarter of the blocks' memory
```

or `pgm-scale sample FOLDER`. With transformers alone (`trust_remote_code` runs the .py files of this folder; after
`import pgm_scale.hugging_face` it is not needed):

```python
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)
{call}
```
"""
_TEXT_CALL = (
    "tokens = model.sample(count=4)  # rows of token ids, which the AutoTokenizer of this folder decodes"
)
_IMAGE_CALL = (
    "tokens = model.sample(class_ids=torch.tensor([0]))  # BOS and codes, which vq.safetensors decodes"
)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beside the description.

    Attributes:
        data: the training split; None where its folder cannot be read any more.
        settings: sections of the run's configuration.
        metrics: the run's last record up to the step, and its last one with validation; empty if there are none.
        evaluation: of an eval JSON.
        distilled_from: the first teacher of a distillation.
    """

    parameters: int
    dtype: str
    data: DatasetManifest | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    distilled_from: Origin | None = None


def model_card(name: str, description: ModelDescription, facts: CardFacts) -> str:
    """Markdown with YAML front matter. Strings that are paths lose their folders."""
    origin, model, sections = description.origin, description.model, []
    front = {
        "library_name": "transformers",
        # Only an autoregressive model works in the pipeline that the hub offers for the tag.
        **({"pipeline_tag": "text-generation"} if model.kind == "autoregressive_transformer" else {}),
        "tags": ["pgm-scale", model.kind.replace("_", "-"), *(["diffusion"] * (model.kind in _DIFFUSION))],
    }
    # A distillation's own, while the description has that of its teacher's pretraining.
    kind = facts.settings.get("objective", {}).get("kind", description.objective.kind)
    sections.append(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {_inline(name)}\n")
    sections.append(
        f"A {_inline(model.kind)} of {facts.parameters:,} parameters, trained by pgm-scale with the objective "
        f"{_inline(kind)}. The license is the owner's to choose: add it above.\n"
    )
    teacher = facts.distilled_from
    identity = {
        "run": origin.source,
        "run id": origin.run_id,
        "step": origin.step,
        "weights": {"ema": "exponential moving average", "weight": "raw"}[origin.weights],
        "stored as": facts.dtype,
        "parameters": facts.parameters,
        "checkpoint SHA-256": origin.checkpoint_sha256,
        "tokenizer SHA-256": description.tokenizer_sha256,
    }
    if teacher is not None:
        identity |= {"distilled from": teacher.source, "teacher's SHA-256": teacher.checkpoint_sha256}
    sections.append(_section("Model", {**identity, **_flat(configuration.to_mapping(model))}))
    sections.append(_section("Data", _data(description, facts.data)))
    sections.append(_section("Training", _flat(facts.settings)))
    sections.append(_section("Last metrics of the run", _flat(facts.metrics)))
    sections.append(_section("Evaluation", _flat(facts.evaluation)))
    sections.append(_USE.replace("{call}", _TEXT_CALL if description.images is None else _IMAGE_CALL))
    return "\n".join(section for section in sections if section)


def _data(description: ModelDescription, manifest: DatasetManifest | None) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "tokens a row": description.length_tokens,
        "vocabulary": description.vocabulary.size,
    }
    if description.images is not None:
        images = description.images
        rows |= {"image side (pixels)": images.side_pixels, "classes": len(images.class_names)}
    if manifest is None:
        return {"training split": "not readable when this was exported", **rows}
    counts = {"documents": manifest.documents, "rows": manifest.rows, "tokens": manifest.tokens}
    source = {f"source.{key}": value for key, value in _flat(manifest.source).items()}
    return {**counts, **rows, "packing": manifest.packing, **source}


def _section(title: str, rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {_inline(key)} | {_inline(_shown(value))} |" for key, value in rows.items() if value is not None
    ]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""]) if lines else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return _without_folders(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Iterable):
        return ", ".join(_shown(item) for item in value)
    return json.dumps(value)


def _without_folders(text: str) -> str:
    """A path or address is told by its last part alone: folders, hosts and accounts are nobody's business."""
    if "://" in text:
        text = urlsplit(text).path or "/"
    if "/" not in text and "\\" not in text:
        return text
    return PurePath(text.replace("\\", "/").rstrip("/")).name or "a path"


def _inline(text: Any) -> str:
    """Text that ends neither its table cell nor its line."""
    return " ".join(str(text).replace("|", "\\|").split())
