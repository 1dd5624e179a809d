"""Checkpoints know no layout: saved under any, they are the same files' content and load under any other."""

from pathlib import Path
from typing import Any

import pytest

from layouts import LAYOUTS, run_config
from mt_cli.verify.record import record
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.verification.compare import compare_records, tensor_differences
from mt_core.verification.measure import Record, measure

pytestmark = pytest.mark.slow

RTOL = 1e-12
CHOSEN = [
    "tensor 4, sequence",
    "context 2, ring",
    "zero1 2",
    "fsdp 2",
    "fsdp 2 × tensor 2",
    "zero1 2 × tensor 2, sequence",
    "fsdp 2 in replicas 2",
]


def config_of(layout: str | None, **sections: Any) -> Any:
    return run_config("repeated-groups", parallel=LAYOUTS[layout][1] if layout else {}, **sections)


@pytest.fixture(scope="module")
def unbroken() -> Record:
    return measure(config_of(None), 1, steps=3)


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one")
    measure(config_of(None), 1, steps=2, save=run)
    return resolve(run)


def last_step(whole: Record) -> Record:
    return Record(whole.losses[2:], whole.norms[2:], whole.gradients[2:], whole.weights)


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_saves_what_one_rank_saves(layout, of_one_rank, tmp_path):
    record(config_of(layout), LAYOUTS[layout][0], steps=2, save=tmp_path)
    for part in ("model", "optim"):
        ours, theirs = open_part(resolve(tmp_path) / part), open_part(of_one_rank / part)
        assert ours.keys() == theirs.keys()
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
        for kind in {name.partition(".")[0] for name in theirs} if part == "optim" else [""]:
            a, b = ({name: t[name][...] for name in theirs if name.startswith(kind)} for t in (ours, theirs))
            assert max(value for _, value in tensor_differences(a, b)) <= RTOL, kind


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_goes_on_from_what_one_rank_saved(layout, of_one_rank, unbroken):
    resumed = record(config_of(layout), LAYOUTS[layout][0], steps=1, start=of_one_rank)
    found = compare_records(resumed, last_step(unbroken))
    assert [f"{d.quantity}: {d.relative:.1e}" for d in found if not d.relative <= RTOL] == []


def test_from_one_layout_to_another_without_a_detour(unbroken, tmp_path):
    record(config_of("zero1 2 × tensor 2, sequence"), 4, steps=2, save=tmp_path)
    resumed = record(config_of("fsdp 2"), 2, steps=1, start=resolve(tmp_path))
    assert max(d.relative for d in compare_records(resumed, last_step(unbroken))) <= RTOL
