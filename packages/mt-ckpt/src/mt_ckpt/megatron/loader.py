"""Loader `core`: Megatron-Core's checkpoints of GPT, BERT and T5, `torch` or `torch_dist`, local or engine names."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mt_ckpt.formats import ArgsFile, VocabRows, iteration_directory
from mt_ckpt.megatron.args.model_types import read_model
from mt_ckpt.megatron.dist_format.reader import DistFiles
from mt_ckpt.megatron.torch_format.reader import TorchFiles
from mt_ckpt.tensor_streams import tokenizer_files
from mt_ckpt.tensor_streams.safetensors_directory import read_json
from mt_models.config import TransformerConfig


class MegatronCoreLoader:
    """A `CheckpointLoader`. Without `true_vocab_size`, args.vocab_size says where padding begins, if anything does."""

    def __init__(
        self,
        path: Path,
        *,
        true_vocab_size: VocabRows = None,
        megatron_args: ArgsFile = None,
    ) -> None:
        self.path = path
        directory = iteration_directory(path)
        files = DistFiles if (directory / ".metadata").is_file() else TorchFiles
        self.source = files(directory, given=read_json(megatron_args) if megatron_args else {})
        self.shapes = self.source.shapes()
        self.true_vocab_size = true_vocab_size

    def config(self) -> TransformerConfig:
        """The model that the checkpoint's args and tensors describe."""
        return read_model(self.source.args, self.shapes, str(self.source.path), self.true_vocab_size)

    def trained_seq_length(self) -> int | None:
        """Tokens of the samples that Megatron trained on; None where args do not say."""
        return getattr(self.source.args, "seq_length", None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time."""
        return self.source.tensors(self.config())

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer beside the tracker, where our saver puts them."""
        return tokenizer_files.find_tokenizer_files(self.path)
