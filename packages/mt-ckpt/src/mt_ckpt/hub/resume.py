"""Finishing the files of a download that was killed: from where they stopped, not from their beginning.

huggingface_hub names the part that has arrived `blobs/ETAG.RANDOM.incomplete` and never looks at it again. The etag of
a large file is its SHA-256, which tells whether the parts fit together; a file without one is fetched again.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mt_ckpt.hub.repository import Repository

PART = re.compile(r"([0-9a-f]{64})\.(?:\w+\.)?incomplete")


def finish_parts(repository: Repository, wanted: Iterable[str], unwanted: Iterable[str]) -> None:
    """Complete those of the repository's files of which a killed run left a part in the cache."""
    from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    folder = repo_folder_name(repo_id=repository.name, repo_type="model")
    cache = Path(constants.HF_HUB_CACHE)
    parts = _parts(cache / folder / "blobs")
    if not parts or constants.HF_HUB_OFFLINE:
        return
    try:
        names = HfApi().list_repo_files(repository.name, revision=repository.revision)
    except (errors.HfHubHTTPError, errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage] (httpx's)
        return  # the library says what is wrong, unless the cache holds all of it
    for name in filter_repo_objects(names, allow_patterns=[*wanted], ignore_patterns=[*unwanted]):
        url = hf_hub_url(repository.name, name, revision=repository.revision)
        about = get_hf_file_metadata(url)
        if about.etag in parts and about.size:
            with _lock_download(cache / ".locks" / folder / f"{about.etag}.lock") as acquired:
                if acquired:
                    _finish(url, parts[about.etag], about.etag, about.size)


def _parts(blobs: Path) -> dict[str, list[Path]]:
    """SHA-256 of a file to the parts of it that have arrived, the longest first."""
    parts: dict[str, list[Path]] = {}
    for file in sorted(blobs.glob("*.incomplete"), key=lambda file: -file.stat().st_size):
        if match := PART.fullmatch(file.name):
            parts.setdefault(match[1], []).append(file)
    return parts


@contextmanager
def _lock_download(lock: Path) -> Iterator[bool]:
    """Lock a file against other processes; yields whether the lock was free."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    file_lock = WeakFileLock(lock, timeout=0.5)
    try:
        file_lock.__enter__()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.__exit__(None, None, None)


def _finish(url: str, parts: list[Path], etag: str, size: int) -> None:
    """Fetch the rest of the longest part; what is then not the file is removed, and fetched whole by the library."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    longest, *others = parts
    for other in others:
        other.unlink()
    arrived = longest.stat().st_size
    if arrived < size:
        with longest.open("ab") as file:
            http_get(url, file, resume_size=arrived, headers=build_hf_headers(), expected_size=size)
    if _sha256(longest) == etag:
        os.replace(longest, longest.with_name(etag))
    else:
        longest.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
