"""To and from the hub. Downloads go to huggingface_hub's cache, so what is there needs no network.

A transfer that breaks off is taken up at the last 10 MB, also by the next run if this one is killed.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mt_ckpt.hub.repository import UNWANTED, WANTED, Repository, hub_errors
from mt_ckpt.hub.resume import finish_parts
from mt_core.checkpoint.detection import detect_loader, recognising_loaders
from mt_core.errors import MtError
from mt_core.files import atomic_directory

if TYPE_CHECKING:
    from mt_ckpt.huggingface.loader import HuggingFace


def fetch(repository: Repository) -> Path:
    """The repository's checkpoint in the cache: what is there already is not sent again, nor needs a network."""
    from huggingface_hub import snapshot_download

    with hub_errors(repository):
        finish_parts(repository, WANTED, UNWANTED)
        return Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )


def load(name: Path) -> "HuggingFace":
    """The `hub` loader: `name` is org/name or org/name@revision."""
    from mt_ckpt.huggingface.loader import HuggingFace

    return HuggingFace(fetch(Repository.parse(str(name))))


def pull(name: str, directory: Path) -> list[str]:
    """Put a repository's checkpoint into `directory`, whole or not at all; returns the names of its files."""
    if directory.exists():
        raise MtError(str(directory), "already exists", "choose another directory or remove it")
    snapshot = fetch(Repository.parse(name))
    check(snapshot)
    files = sorted(file for file in snapshot.iterdir() if file.is_file())
    with atomic_directory(directory) as temporary:
        for file in files:
            _place(file.resolve(), temporary / file.name)
    return [file.name for file in files]


def _place(source: Path, target: Path) -> None:
    """Weights are linked where they can be, since two copies of them may not fit the disk; the rest may be edited."""
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copy(source, target)


def push(directory: Path, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Publish a directory in Hugging Face format, checked first; returns the commit's address."""
    from huggingface_hub import HfApi

    repository = Repository.parse(name)
    if repository.revision:
        raise MtError(str(repository), "names a revision", "push goes to the main branch: give org/name")
    if "hf" not in recognising_loaders(directory):
        actual = f"is in {detect_loader(directory)} format"
        raise MtError(str(directory), actual, "convert it first: mt ckpt convert --saver hf")
    check(directory)
    with hub_errors(repository):
        api = HfApi()
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository.name,
            folder_path=directory,
            commit_message=message or "Upload with mt ckpt push",
            allow_patterns=[*WANTED, "README.md"],
            ignore_patterns=list(UNWANTED),
        )
    return str(done.commit_url)


def check(directory: Path) -> None:
    """Refuse a directory that is not exactly a model that mt reads, by its files' headers."""
    from mt_ckpt.huggingface.loader import HuggingFace

    next(iter(HuggingFace(directory).tensors()))
