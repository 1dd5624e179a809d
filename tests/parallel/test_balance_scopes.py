"""Balance losses of a micro-batch and of the global batch: what one rank computes, in fp64, on every axis.

They depend on how a step is cut, so the one rank has the same micro-batches, or for the global batch those of all data
ranks as one. Sequences have documents and padding.
"""

from typing import Any

import pytest

from layouts import SAMPLES, run_config
from mt_cli.verify.record import records
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record, measure
from parallel.test_parity_matrix import RTOL

pytestmark = pytest.mark.slow

SCOPES = ("micro_batch", "global_batch")
FULL = {"granularity": "full", "method": "block", "layers": 1}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "replicate 2": (2, 2, {"parallel": {"sharding": "replicate"}}),
    "fsdp 2, recomputed": (2, 2, {"parallel": {"sharding": "fsdp"}, "recompute": FULL}),
    "tensor 2, sequence": (2, 2, {"parallel": {"tensor": 2, "sequence": True}}),
    "context 2": (2, 4, {"parallel": {"context": 2}}),
    "1f1b 2, recomputed": (2, 1, {"parallel": {"pipeline": 2}, "recompute": FULL}),
    "dualpipev 2": (2, 1, {"parallel": {"pipeline": 2}, "pipeline": {"schedule": "dualpipev", "layout": "E|t|t|L"}}),
    "expert 2 × zero1 2": (4, 1, {"parallel": {"expert": 2, "sharding": "zero1"}}),
    "expert 2 × context 2, recomputed": (4, 2, {"parallel": {"expert": 2, "context": 2}, "recompute": FULL}),
    "expert 2 × tensor 2, sequence": (4, 2, {"parallel": {"expert": 2, "tensor": 2, "sequence": True}}),
    "interleaved 2 × expert 2": (
        4,
        1,
        {"parallel": {"pipeline": 2, "expert": 2}, "pipeline": {"schedule": "interleaved", "layout": "E|t|t|L"}},
    ),
}
"""Ranks, samples of a micro-batch, and sections."""


def config_of(scope: str, micro: int, **sections: Any) -> Any:
    config = run_config("shared-expert", batch={"micro_batch": micro, "global_batch": SAMPLES}, **sections)
    mlp = config.model.mlp.model_copy(update={"aux_loss_scope": scope, "aux_loss_coeff": 0.5})
    return config.model_copy(update={"model": config.model.model_copy(update={"mlp": mlp})})


def data_ranks(layout: str) -> int:
    ranks, _, sections = LAYOUTS[layout]
    parallel = sections["parallel"]
    return ranks // (parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1))


@pytest.fixture(scope="session")
def one_rank(compute_once):
    """What one rank computes with micro-batches of so many samples."""

    def run(scope: str, micro: int) -> Record:
        key = f"balance of {scope}, one rank, {micro}"
        return compute_once(key, lambda: measure(config_of(scope, micro), 1, steps=2, documents=True))

    return run


@pytest.fixture(scope="session")
def recorded(compute_once):
    """Both scopes of all layouts of so many ranks, on the same ranks."""

    def run(ranks: int) -> dict[tuple[str, str], Record]:
        cases = [(layout, scope) for layout in LAYOUTS if LAYOUTS[layout][0] == ranks for scope in SCOPES]
        configs = [config_of(scope, LAYOUTS[layout][1], **LAYOUTS[layout][2]) for layout, scope in cases]
        return dict(zip(cases, records(configs, ranks, steps=2, documents=True), strict=True))

    return lambda ranks: compute_once(f"balance, {ranks} ranks", lambda: run(ranks))


def disagreements(record: Record, reference: Record) -> list[str]:
    return [f"{d.quantity}: {d.relative:.1e}" for d in compare_records(record, reference) if not d.relative <= RTOL]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_losses_gradients_and_weights_are_those_of_one_rank(layout, scope, recorded, one_rank):
    ranks, micro, _ = LAYOUTS[layout]
    same = micro * data_ranks(layout) if scope == "global_batch" else micro
    assert disagreements(recorded(ranks)[layout, scope], one_rank(scope, same)) == []


def test_each_scope_and_each_cut_of_the_batch_has_gradients_of_its_own(one_rank):
    runs = [one_rank(scope, micro) for scope in SCOPES for micro in (1, 2)]
    for number, run in enumerate(runs):
        assert all(disagreements(run, other) != [] for other in runs[:number])


def test_in_one_micro_batch_both_scopes_are_the_same():
    whole = [measure(config_of(scope, SAMPLES), 1, steps=1, documents=True) for scope in SCOPES]
    assert disagreements(*whole) == []
