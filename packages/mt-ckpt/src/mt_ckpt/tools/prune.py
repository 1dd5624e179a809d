"""Deleting old steps of a run."""

from pathlib import Path

from mt_core.checkpoint import native
from mt_core.errors import MtError


def prune(run: Path, keep: int) -> tuple[list[str], list[str]]:
    """Names of the steps that were removed and of those that are left, oldest first."""
    before = [path.name for path in native.steps(run)]
    if not before:
        raise MtError(str(run), "holds no committed steps", "give a run directory")
    native.prune(run, keep)
    kept = [path.name for path in native.steps(run)]
    return [name for name in before if name not in kept], kept
