"""Simulated bubbles are those of the papers, with passes of one length unless a test says otherwise.

Sums of whole numbers: nothing is rounded.
"""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mt_core.pipeline.actions import Schedule
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import build_schedule
from mt_core.pipeline.simulator import StageCosts, Timeline, simulate

RANKS, MICROBATCHES, CHUNKS = st.integers(1, 16), st.integers(1, 64), st.integers(2, 4)
SECONDS = st.integers(1, 9)
FEW = settings(max_examples=30, deadline=None)


def play(schedule: Schedule, *seconds: int, overlap: float = 0) -> Timeline:
    """The timeline with stages whose passes take so long, or 1."""
    costs = StageCosts(*seconds) if seconds else StageCosts()
    return simulate(schedule, [costs] * schedule.placement.stages, overlap=overlap)


def idle(timeline: Timeline) -> list[float]:
    """How long each rank waits until all are done."""
    return [timeline.seconds - work for work in timeline.work]


@given(st.sampled_from(["gpipe", "1f1b"]), RANKS, MICROBATCHES, SECONDS, SECONDS, SECONDS)
@FEW
def test_gpipe_and_1f1b_wait_once_for_each_further_rank(name, ranks, microbatches, forward, inputs, weights):
    timeline = play(build_schedule(name, ScheduleSize(ranks, microbatches)), forward, inputs, weights)
    assert idle(timeline) == [(ranks - 1) * (forward + inputs + weights)] * ranks
    assert timeline.bubble == pytest.approx((ranks - 1) / microbatches)


@given(st.data(), RANKS, CHUNKS, SECONDS, SECONDS)
@FEW
def test_interleaving_divides_the_bubble_by_the_chunks_with_any_group(data, ranks, chunks, forward, inputs):
    """Groups need not be as large as there are ranks, and the last may be smaller."""
    group = data.draw(st.integers(ranks, ranks + 8))
    microbatches = data.draw(st.integers(group, 64))
    assume(microbatches % group == 0 or microbatches % group >= ranks)
    timeline = play(build_schedule("interleaved", ScheduleSize(ranks, microbatches, chunks, group)), forward, inputs)
    assert idle(timeline) == [(ranks - 1) * (forward + inputs + 1)] * ranks
    assert timeline.bubble == pytest.approx((ranks - 1) / microbatches / chunks)


@given(RANKS, MICROBATCHES)
@FEW
def test_zb_h1_waits_a_third_of_1f1b_once_there_are_as_many_microbatches_as_ranks(ranks, microbatches):
    timeline = play(build_schedule("zb-h1", ScheduleSize(ranks, microbatches)))
    assert idle(timeline) == [max(ranks - 1, 2 * ranks - 1 - microbatches)] * ranks


@given(RANKS, st.integers(0, 48), SECONDS, SECONDS, SECONDS)
@FEW
def test_zb_h1_waits_for_a_forward_and_an_input_pass_less_a_weight_pass(ranks, more, forward, inputs, weights):
    """T_F + T_B − T_W for each further rank, as the paper counts, where weight passes are the shortest."""
    weights = min(forward, inputs, weights)
    timeline = play(build_schedule("zb-h1", ScheduleSize(ranks, ranks + more)), forward, inputs, weights)
    assert idle(timeline) == [(ranks - 1) * (forward + inputs - weights)] * ranks


@given(RANKS, MICROBATCHES)
@FEW
def test_zb_2p_lets_no_rank_pause_once_there_are_twice_as_many_microbatches(ranks, microbatches):
    """The step cannot end before the last rank has worked: its first microbatch comes after ranks − 1 passes."""
    timeline = play(build_schedule("zb-2p", ScheduleSize(ranks, microbatches)))
    assert idle(timeline) == [max(ranks - 1, 2 * ranks - 1 - microbatches)] * ranks
    assert timeline.paused == 0 or microbatches < 2 * ranks - 1


@given(RANKS, MICROBATCHES)
@FEW
def test_zbv_ends_when_the_last_rank_has_worked_without_a_pause(ranks, microbatches):
    """With chunks of half the size the last rank begins twice as early as in ZB-H1 and ZB-2P."""
    timeline = play(build_schedule("zbv", ScheduleSize(ranks, microbatches, 2)))
    if microbatches >= 2 * ranks - 1:
        assert idle(timeline) == [ranks - 1] * ranks
    else:
        assert max(idle(timeline)) <= 2 * max(ranks - 1, 2 * ranks - 1 - microbatches)  # what ZB-H1 waits


@given(RANKS, st.integers(0, 32), st.sampled_from([0, 0.25, 0.5, 1]))
@FEW
def test_dualpipev_waits_as_its_authors_count(ranks, more, overlap):
    """Each further rank costs F&B + B − 3W: an overlapped pair, a whole backward pass, and less three weight passes."""
    timeline = play(build_schedule("dualpipev", ScheduleSize(ranks, 2 * ranks + more, 2)), overlap=overlap)
    assert max(idle(timeline)) == (ranks - 1) * ((3 - overlap) + 2 - 3)


@given(RANKS, st.integers(0, 32))
@FEW
def test_dualpipev_waits_no_longer_where_features_leave_before_the_backward_pass(ranks, more):
    schedule = build_schedule("dualpipev", ScheduleSize(ranks, 2 * ranks + more, 2))
    together, apart = play(schedule), play(schedule.in_sequence())
    assert apart.work == together.work
    assert apart.seconds <= together.seconds


@pytest.mark.parametrize("ranks", [9, 10, 13, 16])
@pytest.mark.parametrize("more", [0, 1, 2, 5])
def test_generated_schedules_reach_the_earliest_end_with_many_ranks_too(ranks, more):
    """Other orders of urgency reach it up to nine ranks only."""
    timeline = play(build_schedule("zbv", ScheduleSize(ranks, 2 * ranks - 1 + more, 2)))
    assert idle(timeline) == [ranks - 1] * ranks


@given(st.integers(2, 8), st.integers(0, 48))
@FEW
def test_where_no_backward_pass_is_split_zero_bubble_schedules_wait_as_1f1b_or_longer(ranks, more):
    """As with torch.compile and FSDP2; a backward pass is twice as long as a forward pass."""
    microbatches = 2 * ranks + more

    def play_whole(name: str, chunks: int = 1) -> Timeline:
        schedule = build_schedule(name, ScheduleSize(ranks, microbatches, chunks))
        costs = StageCosts(6 / chunks, 12 / chunks, 0, 1 / chunks, 0)
        return simulate(schedule, [costs] * schedule.placement.stages)

    plain = play_whole("1f1b")
    assert plain.bubble == pytest.approx((ranks - 1) / microbatches)
    assert play_whole("zb-h1").bubble == pytest.approx(plain.bubble)
    assert play_whole("zb-h1").peak_activations == plain.peak_activations == (*range(ranks, 0, -1),)
    assert play_whole("zb-2p").bubble == pytest.approx(plain.bubble)
    assert play_whole("zb-2p").peak_activations == (*range(2 * ranks - 1, 0, -2),)
    assert play_whole("zbv", 2).bubble > plain.bubble
    assert play_whole("dualpipev", 2).bubble == pytest.approx(5 / 6 * plain.bubble)
    assert set(play_whole("dualpipev", 2).peak_activations) == {ranks + 0.5}
