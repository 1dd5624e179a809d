"""Every schedule does each pass once, in an order that can be done, and holds what it is known to hold."""

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mt_core.config.sections import ScheduleName
from mt_core.errors import MtError
from mt_core.pipeline.actions import Action, Overlap, Placement, Schedule
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import SCHEDULES, build_schedule, find_nearest_counts, list_problems
from mt_core.pipeline.simulator import StageCosts, Timeline, simulate


@st.composite
def schedules(draw, name: str | None = None) -> Schedule:
    """Any schedule of any size that it takes."""
    name = name or draw(st.sampled_from([*SCHEDULES]))
    fewest, most = SCHEDULES[name].chunks
    ranks, chunks = draw(st.integers(1, 16)), draw(st.integers(fewest, most or 4))
    group = draw(st.none() | st.integers(ranks, ranks + 5)) if name == "interleaved" else None
    count = draw(st.integers(1, 64))
    if any(list_problems(name, ScheduleSize(ranks, count, chunks, group))):
        count = find_nearest_counts(name, ScheduleSize(ranks, count, chunks, group))[-1]
    return build_schedule(name, ScheduleSize(ranks, count, chunks, group))


@st.composite
def timed_sizes(draw) -> tuple[str, ScheduleSize]:
    """A generated schedule and its size with times of every stage's passes."""
    name = draw(st.sampled_from([each for each, kind in SCHEDULES.items() if kind.generated]))
    ranks, chunks = draw(st.integers(1, 8)), SCHEDULES[name].chunks[0]
    count, stages = draw(st.integers(1, 24)), ranks * chunks
    lengths = st.tuples(st.floats(0.1, 3), st.floats(0, 3), st.floats(0, 3))
    times = draw(st.lists(lengths, min_size=stages, max_size=stages))
    return name, ScheduleSize(ranks, count, chunks, pass_times=tuple(times))


def play(schedule: Schedule) -> Timeline:
    return simulate(schedule, [StageCosts()] * schedule.placement.stages)


@given(timed_sizes())
@settings(max_examples=40, deadline=None)
def test_passes_ordered_by_their_times_never_take_longer_and_hold_no_more_microbatches(drawn):
    name, size = drawn
    costs = [StageCosts(*each) for each in size.pass_times]
    timed, fixed = (simulate(build_schedule(name, each), costs) for each in (size, replace(size, pass_times=None)))
    assert timed.seconds <= fixed.seconds
    assert max(timed.peak_activations) <= 2 * size.ranks


def test_passes_of_one_length_come_in_the_same_order_whatever_it_is():
    for name, chunks in (("zb-2p", 1), ("zbv", 2)):
        plain = ScheduleSize(4, 9, chunks)
        timed = replace(plain, pass_times=((2.0, 2.0, 2.0),) * 4 * chunks)
        assert build_schedule(name, timed) == build_schedule(name, plain)


