"""Who stands where: the groups of every axis, and what a configuration means for a number of ranks."""

from itertools import product

import pytest

from mt_core.config.sections import ParallelConfig
from mt_core.distributed.topology import AXES, ParallelDims, dims_of
from mt_core.errors import MtError

SIZES = [(data, context, tensor) for data, context, tensor in product((1, 2, 3, 4), (1, 2, 4), (1, 2, 4))]


def coordinates(dims: ParallelDims) -> dict[int, tuple[int, int, int]]:
    """The oracle: place on data, context and tensor of each rank, by counting up with tensor the fastest."""
    places = product(range(dims.data), range(dims.context), range(dims.tensor))
    return dict(enumerate(places))


def together(dims: ParallelDims, *axes: str) -> set[tuple[int, ...]]:
    """The oracle's groups: ranks whose places are equal on all other axes."""
    others = [AXES.index(axis) for axis in AXES if axis not in axes]
    places = coordinates(dims)
    alike = (tuple(r for r in places if all(places[r][o] == places[m][o] for o in others)) for m in places)
    return set(alike)


@pytest.mark.parametrize("sizes", SIZES)
def test_groups_differ_only_along_their_axes(sizes):
    dims = ParallelDims(*sizes)
    for axes in (("data",), ("context",), ("tensor",), ("data", "context"), ("context", "tensor"), AXES):
        found = [tuple(line) for line in dims.groups(*axes)]
        assert set(found) == together(dims, *axes)
        assert sorted(rank for line in found for rank in line) == list(range(dims.ranks))


def test_the_worked_example_of_megatron_s_numbering():
    """docs/specs/core.md §1.1, the ranks of one of its two pipeline stages: tp 2, cp 2, dp 2."""
    dims = ParallelDims(data=2, context=2, tensor=2)
    assert [*dims.groups("tensor")] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [*dims.groups("context")] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [*dims.groups("data")] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [*dims.groups("data", "context")] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("sizes", SIZES)
def test_shard_groups_and_replica_groups_are_the_rows_and_columns_of_data_and_context(sizes):
    together = sizes[0] * sizes[1]
    for size in (size for size in range(1, together + 1) if together % size == 0):
        dims = ParallelDims(*sizes, shard=size)
        shards, replicas = [*dims.shard_groups()], [*dims.replica_groups()]
        lines = {tuple(line) for line in dims.groups("data", "context")}
        table = [
            [line[start : start + size] for start in range(0, together, size)] for line in sorted(lines)
        ]  # a row for each copy of the state
        assert sorted(map(tuple, shards)) == sorted(tuple(row) for rows in table for row in rows)
        assert sorted(map(tuple, replicas)) == sorted(column for rows in table for column in zip(*rows, strict=True))


@pytest.mark.parametrize("sizes", SIZES)
def test_expert_groups_are_neighbours_and_ranks_at_one_place_hold_the_same_experts(sizes):
    together = sizes[0] * sizes[1]
    for expert in (size for size in range(1, together + 1) if together % size == 0):
        dims = ParallelDims(*sizes, expert=expert)
        lines = [*dims.groups("data", "context")]
        place = {rank: (number, index % expert) for number, line in enumerate(lines) for index, rank in enumerate(line)}
        for group in dims.expert_groups():
            assert [place[rank][1] for rank in group] == [*range(expert)]
            assert [rank - group[0] for rank in group] == [dims.tensor * n for n in range(expert)]
        for group in dims.same_experts():
            assert len({place[rank] for rank in group}) == 1
            assert len(group) == together // expert


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_are_shared_among_ranks_that_hold_them(sizes):
    """As many as lie in a shard group; if shard groups cut expert groups, as many as make up whole ones of both."""
    together = sizes[0] * sizes[1]
    divisors = [size for size in range(1, together + 1) if together % size == 0]
    for expert, shard in product(divisors, divisors):
        dims = ParallelDims(*sizes, shard=shard, expert=expert)
        same = {rank: group for group in dims.same_experts() for rank in group}
        shards, replicas = [*dims.expert_shard_groups()], [*dims.expert_replica_groups()]
        for groups in (shards, replicas):
            assert sorted(rank for group in groups for rank in group) == [*range(dims.ranks)]
            assert all(same[rank] == same[group[0]] for group in groups for rank in group)
        assert all(len({*a} & {*b}) <= 1 for a, b in product(shards, replicas))
        if shard % expert == 0:
            assert {len(group) for group in shards} == {shard // expert}
            assert all(any({*group} <= {*whole} for whole in dims.shard_groups()) for group in shards)
        if expert == 1:
            assert (shards, replicas) == ([*dims.shard_groups()], [*dims.replica_groups()])


def test_the_expert_grid_of_megatron_s_numbering():
    """docs/specs/core.md §1.1, one pipeline stage of 8 ranks, with experts over 2 neighbours of data × context."""
    dims = ParallelDims(data=2, context=2, tensor=2, expert=2)
    assert [*dims.expert_groups()] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert [*dims.same_experts()] == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_without_a_shard_size_all_ranks_with_the_same_weights_share():
    dims = ParallelDims(data=2, context=2, tensor=2)
    assert [*dims.shard_groups()] == [*dims.groups("data", "context")]
    assert [*dims.replica_groups()] == [[rank] for line in dims.groups("data", "context") for rank in line]


@pytest.mark.parametrize(
    ("values", "ranks", "dims"),
    [
        ({}, 1, ParallelDims(1, 1, 1, 1)),
        ({}, 4, ParallelDims(4, 1, 1, 1)),
        ({"tensor": 2, "context": 2}, 8, ParallelDims(2, 2, 2, 1)),
        ({"data": 2, "tensor": 2, "sharding": "fsdp"}, 4, ParallelDims(2, 1, 2, None)),
        ({"sharding": "zero1", "shard_size": 2}, 4, ParallelDims(4, 1, 1, 2)),
    ],
)
def test_data_is_what_the_other_axes_leave(values, ranks, dims):
    found = dims_of(ParallelConfig(**values), ranks)
    assert found == dims
    assert found.ranks == ranks


@pytest.mark.parametrize(
    ("values", "ranks", "told"),
    [
        (
            {"tensor": 4, "context": 2},
            12,
            "parallel: tensor 4 × context 2 does not divide 12 ranks; start 16 ranks, or change one of the two",
        ),
        (
            {"data": 2, "tensor": 2},
            8,
            "parallel.data: tensor 2 × context 1 × data 2 = 4, but 8 ranks run; start 4 ranks, or leave data unset",
        ),
        (
            {"sharding": "zero1", "shard_size": 3, "context": 2},
            8,
            "parallel.shard_size: 3 does not divide data × context = 8; allowed: 1, 2, 4, 8",
        ),
        (
            {"expert": 4, "tensor": 2, "context": 3},
            12,
            "parallel.expert: 4 does not divide data × context = 6; allowed: 1, 2, 3, 6",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_those_that_would(values, ranks, told):
    with pytest.raises(MtError) as caught:
        dims_of(ParallelConfig(**values), ranks)
    assert str(caught.value) == told
