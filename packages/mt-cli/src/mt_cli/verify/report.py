"""What `mt verify` prints: tables for people, plain values for machines."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from mt_cli.verify.check import Outcome, Row
from mt_core.config.run_config import TransformerRun

WORST = 3
"""Gradients, and weights, of which a row is shown."""


def head(config: TransformerRun, small: Any) -> Iterator[str]:
    """What is run instead of the whole configuration."""
    model, small_model = config.model, small.model
    sizes = (
        (small_model.layers, model.layers, "layers"),
        (small_model.hidden_size, model.hidden_size, "features"),
        (small_model.attention.heads, model.attention.heads, "heads"),
        (small_model.attention.num_kv_heads, model.attention.num_kv_heads, "groups"),
        (small.data.seq_length, config.data.seq_length, "tokens"),
    )
    yield f"shrunk to  {', '.join(f'{few} of {many} {name}' for few, many, name in sizes)}; {small.precision.dtype}"


def lines(outcome: Outcome, *, everything: bool) -> Iterator[str]:
    """The table of one layout."""
    yield f"\n{outcome.case.name}: {outcome.case.ranks} ranks, {outcome.seconds:.1f} s"
    rows = outcome.rows if everything else _select_rows(outcome.rows)
    width = max(len(row.quantity) for row in rows) + 2
    yield f"  {'':<{width}}{'difference':>10}{'limit':>10}"
    for row in rows:
        mark = "" if row.agrees else "  <-"
        yield f"  {row.quantity:<{width}}{row.difference:>10.1e}{row.limit:>10.1e}{mark}"
    wrong = sum(not row.agrees for row in outcome.rows)
    yield f"  {_verdict(outcome)}: {wrong or 'none'} of {len(outcome.rows)} quantities beyond the limit"


def _select_rows(rows: Sequence[Row]) -> list[Row]:
    """Loss and norm, and the worst of the others."""
    gradients = [row for row in rows[2:] if row.quantity.startswith("gradient of ")]
    weights = [row for row in rows[2:] if not row.quantity.startswith("gradient of ")]
    worst = [row for group in (gradients, weights) for row in sorted(group, key=_badness)[:WORST]]
    return [*rows[:2], *worst]


def _badness(row: Row) -> float:
    return -row.difference if row.difference == row.difference else float("-inf")


def _verdict(outcome: Outcome) -> str:
    return "agrees" if outcome.agrees else "DISAGREES"


def last_line(outcomes: Sequence[Outcome], seconds: float) -> str:
    """All layouts in a line."""
    wrong = [outcome.case.name for outcome in outcomes if not outcome.agrees]
    widest = max(row.limit for outcome in outcomes for row in outcome.rows)
    text = f"disagree with one rank: {'; '.join(wrong)}" if wrong else "agree with one rank"
    return f"\n{text} (widest limit {widest:.1e}); {seconds:.0f} s"


def as_values(small: Any, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Everything as plain values; a difference that is no number is null."""
    return {
        "agrees": all(outcome.agrees for outcome in outcomes),
        "seconds": seconds,
        "layouts": [
            {
                "layout": outcome.case.parallel.model_dump(mode="json"),
                "ranks": outcome.case.ranks,
                "agrees": outcome.agrees,
                "seconds": outcome.seconds,
                "quantities": [_row_values(row) for row in outcome.rows],
            }
            for outcome in outcomes
        ],
        "config": small.model_dump(mode="json"),
    }


def _row_values(row: Row) -> dict[str, Any]:
    difference = row.difference if isfinite(row.difference) else None
    return {"quantity": row.quantity, "difference": difference, "limit": row.limit, "agrees": row.agrees}
