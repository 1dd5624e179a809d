"""Reading what `torch.save` wrote without running any of it: a pickle names everything it would call, and only names
of the list below are let through. Classes of Megatron's own become inert stand-ins, so Megatron need not be installed.
"""

import argparse
import io
import pathlib
import pickle
import pickletools
import signal
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mt_core.errors import MtError, Problem, raise_if

MEGATRON = "megatron."
"""Classes under this are arguments' values: enumerations, optimizer settings, states of the rerun machinery."""
INERT = (MEGATRON, "fp16.")
"""What starts so becomes a stand-in; of `fp16`, a package of 2019, files hold loss scalers."""
ADVICE = "nothing was run; a checkpoint of Megatron needs no such thing: do not trust this file"


class StandIn:
    """Stands for an instance of a class of Megatron's; keeps what was pickled, does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            vars(self).update(state)


def allowed_names() -> dict[str, Any]:
    """Names besides torch's own allow-list that a Megatron checkpoint may use (docs/specs/checkpoints.md §1.5)."""
    import numpy as np

    rebuild = np._core.multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "pathlib.PosixPath": pathlib.PurePosixPath,
        "signal.Signals": signal.Signals,
        "_io.BytesIO": io.BytesIO,
        "io.BytesIO": io.BytesIO,
        "numpy.core.multiarray._reconstruct": rebuild,
        "numpy._core.multiarray._reconstruct": rebuild,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.dtypes.UInt32DType": np.dtypes.UInt32DType,
    }


def read(path: Path) -> Any:
    """What a file holds; its tensors are memory-mapped where the file is a zip, as all are since torch 1.6."""
    if not path.is_file():
        raise MtError(str(path), "missing", "copy it from where the checkpoint came from")
    zipped = zipfile.is_zipfile(path)
    with _refusing(str(path)):
        globals_used = get_unsafe_globals_in_checkpoint(path) if zipped else _inert_before_zip(path)
    return _load(str(path), path, globals_used, mmap=zipped)


def _inert_before_zip(path: Path) -> list[str]:
    """Classes to stand in for in a file from before torch 1.6: four pickles, then the tensors' bytes."""
    globals_used: set[str] = set()
    with path.open("rb") as file:
        try:
            for _ in range(4):
                codes = pickletools.genops(file)
                globals_used |= {str(of).replace(" ", ".") for code, of, _ in codes if code.name == "GLOBAL"}
        except (ValueError, UnicodeDecodeError):
            return []  # no pickle: torch will say so
    return sorted(name for name in globals_used if name.startswith(INERT))


def read_bytes(where: str, content: bytes) -> Any:
    """What a record of a `torch_dist` file holds: `torch.save`'s zip, in memory."""
    with _refusing(where):
        globals_used = get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    return _load(where, io.BytesIO(content), globals_used, mmap=False)


def _load(where: str, source: Any, globals_used: list[str], *, mmap: bool) -> Any:
    allowed = allowed_names()
    stand_ins = {name: type(name.rpartition(".")[2], (StandIn,), {}) for name in globals_used if name.startswith(INERT)}
    refused = sorted(set(globals_used) - allowed.keys() - stand_ins.keys())
    raise_if(Problem(where, f"its pickle wants to use {name}", ADVICE) for name in refused)
    passed: list[Any] = [(value, name) for name, value in (allowed | stand_ins).items()]
    with _refusing(where), safe_globals(passed):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """What torch and zipfile raise for a damaged file, as one line that names it."""
    try:
        yield
    except PermissionError as err:
        raise MtError(where, "cannot be read", f"check its permissions ({err.strerror})") from None
    except pickle.UnpicklingError as err:
        raise MtError(where, f"its pickle is refused ({_reason(err)})", ADVICE) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, BadZipFile) as err:
        raise MtError(where, f"truncated or not a file of torch.save ({_reason(err)})", "copy it again") from None


def _reason(err: Exception) -> str:
    """The line of torch's message that names the culprit."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    culprit = next(
        (line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "empty"
    )
    return culprit.partition(" was not an allowed")[0]
