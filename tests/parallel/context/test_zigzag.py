"""Zig-zag sharding against an oracle that enumerates who holds what."""

import pytest
import torch

from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.context.zigzag import (
    gather_sequence,
    local_positions,
    shard_sequence,
    shard_zigzag,
    unshard_zigzag,
)
from mt_core.verification.ranks import run_ranks

ALONE = Axis("context")


def places(size: int) -> list[Axis]:
    return [Axis("context", rank, size) for rank in range(size)]


@pytest.mark.parametrize(
    ("length", "size", "held"),
    [
        (8, 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (8, 4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
        (12, 3, [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
    ],
)
def test_rank_r_holds_piece_r_and_its_mirror_image(length, size, held):
    assert [local_positions(length, axis).tolist() for axis in places(size)] == held


def test_positions_are_int64():
    assert local_positions(8, places(2)[0]).dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_held_once_and_causal_work_is_equal(size):
    held = [local_positions(24, axis) for axis in places(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(24))
    assert {int((positions + 1).sum()) for positions in held} == {24 * 25 // 2 // size}


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_share_is_the_tokens_at_the_local_positions(dim):
    whole = torch.randn(8, 8, 8)
    for axis in places(2):
        assert torch.equal(shard_sequence(whole, axis, dim), whole.index_select(dim, local_positions(8, axis)))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shares_of_all_ranks_in_order_are_the_whole(dim):
    whole = torch.randn(16, 16, 16)
    shares_of_rank = torch.stack([shard_sequence(whole, axis, dim) for axis in places(4)])
    assert torch.equal(unshard_zigzag(shares_of_rank, dim), whole)
    assert torch.equal(shard_zigzag(whole, 4, dim), shares_of_rank)


def test_one_rank_holds_any_length_as_it_is():
    tensor = torch.randn(2, 7)
    assert shard_sequence(tensor, ALONE, 1) is tensor
    assert gather_sequence(tensor, ALONE, 1) is tensor
    assert local_positions(7, ALONE).tolist() == list(range(7))


def joined(axis):
    whole = torch.arange(2 * 16 * 3, dtype=torch.float64).view(2, 16, 3)
    return [torch.equal(gather_sequence(shard_sequence(x, axis, 1), axis, 1), x) for x in (whole, whole.long())]


def test_join_is_the_inverse_of_split():
    assert run_ranks(4, joined) == [[True, True]] * 4


@pytest.mark.parametrize(
    ("length", "size", "nearest"), [(30, 4, "24 or 32"), (3, 2, "4"), (0, 2, "4"), (1025, 2, "1024 or 1028")]
)
def test_a_length_that_does_not_divide_names_the_nearest_that_do(length, size, nearest):
    with pytest.raises(MtError) as error:
        local_positions(length, places(size)[0])
    assert str(error.value) == (
        f"parallel.context: a sequence of {length} tokens cannot be cut into {2 * size} equal pieces "
        f"(2 for each of {size} ranks); the nearest lengths are {nearest}"
    )
