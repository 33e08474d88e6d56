"""JSON files that hold the SHA-256 of themselves: a change of any byte is found."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sealed_json(tree: dict[str, Any]) -> bytes:
    """With the SHA-256 of itself; the same bytes for the same tree."""
    digest = hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    return (json.dumps({**tree, "sha256": digest}, indent=2) + "\n").encode()


def open_sealed_json(data: bytes, needs_seal: bool = True) -> Any:
    """What was sealed; without `needs_seal` also what never was (of an older release).

    Raises:
        ValueError: in one line, what is wrong.
    """
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(tree, dict) and tree.pop("sha256", None) is not None:
        if sealed_json(tree) != data:
            raise ValueError("its bytes are not those of its sha256")
    elif needs_seal:
        raise ValueError("it has no sha256 of itself")
    return tree
