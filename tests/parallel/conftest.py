"""What one rank computes, which every layout has to."""

import pytest

from layouts import BALANCED, DEEP, MODELS, SAMPLES, run_config
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


@pytest.fixture(scope="session")
def deep_reference(compute_once) -> dict[tuple[str, bool], Record]:
    """The same of models with enough layers for stages."""
    batch = {"micro_batch": SAMPLES, "global_batch": SAMPLES}
    return compute_once(
        "parity of deep models, one rank",
        lambda: {
            (model, documents): measure(run_config(model, DEEP, batch=batch), 1, documents=documents)
            for model in MODELS | BALANCED
            for documents in (False, True)
        },
    )
