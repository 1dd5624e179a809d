"""Compares each layout's run of the small configuration with that of one rank.

Two correct runs may differ by what rounding explains, and no more. A layer rounds some 36 results, forward and
backward, one after the other, and both runs do; roundings add up as a random walk. Measured over two presets, six
layouts and two seeds, the worst gradient was 10 eps apart in bf16, where sums are taken in fp32 (12 allowed with two
layers), and 40 eps in fp32, where sums over tokens round too (136 allowed).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mt_cli.verify.layouts import Case, with_stages
from mt_cli.verify.record import record
from mt_core.config.run_config import TransformerRun
from mt_core.config.sections import ParallelConfig, RecomputeConfig
from mt_core.plugins import component
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record

EPS = {"bf16": 2.0**-7, "fp32": 2.0**-23}
"""Distance from 1 to the next number."""
ROUNDINGS = 36
"""Results that a layer rounds one after the other."""
FP64 = 1e-12
"""The limit of everything in fp64: thousands of roundings, and a million times less than any mistake."""
TIMEOUT_S = 600.0
"""Seconds that one layout's run may take."""


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


def check(config: TransformerRun, cases: Sequence[Case], *, steps: int, documents: bool) -> Iterator[Outcome]:
    """The outcome of each case as soon as it is there; `config` is one that `shrink` made."""
    config = with_runnable_core(config)
    options = {"steps": steps, "documents": documents, "timeout_s": TIMEOUT_S}
    plain = with_stages(config.model_copy(update={"parallel": ParallelConfig(), "recompute": RecomputeConfig()}))
    references: dict[int, Record] = {}
    for case in cases:
        micro = config.batch.micro_batch * (case.parallel.data or 1 if _balances_steps(config) else 1)
        if micro not in references:
            batch = config.batch.model_copy(update={"micro_batch": micro})
            references[micro] = record(plain.model_copy(update={"batch": batch}), 1, **options)
        reference, began = references[micro], time.monotonic()
        run = record(with_stages(config.model_copy(update={"parallel": case.parallel})), case.ranks, **options)
        rows = (Row(d.quantity, d.relative, limit(config, d.quantity)) for d in compare_records(run, reference))
        rows = tuple(row for row in rows if is_comparable(config, row.quantity))
        yield Outcome(case, rows, time.monotonic() - began)


def _balances_steps(config: TransformerRun) -> bool:
    """Whether a loss takes what all data ranks have had of the step: one rank then has to have as much at once."""
    return getattr(config.model.mlp, "aux_loss_scope", None) == "global_batch"


def with_runnable_core(config: TransformerRun) -> Any:
    """The configuration, with `auto` for an attention core that needs a GPU."""
    attention = config.model.attention
    if attention.core == "auto" or not component("attention", attention.core).why_not(torch.device("cpu")):
        return config
    attention = attention.model_copy(update={"core": "auto"})
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})


def limit(config: TransformerRun, quantity: str) -> float:
    """The largest relative difference of a quantity of `mt_core.verification.compare` that agrees."""
    dtype = config.precision.dtype
    if dtype == "fp64":
        return FP64
    walk, tokens = 2 * ROUNDINGS * config.model.layers, config.batch.global_batch * config.data.seq_length
    mean = quantity in ("loss", "grad norm")
    if dtype == "bf16":
        return EPS[dtype] * (walk / tokens if mean else walk) ** 0.5
    return EPS[dtype] * (tokens if mean else walk * tokens) ** 0.5


def is_comparable(config: TransformerRun, quantity: str) -> bool:
    """Whether a quantity can be compared: in 16 bits, Adam makes whole steps of roundings, so weights cannot."""
    return config.precision.dtype != "bf16" or quantity in ("loss", "grad norm") or quantity.startswith("gradient of ")
