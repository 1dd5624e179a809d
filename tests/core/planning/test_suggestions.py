"""What is offered when a run does not fit."""

import pytest

from core.planning.configs import h200, run
from mt_core.errors import raise_if
from mt_core.parallel.layout import build_layout, problems
from mt_core.planning.plan import plan
from mt_core.planning.suggestions import Suggestion, find_fitting_layouts, find_fitting_ranks


def advice(ranks: int, *overrides: str, gib: float = 139.8, preset: str = "llama3-8b") -> list[Suggestion]:
    config = run("batch.global_batch=16", *overrides, preset=preset)
    profile = h200().model_copy(update={"memory_gib": gib})
    return find_fitting_layouts(config, build_layout(config, ranks), profile, ranks=ranks)


def words(found: Suggestion) -> list[str]:
    return [change for group in found.changes for change in group]


@pytest.mark.parametrize(
    ("ranks", "gib", "overrides"),
    [
        (4, 139.8, ()),
        (8, 30.0, ("parallel.tensor=4", "parallel.sequence=true", "parallel.sharding=zero1")),
        (8, 40.0, ("batch.micro_batch=2", "parallel.data=8")),
        (8, 60.0, ("parallel.sharding=fsdp", "parallel.shard_size=2")),
        (4, 100.0, ("parallel.sharding=zero1", "recompute.granularity=full", "recompute.method=block")),
    ],
)
def test_what_is_offered_is_possible_and_fits_when_it_is_set(ranks, gib, overrides):
    """Each offer goes back through the configuration, as the user would set it."""
    profile = h200().model_copy(update={"memory_gib": gib})
    config = run("batch.global_batch=16", *overrides)
    assert not plan(config, ranks, profile).fits
    found = advice(ranks, *overrides, gib=gib)
    assert found
    for one in found:
        changed = run("batch.global_batch=16", *overrides, *words(one))
        raise_if(problems(changed, ranks))
        again = plan(changed, ranks, profile)
        assert again.fits
        assert (again.total, again.step.seconds) == (one.plan.total, one.plan.step.seconds)


def test_fewest_changes_come_first_then_speed():
    found = advice(4)
    assert sorted(words(one) for one in found[:2]) == [["parallel.sharding=fsdp"], ["parallel.sharding=zero1"]]
    assert {len(one.changes) for one in found} == {1}
    times = [one.plan.step.seconds for one in found]
    assert times == sorted(times)


def test_experts_are_cut_where_a_mixture_does_not_fit():
    found = advice(16, "parallel.sharding=zero1", preset="mixtral-8x7b")
    assert words(found[0]) == ["parallel.expert=8"]
    config = run("batch.global_batch=16", "parallel.sharding=zero1", *words(found[0]), preset="mixtral-8x7b")
    assert plan(config, 16, h200()).total == found[0].plan.total
    assert not any("expert" in word for one in advice(4) for word in words(one))


def test_no_more_layers_are_recomputed_than_it_needs():
    found = advice(4, "parallel.sharding=zero1", gib=120.0)
    layers = [word for one in found for word in words(one) if word.startswith("recompute.layers")]
    assert layers == ["recompute.layers=4"]


def test_scores_that_are_kept_are_recomputed_first():
    """Eager attention on 2,048 tokens keeps 40 GiB of scores."""
    found = advice(
        1, "model.layers=8", "model.attention.core=eager", "data.seq_length=4096", "batch.micro_batch=4", gib=110
    )
    assert ["recompute.granularity=selective"] in [words(one) for one in found]


def test_several_changes_are_tried_together():
    (first, *_) = advice(8, "model.layers=64", gib=40.0)
    assert len(first.changes) > 1


@pytest.mark.slow
def test_more_gpus_are_asked_for_when_nothing_else_helps():
    config = run("batch.global_batch=64", preset="gpt3-175b")
    layout = build_layout(config, 8)
    assert find_fitting_layouts(config, layout, h200(), ranks=8) == []
    found = find_fitting_ranks(config, layout, h200())
    assert found is not None
    ranks, offer = found
    assert (ranks, offer.plan.layout.dims.ranks) == (32, 32)
    assert offer.plan.fits


def test_nothing_is_offered_that_cannot_exist():
    config = run("batch.global_batch=1", preset="gpt3-175b")
    assert find_fitting_ranks(config, build_layout(config, 1), h200().model_copy(update={"memory_gib": 4.0})) is None


@pytest.mark.parametrize(
    ("preset", "ranks", "overrides"),
    [
        ("mixtral-8x22b", 64, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=8")),
        ("qwen3-30b-a3b", 16, ("parallel.expert=8",)),
    ],
)
def test_a_preset_of_experts_fits_where_experts_are_cut_or_something_that_does_is_offered(preset, ranks, overrides):
    settings = ("batch.global_batch=64", "parallel.sharding=zero1", "recompute.granularity=full", *overrides)
    config = run(*settings, preset=preset)
    raise_if(problems(config, ranks))
    if not plan(config, ranks, h200()).fits:
        found = find_fitting_layouts(config, build_layout(config, ranks), h200(), ranks=ranks)
        config = run(*settings, *words(found[0]), preset=preset)
    assert plan(config, ranks, h200()).fits
