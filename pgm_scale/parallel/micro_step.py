"""What the engine runs for one micro-batch, in whichever order its schedule has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgm_scale.models.readout import Readout


@dataclass(frozen=True)
class MicroStep:
    """One forward pass and its loss.

    Attributes:
        arguments, readout: of the model's call, on the device.
        begin: called right before the forward pass; it seeds dropout.
        loss: from the readout's result to this micro-batch's share of the global mean loss, where the result is:
            on the last pipeline stage.
    """

    arguments: tuple[Any, ...]
    readout: Readout
    begin: Callable[[], None]
    loss: Callable[[Any], Tensor]
