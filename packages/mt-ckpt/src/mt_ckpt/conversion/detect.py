"""Which loader reads a checkpoint, from the files it consists of."""

from pathlib import Path
from typing import TYPE_CHECKING

from mt_ckpt.megatron.legacy.detection import is_legacy
from mt_core.errors import MtError
from mt_core.plugins import component

if TYPE_CHECKING:
    from mt_core.contracts import CheckpointLoader

MARKS = {
    "native": ("meta.json", "step-*"),
    "hf": ("config.json",),
    "llama_mistral": ("params.json",),
    "core": ("latest_checkpointed_iteration.txt", "mp_rank_*", "metadata.json"),
}
"""Loader to patterns of names, any of which tells its format."""


def detect(path: Path) -> str:
    """The name of the loader for `path`."""
    for loader, patterns in MARKS.items():
        if any(next(path.glob(pattern), None) for pattern in patterns):
            return "legacy" if loader == "core" and is_legacy(path) else loader
    found = "holds no checkpoint of a known format" if path.is_dir() else "no such directory"
    looked_for = "; ".join(f"{loader}: {' or '.join(patterns)}" for loader, patterns in MARKS.items())
    raise MtError(str(path), found, f"looked for {looked_for}")


def open_checkpoint(path: Path) -> "CheckpointLoader":
    """The loader for `path`, opened."""
    return component("ckpt-loader", detect(path))(path)
