"""What can be wrong with the data section, found without numpy and without reading a corpus."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from mt_core.errors import MtError, Problem
from mt_core.plugins import components, did_you_mean
from mt_data.config import DataConfig, TokenizerConfig
from mt_data.paths import missing_files, parse_paths
from mt_data.split import split_problem


def data_problems(config: DataConfig) -> Iterator[Problem]:
    """Bad path grammar, missing .bin/.idx files, a bad split, missing tokenizer files, an unknown tokenizer type."""
    try:
        for prefix in parse_paths(config.paths).prefixes:
            yield from missing_files(prefix, "data.paths")
    except MtError as err:
        yield from err.problems
    if problem := split_problem(config.split):
        yield problem
    if config.tokenizer:
        yield from tokenizer_problems(config.tokenizer, "data.tokenizer")
    elif config.eod_mask_loss:
        yield Problem("data.eod_mask_loss", "is on, but there is no data.tokenizer to say which id ends a document")


def tokenizer_problems(config: TokenizerConfig, where: str) -> Iterator[Problem]:
    """An unknown type, and every file that is named but missing, with the nearest name in its folder."""
    known = components("tokenizer")
    if config.type not in known:
        yield Problem(f"{where}.type", f"unknown name {config.type!r}", did_you_mean(config.type, known))
    for field in ("vocab_file", "merge_file", "model"):
        value = getattr(config, field)
        if value is not None and not Path(value).exists():
            yield Problem(f"{where}.{field}", f"no file {value}", nearest_file(Path(value)))


def nearest_file(path: Path) -> str:
    """A hint for a path that does not exist: the nearest name in its folder, or the part of it that is missing."""
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [sibling.name for sibling in path.parent.iterdir()], n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else f"nothing in {path.parent} has a name like it"
