"""What `pgm-scale launch` submits: for the published runs, for 1.3B to 70B, and for each style of cluster.

python -m ops.slurm_examples    # writes the texts again
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
# Of an invented shared file system, so that the texts are the same wherever they are written.
RUNS = "/shared/runs"
PYTHON = "/shared/pgm-scale/.venv/bin/python"


@dataclass(frozen=True)
class Example:
    """A launch; `nodes` are those of the published run, or those that the configuration is laid out for."""

    name: str
    command: str
    config: str
    cluster: str
    nodes: int
    overrides: tuple[str, ...] = ()


PUBLISHED = (  # FACTS 2.2, 5 and 6.1
    Example("lm1b-pgm-6-6", "train", "configs/lm1b.yaml", "a100-4x", 2),
    Example("owt-pgm-8-8", "train", "configs/owt.yaml", "a100-4x", 4),
    Example("imagenet-pgm-12-12", "train", "configs/imagenet_pgm.yaml", "a100-4x", 4),
    Example("imagenet-maskgit-large", "train", "configs/imagenet_maskgit.yaml", "a100-4x", 4),
    # The model is the teacher's; it is named as that run is not there yet.
    Example(
        "owt-pgm-8-8-sdtt", "distill", "configs/owt_sdtt.yaml", "a100-4x", 2, ("model.size=pgm-8-8-768",)
    ),
)
SCALE = (
    Example("pgm-1.3b", "train", "configs/scale/pgm-1.3b.yaml", "h100-8x", 8),
    Example("pgm-7b", "train", "configs/scale/pgm-7b.yaml", "h100-8x", 16),
    Example("pgm-13b", "train", "configs/scale/pgm-13b.yaml", "h100-8x", 16),
    Example("pgm-30b", "train", "configs/scale/pgm-30b.yaml", "h100-8x", 64),
    Example("pgm-70b", "train", "configs/scale/pgm-70b.yaml", "h100-8x", 64),
)
STYLES = (  # one run on every kind of cluster: 16 GPUs
    Example("style-h100-8x", "train", "configs/owt.yaml", "h100-8x", 2),
    Example("style-a100-4x", "train", "configs/owt.yaml", "a100-4x", 4),
    Example("style-h200-8x", "train", "configs/owt.yaml", "h200-8x", 2),
    Example("style-a100-80gb-8x", "train", "configs/owt.yaml", "a100-80gb-8x", 2),
    Example("style-aws-p5-8x", "train", "configs/owt.yaml", "aws-p5-8x", 2),
    Example("style-gcp-a3-mega-8x", "train", "configs/owt.yaml", "gcp-a3-mega-8x", 2),
)
EXAMPLES = (*PUBLISHED, *SCALE, *STYLES)
