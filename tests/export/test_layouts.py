"""A checkpoint of TP 2 x PP 2 under ZeRO-1 is exported as one of a single process with the same weights is."""

import dataclasses
import shutil
from pathlib import Path

from ops.parity_layouts import layout
from ops.parity_runs import train_all, write_data
from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.config import CheckpointConfig
from pgm_scale.export.run import ExportRequest, export_run
from pgm_scale.trained_model import Weights
from tests.distributed import run_ranks
from tests.export.runs import whole

STEPS = 2


def test_a_layout_leaves_no_trace(tmp_path: Path) -> None:
    case, run = layout("PGM", tensor=2, pipeline=2, zero=1), tmp_path / "spread"
    config = case.config(write_data(tmp_path / "data"), tmp_path)
    config = dataclasses.replace(
        config,
        folder=str(run),
        training=dataclasses.replace(config.training, steps=STEPS),
        checkpoint=CheckpointConfig(interval_steps=STEPS),
    )
    run_ranks(case.world_size, train_all, [config])
    store = CheckpointStore(run)
    assert len(list(store.folders.of(STEPS).glob("rank_*"))) == 4

    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.yaml", "run.json", "tokenizer.json"):
        shutil.copyfile(run / name, alone / name)
    kinds: tuple[Weights, ...] = ("weight", "ema")
    fragments = [
        (kind, whole(name, values)) for kind in kinds for name, values in store.read_full(STEPS, kind).items()
    ]
    CheckpointStore(alone).save(STEPS, fragments, {})
    assert len(list(CheckpointStore(alone).folders.of(STEPS).glob("rank_*"))) == 1

    for kind in kinds:
        folders = [tmp_path / f"{source.name}-{kind}" for source in (run, alone)]
        for source, folder in zip((run, alone), folders, strict=True):
            export_run(str(source), ExportRequest(str(folder), weights=kind), lambda _: None)
        one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
        assert one.keys() == other.keys()
        # These tell the checkpoint's hash, which is that of its files.
        differing = {name for name in one if one[name] != other[name]}
        assert differing <= {"README.md", "config.json"}, differing
    weights = [(tmp_path / f"spread-{kind}" / "model.safetensors").read_bytes() for kind in kinds]
    assert weights[0] != weights[1]
