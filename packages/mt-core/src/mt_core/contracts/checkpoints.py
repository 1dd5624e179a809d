"""What loaders and savers of checkpoints offer, in any format."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mt_core.contracts.configurations import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


ID_FILES = ("generation_config.json", "token_ids.json")
"""Files that travel with a tokenizer and say which ids end a text; the first has the word."""


class CheckpointLoader(Protocol):
    """Kind `ckpt-loader`: configuration and canonical tensors of a checkpoint in some format.

    Keyword-only parameters of `__init__`, of a saver as well, are options of `mt ckpt convert`.
    A static method `recognises(path: Path) -> bool` lets commands choose the loader where none is named; it looks at
    names of files and imports nothing heavy. A text `looks_for` names those files in errors. A method
    `trained_seq_length() -> int | None` says how long the samples in training were. All three may be left out.
    """

    def __init__(self, path: Path) -> None: ...

    def config(self) -> ModelConfig:
        """The model's configuration, or one `MtError` naming everything in it that mt does not implement."""
        ...

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        """Canonical name and tensor, one at a time."""
        ...

    def tokenizer_files(self) -> Sequence[Path]:
        """Files of the tokenizer that travels with the checkpoint; empty if none does."""
        ...


class CheckpointSaver(Protocol):
    """Kind `ckpt-saver`: a function that writes a checkpoint in some format, whole or not at all."""

    def __call__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Iterable[tuple[str, "Tensor"]],
        tokenizer_files: Sequence[Path] = (),
    ) -> None:
        """Write `tensors` (canonical names) and copies of the tokenizer's files under `path`."""
        ...
