"""Where a data section says its corpora are: Megatron's grammar of paths, for all splits or for each.

Source: docs/specs/data.md §4.1.

Prefixes, or weights and prefixes in turn. Needs no numpy.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt_core.errors import MtError, Problem
from mt_core.plugins import did_you_mean
from mt_data.config.split import SPLITS

if TYPE_CHECKING:
    from mt_data.config import Corpora

GRAMMAR = 'prefixes only, or a weight before each prefix: "0.3" "a_text_document" "0.7" "b_text_document"'
FORMS = "one of paths, paths_file, split_paths_file, or train_paths with valid_paths and test_paths"


@dataclass(frozen=True, slots=True)
class WeightedPaths:
    """Prefixes of .bin/.idx pairs; `weights` is None where none were given."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    where: str = "data.paths"
    """The setting that names them."""


@dataclass(frozen=True, slots=True)
class SplitPaths:
    """The corpora of the three splits; None for a split that has none of its own."""

    splits: tuple[WeightedPaths | None, ...]
    shared: bool
    """All splits are shares of the same corpora; otherwise each has corpora of its own, whole."""

    def problems(self, suffixes: tuple[str, ...]) -> Iterator[Problem]:
        """Files that are missing; each path has one under every suffix."""
        for paths in filter(None, dict.fromkeys(self.splits)):
            for prefix in paths.prefixes:
                yield from find_missing_files(prefix, paths.where, suffixes)


def resolve_split_paths(config: "Corpora") -> SplitPaths:
    """The corpora that a section names, in whichever of the four forms; none at all are three times None."""
    paths_by_split = {f"{split}_paths": getattr(config, f"{split}_paths") for split in SPLITS}
    given = {
        "paths": config.paths,
        "paths_file": config.paths_file,
        "split_paths_file": config.split_paths_file,
        "train_paths": paths_by_split if any(paths_by_split.values()) else None,
    }
    if len(named := [name for name, value in given.items() if value]) > 1:
        raise MtError("data.paths", f"data is named twice, in {' and '.join(named)}", FORMS)
    if config.split_paths_file:
        paths_by_split = _read_split_paths(Path(config.split_paths_file))
    if any(paths_by_split.values()):
        where = f"data.{named[0]}" if config.split_paths_file else ""
        return SplitPaths(
            tuple(_parse_optional(paths_by_split[name], where or f"data.{name}") for name in paths_by_split),
            shared=False,
        )
    paths, where = config.paths, "data.paths"
    if config.paths_file:
        paths, where = _read(Path(config.paths_file), "data.paths_file").split(), "data.paths_file"
    return SplitPaths((parse_paths(paths, where) if paths else None,) * len(SPLITS), shared=True)


def parse_paths(paths: Sequence[str], where: str = "data.paths") -> WeightedPaths:
    """Separate weights from prefixes: an even list whose every first element is a number is weighted.

    A list that mixes the two forms is refused; Megatron takes some of them for prefixes silently.
    """
    paths = [path.strip() for path in paths]
    weights = [_number(path) for path in paths[::2]] if len(paths) % 2 == 0 else []
    if all(weight is None for weight in weights):
        return WeightedPaths(tuple(paths), None, where)
    numbers = [weight for weight in weights if weight is not None]
    if len(numbers) < len(weights):
        raise MtError(where, f"{' '.join(paths)!r} has a weight before some prefixes only", GRAMMAR)
    if bad := [weight for weight in numbers if not 0 < weight < math.inf]:
        raise MtError(where, f"weight {bad[0]}", "weights are finite and greater than 0")
    return WeightedPaths(tuple(paths[1::2]), tuple(numbers), where)


def find_missing_files(prefix: str, where: str, suffixes: tuple[str, ...] = (".bin", ".idx")) -> Iterator[Problem]:
    """A problem if the .bin or the .idx of a prefix is not there, with the nearest prefix that has both."""
    missing = [prefix + suffix for suffix in suffixes if not Path(prefix + suffix).is_file()]
    if not missing:
        return
    folder = Path(prefix).parent
    if suffixes == ("",):
        near = sorted(str(file) for file in folder.glob("*") if file.is_file())
        hint = did_you_mean(prefix, near) if near else f"no file in {folder}"
    else:
        near = sorted(str(idx)[:-4] for idx in folder.glob("*.idx") if idx.with_suffix(".bin").is_file())
        hint = did_you_mean(prefix, near) if near else f"no .bin/.idx pair in {folder}; mt data preprocess writes one"
    yield Problem(where, f"no file {' and '.join(missing)}", hint)


def _parse_optional(paths: Sequence[str], where: str) -> WeightedPaths | None:
    return parse_paths(paths, where) if paths else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise MtError(where, f"{path} cannot be read ({err})", "a text file") from err


def _read_split_paths(path: Path) -> dict[str, Sequence[str]]:
    """Paths of each split from a JSON file: lists, strings split at white space, or null."""
    where = "data.split_paths_file"
    try:
        values = json.loads(_read(path, where))
    except (ValueError, RecursionError) as err:
        raise MtError(where, f"{path} is not JSON ({err})", "an object with keys train, valid and test") from err
    if not isinstance(values, dict) or set(values) != set(SPLITS):
        raise MtError(where, f"{path} does not hold the three splits", "an object with keys train, valid and test")
    lists = {split: value.split() if isinstance(value, str) else value or [] for split, value in values.items()}
    for split, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str | float | int) for item in value):
            raise MtError(where, f"{path}: {split} is {value!r}", "a list, a string or null")
    return {split: [str(item) for item in lists[split]] for split in SPLITS}
