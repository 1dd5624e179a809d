"""What the datasets of sentences with masked words have in common: corpora, mapping, random numbers of a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.blending.build import DatasetReader, SplitPart, Splits, SplitSizes, blend_splits
from mt_data.blending.extension import NumSamples
from mt_data.config import MaskedData
from mt_data.config.split import SPLITS
from mt_data.datasets.masking.mask import MaskingConfig
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_sentence_mapping
from mt_data.indexed.cache import IndexCache, hash_content
from mt_data.indexed.reader import IndexedReader

MAPPING_VERSION = 1
"""Goes into the cache's keys; to be raised when the mapping of a request changes."""


@dataclass(frozen=True, slots=True)
class SentenceSamples:
    """The sentences of each sample."""

    reader: IndexedReader
    mapping: np.ndarray
    """Rows of (first sentence, behind the last, target length)."""
    seed: int

    def __len__(self) -> int:
        return len(self.mapping)

    def read_sentences(self, index: int) -> tuple[list[list[int]], int]:
        """Token ids of the sample's sentences, and the length that it was to have."""
        first, behind, target = self.mapping[index].tolist()
        return [self.reader.get(sentence).tolist() for sentence in range(first, behind)], target

    def random_state(self, index: int) -> np.random.RandomState:
        """The generator of a sample: its draws depend on nothing but the seed and its number."""
        return np.random.RandomState((self.seed + index) % 2**32)


def build_masked_splits(
    config: MaskedData,
    make: Callable[[SentenceSamples], Dataset],
    make_sampling: Callable[[NumSamples], SentenceSampling],
    *,
    samples: SplitSizes,
    cache: IndexCache,
) -> Splits:
    """The three datasets, each made of the samples that its sentence sampling gives."""

    def build(reader: IndexedReader, part: SplitPart) -> Dataset:
        sampling = make_sampling(part.samples)
        sampling = replace(sampling, seed=part.extension.derive_seed(sampling.seed))
        bounds = np.asarray(reader.documents[part.elements.start : part.elements.stop + 1])
        key = hash_content("sentences", MAPPING_VERSION, repr(sampling), reader.lengths, bounds)
        sentences = Sentences(np.asarray(reader.lengths), bounds)
        (mapping,) = cache.get_arrays(
            key, ("mapping",), lambda: {"mapping": build_sentence_mapping(sentences, sampling)}
        )
        if not len(mapping):
            raise MtError(
                f"the {SPLITS[part.split]} split of {reader.prefix}",
                f"gives no samples: {len(part.elements)} documents without {sampling.min_sentences} usable sentences",
                "documents split into sentences: mt data preprocess --split-sentences",
            )
        return make(SentenceSamples(reader, mapping, sampling.seed))

    parts = DatasetReader(IndexedReader, lambda reader: reader.document_count, build, "documents")
    return blend_splits(config, parts, samples=samples, cache=cache)


def make_masking_config(config: MaskedData) -> MaskingConfig:
    """How a section masks words."""
    return MaskingConfig(
        mask_prob=config.mask_prob,
        max_ngram=config.max_ngram,
        full_words=config.full_words,
        geometric=config.geometric,
        longer_ngrams=config.longer_ngrams,
        permute=config.permute,
    )


def flatten(sentences: Sequence[list[int]]) -> list[int]:
    """The tokens of all sentences."""
    return list(chain.from_iterable(sentences))


def pad_to_length(values: list[int], length: int, filler: int) -> np.ndarray:
    """The values, filled up to a length, int64."""
    array = np.full(length, filler, np.int64)
    array[: len(values)] = values
    return array
