"""Libraries behind optional extras, and how many threads they may use."""

import importlib
import multiprocessing
import os
from types import ModuleType

from mt_core.errors import MtError


def engine(module: str, *, type: str) -> ModuleType:
    """A library that is an extra of mt-data by its own name, imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise MtError(type, f"needs {err.name!r}, which is not installed", f"pip install 'mt-data[{module}]'") from err


def threads() -> int:
    """Threads for a batch: every core, but one in a worker process, where the processes are the parallelism."""
    if multiprocessing.parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
