"""`make demo-images`: from real images to a VQ tokenizer, a PGM and a MaskGIT of its codes, and their samples.

The images are scikit-learn's 1,797 handwritten digits, which need no download. It runs the commands that a user
would run, prints each, and ends with a one-screen report. What it does by hand is what no command does: writing the
digits as a folder of images, choosing how many steps fit the time, and comparing the speed of two samplers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ops.demo_tools import run_command, steps_within_budget
from pgm_scale.files import atomic_write_bytes
from pgm_scale.reporting.metrics_file import read_metrics
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import known_prefixes, sample

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(".demo-images")
CONFIGS = {name: Path(f"configs/demo_images_{name}.yaml") for name in ("vq", "pgm", "maskgit")}
# Seconds of training of the 8 minutes, and the most steps that are of use.
BUDGETS = {"vq": (80.0, 600), "pgm": (90.0, 4000), "maskgit": (90.0, 4000)}
SIDE_PIXELS = 16
VALIDATION_SHARE = 1 / 3
EVALUATED = 600
PER_CLASS = 8
SPEED_IMAGES = 64
LEAST_ACCURACY = 0.85


def main() -> int:
    started_s = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_digits(FOLDER / "digits")
    splits = [
        part for split in ("train", "validation") for part in (f"--{split}", f"{FOLDER}/digits/{split}")
    ]
    size = ("--size", str(SIDE_PIXELS))
    run_command("prepare", "images", *splits, *size, "--channels", "1", "--output", f"{FOLDER}/pixels")
    train("vq")
    run_command(
        "prepare", "imagenet-vq", *splits, *size, "--vq", f"{FOLDER}/vq", "--output", f"{FOLDER}/codes"
    )
    for name in ("pgm", "maskgit"):
        train(name)
        grid = ("--count", str(PER_CLASS), "--columns", str(PER_CLASS), "--out", f"{FOLDER}/{name}.png")
        run_command("sample", f"{FOLDER}/{name}", *grid)
    results = {name: evaluate(name) for name in ("pgm", "maskgit")}
    return report(results, sampler_speeds(), started_s)


def write_digits(folder: Path) -> None:
    """The digits as PNG files `<split>/<digit>/<number>.png`; a third of them, drawn at random, is held out."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    held_out = set(order[: round(VALIDATION_SHARE * len(order))].tolist())
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("validation" if number in held_out else "train") / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(path)


def train(name: str) -> None:
    steps = steps_within_budget(CONFIGS[name], *BUDGETS[name])
    run_command("train", str(CONFIGS[name]), f"training.steps={steps}")


def evaluate(name: str) -> dict[str, Any]:
    """Samples of a run against the held-out digits; the classifier has learned from the others."""
    output = FOLDER / f"{name}_evaluation.json"
    light = ("--features", "light", "--classifier", f"{FOLDER}/pixels/train")
    reference = ("--reference", f"{FOLDER}/pixels/validation", "--labels", "balanced")
    count = ("--count", str(EVALUATED), "--batch", "100")
    run_command("eval-images", f"{FOLDER}/{name}", *reference, *light, *count, "--out", str(output))
    return json.loads(output.read_text())


def sampler_speeds() -> dict[str, float]:
    """Images/s of both models without decoding and without guidance, alternating, best of three each."""
    runs = {name: load_run(FOLDER / name) for name in ("pgm", "maskgit")}
    speeds = dict.fromkeys(runs, 0.0)
    for _ in range(3):
        for name, run in runs.items():
            description = run.description
            done = sample(
                run.model,
                description.vocabulary,
                description.length_tokens,
                description.sampler,
                known_BL=known_prefixes(
                    [[]] * SPEED_IMAGES, description.length_tokens, description.vocabulary.bos_id
                ),
                labels_B=np.arange(SPEED_IMAGES) % 10,
                seed=0,
                batch_sequences=SPEED_IMAGES,
                device="cpu",
            )
            speeds[name] = max(speeds[name], SPEED_IMAGES / done.elapsed_s)
    return speeds


def report(results: dict[str, dict[str, Any]], speeds: dict[str, float], started_s: float) -> int:
    """Print the report and write it as JSON; 1 if it misses its promise."""
    vq = read_metrics(FOLDER / "vq" / "metrics.jsonl")[-1]
    seconds = time.monotonic() - started_s
    held = results["pgm"]["classifier_accuracy"] >= LEAST_ACCURACY
    lines = [
        "",
        "=" * 78,
        "pgm-scale demo: handwritten digits as images, on the CPU",
        f"  VQ        {vq['step']} steps, validation loss {vq['validation_loss']:.4f}, "
        f"{vq['codebook_usage']:.0%} of its codes in use",
    ]
    for name, label in (("pgm", "PGM"), ("maskgit", "MaskGIT")):
        result = results[name]
        lines.append(
            f"  {label:9} {result['step']} steps; a classifier sees the right digit in "
            f"{result['classifier_accuracy']:.1%} of {result['count']} samples "
            f"(of real ones {result['classifier_accuracy_of_reference']:.1%});"
        )
        lines.append(
            f"            distance {result['light_distance']:.1f} to held-out digits (light features, not FID), "
            f"{speeds[name]:,.0f} images/s"
        )
    lines += [
        f"  samples   {FOLDER}/pgm.png, {FOLDER}/maskgit.png   (Halton order, guidance; a row a digit)",
        f"  runs      {FOLDER}/pgm   (pgm-scale sample {FOLDER}/pgm --classes 3,7 --out digits.png)",
        f"  took      {seconds:.0f} s",
        "=" * 78,
    ]
    if not held:
        lines.append(
            f"the promise is {LEAST_ACCURACY:.0%} of the PGM's samples seen as their digit: not reached here"
        )
    print("\n".join(lines))
    record = {"evaluation": results, "images_per_second": speeds, "seconds": seconds, "held": held}
    atomic_write_bytes(FOLDER / "report.json", (json.dumps(record, indent=2) + "\n").encode())
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
