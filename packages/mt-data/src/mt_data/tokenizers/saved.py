"""`mt_tokenizer.json`: what `save` writes beside a tokenizer's own files, so that `load` gets the same ids back."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_data.config import TokenizerConfig

SAVED = "mt_tokenizer.json"
FILE_FIELDS = ("vocab_file", "merge_file", "model")
"""Fields of `TokenizerConfig` that are paths."""


@dataclass(frozen=True, slots=True)
class SavedTokenizer:
    """Contents of `mt_tokenizer.json`."""

    type: str
    """Component of kind `tokenizer`."""
    eod: int | None
    """None if the tokenizer has no end of document."""
    vocab_size: int
    fingerprint: str
    """`fingerprint` of the tokenizer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `TokenizerConfig` that make this tokenizer again; files are names within the directory."""

    def config(self, directory: Path) -> TokenizerConfig:
        """The configuration that builds the tokenizer from the files in `directory`."""
        files = {key: str(directory / name) for key, name in self.options.items() if key in FILE_FIELDS}
        return TokenizerConfig(**{**self.options, **files, "type": self.type})


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the map from id to token: equal where two tokenizers give every id the same meaning.

    The map is `tokenizer.vocabulary()`; for a tokenizer without that method each id is decoded.
    """
    if vocabulary := getattr(tokenizer, "vocabulary", None):
        pairs = sorted((number, token) for token, number in vocabulary().items())
    else:
        pairs = [(number, tokenizer.decode([number])) for number in range(tokenizer.vocab_size)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def write_saved(tokenizer: Tokenizer, type: str, directory: Path, *, options: Mapping[str, Any] | None = None) -> None:
    """Write `mt_tokenizer.json`."""
    saved = SavedTokenizer(
        type, getattr(tokenizer, "eod", None), tokenizer.vocab_size, fingerprint(tokenizer), dict(options or {})
    )
    write_text(directory / SAVED, json.dumps(asdict(saved), indent=2) + "\n")


def read_saved(directory: Path) -> SavedTokenizer:
    """Read `mt_tokenizer.json`."""
    path = directory / SAVED
    try:
        saved = SavedTokenizer(**json.loads(path.read_text("utf-8")))
        saved.config(directory)
        return saved
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise MtError(str(path), f"is damaged: {err}", "save the tokenizer again, or remove this file") from err


def check_fingerprint(tokenizer: Tokenizer, directory: Path) -> None:
    """Raise if the files beside `mt_tokenizer.json` no longer give the ids that it was written with."""
    if (directory / SAVED).is_file():
        saved = read_saved(directory)
        if (getattr(tokenizer, "eod", None), fingerprint(tokenizer)) != (saved.eod, saved.fingerprint):
            raise MtError(
                str(directory),
                f"holds a tokenizer other than the one that {SAVED} describes",
                "restore its files, or remove that one if the change is meant",
            )


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, its folder made if need be."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small binary file whole or not at all, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)
