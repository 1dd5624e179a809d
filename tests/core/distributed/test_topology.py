"""Who stands where: the groups of every axis, and what a configuration means for a number of ranks."""

from itertools import product

import pytest

from mt_core.config.sections import ParallelConfig
from mt_core.distributed.topology import ParallelDims, resolve_dims
from mt_core.errors import MtError

SIZES = [(data, context, tensor) for data, context, tensor in product((1, 2, 3, 4), (1, 2, 4), (1, 2, 4))]


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def count_up(dims: ParallelDims) -> list[dict[str, int]]:
    """The oracle: the coordinates of all ranks in their order, by counting up with tensor the fastest."""
    shard, expert = dims.shard or dims.data * dims.context, dims.expert
    most = next(n for n in range(1, shard * expert + 1) if n * expert % shard == 0)  # fewest that fill whole groups
    ranks = []
    axes = (dims.pipeline, dims.data, dims.context, dims.tensor)
    for pipeline, data, context, tensor in product(*map(range, axes)):
        line = data * dims.context + context
        ranks.append(
            {"pipeline": pipeline, "data": data, "context": context, "tensor": tensor, "data_context": line}
            | {"shard": line % shard, "replica": line // shard, "expert": line % expert}
            | {"expert_data_parallel": line // expert, "expert_parts": line % expert * dims.tensor + tensor}
            | {"expert_shard": line // expert % most, "expert_replica": line // expert // most}
        )
    return ranks


@pytest.mark.parametrize("sizes", SIZES)
def test_coordinates_are_those_of_counting_up(sizes):
    for shard, expert in product(divisors(sizes[0] * sizes[1]), repeat=2):
        dims = ParallelDims(*sizes, shard=shard, expert=expert, pipeline=1 + expert % 2)
        expected = count_up(dims)
        assert [dims.coordinates(rank) for rank in range(dims.ranks)] == expected
        assert dims.sizes == {axis: 1 + max(rank[axis] for rank in expected) for axis in expected[0]}


@pytest.mark.parametrize("sizes", SIZES)
def test_ranks_of_a_group_differ_along_its_axis_alone(sizes):
    dims = ParallelDims(*sizes)
    expected = count_up(dims)
    for axis, others in (
        ("data", ("context", "tensor")),
        ("context", ("data", "tensor")),
        ("tensor", ("data", "context")),
        ("data_context", ("tensor",)),
    ):
        alike = {
            tuple(r for r, place in enumerate(expected) if all(place[o] == mine[o] for o in others))
            for mine in expected
        }
        groups = dims.groups(axis)
        assert {*map(tuple, groups)} == alike
        assert sorted(rank for group in groups for rank in group) == [*range(dims.ranks)]
        assert all(dims.group(axis, rank) == group for group in groups for rank in group)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_span_of_an_axis_is_where_its_groups_end(sizes):
    for shard, expert in product(divisors(sizes[0] * sizes[1]), repeat=2):
        dims = ParallelDims(*sizes, shard=shard, expert=expert)
        for axis, size in dims.sizes.items():
            group = dims.groups(axis)[0]
            step = group[1] - group[0] if size > 1 else dims.span(axis)
            assert dims.span(axis) == step * size
            assert max(group) < dims.span(axis)


def test_the_worked_example_of_megatron_s_numbering():
    """docs/specs/core.md §1.1, the ranks of one of its two pipeline stages: tp 2, cp 2, dp 2."""
    dims = ParallelDims(data=2, context=2, tensor=2)
    assert dims.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dims.groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert dims.groups("data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert dims.groups("data_context") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("sizes", SIZES)
def test_shard_groups_and_replica_groups_are_the_rows_and_columns_of_data_and_context(sizes):
    together = sizes[0] * sizes[1]
    for size in (size for size in range(1, together + 1) if together % size == 0):
        dims = ParallelDims(*sizes, shard=size)
        shards, replicas = dims.groups("shard"), dims.groups("replica")
        lines = {tuple(line) for line in dims.groups("data_context")}
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
        lines = dims.groups("data_context")
        place = {rank: (number, index % expert) for number, line in enumerate(lines) for index, rank in enumerate(line)}
        for group in dims.groups("expert"):
            assert [place[rank][1] for rank in group] == [*range(expert)]
            assert [rank - group[0] for rank in group] == [dims.tensor * n for n in range(expert)]
        for group in dims.groups("expert_data_parallel"):
            assert len({place[rank] for rank in group}) == 1
            assert len(group) == together // expert


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_are_shared_among_ranks_that_hold_them(sizes):
    """As many as lie in a shard group; if shard groups cut expert groups, as many as make up whole ones of both."""
    together = sizes[0] * sizes[1]
    divisors = [size for size in range(1, together + 1) if together % size == 0]
    for expert, shard in product(divisors, divisors):
        dims = ParallelDims(*sizes, shard=shard, expert=expert)
        same = {rank: group for group in dims.groups("expert_data_parallel") for rank in group}
        shards, replicas = dims.groups("expert_shard"), dims.groups("expert_replica")
        for groups in (shards, replicas):
            assert sorted(rank for group in groups for rank in group) == [*range(dims.ranks)]
            assert all(same[rank] == same[group[0]] for group in groups for rank in group)
        assert all(len({*a} & {*b}) <= 1 for a, b in product(shards, replicas))
        if shard % expert == 0:
            assert {len(group) for group in shards} == {shard // expert}
            assert all(any({*group} <= {*whole} for whole in dims.groups("shard")) for group in shards)
        if expert == 1:
            assert (shards, replicas) == (dims.groups("shard"), dims.groups("replica"))


def test_the_expert_grid_of_megatron_s_numbering():
    """docs/specs/core.md §1.1, one pipeline stage of 8 ranks, with experts over 2 neighbours of data × context."""
    dims = ParallelDims(data=2, context=2, tensor=2, expert=2)
    assert dims.groups("expert") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert dims.groups("expert_data_parallel") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_without_a_shard_size_all_ranks_with_the_same_weights_share():
    dims = ParallelDims(data=2, context=2, tensor=2)
    assert dims.groups("shard") == dims.groups("data_context")
    assert dims.groups("replica") == [[rank] for rank in range(8)]


@pytest.mark.parametrize(
    ("values", "ranks", "dims"),
    [
        ({}, 1, ParallelDims(1, 1, 1, 1)),
        ({}, 4, ParallelDims(4, 1, 1, 1)),
        ({"tensor": 2, "context": 2}, 8, ParallelDims(2, 2, 2, 1)),
        ({"data": 2, "tensor": 2, "sharding": "fsdp"}, 4, ParallelDims(2, 1, 2, None)),
        ({"sharding": "zero1", "shard_size": 2}, 4, ParallelDims(4, 1, 1, 2)),
        ({"pipeline": 4, "tensor": 2}, 16, ParallelDims(2, 1, 2, 1, 1, 4)),
    ],
)
def test_data_is_what_the_other_axes_leave(values, ranks, dims):
    resolved = resolve_dims(ParallelConfig(**values), ranks)
    assert resolved == dims
    assert resolved.ranks == ranks


@pytest.mark.parametrize(
    ("values", "ranks", "message"),
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
            {"tensor": 2, "pipeline": 3},
            8,
            "parallel: tensor 2 × context 1 × pipeline 3 does not divide 8 ranks; "
            "start 12 ranks, or change one of the three",
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
def test_ranks_that_do_not_fit_are_refused_with_those_that_would(values, ranks, message):
    with pytest.raises(MtError) as caught:
        resolve_dims(ParallelConfig(**values), ranks)
    assert str(caught.value) == message
