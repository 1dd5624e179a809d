"""Frozen parameters under every layout: what is trained computes what one rank computes, what is frozen never moves."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from layouts import EXPERT_LAYOUTS, LAYOUTS, SAMPLES, data_ranks, run_config
from mt_cli.verify.record import records
from mt_core.config.trainable import is_trainable
from mt_core.verification.compare import compare_records, tensor_differences
from mt_core.verification.measure import Record, measure

pytestmark = pytest.mark.slow

RTOL = 1e-12
STEPS = 2
PATTERNS: dict[str, tuple[str, ...]] = {
    "layers": ("layers.*",),
    "all but the embedding": ("layers.*", "norm.*", "head.*", "position.*"),
    "norms": ("*norm.*",),
    "second layer's mlp": ("layers.1.mlp.*",),
    "embedding": ("embed.*",),
}
FULL = {"granularity": "full", "method": "uniform", "layers": 1}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    **{
        (layout, model): LAYOUTS[layout][1]
        for layout, model in (
            ("replicate 2", "gqa"),
            ("zero1 2", "learned-biased"),
            ("fsdp 2", "qk-norm"),
            ("tensor 2, sequence", "learned-biased"),
            ("context 2, ring", "qk-norm"),
            ("context 2, all-to-all", "gqa"),
            ("zero1 2 × tensor 2, sequence", "repeated-groups"),
            ("zero1 2 in replicas 2", "mha-tied"),
            ("fsdp 2 in replicas 2", "gqa"),
            ("fsdp 2 × tensor 2", "repeated-groups"),
        )
    },
    **{
        (layout, "experts"): EXPERT_LAYOUTS[layout][1]
        for layout in ("expert 2", "expert 2 × zero1 2", "expert 2 × fsdp 2")
    },
}
"""Layout and model: each layout with one model, together all of them."""


TRAINED = sorted({model for _, model in CASES})


def patterns(model: str, name: str) -> tuple[str, ...]:
    """The patterns that this model has parameters for."""
    names = run_config(model).model.canonical_shapes()
    return tuple(pattern for pattern in PATTERNS[name] if any(is_trainable(each, [pattern]) for each in names))


def ranks_of(layout: str) -> int:
    return (LAYOUTS | EXPERT_LAYOUTS)[layout][0]


def config_of(layout: str, model: str, name: str) -> Any:
    """With two micro-batches for each rank, and layers computed again where the layout replicates everything."""
    micro = max(1, SAMPLES // data_ranks(ranks_of(layout), CASES[layout, model]) // 2)
    sections: dict[str, Any] = {"parallel": CASES[layout, model]}
    sections |= {"batch": {"micro_batch": micro, "global_batch": SAMPLES}}
    sections |= {"recompute": FULL} if layout == "replicate 2" else {}
    return frozen_config(model, name, **sections)


def frozen_config(model: str, name: str, **sections: Any) -> Any:
    optim = {"lr": 1e-2, "eps": 1e-4, "trainable": patterns(model, name)}
    return run_config(model, optim=optim | sections.pop("optim", {}), **sections)


@pytest.fixture(scope="session")
def recorded(compute_once) -> Callable[[str], dict[tuple[str, str, str], Record]]:
    """All runs of a layout, on the same ranks."""

    def run(layout: str) -> dict[tuple[str, str, str], Record]:
        cases = [(*case, name) for case in CASES if case[0] == layout for name in PATTERNS]
        configs = [config_of(*case) for case in cases]
        return dict(zip(cases, records(configs, ranks_of(layout), steps=STEPS), strict=True))

    return lambda layout: compute_once(f"trainable, {layout}", lambda: run(layout))


@pytest.fixture(scope="session")
def one_rank(compute_once) -> dict[tuple[str, str], Record]:
    """By model and name of the patterns."""
    batch = {"micro_batch": SAMPLES, "global_batch": SAMPLES}
    return compute_once(
        "trainable, one rank",
        lambda: {
            (model, name): measure(frozen_config(model, name, batch=batch), 1, steps=STEPS)
            for model in TRAINED
            for name in PATTERNS
        },
    )


@cache
def initial(model: str) -> dict[str, torch.Tensor]:
    return measure(run_config(model), 1, steps=0).weights


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("layout", "model"), CASES)
def test_losses_norms_gradients_and_weights_are_those_of_one_rank(layout, model, name, recorded, one_rank):
    record = recorded(layout)[layout, model, name]
    differences = compare_records(record, one_rank[model, name])
    assert [f"{d.quantity}: {d.relative:.1e}" for d in differences if not d.relative <= RTOL] == []


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("layout", "model"), CASES)
def test_exactly_the_frozen_parameters_keep_their_bits(layout, model, name, recorded):
    record, before = recorded(layout)[layout, model, name], initial(model)
    assert record.weights.keys() == before.keys()
    moved = {each for each, tensor in record.weights.items() if not torch.equal(tensor, before[each])}
    assert moved == {each for each in before if is_trainable(each, patterns(model, name))}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("model", TRAINED)
def test_gradients_of_trainable_parameters_do_not_depend_on_what_is_frozen_and_the_norm_counts_them_alone(
    model, name, one_rank, reference
):
    whole, part = reference[model, False], one_rank[model, name]
    gradients = part.gradients[0]
    assert gradients.keys() == {each for each in whole.weights if is_trainable(each, patterns(model, name))}
    exact = {each: whole.gradients[0][each] for each in gradients}
    assert max(difference for _, difference in tensor_differences(gradients, exact)) <= RTOL
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    assert part.norms[0] == pytest.approx(norm, rel=RTOL)
