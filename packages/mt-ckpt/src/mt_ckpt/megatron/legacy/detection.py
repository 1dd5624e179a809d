"""Tells files of the old classes from Megatron-Core's by what their pickle names, without reading it; torch-free."""

import zipfile
from pathlib import Path

from mt_ckpt.megatron.layout import iteration_directory
from mt_core.errors import MtError

MARK = b"X\x0e\0\0\0language_model"
"""The key of that name, as a pickle spells it."""
SEARCHED = 1 << 22
"""Bytes of a file from before torch 1.6, in which the pickle precedes the tensors."""


def is_legacy(path: Path) -> bool:
    """Whether a checkpoint of Megatron's was made by the old classes; not, if its files cannot be looked into."""
    try:
        first = min(iteration_directory(path).glob("mp_rank_*/model_*rng.pt"), default=None)
        return first is not None and MARK in _pickle(first)
    except (MtError, OSError, zipfile.BadZipFile):
        return False


def _pickle(file: Path) -> bytes:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            return opened.read(SEARCHED)
    with zipfile.ZipFile(file) as opened:
        name = next((name for name in opened.namelist() if name.endswith("data.pkl")), None)
        return opened.read(name) if name else b""
