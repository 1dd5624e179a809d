"""Megatron's mock corpus (docs/specs/data.md §4.14): GPT samples to try a run with, out of no files."""

from pathlib import Path

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import raise_if
from mt_data.blending.build import Splits, SplitSizes
from mt_data.blending.extension import Extension, NumSamples, extend_dataset
from mt_data.config import MockData
from mt_data.config.rules import data_problems
from mt_data.config.split import compute_split_ranges
from mt_data.datasets.gpt.dataset import build_gpt_dataset, make_sample_options
from mt_data.datasets.gpt.indices import IndexRequest
from mt_data.indexed.cache import IndexCache

COUNT, LONGEST = 100_000, 4096


def draw_mock_lengths() -> np.ndarray:
    """Tokens of every sequence."""
    return np.random.default_rng(0).integers(1, LONGEST, size=COUNT, dtype=np.int32)


def split_mock_corpus() -> tuple[range, range, range]:
    """Sequences of each split: a third."""
    return compute_split_ranges("1,1,1", COUNT)


class MockSequences:
    """Sequences 1, 2, 3, …, modulo the vocabulary, each with an end of document; the lengths are random."""

    def __init__(self, *, eod: int, vocab_size: int) -> None:
        self.lengths = draw_mock_lengths()
        self._eod, self._vocab_size = eod, vocab_size

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence, or to its end."""
        size = int(self.lengths[index])
        sequence = np.arange(1, size + 1) % self._vocab_size
        sequence[-1] = self._eod
        return sequence[offset : size if length is None else offset + length]


def build_splits(
    config: MockData,
    *,
    samples: SplitSizes,
    seed: int,
    cache_dir: Path,
    builder: bool = True,
) -> Splits:
    """The three datasets of a section, each made of a third of the sequences."""
    from mt_data.tokenizers import build_tokenizer

    raise_if(data_problems(config))
    assert config.tokenizer is not None, "data_problems asks for one"
    tokenizer, cache = build_tokenizer(config.tokenizer), IndexCache(cache_dir, builder)
    sequences, sample_options = (
        MockSequences(eod=tokenizer.eod, vocab_size=tokenizer.vocab_size),
        make_sample_options(config),
    )
    datasets: list[Dataset | None] = []
    for elements, planned in zip(split_mock_corpus(), samples, strict=True):

        def build(num_samples: NumSamples, extension: Extension, elements: range = elements) -> Dataset:
            request = IndexRequest(elements, num_samples, config.seq_length, extension.derive_seed(seed))
            return build_gpt_dataset(sequences, request, cache, sample_options)

        datasets.append(None if planned == 0 else extend_dataset(planned, build))
    return Splits(*datasets)
