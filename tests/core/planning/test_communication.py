"""What a GPU sends, counted by hand: llama3-8b, 32 layers of 4,096 features, 8 groups of 128, sequences of 8,192."""

import pytest

from core.planning.configs import h200, run
from mt_core.parallel.layout import build_layout
from mt_core.planning.communication import Transfer, transfers
from mt_core.planning.parameters import count_parameters

SEQUENCE = 8192 * 4096 * 2
"""Bytes of a micro-batch's features in bf16."""
PARAMETERS = 8_030_261_248


def sent(ranks: int, *overrides: str) -> list[tuple[str, str, str, float, float, str]]:
    """Axis, collective and phase; calls and bytes of one; what it runs beside."""
    config = run("batch.global_batch=16", *overrides)
    rows = transfers(config, build_layout(config, ranks))
    return [(t.axis, t.collective, t.phase, t.calls, t.size, t.hidden) for t in rows]


def test_one_gpu_sends_nothing():
    assert sent(1) == []


@pytest.mark.parametrize(
    ("collective", "bytes_sent"),
    [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("all-to-all", 0.75), ("send", 1.0)],
)
def test_bytes_are_those_of_a_ring(collective, bytes_sent):
    transfer = Transfer("data", 4, collective, "", "reduce", calls=2, size=8e9)
    assert transfer.sent == 2 * 8e9 * bytes_sent


def test_time_is_bytes_over_bandwidth_and_a_latency_a_call():
    transfer = Transfer("data", 4, "send", "", "reduce", calls=3, size=1e9, span=8)
    profile = h200()
    assert transfer.seconds(profile) == pytest.approx(3 / profile.link_gb_s + 3e-6 * profile.latency_us)


def test_ranks_beyond_a_node_use_the_network():
    profile = h200()
    apart = Transfer("data", 2, "send", "", "reduce", calls=1, size=1e9, span=9)
    assert apart.seconds(profile) == pytest.approx(1 / profile.network_gb_s + 1e-6 * profile.latency_us)
    config = run("batch.global_batch=16", "parallel.tensor=8", "parallel.sequence=true")
    spans = {t.axis: t.span for t in transfers(config, build_layout(config, 16))}
    assert spans == {"tensor": 8, "data": 16}


