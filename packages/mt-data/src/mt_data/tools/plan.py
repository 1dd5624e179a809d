"""What a run will read, from its configuration and the indexes of its corpora, before step 1 and without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from mt_core.config.loading import load
from mt_core.config.sections import BatchConfig, RuntimeConfig, Section, TrainConfig
from mt_core.errors import raise_if
from mt_data.config import DataConfig
from mt_data.rules import data_problems
from mt_data.samplers.batch_size import batch_sizes, count_samples
from mt_data.split import SPLITS
from mt_data.tools.draw import Drawn, draw
from mt_data.tools.hold import held


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
