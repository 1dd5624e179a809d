"""Which samples a rank reads: Megatron's orders, resumed anywhere; batch sizes that grow."""

import warnings
from collections.abc import Sequence
from itertools import islice
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_data.batching.batch_sizes import (
    BatchSizes,
    RampedBatchSize,
    SteppedBatchSize,
    check_sizes,
    parse_steps,
)
from mt_data.batching.samplers import RANDPERM_LIMIT, SAMPLERS, DataParallelRank, randperm


def read(
    order: str, total: int, consumed: int, share: tuple[int, int], steps: int | None = None
) -> list[list[list[int]]]:
    """Micro-batches of all ranks, step by step; a share is a micro-batch and a number of ranks."""
    micro_batch, ranks = share
    streams = [
        islice(SAMPLERS[order](total, consumed, DataParallelRank(micro_batch, rank, ranks)), steps)
        for rank in range(ranks)
    ]
    return [[list(ids) for ids in step] for step in zip(*streams, strict=True)]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [sample for step in steps for ids in step for sample in ids]


@pytest.mark.parametrize(
    ("order", "total", "consumed", "expected"),
    [
        (
            "single",
            21,
            4,
            [[[4, 5], [8, 9], [12, 13], [16, 17]], [[6, 7], [10, 11], [14, 15], [18, 19]]],
        ),
        (
            "sequential",
            21,
            12,
            [[[12, 13], [16, 17], [20]], [[14, 15], [18, 19], []]],
        ),
        (
            "cyclic",
            18,
            0,
            [[[4, 0], [7, 3], [2, 5], [1, 6]], [[12, 8], [15, 11], [10, 13], [9, 14]]],
        ),
        ("cyclic", 18, 8, [[[2, 5], [1, 6], [5, 4], [2, 6]], [[10, 13], [9, 14], [13, 12], [10, 14]]]),
        ("cyclic", 18, 16, [[[5, 4], [2, 6], [7, 3], [1, 0]], [[13, 12], [10, 14], [15, 11], [9, 8]]]),
        (
            "cyclic-unsharded",
            18,
            0,
            [[[8, 7], [5, 13], [15, 0], [12, 16]], [[4, 3], [9, 2], [1, 11], [17, 6]]],
        ),
    ],
)
def test_the_orders_are_megatrons(order: str, total: int, consumed: int, expected: list[list[list[int]]]):
    steps = read(order, total, consumed, (2, 2), steps=len(expected[0]))
    assert [list(rank) for rank in zip(*steps, strict=True)] == expected


SHARES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(st.integers(0, 200), st.integers(0, 12), SHARES, SHARES)
def test_the_position_of_single_is_valid_under_another_number_of_ranks(
    total: int, steps: int, before: tuple[int, int], after: tuple[int, int]
):
    first = flat(read("single", total, 0, before, steps))
    rest = flat(read("single", total, len(first), after))
    assert first + rest == list(range(len(first) + len(rest)))
    assert total - len(first + rest) < max(before[0] * before[1], after[0] * after[1])


@given(st.integers(0, 200), st.integers(0, 12), SHARES, SHARES)
def test_sequential_reads_every_sample_once(total: int, steps: int, before: tuple[int, int], after: tuple[int, int]):
    first = flat(read("sequential", total, 0, before, steps))
    assert first + flat(read("sequential", total, len(first), after)) == list(range(total))


