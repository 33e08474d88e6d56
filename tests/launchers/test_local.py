"""What `--local` refuses; tests/launchers/test_cli.py runs it for real."""

from pathlib import Path

import pytest

from launchers.command import build_stage
from launchers.local import _visible_gpus, run_here
from pgm_scale.errors import UserError
from tests.tiny_data import write_tiny_data

ROOT = Path(__file__).parents[2]


def test_the_local_stand_in_is_no_place_for_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("slurm: {tasks_per_node: 2, launcher: torchrun}\n")
    data = write_tiny_data(tmp_path / "data")
    words = (str(ROOT / "configs/owt.yaml"), f"folder={tmp_path / 'run'}", f"data.train={data}")
    with pytest.raises(UserError, match=r"set slurm\.launcher to srun"):
        run_here(build_stage("train", words, str(path), {}), print)


@pytest.mark.parametrize(
    ("visible", "gpus"), [("", ()), ("4,5,6", (4, 5, 6)), ("GPU-8a", ()), ("5", None), ("4,", None)]
)
def test_gpus_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: tuple[int, ...] | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if gpus is not None:
        assert _visible_gpus(2) == gpus
        return
    with pytest.raises(UserError, match="--local needs 2 GPUs, and CUDA_VISIBLE_DEVICES names 1"):
        _visible_gpus(2)
