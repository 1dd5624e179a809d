"""The simulator counts time, memory and waiting, and finds what cannot be done."""

from dataclasses import replace

import pytest

from mt_core.errors import MtError
from mt_core.pipeline.actions import Action, Overlap, PassKind, Placement, Schedule
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import build_schedule
from mt_core.pipeline.simulator import StageCosts, simulate


def make(*steps: str, chunks: int = 1) -> Schedule:
    """A schedule of one microbatch a digit: "F0 B0" for each rank."""
    kinds: dict[str, PassKind] = {"F": "F", "B": "B", "I": "I", "W": "W"}
    ranks = tuple(tuple(Action(kinds[word[0]], int(word[1:])) for word in line.split()) for line in steps)
    count = max(action.microbatch for line in ranks for action in line) + 1
    return Schedule("mine", Placement(len(steps), chunks), count, ranks)


def test_a_timeline_has_the_start_and_end_of_each_action():
    timeline = simulate(make("F0 F1 B0 B1", "F0 B0 F1 B1"))
    times = [[(str(event.step), event.start, event.end) for event in events] for events in timeline.events]
    assert times == [
        [("F0", 0, 1), ("F1", 1, 2), ("B0", 4, 6), ("B1", 7, 9)],
        [("F0", 1, 2), ("B0", 2, 4), ("F1", 4, 5), ("B1", 5, 7)],
    ]
    assert (timeline.seconds, timeline.work, timeline.bubble) == (9, (6, 6), 0.5)
    assert timeline.paused == 3


def test_stages_may_be_uneven():
    """The slower second stage is never without work once it has begun."""
    costs = [StageCosts(1, 1, 1), StageCosts(3, 3, 3)]
    timeline = simulate(build_schedule("1f1b", ScheduleSize(2, 4)), costs)
    assert timeline.seconds == 1 + 4 * 9 + 2
    assert timeline.work == (12, 36)
    assert timeline.bubble == pytest.approx(2 * 39 / 48 - 1)


def test_what_is_sent_arrives_later_but_not_within_a_rank():
    there = simulate(build_schedule("1f1b", ScheduleSize(4, 1)), send=0.5)
    assert there.seconds == pytest.approx(4 * 3 + 6 * 0.5)
    turn = simulate(build_schedule("zbv", ScheduleSize(4, 1, 2)), [StageCosts()] * 8, send=0.5)
    assert turn.seconds == pytest.approx(8 + 8 + 1 + (6 + 6) * 0.5)


def test_input_and_weight_passes_free_their_parts():
    whole = build_schedule("zb-h1", ScheduleSize(4, 8))
    for part in (0, 0.5, 1):
        timeline = simulate(whole, [StageCosts(weight_part=part)] * 4)
        assert timeline.peak_activations == tuple(4 - rank + rank * part for rank in range(4))


def test_memory_is_counted_by_stage():
    costs = [StageCosts(activations=size) for size in (1, 10, 100, 1000)]
    timeline = simulate(build_schedule("zbv", ScheduleSize(2, 1, 2)), costs)
    assert timeline.peak_activations == (1001, 110)


def test_passes_that_run_together_hide_a_share_of_the_shorter():
    steps = (Action("F", 0), Overlap(Action("F", 1), Action("B", 0)), Action("B", 1))
    schedule = Schedule("mine", Placement(1), 2, (steps,))
    assert simulate(schedule).seconds == 6
    assert simulate(schedule, overlap=0.5).seconds == 5.5
    assert simulate(schedule, overlap=1).seconds == 5
    assert simulate(schedule).peak_activations == (2,)


def test_by_default_a_rank_takes_one_of_everything():
    timeline = simulate(build_schedule("interleaved", ScheduleSize(2, 2, 4)))
    assert timeline.work == pytest.approx((6, 6))
    assert simulate(build_schedule("zbv", ScheduleSize(4, 16, 2))).peak_activations == (4, 4, 4, 4)


def test_a_deadlock_says_who_waits_for_what():
    with pytest.raises(MtError) as caught:
        simulate(make("F0 B0 F1 B1", "F0 F1 B0 B1"))
    assert str(caught.value).splitlines() == [
        "schedule mine, rank 0: deadlock: step 1, B0, waits for I of microbatch 0 through stage 1, which rank 1 does "
        "in step 2; rank 1 is at step 1; change the order of one of the two",
        "schedule mine, rank 1: deadlock: step 1, F1, waits for F of microbatch 1 through stage 0, which rank 0 does "
        "in step 2; rank 0 is at step 1; change the order of one of the two",
    ]


def test_a_rank_that_waits_for_itself_is_a_deadlock_too():
    with pytest.raises(MtError) as caught:
        simulate(make("B0 F0"))
    assert str(caught.value) == (
        "schedule mine, rank 0: deadlock: step 0, B0, waits for F of microbatch 0 through stage 0, which rank 0 does "
        "in step 1; rank 0 is at step 0; change the order of one of the two"
    )


def test_passes_that_are_missing_repeated_or_unknown_are_all_told():
    with pytest.raises(MtError) as caught:
        simulate(make("F0 F0 I0 B1"))
    assert str(caught.value).splitlines() == [
        "schedule mine, rank 0: F of microbatch 1, chunk 0 is missing; every pass is done once",
        "schedule mine, rank 0: W of microbatch 0, chunk 0 is missing; every pass is done once",
        "schedule mine, rank 0: F of microbatch 0, chunk 0 is there 2 times; every pass is done once",
    ]
    one = make("F0 B0")
    with pytest.raises(MtError, match="F of microbatch 0, chunk 2 does not exist; allowed: microbatches 0 to 0, ch"):
        simulate(replace(one, steps=((*one.steps[0], Action("F", 0, 2)),)))
