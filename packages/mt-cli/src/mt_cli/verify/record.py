"""Short runs of configurations on fresh CPU ranks."""

from collections.abc import Sequence
from typing import Any

from mt_cli.run_config import run_config_type
from mt_core.config.run_config import TransformerRun
from mt_core.distributed.mesh import Axis
from mt_core.verification.measure import Record, measure
from mt_core.verification.ranks import TIMEOUT_S, run_ranks


def record(config: TransformerRun, ranks: int, *, timeout_s: float = TIMEOUT_S, **options: Any) -> Record:
    """What `measure` records on the first of `ranks` ranks."""
    return records([config], ranks, timeout_s=timeout_s, **options)[0]


def records(configs: Sequence[Any], ranks: int, *, timeout_s: float = TIMEOUT_S, **options: Any) -> list[Record]:
    """One after the other on the same ranks, which saves the starting of them."""
    values = [config.model_dump() for config in configs]
    return run_ranks(ranks, _measure, values, options, timeout_s=timeout_s)[0]


def _measure(axis: Axis, configs: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[Record]:
    return [measure(run_config_type().model_validate(values), axis.size, **options) for values in configs]