def test_replicated_gradients_are_summed_beside_backward():
    (row,) = sent(4)
    buckets = -(-PARAMETERS // 40_000_000)
    assert row == ("data", "all-reduce", "reduce", buckets, 4 * PARAMETERS / buckets, "last backward pass")


def test_zero1_scatters_gradients_and_gathers_weights():
    assert [
        (c, phase, calls * size, hidden) for _, c, phase, calls, size, hidden in sent(4, "parallel.sharding=zero1")
    ] == [
        ("reduce-scatter", "reduce", pytest.approx(4 * PARAMETERS), "last backward pass"),
        ("all-gather", "gather", pytest.approx(2 * PARAMETERS), "first forward pass"),
    ]


def test_without_overlap_nothing_is_hidden():
    off = ("parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false")
    assert {row[-1] for row in sent(4, "parallel.sharding=zero1", *off)} == {""}


def test_hybrid_sharding_sums_parts_among_copies():
    rows = sent(8, "parallel.sharding=zero1", "parallel.shard_size=2")
    assert [row[1] for row in rows] == ["reduce-scatter", "all-gather", "all-reduce"]
    assert rows[-1][3] * rows[-1][4] == pytest.approx(4 * PARAMETERS / 2)
    assert rows[-1][-1] == ""


def test_fsdp_gathers_weights_twice_in_every_micro_batch():
    rows = sent(4, "parallel.sharding=fsdp")
    layers = count_parameters(run().model).block * 32
    assert [(c, phase, calls, round(calls * size)) for _, c, phase, calls, size, _ in rows] == [
        ("all-gather", "forward", 33, 2 * PARAMETERS),
        ("all-gather", "backward", 33, 2 * layers),
        ("reduce-scatter", "backward", 33, 4 * PARAMETERS),
    ]


def test_tensor_parallelism_sums_results_of_every_layer():
    assert sent(4, "parallel.tensor=4") == [
        ("tensor", "all-reduce", "forward", 65, SEQUENCE, ""),
        ("tensor", "all-reduce", "backward", 65, SEQUENCE, "matrix products"),
    ]


def test_sequence_parallelism_gathers_and_scatters():
    rows = sent(4, "parallel.tensor=4", "parallel.sequence=true")
    assert rows[:5] == [
        ("tensor", "all-gather", "forward", 65, SEQUENCE, ""),
        ("tensor", "reduce-scatter", "forward", 65, SEQUENCE, ""),
        ("tensor", "all-gather", "backward", 65, SEQUENCE, ""),
        ("tensor", "all-gather", "backward", 65, SEQUENCE, "matrix products"),
        ("tensor", "reduce-scatter", "backward", 65, SEQUENCE, "matrix products"),
    ]
    assert rows[5] == ("tensor", "all-reduce", "reduce", 1, 65 * 4096 * 4, "")  # the norms


@pytest.mark.parametrize("sequence", ["true", "false"])
def test_recompute_communicates_again(sequence):
    base = ("parallel.tensor=4", f"parallel.sequence={sequence}")
    plain = sum(row[3] for row in sent(4, *base))
    full = ("recompute.granularity=full", "recompute.method=block")
    again = sum(row[3] for row in sent(4, *base, *full, "recompute.layers=8"))
    assert again - plain == 2 * 8 * (2 if sequence == "true" else 1)


def of_experts(ranks: int, *overrides: str) -> list[tuple[str, str, float, float]]:
    """Axis, collective, calls and bytes of one of mixtral-8x7b, 8,192 tokens a micro-batch."""
    config = run("batch.global_batch=16", "data.seq_length=8192", *overrides, preset="mixtral-8x7b")
    return [(t.axis, t.collective, t.calls, t.size) for t in transfers(config, build_layout(config, ranks))]


WHOLE = "parallel.expert_tensor=1"


def test_tokens_travel_to_their_two_experts_and_back():
    rows = [row for row in of_experts(8, "parallel.expert=8") if row[0] == "expert"]
    assert rows == [("expert", "all-to-all", 64, 2 * SEQUENCE)] * 2
    full = of_experts(8, "parallel.expert=8", "recompute.granularity=full")
    assert sum(calls for axis, _, calls, _ in full if axis == "expert") == 192
    cut = ("parallel.expert=8", "parallel.tensor=2", "parallel.sequence=true")
    assert {row[3] for row in of_experts(16, *cut) if row[0] == "expert"} == {2 * SEQUENCE}
    assert {row[3] for row in of_experts(16, *cut, WHOLE) if row[0] == "expert"} == {SEQUENCE}


def test_all_gather_brings_every_token_to_every_rank_whatever_it_chose():
    gathered = ("parallel.expert=8", "parallel.token_dispatcher=all_gather")
    rows = [row for row in of_experts(8, *gathered) if row[0] == "expert"]
    assert rows == [("expert", name, 32, 8 * SEQUENCE) for name in ("all-gather", "reduce-scatter") * 2]
    full = of_experts(8, *gathered, "recompute.granularity=full")
    assert sum(calls for axis, _, calls, _ in full if axis == "expert") == 192


EXPERTS, DENSE = 32 * 8 * 3 * 4096 * 14336, 46_702_792_704 - 32 * 8 * 3 * 4096 * 14336


@pytest.mark.parametrize(("sharding", "collectives"), [("replicate", 2), ("zero1", 4)])
def test_experts_are_reduced_among_the_ranks_that_hold_them(sharding, collectives):
    rows = [row for row in of_experts(16, "parallel.expert=8", f"parallel.sharding={sharding}") if row[0] == "data"]
    assert len(rows) == collectives
    reduced = [calls * size for _, collective, calls, size in rows if collective != "all-gather"]
    assert reduced == [pytest.approx(4 * DENSE), pytest.approx(4 * EXPERTS / 8)]


def test_fsdp_gathers_experts_among_the_ranks_that_hold_them():
    rows = [row for row in of_experts(16, "parallel.expert=8", "parallel.sharding=fsdp") if row[0] == "data"]
    ends = 2 * 32_000 * 4096 + 4096
    assert [(collective, calls, round(calls * size)) for _, collective, calls, size in rows] == [
        ("all-gather", 33, 2 * DENSE),
        ("all-gather", 33, 2 * (DENSE - ends)),
        ("reduce-scatter", 33, 4 * DENSE),
        ("all-gather", 32, 2 * EXPERTS // 8),
        ("all-gather", 32, 2 * EXPERTS // 8),
        ("reduce-scatter", 32, 4 * EXPERTS // 8),
    ]


def test_ranks_with_the_same_experts_lie_apart():
    config = run("batch.global_batch=16", "parallel.expert=8", preset="mixtral-8x7b")
    over_data = [t for t in transfers(config, build_layout(config, 16)) if t.axis == "data"]
    assert [(t.ranks, t.span) for t in over_data] == [(16, 16), (2, 16)]


def test_experts_that_one_rank_holds_are_not_reduced():
    assert len([row for row in of_experts(8, "parallel.expert=8") if row[0] == "data"]) == 1


def test_tensor_ranks_exchange_nothing_for_experts_they_hold_whole():
    rows = of_experts(8, "parallel.tensor=4", WHOLE)
    assert {calls for axis, _, calls, _ in rows if axis == "tensor"} == {33}
    rows = of_experts(8, "parallel.tensor=4", "parallel.sequence=true", "parallel.expert=2", WHOLE)
    whole = (65 * 4096 + 32 * 8 * 4096 + EXPERTS / 2) * 4  # norms, routers, own experts
    assert [size for axis, _, calls, size in rows if axis == "tensor" and calls == 1] == [whole]


def test_tensor_ranks_sum_what_each_has_of_experts_they_share():
    rows = of_experts(8, "parallel.tensor=4")
    assert {calls for axis, _, calls, _ in rows if axis == "tensor"} == {65}
    rows = of_experts(8, "parallel.tensor=4", "parallel.sequence=true", "parallel.expert=2")
    norms_and_routers = (65 * 4096 + 32 * 8 * 4096) * 4
    assert [size for axis, _, calls, size in rows if axis == "tensor" and calls == 1] == [norms_and_routers]
    rows = of_experts(16, "parallel.tensor=2", "parallel.expert=4")
    reduced = [calls * size for axis, _, calls, size in rows if axis == "data"]
    assert reduced[1] == pytest.approx(4 * EXPERTS / 4 / 2)


KEYS = 2 * 2048 * 8 * 128 * 2
"""Keys and values of a context rank of four, in bf16."""


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        (
            "ring",
            [
                ("send", "forward", 3 * 32, KEYS, "attention core"),
                ("send", "backward", 3 * 32, KEYS, "attention core"),
                ("send", "backward", 4 * 32, 2 * KEYS, "attention core"),
            ],
        ),
        ("all_gather", [("all-gather", "forward", 32, 4 * KEYS, ""), ("reduce-scatter", "backward", 32, 8 * KEYS, "")]),
        ("all_to_all", [("all-to-all", phase, 32, KEYS + 2 * SEQUENCE / 4, "") for phase in ("forward", "backward")]),
    ],
)
def test_context_parallelism_exchanges_keys_and_values(exchange, expected):
    rows = sent(4, "parallel.context=4", f"parallel.cp_comm_type={exchange}")
    assert [row[1:] for row in rows if row[0] == "context"] == expected
    assert [row[1] for row in rows if row[0] == "data"] == ["all-reduce"]


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all"])
def test_selective_recompute_exchanges_again(exchange):
    base = ("parallel.context=4", f"parallel.cp_comm_type={exchange}")
    plain = sum(row[3] for row in sent(4, *base))
    again = sum(row[3] for row in sent(4, *base, "recompute.granularity=selective"))
    assert again - plain == 32 * (3 if exchange == "ring" else 1)
