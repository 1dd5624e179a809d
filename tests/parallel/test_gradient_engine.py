"""Buckets and FSDP2 under the step: what overlaps, how buckets are cut and how replicas agree changes no number."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layouts import run_config
from mt_cli.verify.record import records
from mt_core.distributed.mesh import Axis
from mt_core.parallel.data.zero1 import ALIGNMENT, lay_out
from mt_core.training.step import backward, reduce, update
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record
from mt_core.verification.ranks import run_ranks
from rank_states import CPU, batches_of, state_of, step

pytestmark = pytest.mark.slow

OVERLAPS = [(reduce, gather) for reduce in (True, False) for gather in (True, False)]
BUCKETS = [1, 3000, 40_000_000]
"""One bucket for each parameter, a few, one for all."""


def bits(record: Record) -> list[Any]:
    """Everything a record holds, to be compared bit for bit."""
    named = [*record.gradients, record.weights]
    return [record.losses, record.norms, *({n: t.numpy().tobytes() for n, t in tensors.items()} for tensors in named)]


Case = tuple[str, str, bool, bool, int]


def config_of(case: Case) -> Any:
    """With two micro-batches for each step of a rank."""
    sharding, dtype, reduce, gather, size = case
    parallel = {"sharding": sharding, "bucket_size": size}
    parallel |= {"overlap_grad_reduce": reduce, "overlap_param_gather": gather}
    return run_config(parallel=parallel, precision={"dtype": dtype}, batch={"micro_batch": 2, "global_batch": 8})


@cache
def everything() -> dict[Case, Record]:
    """Two steps on two ranks with every overlap and size of buckets."""
    cases = [
        (sharding, dtype, *overlap, size)
        for sharding in ("replicate", "zero1")
        for dtype in ("fp64", "bf16")
        for overlap in OVERLAPS
        for size in BUCKETS
    ]
    return dict(zip(cases, records([config_of(case) for case in cases], 2, steps=2), strict=True))


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("sharding", ["replicate", "zero1"])
@pytest.mark.parametrize("size", BUCKETS)
def test_overlap_changes_no_bit(sharding, dtype, size):
    found = [everything()[sharding, dtype, reduce, gather, size] for reduce, gather in OVERLAPS]
    assert all(bits(record) == bits(found[0]) for record in found)


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_the_size_of_buckets_changes_no_bit_when_gradients_are_replicated(dtype):
    found = [everything()["replicate", dtype, True, True, size] for size in BUCKETS]
    assert all(bits(record) == bits(found[0]) for record in found)


def test_the_size_of_zero1_buckets_changes_only_the_order_in_which_the_norm_is_summed():
    tiny, *others = [everything()["zero1", "fp64", True, True, size] for size in BUCKETS]
    for record in others:
        assert bits(record)[2] == bits(tiny)[2], "the first step's gradients"
        assert max(d.relative for d in compare_records(record, tiny)) <= 1e-14


def under_way(axis: Axis, overlap: bool) -> tuple[list[bool], list[bool]]:
    """Of each bucket: whether it is being reduced after the last backward pass, and gathered after the step."""
    case = ("zero1", "fp32", overlap, overlap, 3000)
    config = config_of(case)
    state = state_of(config, axis.size)
    backward(state.model, state.data_parallel, batches_of(config, state.data_parallel.mesh), 128.0, CPU)
    reducing = [bucket.reducing is not None for bucket in state.data_parallel.buckets]
    reduce(state.data_parallel)
    update(state.data_parallel, state.optimizer, lr=1e-2, clip_norm=1.0)
    gathering = [bucket.gathering is not None for bucket in state.data_parallel.buckets]
    state.data_parallel.wait()
    return reducing, gathering


@pytest.mark.parametrize("overlap", [True, False])
def test_collectives_are_under_way_before_they_are_waited_for_only_with_overlap(overlap):
    for reducing, gathering in run_ranks(2, under_way, overlap):
        assert len(reducing) == len(gathering) > 3
        assert set(reducing) == set(gathering) == {overlap}


def hybrid(axis: Axis, sharding: str) -> tuple[int, dict[str, bytes], int]:
    """This rank's place among the sharded, its main parameters after two steps, and their elements."""
    config = run_config(parallel={"sharding": sharding, "shard_size": 2}, precision={"dtype": "fp32"})
    state = state_of(config, axis.size)
    for number in range(2):
        step(config, state, number)
    main_params = {name: m.detach().numpy().tobytes() for name, m in state.data_parallel.main_params.items()}
    return (
        state.data_parallel.mesh.shard.rank,
        main_params,
        sum(m.numel() for m in state.data_parallel.main_params.values()),
    )


