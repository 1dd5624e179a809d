"""The heartbeat of the tests: every layout computes what one rank computes, in fp64, gradient by gradient."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from layouts import LAYOUTS, MODELS, SAMPLES, data_ranks, run_config, runtime_config
from mt_cli.verify.record import records
from mt_core.config.sections import ParallelConfig
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record, measure
from mt_models.config import Dropout

pytestmark = pytest.mark.slow

RTOL = 1e-12
"""A few hundred roundings of 2⁻⁵³ in sequence; tensors are compared relative to their largest element."""

VARIANTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "accumulation 1": (1, {}, "separate"),
    "accumulation 4, full recompute": (4, {"granularity": "full", "method": "uniform", "layers": 2}, "fused"),
    "accumulation 2, selective recompute": (2, {"granularity": "selective"}, "fused"),
    "accumulation 1, block recompute": (1, {"granularity": "full", "method": "block", "layers": 1}, "separate"),
}
"""Micro-batches of a step, the `recompute` section, and how gradients of weights are added up, but under FSDP2."""


def cases(layout: str) -> list[tuple[str, str]]:
    """Every model, each with one variant in turn: between them the layouts have all pairs of the three."""
    first = list(LAYOUTS).index(layout)
    return [(model, list(VARIANTS)[(first + number) % len(VARIANTS)]) for number, model in enumerate(MODELS)]


def config_of(layout: str, model: str, variant: str) -> Any:
    ranks, parallel = LAYOUTS[layout]
    accumulation, recompute, sums = VARIANTS[variant]
    micro = max(1, SAMPLES // data_ranks(ranks, parallel) // accumulation)
    batch = {"micro_batch": micro, "global_batch": SAMPLES}
    runtime = runtime_config(sums, parallel)
    return run_config(model, parallel=parallel, recompute=recompute, batch=batch, runtime=runtime)


@pytest.fixture(scope="session")
def recorded(compute_once) -> Callable[[str], dict[tuple[str, str], Record]]:
    """All runs of a layout, on the same ranks."""

    def run(layout: str) -> dict[tuple[str, str], Record]:
        configs = [config_of(layout, model, variant) for model, variant in cases(layout)]
        return dict(zip(cases(layout), records(configs, LAYOUTS[layout][0]), strict=True))

    return lambda layout: compute_once(f"parity, {layout}", lambda: run(layout))


def disagreements(record: Record, reference: Record) -> list[str]:
    return [f"{d.quantity}: {d.relative:.1e}" for d in compare_records(record, reference) if not d.relative <= RTOL]


@pytest.mark.parametrize(("layout", "model", "variant"), [(each, *case) for each in LAYOUTS for case in cases(each)])
def test_losses_norms_gradients_and_weights_of_three_steps_are_those_of_one_rank(
    layout, model, variant, recorded, reference
):
    assert disagreements(recorded(layout)[model, variant], reference[model, False]) == []


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.startswith("context 2,")] + ["tensor 2, sequence"])
def test_documents_that_do_not_see_each_other_are_honoured(layout, reference):
    ranks, parallel = LAYOUTS[layout]
    models = ["gqa", "learned-biased", "latent"]
    found = records([run_config(model, parallel=parallel) for model in models], ranks, documents=True)
    for model, record in zip(models, found, strict=True):
        assert disagreements(record, reference[model, True]) == []
        assert disagreements(record, reference[model, False]) != []


def test_dropout_that_is_on_in_the_matrix_changes_what_is_computed(reference):
    for model in (name for name, parts in MODELS.items() if "dropout" in parts):
        config = config_of("replicate 2", model, "accumulation 1")
        plain = config.model_copy(update={"model": config.model.model_copy(update={"dropout": Dropout()})})
        one_rank = plain.model_copy(update={"parallel": ParallelConfig()})
        assert disagreements(measure(one_rank, 1), reference[model, False]) != []


def test_every_pair_of_layout_model_and_variant_is_somewhere_in_the_matrix():
    drawn = {(layout, *case) for layout in LAYOUTS for case in cases(layout)}
    for one, other in itertools.combinations(range(3), 2):
        every = itertools.product((LAYOUTS, MODELS, VARIANTS)[one], (LAYOUTS, MODELS, VARIANTS)[other])
        assert {(case[one], case[other]) for case in drawn} == set(every)
