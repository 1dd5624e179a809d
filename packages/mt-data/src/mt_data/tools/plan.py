"""What a run will read, from its configuration and the indexes of its corpora, before step 1 and without a model.

Samples of BERT, T5 and ICT are counted as the run makes them, for one epoch; later epochs of BERT and T5 may differ by
a few, as their lengths are random.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from mt_core.config.loading import load
from mt_core.config.sections import BatchConfig, RuntimeConfig, Section, TrainConfig
from mt_core.errors import MtError, raise_if
from mt_data.batch_sizes import batch_sizes, count_samples
from mt_data.config import BERTData, Corpora, DataConfig, FIMData, GPTData, ICTData, Loading, MockData, SFTData, T5Data
from mt_data.config.paths import WeightedPaths, sources
from mt_data.config.rules import data_problems
from mt_data.config.split import SPLITS, legacy_ranges, split_ranges
from mt_data.datasets.masking.sentence_mapping import Sentences, block_mapping, sentence_mapping
from mt_data.indexed.reader import IndexedReader
from mt_data.tools.epoch_plan import Drawn, Samples, Source, draw, split_part, split_tokens


class PlanConfig(Section):
    """The sections of a run that decide what it reads; the others may hold anything."""

    data: DataConfig
    batch: BatchConfig = BatchConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    model_config = ConfigDict(extra="ignore")


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What is read of one split."""

    name: str
    samples: int
    drawn: list[Drawn]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's reading: training first, then what is evaluated on."""

    config: PlanConfig
    splits: list[SplitPlan]

    @property
    def samples(self) -> int:
        """Of training, over all steps."""
        return count_samples(batch_sizes(self.config.batch), self.config.train.steps)


def plan_run(files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None) -> Plan:
    """The plan of the run that these files, overrides and preset describe."""
    config: PlanConfig = load(PlanConfig, files, overrides, preset, rules=False)
    raise_if(data_problems(config.data))
    train, batch = config.train, config.batch
    evaluated = train.eval_batches * batch.global_batch if train.eval_every else 0
    wanted = (count_samples(batch_sizes(batch), train.steps), evaluated)
    splits = [_split(config, number, samples) for number, samples in enumerate(wanted) if samples]
    return Plan(config, splits)


def _split(config: PlanConfig, number: int, samples: int) -> SplitPlan:
    found, cut = held(config.data, number, config.runtime.seed)
    return SplitPlan(SPLITS[number], samples, draw(found, samples, cut))


def held(data: Loading, number: int, seed: int) -> tuple[list[Source], Samples]:
    """The sources of the training (0) or validation (1) split, and how samples are cut from those that are streams."""
    for kinds, count in HELD.items():
        if isinstance(data, kinds):
            extra = int(data.extra_token) if isinstance(data, GPTData) else 1
            return list(count(data, number, seed)), Samples(data.seq_length, extra)
    kind = getattr(data, "kind", type(data).__name__)
    known = ", ".join(str(section.model_fields["kind"].default) for kinds in HELD for section in kinds)
    raise MtError("data.kind", f"{kind!r}", f"{known}: kinds whose samples mt data plan can count")


def _streams(data: Corpora, number: int, seed: int) -> Iterator[Source]:
    del seed
    for prefix, weight, split in _paths(data, number):
        reader = IndexedReader(prefix)
        yield Source(prefix, split_tokens(reader, split, number) if split else reader.token_count, weight)


def _sentences(data: BERTData | T5Data, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.bert import gathering as bert
    from mt_data.datasets.t5 import gathering as t5

    gathering = bert(data, seed, None) if isinstance(data, BERTData) else t5(data, seed, None)
    for prefix, weight, split in _paths(data, number):
        reader = IndexedReader(prefix)
        documents = range(reader.document_count)
        if split:
            what = f"{len(documents)} documents, split {split!r}"
            documents = split_part(prefix, split_ranges(split, len(documents)), number, what)
        sentences = _of(reader, documents)
        yield Source(prefix, _tokens(sentences), weight, len(sentence_mapping(sentences, gathering)))


def _blocks(data: ICTData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.ict import gathering, title_lengths

    reader, titles = IndexedReader(data.paths[0]), IndexedReader(data.titles) if data.titles else None
    what = f"{reader.document_count} documents, split {data.split!r}"
    documents = split_part(reader.prefix, legacy_ranges(data.split, reader.document_count), number, what)
    sentences, lengths = _of(reader, documents), title_lengths(titles, documents)
    yield Source(
        reader.prefix,
        _tokens(sentences),
        units=len(block_mapping(sentences, lengths, gathering(data, seed, None))),
    )


def _lines(data: SFTData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.sft.dataset import Lines

    del seed
    for path, weight, split in _paths(data, number):
        lines = range(len(Lines(path)))
        if split:
            what = f"{len(lines)} lines, split {split!r}"
            lines = split_part(path, split_ranges(split, len(lines)), number, what)
        yield Source(path, None, weight, len(lines))


def _mock(data: MockData, number: int, seed: int) -> Iterator[Source]:
    from mt_data.datasets.mock import mock_lengths, mock_splits

    del data, seed
    part = mock_splits()[number]
    yield Source("mock", int(mock_lengths()[part.start : part.stop].sum(dtype=np.int64)))


HELD: dict[tuple[type[Loading], ...], Callable[[Any, int, int], Iterator[Source]]] = {
    (GPTData, FIMData): _streams,
    (BERTData, T5Data): _sentences,
    (ICTData,): _blocks,
    (SFTData,): _lines,
    (MockData,): _mock,
}
"""How the sources of each kind are counted."""


def _paths(data: Corpora, number: int) -> Iterator[tuple[str, float | None, str]]:
    """Prefix, weight, and the split string if the split is a share of the corpus and not all of it."""
    found = sources(data)
    if (paths := found.splits[number]) is None:
        raise MtError("data", f"names nothing for {SPLITS[number]}", "give it in data.paths or one of the other forms")
    for prefix, weight in zip(paths.prefixes, _weights(paths), strict=True):
        yield prefix, weight, data.split if found.shared else ""


def _weights(paths: WeightedPaths) -> tuple[float | None, ...]:
    return paths.weights or (None,) * len(paths.prefixes)


def _of(reader: IndexedReader, documents: range) -> Sentences:
    return Sentences(np.asarray(reader.lengths), np.asarray(reader.documents[documents.start : documents.stop + 1]))


def _tokens(sentences: Sentences) -> int:
    first, behind = int(sentences.documents[0]), int(sentences.documents[-1])
    return int(sentences.lengths[first:behind].sum(dtype=np.int64))
