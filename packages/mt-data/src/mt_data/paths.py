"""Megatron's grammar of data paths: prefixes, or weights and prefixes in turn (spec/data.md §4.1). Needs no numpy."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import MtError, Problem
from mt_core.plugins import did_you_mean

GRAMMAR = 'prefixes only, or a weight before each prefix: "0.3" "a_text_document" "0.7" "b_text_document"'


@dataclass(frozen=True, slots=True)
class WeightedPaths:
    """Prefixes of .bin/.idx pairs; `weights` is None where none were given."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_paths(paths: Sequence[str]) -> WeightedPaths:
    """Tell weights from prefixes: an even list whose every first element is a number is weighted.

    A list that mixes the two forms is refused; Megatron takes some of them for prefixes silently.
    """
    paths = [path.strip() for path in paths]
    weights = [_number(path) for path in paths[::2]] if len(paths) % 2 == 0 else []
    if all(weight is None for weight in weights):
        return WeightedPaths(tuple(paths))
    numbers = [weight for weight in weights if weight is not None]
    if len(numbers) < len(weights):
        raise MtError("data.paths", f"{' '.join(paths)!r} has a weight before some prefixes only", GRAMMAR)
    if bad := [weight for weight in numbers if not 0 < weight < math.inf]:
        raise MtError("data.paths", f"weight {bad[0]}", "weights are finite and greater than 0")
    return WeightedPaths(tuple(paths[1::2]), tuple(numbers))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def missing_files(prefix: str, where: str) -> Iterator[Problem]:
    """A problem if the .bin or the .idx of a prefix is not there, with the nearest prefix that has both."""
    missing = [suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if missing:
        folder = Path(prefix).parent
        pairs = sorted(str(idx)[:-4] for idx in folder.glob("*.idx") if idx.with_suffix(".bin").is_file())
        hint = did_you_mean(prefix, pairs) if pairs else f"no .bin/.idx pair in {folder}; mt data preprocess writes one"
        yield Problem(where, f"no file {' and '.join(prefix + suffix for suffix in missing)}", hint)
