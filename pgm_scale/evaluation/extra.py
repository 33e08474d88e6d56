"""Packages that only an evaluation needs: the pip extra `evaluation`."""

from __future__ import annotations

import importlib
from typing import Any

from pgm_scale.errors import UserError


def require(module: str, option: str) -> Any:
    """Import an optional package.

    Raises:
        UserError: it is not there; the message names the option that needs it and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package {module.split('.')[0]} ({error}); pip install 'pgm-scale[evaluation]'"
        ) from None
