"""What a run will read, from its configuration and the indexes of its corpora, before step 1 and without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mt_core.config.load import load
from mt_core.config.section import Section
from mt_core.config.sections import BatchConfig, ScheduleConfig
from mt_core.errors import MtError, raise_if
from mt_data.config import DataConfig, FIMData, GPTData
from mt_data.indexed.reader import IndexedReader
from mt_data.paths import sources
from mt_data.rules import data_problems
from mt_data.split import SPLITS
from mt_data.tools.draw import Drawn, Samples, draw, split_tokens, weighted_sources


class PlanConfig(Section):
    """The sections of a run that decide what it reads; the others may hold anything."""

    data: DataConfig
    batch: BatchConfig = BatchConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    model: Any = None
    optim: Any = None
    precision: Any = None
    parallel: Any = None
    checkpoint: Any = None
    log: Any = None
    runtime: Any = None


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
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.config.batch.global_batch * self.config.data.seq_length


def plan_run(files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None) -> Plan:
    """The plan of the run that these files, overrides and preset describe."""
    config: PlanConfig = load(PlanConfig, files, overrides, preset, rules=False)
    if not isinstance(config.data, GPTData | FIMData):
        raise MtError("data.kind", f"{config.data.kind!r}", "gpt or fim, whose samples mt data plan can count")
    raise_if(data_problems(config.data))
    schedule, batch = config.schedule, config.batch.global_batch
    wanted = (schedule.steps * batch, schedule.eval_batches * batch if schedule.eval_every else 0)
    splits = [_split(config.data, number, samples) for number, samples in enumerate(wanted) if samples]
    return Plan(config, splits)


def _split(data: GPTData | FIMData, number: int, samples: int) -> SplitPlan:
    found = sources(data)
    if (paths := found.splits[number]) is None:
        raise MtError("data", f"names nothing for {SPLITS[number]}", "prefixes of .bin/.idx pairs in data.paths")
    readers = [IndexedReader(prefix) for prefix in paths.prefixes]
    tokens = [split_tokens(reader, data.split, number) if found.shared else reader.token_count for reader in readers]
    cut = Samples(data.seq_length, int(data.extra_token) if isinstance(data, GPTData) else 1)
    return SplitPlan(SPLITS[number], samples, draw(weighted_sources(paths, tokens), samples, cut))
