"""The run directory: who may use it, what is checked and written before the first step, what a failed start leaves.

The first rank does all of it.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mt_cli.run_config import FullConfig, to_toml
from mt_cli.train.resume import ResumePoint, list_changes
from mt_cli.train.run_lock import CONFIG, HEARTBEATS, created_directory, lock_run
from mt_cli.vocabulary import find_spare_rows
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.contracts import ID_FILES
from mt_core.errors import MtError
from mt_core.files import atomic_file, disk_errors
from mt_data import tokenizers

LATER_CONFIG = re.compile(r"config-(\d{8})(?:-(\d+))?\.toml")
"""Configurations with which a run went on: the step at which each took over, and a number if several did there."""
INDEX_CACHE, TOKENIZER = "index-cache", "tokenizer"
MADE_AT_START = (HEARTBEATS, TOKENIZER, INDEX_CACHE, CONFIG, "metrics.jsonl", "tensorboard")
"""What a start makes in the run directory before its first step."""


@dataclass(slots=True)
class Start:
    """How far the start of a run has come, which decides what stays if it fails."""

    keep: set[str] = field(default_factory=set)
    """Names in the run directory that stay: what was there before, and what the next start can use."""
    done: bool = False
    """Whether a step has been trained: then everything stays."""


@contextmanager
def open_run_directory(run_dir: Path, *, first: bool, launched: bool) -> Iterator[Start]:
    """Make and lock the run directory; if the block fails before `Start.done`, remove what it made, and nothing else.

    Only the first rank does anything. Under mt's launcher (`launched`) the heartbeats stay for its report.
    """
    if not first:
        yield Start()
        return
    with created_directory(run_dir), lock_run(run_dir):
        start = Start({path.name for path in run_dir.iterdir()} | ({HEARTBEATS} if launched else set()))
        try:
            yield start
        except BaseException:
            if not start.done:
                _remove_made(run_dir, start.keep)
            raise


def _remove_made(run_dir: Path, keep: set[str]) -> None:
    later = [path.name for path in run_dir.iterdir() if LATER_CONFIG.fullmatch(path.name)]
    for name in {*MADE_AT_START, *later} - keep:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def report_resume(point: ResumePoint, config: FullConfig) -> None:
    """Say from where the run goes on, and what has changed since."""
    print(f"mt: resuming from {point.path}", file=sys.stderr)
    for change in list_changes(point, config):
        print(f"mt: changed since then: {change}", file=sys.stderr)


def prepare_files(run_dir: Path, config: FullConfig, *, resumed: bool) -> Sequence[Path]:
    """Write the tokenizer, after checking that it fits the checkpoint; returns its files. Spare rows are warned of."""
    for warning in find_spare_rows(config) if not resumed else ():
        print(f"mt: warning: {warning}", file=sys.stderr)
    with disk_errors(run_dir):
        prepare_tokenizer(run_dir / TOKENIZER, config, resumed=resumed)
    return sorted((run_dir / TOKENIZER).glob("*"))


def record_config(run_dir: Path, config: FullConfig, step: int, *, resumed: bool) -> None:
    """Write the resolved configuration that takes over at `step`: RUN/config.toml, or a file of its own on a resume.

    On a resume nothing is overwritten, and nothing written if the last one was the same.
    """
    text = to_toml(config)
    if not resumed:
        for path in list_later_configs(run_dir):
            path.unlink()  # of a run that left no checkpoint, and so nothing to go on from
        path = run_dir / CONFIG
    else:
        last = [run_dir / CONFIG, *list_later_configs(run_dir)][-1]
        if last.exists() and last.read_text(encoding="utf-8") == text:
            return
        number, path = 1, run_dir / f"config-{step:08d}.toml"
        while path.exists():
            number, path = number + 1, run_dir / f"config-{step:08d}-{number + 1}.toml"
    with atomic_file(path, "w") as file:
        file.write(text)


def list_later_configs(run_dir: Path) -> list[Path]:
    """The configurations with which a run went on, in their order."""
    named = [(match, path) for path in run_dir.iterdir() if (match := LATER_CONFIG.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda item: (int(item[0][1]), int(item[0][2] or 1)))]


def prepare_tokenizer(directory: Path, config: FullConfig, *, resumed: bool) -> None:
    """Put the run's tokenizer into `directory`; one that does not fit the checkpoint is refused."""
    travelling = init_tokenizer_files(config)
    if config.data.tokenizer is None:
        if travelling and not directory.exists():
            directory.mkdir()
            for file in travelling:
                shutil.copy(file, directory / file.name)
        return
    tokenizer = tokenizers.build_tokenizer(config.data.tokenizer)
    vocabulary = [file for file in travelling if file.name not in ID_FILES]
    if resumed and directory.exists():
        check_same(tokenizer, directory)
    elif vocabulary:
        check_same(tokenizer, vocabulary[0].parent)
    tokenizer.save(directory)
    for file in travelling:
        if vocabulary and file.name in ID_FILES:  # which name tokens of this vocabulary
            shutil.copy(file, directory / file.name)


def init_tokenizer_files(config: FullConfig) -> list[Path]:
    """The tokenizer that travels with `checkpoint.init`."""
    if not config.checkpoint.init:
        return []
    loader, _, path = config.checkpoint.init.partition(":")
    return list(open_checkpoint(Path(path), loader, config.checkpoint.init_options).tokenizer_files())


def check_same(tokenizer: Any, directory: Path) -> None:
    """Refuse a tokenizer that gives some id another meaning than the one saved in `directory`."""
    if tokenizers.fingerprint(tokenizer) != tokenizers.fingerprint(tokenizers.load_tokenizer(directory)):
        raise MtError("data.tokenizer", f"differs from the checkpoint's, {directory}", "use the checkpoint's tokenizer")
