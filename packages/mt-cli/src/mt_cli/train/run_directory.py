"""The run directory: what is checked and written, by the first rank, before the first step."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mt_cli.run_config import FullConfig, differences, to_toml
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import read_meta, steps
from mt_core.config.loading import model_config
from mt_core.contracts import ID_FILES
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_file, disk_errors
from mt_data import tokenizers


def prepare(run_dir: Path, config: FullConfig) -> list[Path]:
    """Check what an earlier run left, then write config.toml and the tokenizer; returns the tokenizer's files."""
    raise_if(conflicts(run_dir, config))
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        prepare_tokenizer(run_dir / "tokenizer", config, resumed=bool(steps(run_dir)))
    with atomic_file(run_dir / "config.toml", "w") as file:
        file.write(to_toml(config))
    return sorted((run_dir / "tokenizer").glob("*"))


def conflicts(run_dir: Path, config: FullConfig) -> Iterator[Problem]:
    """Why this configuration cannot go on from the checkpoints in `run_dir`, if there are any."""
    committed = steps(run_dir)
    if not committed:
        return
    if not config.checkpoint.resume:
        yield Problem(str(run_dir), f"has a checkpoint, {committed[-1].name}", "resume it, or choose another run_dir")
        return
    saved = model_config(read_meta(committed[-1])["config"]["model"]).model_dump(mode="json")  # newer fields: defaults
    for key, was, now in differences(saved, config.model.model_dump(mode="json")):
        yield Problem(f"model.{key}", f"{now}, but {committed[-1]} has {was}", "keep it, or choose another run_dir")


def prepare_tokenizer(directory: Path, config: FullConfig, *, resumed: bool) -> None:
    """Put the run's tokenizer into `directory`; one that does not fit the model or the checkpoint is refused."""
    travelling = init_tokenizer_files(config)
    if config.data.tokenizer is None:
        if travelling and not directory.exists():
            directory.mkdir()
            for file in travelling:
                shutil.copy(file, directory / file.name)
        return
    tokenizer = tokenizers.build_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        actual = f"has {tokenizer.vocab_size} ids, the model {config.model.vocab_size}"
        raise MtError(
            "data.tokenizer", actual, f"set model.vocab_size to {tokenizer.vocab_size} or change the tokenizer"
        )
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
