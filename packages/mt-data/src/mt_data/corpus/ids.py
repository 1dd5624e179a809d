"""A number for each record, under a key of its own."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mt_data.corpus.records import Each, OnError, Record, read_lines
from mt_data.corpus.step import Step, run_step
from mt_data.text_io.lines import check_inputs

KEY = "adlr_id"
"""Megatron's name for it."""


def add_ids(
    inputs: Sequence[Path], output: Path, prefix: str, *, key: str = KEY, on_error: OnError = "stop"
) -> dict[str, int]:
    """Give each record `PREFIX-0000000001` and so on, by its line."""
    check_inputs(inputs)
    step = Step("add-id", output, tuple(inputs), {"prefix": prefix, "key": key, "on_error": on_error})
    return run_step(step, read_lines(inputs), Each(partial(_numbered, key, prefix), (), on_error))


def _numbered(key: str, prefix: str, record: Record, number: int) -> tuple[list[Record], str]:
    return [{**record, key: f"{prefix}-{number + 1:010d}"}], "kept"
