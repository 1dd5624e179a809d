"""Loader `core`: Megatron-Core's GPT checkpoints, `torch` or `torch_dist`, local or engine names."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mt_ckpt import tokenizer_files
from mt_ckpt.megatron.arguments import read_args
from mt_ckpt.megatron.dist_files import DistFiles
from mt_ckpt.megatron.layout import iteration_directory
from mt_ckpt.megatron.torch_files import TorchFiles
from mt_models.config import GPTConfig


class Core:
    """A `CheckpointLoader`. Without `true_vocab_size`, args.vocab_size says where padding begins, if anything does."""

    def __init__(self, path: Path, *, true_vocab_size: int | None = None) -> None:
        self.path = path
        directory = iteration_directory(path)
        self.source = (DistFiles if (directory / ".metadata").is_file() else TorchFiles)(directory)
        self.true_vocab_size = true_vocab_size

    def config(self) -> GPTConfig:
        """The model that the checkpoint's args describe."""
        return read_args(self.source.args, str(self.source.path), self.true_vocab_size)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time."""
        return self.source.tensors(self.config())

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer beside the tracker, where our saver puts them."""
        return tokenizer_files.in_directory(self.path)
