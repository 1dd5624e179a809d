"""Each exchange of context parallelism equals attention in one process: outputs and gradients, to fp64 rounding."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.context.comm_types import COMM_TYPES, make_context_core
from mt_core.parallel.context.zigzag import gather_sequence, shard_sequence
from mt_core.verification.ranks import run_ranks
from mt_models.layers.attention_cores import attend_eager

BATCH, LENGTH, HEAD = 2, 32, 8
SHAPES = {"mha": (4, 4), "gqa": (8, 4), "mqa": (4, 1)}
DOCUMENTS = ("none", "packed", "interleaved")
SIZES = (2, 4)
DIVISIBLE = [case for case in itertools.product(COMM_TYPES, SHAPES, DOCUMENTS) if case[:2] != ("all_to_all", "mqa")]
IN_BF16 = [(exchange, "gqa", kind) for exchange in COMM_TYPES for kind in ("none", "packed")]
BF16_BAND = 2**-7
"""Relative error (2-norm) against exact attention of the same bf16 values; one process stays below it as well."""


def inputs(shape, *, dtype=torch.float64):
    """q, k, v and the gradient of y for the whole sequence, the same on every rank."""
    heads, groups = SHAPES[shape]
    generator = torch.Generator().manual_seed(11)
    numbers = (heads, groups, groups, heads)
    return [torch.randn(BATCH, LENGTH, n, HEAD, generator=generator, dtype=torch.float64).to(dtype) for n in numbers]


def documents(kind):
    """Packed: documents of uneven lengths that straddle pieces, other ones in each row. Interleaved: in any order."""
    if kind == "none":
        return None
    if kind == "interleaved":
        return torch.arange(LENGTH).remainder(3).expand(BATCH, -1).contiguous()
    ends = torch.tensor([[5, 6, 21, 30], [1, 13, 16, 17]])
    return (torch.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1)


def eager(q_BTHK, k_BSGK, v_BSGK, documents_BS=None):
    """Attention written out; the documents are those of the keys, and the queries are the last T positions."""
    if documents_BS is None:
        return attend_eager(q_BTHK, k_BSGK, v_BSGK)
    T, S, G = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[2]
    scores_BGRTS = torch.einsum("btgrk,bsgk->bgrts", q_BTHK.unflatten(2, (G, -1)), k_BSGK) / math.sqrt(HEAD)
    seen_BTS = torch.ones(T, S, dtype=torch.bool).tril(S - T) & (documents_BS[:, -T:, None] == documents_BS[:, None])
    weights_BGRTS = scores_BGRTS.masked_fill(~seen_BTS[:, None, None], -math.inf).softmax(-1)
    return torch.einsum("bgrts,bsgk->btgrk", weights_BGRTS, v_BSGK).flatten(2, 3)


def attended(core, tensors, numbers):
    """y, dq, dk, dv of `core`."""
    *qkv, dy = tensors
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    y = core(*leaves, numbers)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def shared(axis, exchange, shape, kind, dtype):
    """`attended` by an exchange over shares of the sequence, the shares joined."""
    core = COMM_TYPES[exchange](axis, eager)
    share = partial(shard_sequence, axis=axis, dim=1)
    numbers = documents(kind)
    found = attended(core, [share(x) for x in inputs(shape, dtype=dtype)], None if numbers is None else share(numbers))
    return [gather_sequence(x, axis, 1) for x in found]


def cases(axis):
    """Results in fp64 and in bf16, as arrays by case; whether recomputing changes any."""
    exact = {case: [x.numpy() for x in shared(axis, *case, torch.float64)] for case in DIVISIBLE}
    narrow = {case: [x.double().numpy() for x in shared(axis, *case, torch.bfloat16)] for case in IN_BF16}
    return exact, narrow, {exchange: recomputed(axis, exchange) for exchange in COMM_TYPES}


@pytest.fixture(scope="module")
def exchanged():
    """What every rank computed, by the number of ranks."""
    return {size: run_ranks(size, cases) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", DIVISIBLE, ids="-".join)
def test_an_exchange_equals_one_process(exchanged, size, case):
    _, shape, kind = case
    expected = attended(eager, inputs(shape), documents(kind))
    for rank in range(size):
        for name, found, wanted in zip(("y", "dq", "dk", "dv"), exchanged[size][rank][0][case], expected, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(found), wanted, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_documents_matter():
    whole, packed, interleaved = (eager(*inputs("mha")[:3], documents(kind)) for kind in DOCUMENTS)
    assert not torch.allclose(whole, packed)
    assert not torch.allclose(whole, interleaved)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_stays_in_the_band_that_one_process_keeps(exchanged, size):
    _, found, _ = exchanged[size][0]
    for case in IN_BF16:
        tensors, numbers = inputs("gqa", dtype=torch.bfloat16), documents(case[2])
        exact = attended(eager, [x.double() for x in tensors], numbers)
        alone = attended(eager, tensors, numbers)
        for number, wanted in enumerate(exact):
            errors = [float((torch.as_tensor(x[number]) - wanted).norm() / wanted.norm()) for x in (found[case], alone)]
            assert max(errors) < BF16_BAND, (case, number, errors)


def in_a_part_of_the_world(world):
    """Whether every exchange works on an axis whose group is some of the ranks: {0, 2} or {1, 3}."""
    groups = [torch.distributed.new_group(members) for members in ([0, 2], [1, 3])]
    axis = Axis("context", world.rank // 2, 2, groups[world.rank % 2])
    qkv = [x * (1 + world.rank % 2) for x in inputs("gqa")[:3]]
    expected, shares = eager(*qkv), [shard_sequence(x, axis, 1) for x in qkv]
    found = [gather_sequence(maker(axis, eager)(*shares), axis, 1) for maker in COMM_TYPES.values()]
    return [torch.allclose(y, expected, rtol=1e-12, atol=1e-14) for y in found]


def test_an_axis_may_be_a_part_of_the_world():
    assert run_ranks(4, in_a_part_of_the_world) == [[True, True, True]] * 4


def saved(axis):
    """Shapes that ring attention keeps for backward."""
    q, k, v, _ = (shard_sequence(x, axis, 1).requires_grad_() for x in inputs("gqa"))
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        COMM_TYPES["ring"](axis, eager)(q, k, v)
    return shapes


def test_the_ring_keeps_only_this_ranks_own_tensors():
    tokens = LENGTH // 2
    q, k = (BATCH, tokens, 8, HEAD), (BATCH, tokens, 4, HEAD)
    assert run_ranks(2, saved) == [[q, k, k, q, (BATCH, 8, tokens)]] * 2


def recomputed(axis, exchange):
    """Whether recomputing the attention in backward changes anything."""
    core = COMM_TYPES[exchange](axis, eager)
    tensors = [shard_sequence(x, axis, 1) for x in inputs("gqa")]
    again = attended(lambda *qkvd: checkpoint(core, *qkvd, use_reentrant=False), tensors, None)
    return all(map(torch.equal, attended(core, tensors, None), again))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exchange", COMM_TYPES)
def test_recompute_changes_nothing(exchanged, exchange, size):
    assert [unchanged[exchange] for _, _, unchanged in exchanged[size]] == [True] * size


@pytest.mark.parametrize("exchange", COMM_TYPES)
def test_on_one_rank_an_exchange_is_the_core(exchange):
    axis = Axis("context")
    found, expected = (attended(core, inputs("gqa"), None) for core in (COMM_TYPES[exchange](axis, eager), eager))
    for x, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(x, wanted, rtol=1e-12, atol=1e-14)
    assert make_context_core(exchange, eager, axis=axis) is eager


@pytest.mark.parametrize(
    ("shape", "size", "found", "sizes"),
    [
        ("mqa", 2, "4 heads in 1 key/value groups among 2 ranks", "1"),
        ("gqa", 8, "8 heads in 4 key/value groups among 8 ranks", "1, 2, 4"),
        ("mha", 3, "4 heads in 4 key/value groups among 3 ranks", "1, 2, 4"),
    ],
)
def test_all_to_all_refuses_heads_it_cannot_share(shape, size, found, sizes):
    core = make_context_core("all_to_all", eager, axis=Axis("context", 0, size))
    with pytest.raises(MtError) as error:
        core(*inputs(shape)[:3])
    assert str(error.value) == (
        f"parallel.context: all_to_all cannot share {found}; "
        f'allowed sizes: {sizes}; cp_comm_type "ring" and "all_gather" take any'
    )
