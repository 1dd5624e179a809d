"""All schedules for one run, and which of them is recommended."""

import json

import pytest

from core.planning.configs import h200, run
from mt_core.pipeline.layout_string import parse_layout
from mt_core.planning.pipeline.pipeline_plan import check_pipeline, plan_pipeline
from mt_core.planning.pipeline.schedule_comparison import (
    Candidate,
    balance_candidate,
    compare_schedules,
    order_candidate,
    recommend_schedule,
)


def balance(name: str, *overrides: str) -> tuple[Candidate, Candidate | None]:
    """A schedule as it is planned, and with stages that take equally long."""
    config = run("parallel.pipeline=4", "batch.global_batch=16", *overrides)
    layout = check_pipeline(config, 4)
    candidate = next(each for each in compare_schedules(config, layout, h200()) if each.name == name)
    return candidate, balance_candidate(config, layout, h200(), candidate)


def compare(*overrides: str, gib: float = 139.8, preset: str = "llama3-8b") -> list[Candidate]:
    config = run("parallel.pipeline=4", "batch.global_batch=16", *overrides, preset=preset)
    profile = h200().model_copy(update={"memory_gib": gib})
    return compare_schedules(config, check_pipeline(config, 4), profile)


def get_names(candidates: list[Candidate]) -> list[tuple[str, int]]:
    return [(each.name, each.chunks) for each in candidates]


ALL = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zb-h1", 1),
    ("zb-2p", 1),
    ("zbv", 2),
    ("dualpipev", 2),
]


def test_every_schedule_is_compared():
    candidates = compare()
    assert get_names(candidates) == ALL
    assert all(each.plan for each in candidates)
    assert get_names(compare("pipeline.schedule=interleaved", "pipeline.virtual_stages=8"))[2:5] == [
        ("interleaved", 2),
        ("interleaved", 4),
        ("interleaved", 8),
    ]


def test_what_a_schedule_does_not_take_is_said():
    by_name = {(each.name, each.chunks): each for each in compare("batch.global_batch=6", "model.layers=8")}
    assert {name for name, each in by_name.items() if each.plan is None} == {
        ("interleaved", 2),
        ("interleaved", 4),
        ("dualpipev", 2),
    }
    assert by_name["interleaved", 2].reason == (
        "6 microbatches, but interleaved needs groups of 4, and a last one of none or at least 4; "
        "allowed: 4 or 8 microbatches"
    )
    assert by_name["interleaved", 4].reason == "8 layers for 16 stages"


def test_the_fastest_that_fits_is_recommended():
    candidates = [each for each in compare() if each.name != "dualpipev"]
    best = recommend_schedule(candidates)
    assert best is not None
    assert best.candidate.name == "zbv"
    assert best.candidate.changes == ("pipeline.schedule=zbv",)
    assert best.candidate.plan.seconds == min(each.plan.seconds for each in candidates)
    assert best.reason.startswith("the fastest that fits; ")
    less = 1 - best.candidate.plan.seconds / candidates[1].plan.seconds
    assert best.reason.endswith(f"{less * 100:.1f}% less time than 1f1b")


def test_a_faster_one_that_does_not_fit_is_not():
    """The rank with embedding and head is the fullest of a V."""
    candidates = compare(gib=90.0)
    fitting = {each.name: each.plan.seconds for each in candidates if each.plan.fits}
    assert "zbv" not in fitting
    assert recommend_schedule(candidates).candidate.name == min(fitting, key=lambda name: fitting[name])


def test_of_equally_fast_ones_it_is_that_with_least_memory():
    """GPipe takes as long as 1F1B and holds more."""
    both = [each for each in compare(gib=400.0) if each.name in ("gpipe", "1f1b")]
    best = recommend_schedule(both)
    assert best.candidate.name == "1f1b"
    assert best.reason == "as fast as any that fits, with least memory"


def test_where_none_fits_it_is_the_one_that_needs_least():
    candidates = compare(gib=10.0)
    best = recommend_schedule(candidates)
    assert best.reason == "none fits; this one needs least memory"
    most = {each.name: max(plan.total for plan in each.plan.plans) for each in candidates}
    assert most[best.candidate.name] == min(most.values())
    assert recommend_schedule([Candidate("zbv", 2, reason="no")]) is None


