"""The work folder of a preparation, and what an output folder already holds."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.sources import SPLITS
from pgm_scale.data.manifest import MANIFEST_NAME, DatasetManifest
from pgm_scale.data.writers import write_mds_index
from pgm_scale.errors import UserError
from pgm_scale.files import atomic_write_bytes

WORK_FOLDER = ".prepare"
_PLAN_NAME = "plan.json"


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold the output folder; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another process is preparing here; wait for it to end") from None
        except OSError:
            pass  # some network file systems have no such lock
        yield
    finally:
        os.close(descriptor)


def completed(output: Path, plan: dict[str, Any]) -> list[DatasetManifest] | None:
    """The manifests of an output that is complete, None where splits are still missing.

    Raises:
        UserError: the output holds splits of another plan, or folders that are no data set.
    """
    manifests = []
    for split in SPLITS:
        folder = output / split
        if (folder / MANIFEST_NAME).exists():
            manifest = DatasetManifest.load(folder)
            _refuse_differences(f"{folder} was prepared differently", manifest.source, plan, output)
            manifests.append(manifest)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: in the way, and no data set of ours; choose another --output")
    if len(manifests) < len(SPLITS):
        return None
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    return manifests


def claim(output: Path, plan: dict[str, Any]) -> Path:
    """The work folder, new or of an unfinished run of the same plan; its results may then be trusted.

    Raises:
        UserError: an unfinished run of another plan.
    """
    folder = output / WORK_FOLDER
    plan_file = folder / _PLAN_NAME
    if plan_file.exists():
        what = f"{output} holds an unfinished preparation"
        try:
            old = json.loads(plan_file.read_bytes())
        except ValueError:
            old = None
        if not isinstance(old, dict):
            raise UserError(
                f"{plan_file}: damaged; delete {folder} and run the same command from the beginning"
            )
        _refuse_differences(what, old, plan, output)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("units", *SPLITS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(plan_file, json.dumps(plan, indent=2).encode())
    return folder


def finish(folder: Path, output: Path, tokenizer_files: tuple[str, ...], manifest: DatasetManifest) -> None:
    """Complete the shards in `folder` to a data set and move it into place, unless it is there already."""
    final = output / manifest.split
    if (final / MANIFEST_NAME).exists():
        return
    staging = folder / manifest.split
    shards = {shard.name for shard in manifest.shards}
    for path in list(staging.iterdir()):
        if path.name not in shards:  # of a writer that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in tokenizer_files:
        atomic_write_bytes(staging / name, (folder / name).read_bytes())
    if manifest.format == "mds":
        write_mds_index(staging, manifest)
    manifest.save(staging)
    os.rename(staging, final)


def _refuse_differences(what: str, old: dict[str, Any], new: dict[str, Any], output: Path) -> None:
    before, now = _flat(old), _flat(new)
    differences = [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(f"{what}: {'; '.join(differences)}; choose another --output, or delete {output}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
