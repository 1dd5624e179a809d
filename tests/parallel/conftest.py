"""What one rank computes, which every layout has to."""

import pytest

from layouts import BALANCED, MODELS, SAMPLES, run_config
from mt_core.verification.measure import Record, measure


@pytest.fixture(scope="session")
def reference(compute_once) -> dict[tuple[str, bool], Record]:
    """The same run on one rank, in one batch and without recomputation, by model and whether there are documents."""
    batch = {"micro_batch": SAMPLES, "global_batch": SAMPLES}
    return compute_once(
        "parity, one rank",
        lambda: {
            (model, documents): measure(run_config(model, batch=batch), 1, documents=documents)
            for model in MODELS | BALANCED
            for documents in (False, True)
        },
    )