@given(st.sampled_from(["cyclic", "cyclic-unsharded"]), st.integers(1, 90), st.integers(0, 40), SHARES)
def test_cyclic_resumes_at_any_step(order: str, total: int, cut: int, share: tuple[int, int]):
    group = share[0] * share[1]
    assume(total >= group)
    # unsharded, the ranks take turns in a whole number of micro-batches, which may be no whole number of groups
    assume(order == "cyclic" or total // share[0] % share[1] == 0)
    unbroken = read(order, total, 0, share, cut + 10)
    assert read(order, total, cut * group, share, 10) == unbroken[cut:]
    epoch = unbroken[: total // group]
    if len(epoch) == total // group:
        assert len({*flat(epoch)}) == len(flat(epoch)) == total // group * group


def test_cyclic_shuffles_each_epoch_anew():
    steps = read("cyclic", 20, 0, (2, 1), 20)
    assert sorted(flat(steps[:10])) == sorted(flat(steps[10:])) == list(range(20))
    assert flat(steps[:10]) != flat(steps[10:])


@pytest.mark.parametrize("count", [0, 1, 2, 17, 5000, 200_000])
@pytest.mark.parametrize("seed", [0, 1, 123456])
def test_the_permutation_is_torchs(count: int, seed: int):
    expected = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert randperm(count, seed) == expected.tolist()


def test_more_samples_than_are_shuffled_at_once():
    with pytest.raises(MtError, match="data: 214748364 samples to shuffle at once; less than 214748364 a rank, or"):
        randperm(RANDPERM_LIMIT, 0)


@pytest.mark.parametrize("order", ["single", "sequential"])
def test_a_position_behind_the_end(order: str):
    assert read(order, 8, 8, (2, 1)) == []
    with pytest.raises(MtError, match="data: 9 samples are consumed, the dataset has 8; the dataset it began with"):
        SAMPLERS[order](8, 9, DataParallelRank(2))


@pytest.mark.parametrize("order", ["cyclic", "cyclic-unsharded"])
def test_a_position_or_a_dataset_that_does_not_suit_cyclic(order: str):
    with pytest.raises(MtError, match="position 22 is 6 samples into epoch 1, no multiple of .* ranks, 4; the cyclic"):
        SAMPLERS[order](18, 22, DataParallelRank(2, 0, 2))
    with pytest.raises(MtError, match="3 samples do not fill one micro-batch of every rank; at least 4 samples"):
        SAMPLERS[order](3, 0, DataParallelRank(2, 0, 2))


def at(sizes: BatchSizes, positions: Sequence[int]) -> list[int]:
    return [sizes.size_after(position) for position in positions]


def test_a_ramp_grows_in_equal_increments():
    ramp = RampedBatchSize(start=16, increment=8, samples=600, full=64)
    assert at(ramp, [0, 99, 100, 199, 200, 599, 600, 601]) == [16, 16, 24, 24, 32, 56, 64, 64]
    assert list(ramp.sizes()) == [16, 24, 32, 40, 48, 56, 64]


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    """Megatron's own calculator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.num_microbatches_calculator")


@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    increments=st.integers(1, 9),
    samples=st.integers(1, 3000),
    consumed=st.integers(0, 4000),
)
def test_a_ramp_is_megatrons(
    oracle: ModuleType, start: int, increment: int, increments: int, samples: int, consumed: int
):
    full = start + increment * increments
    reference = oracle.RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, samples)
    reference.update(consumed, False)
    ramp = RampedBatchSize(start, increment, samples, full)
    assert ramp.size_after(consumed) == reference.get_current_global_batch_size()
    assert ramp.size_after(consumed) == reference.get()


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ((16, 7, 100, 64), "batch.rampup: 64 − 16 is no multiple of the increment 7; an increment that divides 48"),
        ((64, 8, 100, 64), "batch.rampup: start 64 is not below the full batch; less than 64"),
        ((0, 8, 100, 64), "batch.rampup: start 0, increment 8, samples 100; all of them at least 1"),
    ],
)
def test_a_ramp_that_does_not_arrive(ramp: tuple[int, int, int, int], message: str):
    with pytest.raises(MtError, match=message):
        RampedBatchSize(*ramp)


def test_a_schedule_of_steps():
    steps = parse_steps("0:64, 1.5K:128 1M:256")
    assert steps == SteppedBatchSize((0, 1500, 1_000_000), (64, 128, 256))
    assert at(steps, [0, 1499, 1500, 999_999, 1_000_000]) == [64, 64, 128, 128, 256]
    assert parse_steps("2M:8 0:4", seq_length=1000) == SteppedBatchSize(
        (0, 2000), (4, 8)
    )  # thresholds in tokens, in any order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "batch.sizes: ''; steps as"),
        ("0:64 10X:8", "batch.sizes: '0:64 10X:8'; steps as"),
        ("5:64", "the first step of '5:64' begins at 5 samples; a step that begins at 0"),
        ("0:64 0:8", "two steps of '0:64 0:8' begin at the same sample; each a threshold of its own"),
        ("0:0", "'0:0' has a batch of 0; sizes of at least 1"),
    ],
)
def test_a_schedule_that_is_none(text: str, message: str):
    with pytest.raises(MtError, match=message):
        parse_steps(text)


def test_sizes_that_the_ranks_do_not_divide():
    check_sizes(RampedBatchSize(8, 4, 100, 24), group=4)
    with pytest.raises(MtError, match="batch: sizes 12, 20 are no multiples of micro-batch × ranks = 8"):
        check_sizes(RampedBatchSize(8, 4, 100, 24), group=8)


def test_a_growing_batch_takes_the_same_samples_in_the_same_order():
    ramp, consumed, order = RampedBatchSize(4, 4, 40, 12), 0, []
    stream = SAMPLERS["single"](100, 0, DataParallelRank(2, 0, 1))
    while consumed < 80:
        step = [i for ids in islice(stream, ramp.size_after(consumed) // 2) for i in ids]
        consumed += ramp.size_after(consumed)
        assert len(order) + len(step) == consumed
        order += step
    assert order == list(range(consumed))
