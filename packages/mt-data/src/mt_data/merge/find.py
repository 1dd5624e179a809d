"""Which pairs are merged, and in which order; everything wrong with them at once."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from mt_core.errors import MtError, Problem, raise_if
from mt_data.config.paths import missing_files

SHARD = re.compile(r"_(\d+)-of-(\d+)_")
"""What `mt data preprocess --shard` puts into a name."""


def find_pairs(inputs: Sequence[str]) -> list[str]:
    """Prefixes of the pairs: those of a directory or a glob in sorted order, others as they are given.

    Every file of a directory must be half of a pair, or the record of a splitter beside one, and all parts of a job
    must be there.
    """
    prefixes, problems = [], []
    for name in inputs:
        try:
            prefixes += _expand(name)
        except MtError as err:
            problems += err.problems
    problems += [problem for prefix in prefixes for problem in missing_files(prefix, prefix)]
    raise_if([*problems, *_missing_shards(prefixes)])
    return prefixes


def _expand(name: str) -> list[str]:
    if Path(name).is_dir():
        return _in_directory(Path(name))
    if has_magic(name) and not Path(f"{name}.idx").exists():
        stem = name.removesuffix(".idx").removesuffix(".bin")
        if not (found := sorted(path[:-4] for path in glob(f"{stem}.idx"))):
            raise MtError(name, "matches no .idx file", "quote it if the shell should leave it alone")
        return found
    return [name.removesuffix(".idx").removesuffix(".bin")]


def _in_directory(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pairs = {name[:-4] for name in names if name.endswith((".bin", ".idx"))}
    strays = [name for name in names if not (name.endswith((".bin", ".idx")) or _is_record(name, pairs))]
    raise_if(Problem(str(folder / name), "is neither a .bin nor an .idx", "move it out of the way") for name in strays)
    if not pairs:
        raise MtError(str(folder), "holds no .bin/.idx pair", "mt data preprocess writes them")
    return [str(folder / name) for name in sorted(pairs)]


def _is_record(name: str, pairs: set[str]) -> bool:
    return name.endswith("_sentence.json") and name[:-5] in pairs


def _missing_shards(prefixes: Sequence[str]) -> Iterator[Problem]:
    jobs: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for prefix in prefixes:
        for match in list(SHARD.finditer(Path(prefix).name))[-1:]:
            begin = prefix[: len(prefix) - len(Path(prefix).name) + match.start()]
            jobs[begin, Path(prefix).name[match.end() :], int(match[2])].add(int(match[1]))
    for (begin, end, parts), found in jobs.items():
        if missing := sorted(set(range(parts)) - found):
            names = ", ".join(f"{part}/{parts}" for part in missing)
            hint = "run mt data preprocess --shard for each of them"
            yield Problem(f"{begin}_*-of-{parts}_{end}", f"parts {names} are missing", hint)
