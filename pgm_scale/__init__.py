"""pgm-scale: pretraining of Partition Generative Models at cluster scale.

Importing the package, and sampling from a trained model, imports neither deepspeed nor megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgm_scale.trained_model import TrainedModel

__version__ = "0.1.0"


def load(folder: str, **options: Any) -> TrainedModel:
    """A trained model from a run folder or an exported one; see `pgm_scale.loading.load` for the options."""
    from pgm_scale.loading import load as load_model  # torch takes a second, which --help should not

    return load_model(folder, **options)