@pytest.mark.parametrize(
    ("name", "microbatches", "times", "before", "after"),
    [
        ("zb-2p", 4, [(1.0, 1.5, 0.5)] * 2, 13.5, 13.0),
        ("zbv", 8, [(1.0, 1.5, 0.5)] * 4, 53.0, 50.0),
    ],
)
def test_short_weight_passes_make_another_order_shorter(name, microbatches, times, before, after):
    size = ScheduleSize(2, microbatches, len(times) // 2)
    costs = [StageCosts(*each) for each in times]
    schedules = [build_schedule(name, replace(size, pass_times=given)) for given in (None, tuple(times))]
    assert [simulate(each, costs).seconds for each in schedules] == [before, after]


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_each_pass_is_done_once_and_after_its_inputs(schedule):
    """Counted from the timeline: F after the F before it, B or I after its F and the stage behind it, W after I."""
    stages, made = schedule.placement.stages, {}
    for rank, events in enumerate(play(schedule).events):
        for event in events:
            for action in event.step.passes:
                stage = schedule.placement.get_stage(rank, action.chunk)
                for kind in "IW" if action.kind == "B" else action.kind:
                    assert (kind, stage, action.microbatch) not in made
                    made[kind, stage, action.microbatch] = (event.start, event.end)
    assert len(made) == 3 * stages * schedule.microbatches
    for (kind, stage, index), (start, _) in made.items():
        before = {
            "F": [("F", stage - 1)] if stage else [],
            "I": [("F", stage), *([("I", stage + 1)] if stage + 1 < stages else [])],
            "W": [],
        }[kind]
        assert all(made[other, neighbour, index][1] <= start for other, neighbour in before)
    assert all(made["W", s, i][1] >= made["I", s, i][1] for s in range(stages) for i in range(schedule.microbatches))


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_microbatches_pass_through_a_chunk_in_their_order(schedule):
    """Gradients are then added in one order, and messages of a kind are used in the order in which they were sent."""
    for rank in range(schedule.placement.ranks):
        order: dict[tuple[str, int], list[int]] = {}
        for action in schedule.list_passes(rank):
            for kind in "IW" if action.kind == "B" else action.kind:
                order.setdefault((kind, action.chunk), []).append(action.microbatch)
        assert all(indices == list(range(schedule.microbatches)) for indices in order.values())


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_only_what_the_table_says_splits_or_overlaps(schedule):
    kind = SCHEDULES[schedule.name]
    kinds = {a.kind for rank in range(schedule.placement.ranks) for a in schedule.list_passes(rank)}
    assert ("I" in kinds) == ("W" in kinds) == kind.split_backward
    overlaps = any(isinstance(step, Overlap) for steps in schedule.steps for step in steps)
    assert overlaps == kind.overlapping


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_peaks_are_the_known_ones(schedule):
    """In activations of a chunk."""
    ranks, count, chunks = schedule.placement.ranks, schedule.microbatches, schedule.placement.chunks
    peaks = play(schedule).peak_activations
    match schedule.name:
        case "gpipe":
            assert peaks == (count,) * ranks
        case "1f1b":
            assert peaks == tuple(min(ranks - rank, count) for rank in range(ranks))
        case "interleaved":
            assert max(peaks) <= count * chunks
            assert list(peaks) == sorted(peaks, reverse=True)
        case "zb-h1":
            assert max(peaks) == peaks[0] == min(ranks, count)
        case "zb-2p":
            assert max(peaks) <= 2 * ranks
        case "zbv" if count >= 2 * ranks - 1:
            assert peaks == (2 * ranks,) * ranks
        case "zbv":
            assert max(peaks) <= 2 * ranks
        case "dualpipev":
            assert peaks == (2 * ranks + 1,) * ranks


@pytest.mark.parametrize(("group", "count"), [(None, 8), (4, 8), (6, 12), (6, 10)])
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_holds_its_warmup_and_one_more(group, count, chunks):
    schedule = build_schedule("interleaved", ScheduleSize(4, count, chunks, group))
    warmups = [(4 - rank - 1) * 2 + (chunks - 1) * (group or 4) for rank in range(4)]
    assert play(schedule).peak_activations == tuple(min(warmup + 1, count * chunks) for warmup in warmups)


def show(schedule: Schedule, rank: int) -> str:
    """F0.1 is the forward pass of microbatch 0 through chunk 1; + joins what overlaps."""
    return " ".join("+".join(f"{a.kind}{a.microbatch}.{a.chunk}" for a in s.passes) for s in schedule.steps[rank])


def test_1f1b_of_three_ranks():
    schedule = build_schedule("1f1b", ScheduleSize(3, 4))
    assert show(schedule, 0) == "F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 B2.0 B3.0"
    assert show(schedule, 2) == "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0"


def test_interleaving_takes_microbatches_in_groups():
    """The example of docs/specs/core.md §3.3: microbatches 0,1,0,1,2,3,2,3 on chunks 0,0,1,1,0,0,1,1."""
    schedule = build_schedule("interleaved", ScheduleSize(2, 4, 2))
    forward = [a for a in schedule.list_passes(0) if a.kind == "F"]
    assert [(a.microbatch, a.chunk) for a in forward] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1),
    ]  # fmt: skip
    assert show(schedule, 0).startswith("F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 ")
    assert show(schedule, 1).startswith("F0.0 F1.0 F0.1 B0.1 ")


def test_zb_h1_delays_weight_gradients_by_the_rank():
    schedule = build_schedule("zb-h1", ScheduleSize(3, 4))
    assert show(schedule, 0) == "F0.0 F1.0 F2.0 I0.0 W0.0 F3.0 I1.0 W1.0 I2.0 W2.0 I3.0 W3.0"
    assert show(schedule, 2) == "F0.0 I0.0 F1.0 I1.0 F2.0 I2.0 W0.0 F3.0 I3.0 W1.0 W2.0 W3.0"


def test_dualpipev_has_its_eight_phases():
    schedule = build_schedule("dualpipev", ScheduleSize(2, 4, 2))
    assert show(schedule, 0) == (
        "F0.0 F1.0 F2.0 F0.1 I0.1 W0.1 F1.1 F3.0+B1.1 F2.1+B0.0 B2.1 F3.1+B1.0 B3.1 I2.0 W2.0 I3.0 W3.0"
    )
    assert (
        show(schedule, 1) == "F0.0 F0.1 F1.0 F1.1 F2.0+B0.1 F2.1+B0.0 F3.0+B1.1 F3.1+B1.0 B2.1 B2.0 I3.1 I3.0 W3.1 W3.0"
    )


