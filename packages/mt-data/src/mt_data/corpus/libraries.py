"""Libraries of the extra `mt-data[corpus]`, imported where they are used."""

import importlib
from typing import Any

from mt_core.errors import MtError


def import_library(name: str) -> Any:
    """A module, or an `MtError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        raise MtError(name, "is not installed", "pip install 'mt-data[corpus]'") from err
