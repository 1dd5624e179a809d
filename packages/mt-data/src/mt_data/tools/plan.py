"""What a run will read, from its configuration and the indexes of its corpora, before step 1 and without a model.

Samples of BERT, T5 and ICT are counted as the run makes them, for one epoch; later epochs of BERT and T5 may differ by
a few, as their lengths are random.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import ConfigDict

from mt_core.config.loading import load
from mt_core.config.sections import BatchConfig, RuntimeConfig, Section, TrainConfig
from mt_core.errors import MtError, raise_if
from mt_data.batching.batch_sizes import count_samples, make_batch_sizes
from mt_data.config import (
    BERTData,
    Corpora,
    DataConfig,
    FIMData,
    GPTData,
    ICTData,
    MockData,
    SFTData,
    T5Data,
)
from mt_data.config.paths import WeightedPaths, resolve_split_paths
from mt_data.config.rules import data_problems
from mt_data.config.split import SPLITS, compute_legacy_ranges, compute_split_ranges
from mt_data.config.union import data_union
from mt_data.datasets.masking.sentence_mapping import Sentences, build_block_mapping, build_sentence_mapping
from mt_data.indexed.reader import IndexedReader
from mt_data.tools.epoch_plan import Source, SourcePlan, StreamSampling, count_split_tokens, plan_sources, select_split

DataT = TypeVar("DataT", bound=DataConfig, covariant=True)


class DataPlanConfig(Section, Generic[DataT]):
    """The sections of a run that decide what it reads; the others may hold anything."""

    data: DataT
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    model_config = ConfigDict(extra="ignore")


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What is read of one split."""

    name: str
    samples: int
    sources: list[SourcePlan]


@dataclass(frozen=True, slots=True)
class DataPlan:
    """A run's reading: training first, then what is evaluated on."""

    config: DataPlanConfig[DataConfig]
    splits: list[SplitPlan]

    @property
    def samples(self) -> int:
        """Number of training samples, over all steps."""
        return count_samples(make_batch_sizes(self.config.batch), self.config.train.steps)


def data_plan_config_type() -> "type[DataPlanConfig[DataConfig]]":
    """`DataPlanConfig` whose data section is of any installed kind; plugins are looked up when this is called."""
    return DataPlanConfig[data_union()]


def plan_run(files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None) -> DataPlan:
    """The plan of the run that these files, overrides and preset describe."""
    config = load(data_plan_config_type(), files, overrides, preset, rules=False)
    raise_if(data_problems(config.data))
    train, batch = config.train, config.batch
    evaluated = train.eval_batches * batch.global_batch if train.eval_every else 0
    num_samples = (count_samples(make_batch_sizes(batch), train.steps), evaluated)
    splits = [_plan_split(config, number, samples) for number, samples in enumerate(num_samples) if samples]
    return DataPlan(config, splits)


def _plan_split(config: DataPlanConfig[DataConfig], number: int, samples: int) -> SplitPlan:
    sources, cut = count_sources(config.data, number, config.runtime.seed)
    return SplitPlan(SPLITS[number], samples, plan_sources(sources, samples, cut))


def count_sources(data: DataConfig, number: int, seed: int) -> tuple[list[Source], StreamSampling]:
    """The sources of the training (0) or validation (1) split, and how samples are cut from those that are streams."""
    for kinds, count in SOURCE_COUNTERS.items():
        if isinstance(data, kinds):
            extra = int(data.extra_token) if isinstance(data, GPTData) else 1
            return list(count(data, number, seed)), StreamSampling(data.seq_length, extra)
    kind = getattr(data, "kind", type(data).__name__)
    known = ", ".join(str(section.model_fields["kind"].default) for kinds in SOURCE_COUNTERS for section in kinds)
    raise MtError("data.kind", f"{kind!r}", f"{known}: kinds whose samples mt data plan can count")


def _count_streams(data: Corpora, number: int, seed: int) -> Iterator[Source]:
    del seed
    for prefix, weight, split in _split_paths(data, number):
        reader = IndexedReader(prefix)
        yield Source(prefix, count_split_tokens(reader, split, number) if split else reader.token_count, weight)


def _count_sentences(data: BERTData | T5Data, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.bert import make_sentence_sampling as bert
    from mt_data.datasets.t5 import make_sentence_sampling as t5

    sampling = bert(data, seed, None) if isinstance(data, BERTData) else t5(data, seed, None)
    for prefix, weight, split in _split_paths(data, number):
        reader = IndexedReader(prefix)
        documents = range(reader.document_count)
        if split:
            what = f"{len(documents)} documents, split {split!r}"
            documents = select_split(prefix, compute_split_ranges(split, len(documents)), number, what)
        sentences = _select_sentences(reader, documents)
        yield Source(prefix, _count_tokens(sentences), weight, len(build_sentence_mapping(sentences, sampling)))


def _count_blocks(data: ICTData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.ict import get_title_lengths, make_sentence_sampling

    reader, titles = IndexedReader(data.paths[0]), IndexedReader(data.titles) if data.titles else None
    what = f"{reader.document_count} documents, split {data.split!r}"
    documents = select_split(reader.prefix, compute_legacy_ranges(data.split, reader.document_count), number, what)
    sentences, lengths = _select_sentences(reader, documents), get_title_lengths(titles, documents)
    yield Source(
        reader.prefix,
        _count_tokens(sentences),
        units=len(build_block_mapping(sentences, lengths, make_sentence_sampling(data, seed, None))),
    )


def _count_lines(data: SFTData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.sft.dataset import ConversationFile

    del seed
    for path, weight, split in _split_paths(data, number):
        lines = range(len(ConversationFile(path)))
        if split:
            what = f"{len(lines)} lines, split {split!r}"
            lines = select_split(path, compute_split_ranges(split, len(lines)), number, what)
        yield Source(path, None, weight, len(lines))


def _count_mock(data: MockData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.mock import draw_mock_lengths, split_mock_corpus

    del data, seed
    part = split_mock_corpus()[number]
    yield Source("mock", int(draw_mock_lengths()[part.start : part.stop].sum(dtype=np.int64)))


SOURCE_COUNTERS: dict[tuple[type[DataConfig], ...], Callable[[Any, int, int], Iterator[Source]]] = {
    (GPTData, FIMData): _count_streams,
    (BERTData, T5Data): _count_sentences,
    (ICTData,): _count_blocks,
    (SFTData,): _count_lines,
    (MockData,): _count_mock,
}
"""How the sources of each kind are counted."""


def _split_paths(data: Corpora, number: int) -> Iterator[tuple[str, float | None, str]]:
    """Prefix, weight, and the split string if the split is a share of the corpus and not all of it."""
    split_paths = resolve_split_paths(data)
    if (paths := split_paths.splits[number]) is None:
        raise MtError("data", f"names nothing for {SPLITS[number]}", "give it in data.paths or one of the other forms")
    for prefix, weight in zip(paths.prefixes, _list_weights(paths), strict=True):
        yield prefix, weight, data.split if split_paths.shared else ""


def _list_weights(paths: WeightedPaths) -> tuple[float | None, ...]:
    return paths.weights or (None,) * len(paths.prefixes)


def _select_sentences(reader: IndexedReader, documents: range) -> Sentences:
    return Sentences(np.asarray(reader.lengths), np.asarray(reader.documents[documents.start : documents.stop + 1]))


def _count_tokens(sentences: Sentences) -> int:
    first, behind = int(sentences.documents[0]), int(sentences.documents[-1])
    return int(sentences.lengths[first:behind].sum(dtype=np.int64))