@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_hybrid_sharding_keeps_equal_bits_in_replicas_and_every_element_once_in_each(sharding):
    found = run_ranks(4, hybrid, sharding)
    assert [place for place, _, _ in found] == [0, 1, 0, 1]
    for here, there in ((0, 2), (1, 3)):
        assert found[here][1] == found[there][1]
    assert found[0][1] != found[1][1]
    whole = sum(shape.numel() for shape in state_of(run_config()).data_parallel.shapes.values())
    assert [here + there for here, there in ((found[0][2], found[1][2]), (found[2][2], found[3][2]))] == [whole, whole]


def headless(axis: Axis, sharding: str) -> str:
    """What is said of a loss that does not reach the output layer."""
    config = run_config(parallel={"sharding": sharding})
    state = state_of(config, axis.size)
    if sharding == "fsdp":
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(state.model, "hidden")
    (batch, *_) = batches_of(config, state.data_parallel.mesh)
    state.data_parallel.begin_step()
    state.data_parallel.last_backward()
    state.model.hidden(batch["tokens"], torch.arange(16)).sum().backward()
    try:
        state.data_parallel.reduce()
    except AssertionError as refusal:
        return str(refusal)
    return "nothing"


@pytest.mark.parametrize(("sharding", "ranks"), [("replicate", 1), ("zero1", 2), ("fsdp", 2)])
def test_a_parameter_that_no_gradient_reaches_is_refused_by_name(sharding, ranks):
    assert run_ranks(ranks, headless, sharding) == ["no gradient reached ['head.weight']"] * ranks


def test_a_gradient_of_an_earlier_step_is_never_taken_for_a_new_one():
    config = run_config()
    state = state_of(config)
    step(config, state)
    state.data_parallel.begin_step()
    with pytest.raises(AssertionError, match="no gradient reached"):
        state.data_parallel.reduce()


def spans_by_bucket(spans: dict[str, Any]) -> list[Sequence[Any]]:
    numbers = sorted({span.bucket for span in spans.values()})
    assert numbers == [*range(len(numbers))]
    return [sorted((s for s in spans.values() if s.bucket == n), key=lambda s: s.start) for n in numbers]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 10_000))
def test_parameters_lie_whole_aligned_and_apart_in_buckets_in_reverse_order(sizes, bucket_size):
    named = {f"p{n}": size for n, size in enumerate(sizes)}
    spans = lay_out(named, bucket_size)
    assert [*spans] == [*reversed(named)]
    assert {name: span.length for name, span in spans.items()} == named
    places = [(span.bucket, span.start) for span in spans.values()]
    assert places == sorted(places)
    for bucket in spans_by_bucket(spans):
        assert bucket[0].start == 0
        for before, after in pairwise(bucket):
            assert after.start % ALIGNMENT == 0
            assert 0 <= after.start - (before.start + before.length) < ALIGNMENT


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 10_000))
def test_a_bucket_is_closed_by_the_parameter_that_fills_it(sizes, bucket_size):
    *closed, _ = buckets = spans_by_bucket(lay_out({f"p{n}": size for n, size in enumerate(sizes)}, bucket_size))
    for bucket in closed:
        assert bucket[-1].start + -(-bucket[-1].length // ALIGNMENT) * ALIGNMENT >= bucket_size
    for bucket in buckets:
        assert bucket[-1].start < bucket_size or len(bucket) == 1


def filled_twice(axis: Axis) -> list[bool]:
    """Whether, time after time, every rank has the weights of the second of two fillings that follow at once."""
    state, told = state_of(run_config(parallel={"sharding": "zero1"}, precision={"dtype": "fp32"}), axis.size), []
    for value in range(1, 21):
        for filling in (-value, value):
            state.fill(lambda name, filling=filling: state.model.initial(0, name) * 0 + filling)
        state.data_parallel.wait()
        told.append(all((p == value).all() for n, p in state.model.named_parameters() if "layers" in n))
    return told


def test_weights_are_not_filled_while_they_are_still_being_gathered():
    assert run_ranks(2, filled_twice) == [[True] * 20] * 2
