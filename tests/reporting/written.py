"""Run folders and evaluation results as the library writes them, with numbers that a test chooses."""

import json
from pathlib import Path
from typing import Any

import yaml

LENGTH, GLOBAL_BATCH = 16, 4


def record(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples": step * GLOBAL_BATCH,
        "loss": 2.0 + 10 / step,
        "loss_mean": 2.0 + 10 / step,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0 / step,
        "tokens_per_second": 1000.0 + step,
        "mfu": None,
        "unix_time_s": 1.8e9 + step,
        **values,
    }


def write_run(folder: Path, records: list[dict[str, Any]] | bytes, **settings: Any) -> str:
    """`settings` are `section__key`; `records` may be the very bytes of `metrics.jsonl`."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "folder": str(folder),
        "name": "run",
        "objective": {"kind": "pgm"},
        "training": {"steps": 100, "seed": 1},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    identity = {
        "run_id": f"id-{folder.name}",
        "vocabulary": {"size": 24, "mask_id": 23, "bos_id": 0, "eos_id": 0, "pad_id": None},
        "length_tokens": LENGTH,
        "tokenizer_sha256": "a" * 64,
        "train_shards_sha256": "b" * 64,
    }
    (folder / "run.json").write_text(json.dumps(identity))
    lines = records
    if not isinstance(lines, bytes):
        lines = "".join(json.dumps(one) + "\n" for one in lines).encode()
    (folder / "metrics.jsonl").write_bytes(lines)
    return str(folder)


def text_result(steps: int, perplexity: float, speed: float, **changes: Any) -> dict[str, Any]:
    """What `pgm-scale eval --judge ... --json` writes, as far as a report reads it."""
    made = {
        "sampler": "pgm_uniform",
        "steps": steps,
        "sampler_settings": {"kind": "pgm_uniform", "steps": steps, "top_p": 1.0},
        "seed": 1,
        "samples": 64,
        "tokens_per_second": speed,
        "unigram_entropy_nats": 5.0 + steps / 1000,
        "retokenised_first_chunk": {"perplexity": perplexity, "perplexity_standard_error": 1.0},
        "raw_tokens": {"perplexity": None, "reason": "other token ids"},
        "judge": {"kind": "huggingface", "path": "judge", "precision": "fp32"},
    }
    return {
        "run": "runs/text",
        "run_id": "id-text",
        "step": 7,
        "weights": "ema",
        "precision": "bf16",
        "perplexity": 3.0,  # of the validation split: no generative one
        "likelihood": [{"perplexity": 3.0, "steps": 999}],
        "generative_perplexity": made,
    } | changes


def image_result(steps: int, fid: float, speed: float, guidance: float = 0.0) -> dict[str, Any]:
    """What `pgm-scale eval-images --out` writes, as far as a report reads it."""
    return {
        "run": "runs/images",
        "run_id": "id-images",
        "step": 7,
        "weights": "ema",
        "precision": "fp32",
        "sampler": {"kind": "halton", "steps": steps, "guidance": guidance},
        "seed": 1,
        "count": 50_000,
        "fid": fid,
        "reference": {"name": "real", "count": 50_000},
        "images_per_second_per_process": speed,
    }


def write_results(path: Path, results: Any) -> str:
    path.write_text(json.dumps(results))
    return str(path)
