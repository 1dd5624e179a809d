"""Each layout's run of the small configuration, compared with that of one rank."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mt_cli.verify.layouts import Case
from mt_cli.verify.limits import compared, limit
from mt_cli.verify.record import record
from mt_core.config.sections import ParallelConfig, RecomputeConfig
from mt_core.plugins import component
from mt_core.verification.compare import differences

TIMEOUT_S = 600.0
"""Of one layout's run."""


@dataclass(frozen=True, slots=True)
class Row:
    """A quantity, how far it is from that of one rank, and how far it may be."""

    quantity: str
    difference: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference; no number does not agree."""
        return self.difference <= self.limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out for one layout."""

    case: Case
    rows: tuple[Row, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether every quantity does."""
        return all(row.agrees for row in self.rows)


def check(config: Any, cases: Sequence[Case], *, steps: int, documents: bool) -> Iterator[Outcome]:
    """The outcome of each case as soon as it is there; `config` is one that `shrink` made."""
    config = with_runnable_core(config)
    options = {"steps": steps, "documents": documents, "timeout_s": TIMEOUT_S}
    plain = config.model_copy(update={"parallel": ParallelConfig(), "recompute": RecomputeConfig()})
    reference = record(plain, 1, **options)
    for case in cases:
        began = time.monotonic()
        run = record(config.model_copy(update={"parallel": case.parallel}), case.ranks, **options)
        rows = (Row(d.quantity, d.relative, limit(config, d.quantity)) for d in differences(run, reference))
        found = tuple(row for row in rows if compared(config, row.quantity))
        yield Outcome(case, found, time.monotonic() - began)


def with_runnable_core(config: Any) -> Any:
    """The configuration, with `auto` for an attention core that needs a GPU."""
    attention = config.model.attention
    if attention.core == "auto" or not component("attention", attention.core).why_not(torch.device("cpu")):
        return config
    attention = attention.model_copy(update={"core": "auto"})
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})