def test_a_layout_of_other_stages_is_balanced_for_a_schedule_that_needs_more():
    by_name = {each.name: each.plan for each in compare("pipeline.layout=Et*8|t*9|t*9|t*6L")}
    assert [len(stage.layers) for stage in by_name["zb-h1"].stages] == [8, 9, 9, 6]
    assert [len(stage.layers) for stage in by_name["zbv"].stages] == [4] * 8


def test_stages_that_take_equally_long_have_fewer_layers_beside_the_head():
    plain, balanced = balance("1f1b")
    assert balanced.changes == ("pipeline.schedule=1f1b", f'pipeline.layout="{balanced.layout}"')
    *others, last = [len(stage.layers) for stage in parse_layout(balanced.layout)]
    assert last < min(others)
    assert sum(others) + last == 32
    assert balanced.plan.seconds < 0.95 * plain.plan.seconds
    assert balanced.plan.timeline.bubble < plain.plan.timeline.bubble
    set_by_hand, again = balance("1f1b", f"pipeline.layout={balanced.layout}")
    assert set_by_hand.plan.seconds == balanced.plan.seconds
    assert again is None


def test_a_schedule_that_refuses_a_smaller_batch_of_the_run_has_no_plan():
    config = run("parallel.pipeline=4", "batch.global_batch=16")
    layout = check_pipeline(config, 4)
    refused = {each.name: each.reason for each in compare_schedules(config, layout, h200(), [6, 16]) if not each.plan}
    assert refused.keys() == {"interleaved", "dualpipev"}
    assert refused["dualpipev"] == "6 microbatches, but dualpipev needs at least 2 × 4 ranks; allowed: 8 microbatches"


def test_what_is_sharded_by_fsdp_splits_no_backward_pass():
    by_name = {each.name: each.plan for each in compare("parallel.sharding=fsdp")}
    plain, split = by_name["1f1b"], by_name["zb-h1"]
    assert plain is not None
    assert split is not None
    assert split.seconds == pytest.approx(plain.seconds)
    assert split.timeline.peak_activations == pytest.approx(plain.timeline.peak_activations)
    for words in ([], ["runtime.compile=true"]):
        by_name = {each.name: each.plan for each in compare(*words)}
        assert by_name["zb-h1"].seconds < 0.95 * by_name["1f1b"].seconds


def test_passes_ordered_by_their_times_make_stages_of_equal_time_faster_still():
    config = run("parallel.pipeline=2", "batch.global_batch=16", preset="gemma-2-2b")
    layout = check_pipeline(config, 2)
    for name in ("zbv", "zb-2p"):
        plain = next(each for each in compare_schedules(config, layout, h200()) if each.name == name)
        balanced = balance_candidate(config, layout, h200(), plain)
        ordered = order_candidate(config, layout, h200(), balanced)
        assert ordered.plan.seconds < 0.98 * balanced.plan.seconds
        assert ordered.plan.stages == balanced.plan.stages
        assert ordered.plan.times == balanced.plan.times
        assert ordered.changes == (*balanced.changes, f"pipeline.pass_times={json.dumps(ordered.pass_times)}")
        again = run("parallel.pipeline=2", "batch.global_batch=16", *ordered.changes, preset="gemma-2-2b")
        assert plan_pipeline(again, layout, h200()) == ordered.plan
        candidates = {each.name: each.plan for each in compare_schedules(again, layout, h200())}
        assert candidates[name] == ordered.plan
        assert candidates["1f1b"] is not None


def test_an_order_that_is_fixed_or_no_shorter_is_left():
    config = run("parallel.pipeline=4", "batch.global_batch=16", preset="gpt3-175b")
    config = config.model_copy(update={"parallel": run("parallel.pipeline=4").parallel})
    layout = check_pipeline(config, 4)
    by_name = {each.name: each for each in compare_schedules(config, layout, h200())}
    for name in ("1f1b", "zb-h1", "dualpipev", "zb-2p"):
        assert order_candidate(config, layout, h200(), by_name[name]) is None
    assert order_candidate(config, layout, h200(), Candidate("zbv", 2, reason="no")) is None
