"""Loader `legacy`: GPT, BERT and T5 of Megatron's old classes, in checkpoints of any version, with args or without."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from mt_ckpt.formats import Heads, VocabRows, iteration_directory
from mt_ckpt.megatron.args.model_types import read_model
from mt_ckpt.megatron.legacy.arguments import complete_args, problems
from mt_ckpt.megatron.legacy.ranks import LegacyFiles, arrange_rows, open_ranks
from mt_ckpt.megatron.torch_format.reader import TorchFiles
from mt_ckpt.tensor_streams import tokenizer_files
from mt_core.errors import raise_if
from mt_models.config import TransformerConfig


class MegatronLegacyLoader:
    """A `CheckpointLoader`.

    `num_attention_heads` is for files without args: everything else follows from shapes. Without `true_vocab_size`,
    args.vocab_size says where padding begins, if anything does.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_attention_heads: Heads = None,
        true_vocab_size: VocabRows = None,
    ) -> None:
        self.path, self.true_vocab_size = path, true_vocab_size
        ranks = open_ranks(iteration_directory(path))
        self.args = _args(ranks, str(path), num_attention_heads)
        if ranks.args is None:
            print(f"note: {path}: no args; sizes are those of the tensors, the activation tanh-GELU", file=sys.stderr)
        self.shapes = {name: tuple(tensor.shape) for chunk in ranks.chunks for name, tensor in chunk[0].items()}
        states = {file: {**state, "args": self.args} for file, state in ranks.states.items()}
        heads = self.args.num_attention_heads // ranks.tensor
        directory = next(iter(states)).parents[1]
        self.source = TorchFiles(
            directory, read=states.__getitem__, arrange=partial(arrange_rows, ranks.version, heads)
        )

    def config(self) -> TransformerConfig:
        """The model that args and shapes describe."""
        return read_model(self.args, self.shapes, str(self.source.path), self.true_vocab_size, core=False)

    def trained_seq_length(self) -> int | None:
        """Tokens of the samples that Megatron trained on; None where args do not say."""
        return getattr(self.args, "seq_length", None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time."""
        return self.source.tensors(self.config())

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer beside the tracker, where our saver puts them."""
        return tokenizer_files.find_tokenizer_files(self.path)


def _args(ranks: LegacyFiles, where: str, heads: int | None) -> Namespace:
    """Complete args, their heads checked."""
    args = complete_args(ranks.args, ranks.chunks, heads, kind=ranks.kind, pipeline=ranks.pipeline)
    if ranks.args is None:
        args.untie_embeddings_and_output_weights = ranks.untied
    raise_if(problems(args, where, heads, ranks.version))
    return args