def test_one_match_executes_every_step():
    """The runtime's loop: positional patterns take a step apart."""

    def name(step: Action | Overlap) -> str:
        match step:
            case Action("F", microbatch, chunk):
                return f"forward {microbatch} {chunk}"
            case Action("B", microbatch, chunk):
                return f"backward {microbatch} {chunk}"
            case Action("I" | "W", microbatch, chunk):
                return f"half {microbatch} {chunk}"
            case Overlap(Action("F", one), Action("B", other)):
                return f"both {one} {other}"
        raise AssertionError(step)

    steps = build_schedule("dualpipev", ScheduleSize(2, 4, 2)).steps[0]
    words = Counter(name(step).split()[0] for step in steps)
    assert words == {"forward": 5, "half": 6, "both": 3, "backward": 2}
    assert len({*steps}) == len(steps)  # hashable


@pytest.mark.parametrize(("shape", "stages"), [("loop", [(0, 3), (1, 4), (2, 5)]), ("v", [(0, 5), (1, 4), (2, 3)])])
def test_chunks_go_around_or_there_and_back(shape, stages):
    placement = Placement(3, 2, shape)
    assert [placement.get_stages(rank) for rank in range(3)] == stages
    assert [placement.get_rank(stage) for rank in range(3) for stage in stages[rank]] == [0, 0, 1, 1, 2, 2]


def test_a_v_sends_nothing_where_it_turns():
    assert [Placement(3).count_sends(rank) for rank in range(3)] == [(1, 0), (1, 1), (0, 1)]
    assert [Placement(3, 2).count_sends(rank) for rank in range(3)] == [(2, 1), (2, 2), (1, 2)]
    assert [Placement(3, 2, "v").count_sends(rank) for rank in range(3)] == [(1, 1), (2, 2), (1, 1)]
    assert Placement(1, 2).count_sends(0) == (0, 0)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "interleaved",
            ScheduleSize(4, 6, 2),
            "batch.global_batch: 6 microbatches, but interleaved needs groups of 4, and a last one of none or at "
            "least 4; allowed: 4 or 8 microbatches",
        ),
        (
            "interleaved",
            ScheduleSize(4, 3, 2, 6),
            "batch.global_batch: 3 microbatches, but interleaved needs groups of 6, and a last one of none or at "
            "least 4; allowed: 6 microbatches",
        ),
        (
            "dualpipev",
            ScheduleSize(4, 7, 2),
            "batch.global_batch: 7 microbatches, but dualpipev needs at least 2 × 4 ranks; allowed: 8 microbatches",
        ),
        ("zbv", ScheduleSize(4, 7, 3), "pipeline.virtual_stages: 3, but a rank of zbv has 2; allowed: 2"),
        (
            "interleaved",
            ScheduleSize(4, 8),
            "pipeline.virtual_stages: 1, but a rank of interleaved has 2 or more; allowed: 2 or more",
        ),
        (
            "interleaved",
            ScheduleSize(4, 8, 2, 3),
            "pipeline.microbatch_group_size: 3 is less than parallel.pipeline 4; allowed: 4 and more",
        ),
        (
            "1f1b",
            ScheduleSize(4, 8, 1, 4),
            "pipeline.microbatch_group_size: 4, but 1f1b has no groups of microbatches; "
            'leave it unset, or pipeline.schedule = "interleaved"',
        ),
        (
            "zb-h1",
            ScheduleSize(2, 4, pass_times=((1, 1, 1),) * 2),
            "pipeline.pass_times: are given, but the order of zb-h1 is fixed; "
            'leave them out, or schedule = "zb-2p" or "zbv"',
        ),
        (
            "zbv",
            ScheduleSize(2, 4, 2, pass_times=((1, 1, 1),) * 2),
            "pipeline.pass_times: 2 stages, but there are 4; give 4 times three numbers",
        ),
        (
            "zb-2p",
            ScheduleSize(2, 4, pass_times=((1, 1, 1), (0, 1, 1))),
            "pipeline.pass_times: [0, 1, 1] for a stage; allowed: a forward pass above 0, and two times that are not "
            "below",
        ),
    ],
)
def test_a_size_that_a_schedule_does_not_take_is_refused_with_one_that_it_takes(name, size, message):
    with pytest.raises(MtError) as caught:
        build_schedule(name, size)
    assert str(caught.value) == message


def test_an_unknown_schedule_names_the_known():
    with pytest.raises(MtError, match="pipeline.schedule: unknown schedule 'zb-v'; did you mean 'zbv'"):
        build_schedule("zb-v", ScheduleSize(4, 8))


def test_counts_that_pass_are_told_as_batches_too():
    (problem,) = list_problems("interleaved", ScheduleSize(4, 6, 2), samples=16)
    assert problem.allowed == "allowed: 4 or 8 microbatches, batch.global_batch = 64 or 128"


def test_the_configuration_names_every_schedule():
    assert get_args(ScheduleName) == tuple(SCHEDULES)
