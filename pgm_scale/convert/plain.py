"""What a foreign file's records say, in plain values: OmegaConf's configurations, and a tokenizer's JSON.

Neither omegaconf nor transformers is imported, or needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pgm_scale.convert.restricted_pickle import Record
from pgm_scale.errors import UserError

_DEEPEST = 64
_MOST_VALUES = 200_000  # a value can be reached by more ways than it has bytes
_VALUE = "_val"  # of an OmegaConf leaf: AnyNode, IntegerNode, ...
_CONTENT = "_content"  # of an OmegaConf container; a string where it is an interpolation, or missing


def plain(value: Any) -> Any:
    """Dicts, lists and scalars of a value that was read from a file.

    OmegaConf's interpolations (`${...}`) stay strings, and so do missing values (`???`). Whatever else is not plain
    becomes the name of its class, and a tensor "torch.Tensor".

    Raises:
        UserError: it holds itself, or is nested or repeated beyond reason.
    """
    return _Reader().read(value, 0)


class _Reader:
    def __init__(self) -> None:
        self.values = 0

    def read(self, value: Any, depth: int) -> Any:
        self.values += 1
        if depth > _DEEPEST or self.values > _MOST_VALUES:
            raise UserError(
                "its hyper-parameters are nested too deeply, or too many; give another checkpoint"
            )
        if isinstance(value, Record):
            return self.read_record(value, depth)
        if isinstance(value, dict):
            return {self.key(k): self.read(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.read(item, depth + 1) for item in value]
        if isinstance(value, Tensor):
            return "torch.Tensor"
        return value

    def read_record(self, record: Record, depth: int) -> Any:
        state = record.state if isinstance(record.state, dict) else {}
        for key in (_VALUE, _CONTENT):
            if record.module.startswith("omegaconf.") and key in state:
                return self.read(state[key], depth + 1)
        self.values += len(record.items)
        if record.items and all(type(item) is tuple and len(item) == 2 for item in record.items):
            return {
                self.key(k): self.read(v, depth + 1) for k, v in record.items
            }  # of a class made from dict
        if record.path == "argparse.Namespace":
            return self.read(state, depth + 1)
        return record.path

    def key(self, key: Any) -> Any:
        return key.path if isinstance(key, Record) else key


def tokenizer_json(value: Any) -> bytes | None:
    """The `tokenizer.json` of a pickled fast tokenizer of transformers, or None of anything else."""
    state = value.state if isinstance(value, Record) else None
    inner = state.get("_tokenizer") if isinstance(state, dict) else None
    if not isinstance(inner, Record) or inner.path != "tokenizers.Tokenizer":
        return None
    return inner.state if isinstance(inner.state, bytes) else None
