"""A foreign checkpoint between its file and our names: what layouts of files are read into, and written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pgm_scale.errors import UserError

Layout = Literal["lightning", "image", "hugging_face", "vq"]
HyperParameters = dict[str, Any]


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Attributes:
    layout: of the files; see `layouts`.
    path: the file, or the folder.
    weights_path: the file that holds the weights.
    tensors: by their published keys, in their order.
    average: the EMA of the trainable ones, in the order of their registration; None without one.
    average_by_key: the same of a layout that names them.
    hyper_parameters: plain values, as the files have them.
    tokenizer_json: of a tokenizer that was stored with it.
    step: of the optimizer; None where the files do not say.
    """

    layout: Layout
    path: Path
    weights_path: Path
    tensors: dict[str, Tensor]
    average: list[Tensor] | None = None
    average_by_key: dict[str, Tensor] | None = None
    hyper_parameters: HyperParameters = field(default_factory=dict)
    tokenizer_json: bytes | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        """Raises: UserError: keys that would do something to a terminal; errors name keys."""
        if not all(key.isprintable() for key in self.tensors):
            raise UserError(f"{self.path}: the name of a tensor is no plain text; download or copy it again")


def found(
    hyper_parameters: HyperParameters, names: tuple[str, ...], kind: type[int] | type[float] | type[str]
) -> Any:
    """The first value of this type under one of these names: in the sections of a Hydra configuration, then beside.

    An interpolation, which is a string, is no number; None if there is no value.
    """
    root = hyper_parameters.get("config", hyper_parameters)
    if not isinstance(root, dict):
        return None
    for section in (root.get("model"), root.get("backbone"), root.get("algo"), root):
        if not isinstance(section, dict):
            continue
        for name in names:
            value = section.get(name)
            if type(value) is kind or (kind is float and type(value) is int):
                return value
    return None
