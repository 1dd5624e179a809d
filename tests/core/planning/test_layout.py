"""Which layouts are possible, what a refusal says, and which others are offered."""

import pytest

from core.planning.configs import run
from mt_core.config.sections import ParallelConfig
from mt_core.distributed.topology import resolve_dims
from mt_core.errors import MtError
from mt_core.parallel.layout import build_layout, problems
from mt_core.parallel.nearest_layouts import describe, find_nearest, suggest_nearest
from mt_core.planning.gpu_profile import read_profile
from mt_core.planning.plan import plan

LLAMA = "batch.global_batch=16"
SP = "parallel.sequence=true"


def told(ranks: int | None, *overrides: str, preset: str = "llama3-8b") -> list[str]:
    return list(map(str, problems(run(*overrides, preset=preset), ranks)))


def test_the_data_axis_is_what_the_others_leave():
    assert build_layout(run(LLAMA, "parallel.tensor=2", "parallel.context=2"), 16).dims.data == 4


def test_a_possible_layout_has_no_problems():
    assert told(8, LLAMA, "parallel.tensor=4", SP, "parallel.sharding=zero1") == []


@pytest.mark.parametrize("extra", [(), ("parallel.data=2",)])
def test_axes_must_make_the_ranks(extra):
    (problem,) = told(6, LLAMA, "parallel.tensor=4", *extra)
    product = "tensor 4 × context 1" + (" × data 2" if extra else "")
    assert problem == f"parallel: {product} does not make 6 ranks; allowed: tensor × context × data = 6"


def test_without_a_number_of_ranks_only_what_the_file_says_is_judged():
    assert told(None, LLAMA, "parallel.tensor=4") == []
    assert told(None, "batch.global_batch=3", "parallel.data=2") == [
        "batch.global_batch: 3 is no multiple of micro_batch 1 × data 2; allowed: 2 or 4"
    ]


def test_of_an_unknown_number_of_ranks_there_are_as_many_as_share_something():
    shared = ("parallel.sharding=zero1", "parallel.shard_size=4", "parallel.context=2")
    assert told(None, LLAMA, *shared) == []
    assert told(None, LLAMA, "parallel.expert=8", preset="mixtral-8x7b") == []
    assert told(None, "batch.global_batch=4", "parallel.expert=8", preset="mixtral-8x7b") == [
        "batch.global_batch: 4 is no multiple of micro_batch 1 × data 8; allowed: 8"
    ]


def test_tensor_must_divide_heads_groups_and_features():
    assert told(3, "batch.global_batch=3", "parallel.tensor=3", SP) == [
        f"parallel.tensor: 3 does not divide model.{name}; allowed: 1, 2, 4, 8, 16 or 32"
        for name in ("attention.heads 32", "attention.num_kv_heads 8", "mlp.ffn_hidden_size 14336")
    ]


def test_more_tensor_ranks_than_groups_repeat_the_groups():
    assert told(16, LLAMA, "parallel.tensor=16") == []
    shape = ("model.attention.heads=12", "model.attention.num_kv_heads=6", "model.mlp.ffn_hidden_size=48")
    assert told(4, "parallel.tensor=4", *shape) == [
        "parallel.tensor: 4 does not divide model.attention.num_kv_heads 6; allowed: 1, 2, 3, 6 or 12"
    ]


def test_sequence_parallelism_needs_a_tensor_axis():
    assert told(1, SP) == ["parallel.sequence: true, but parallel.tensor is 1; allowed: false, or a tensor above 1"]


def test_sequence_parallelism_cuts_a_context_rank_s_tokens():
    (problem,) = told(8, "parallel.tensor=4", SP, "parallel.context=2", "data.seq_length=8180")
    assert problem == (
        "data.seq_length: 8180 is no multiple of context 2 × tensor 4, as parallel.sequence needs; "
        "allowed: 8176 or 8184"
    )


def test_context_halves_every_share():
    assert told(4, "parallel.context=4", "data.seq_length=8188") == [
        "data.seq_length: 8188 is no multiple of 2 × parallel.context 4; allowed: 8184 or 8192"
    ]


def test_all_to_all_shares_heads_and_groups():
    swap = "parallel.cp_comm_type=all_to_all"
    assert told(8, "parallel.context=8", swap) == []
    assert told(32, "parallel.tensor=2", "parallel.context=16", swap) == [
        "parallel.context: 16 does not divide the 4 num_kv_heads of a tensor rank, as all_to_all needs; "
        'allowed: 1, 2 or 4, or cp_comm_type = "ring"'
    ]
    assert told(32, "parallel.tensor=2", "parallel.context=16") == []


def test_a_token_dispatcher_without_ranks_to_exchange_with_is_refused():
    assert told(2, "parallel.token_dispatcher=all_gather") == [
        'parallel.token_dispatcher: "all_gather", but parallel.expert is 1, and no token travels; '
        "leave it out, or set parallel.expert above 1"
    ]


def test_the_batch_is_whole_micro_batches():
    assert told(4, "batch.global_batch=6") == [
        "batch.global_batch: 6 is no multiple of micro_batch 1 × data 4; allowed: 4 or 8"
    ]
    assert told(4, "batch.global_batch=3") == [
        "batch.global_batch: 3 is no multiple of micro_batch 1 × data 4; allowed: 4"
    ]


def test_a_shard_size_divides_data_times_context():
    hybrid = ("batch.global_batch=4", "parallel.context=2", "parallel.sharding=fsdp")
    assert told(8, *hybrid, "parallel.shard_size=4") == []
    assert told(8, *hybrid, "parallel.shard_size=3") == [
        "parallel.shard_size: 3 does not divide data × context = 8; allowed: 1, 2, 4 or 8"
    ]


def test_a_shard_size_needs_something_that_is_shared():
    assert told(4, "batch.global_batch=4", "parallel.shard_size=2") == [
        'parallel.shard_size: 2, but parallel.sharding = "replicate" shares nothing; '
        'leave it unset, or parallel.sharding = "zero1" or "fsdp"'
    ]


MIXTRAL = "mixtral-8x7b"
"""Eight experts, eight key/value groups, 32 heads."""


def test_experts_are_cut_over_data_times_context():
    many = ("batch.global_batch=16", "parallel.expert=8")
    assert told(16, *many, preset=MIXTRAL) == []
    assert told(16, *many, "parallel.tensor=2", "parallel.context=2", preset=MIXTRAL) == []
    assert told(8, *many, "parallel.tensor=2", preset=MIXTRAL) == [
        "parallel.expert: 8 does not divide data × context = 4; allowed: 1, 2 or 4"
    ]


def test_an_expert_axis_divides_the_experts():
    assert told(12, "batch.global_batch=12", "parallel.expert=6", preset=MIXTRAL) == [
        "parallel.expert: 6 does not divide model.mlp.experts = 8; allowed: 1, 2 or 4"
    ]


def test_a_model_without_experts_has_no_expert_axis():
    assert told(8, LLAMA, "parallel.expert=2") == [
        'parallel.expert: 2, but model.mlp.kind "gated" has no experts; allowed: 1, or model.mlp.kind = "moe"'
    ]


def test_the_hidden_features_of_experts_are_cut_by_tensor_ranks_unless_those_have_whole_ones():
    odd = ("parallel.tensor=8", "model.mlp.ffn_hidden_size=100")
    assert told(8, LLAMA, *odd, "parallel.expert_tensor=1", preset=MIXTRAL) == []
    assert told(8, LLAMA, *odd, preset=MIXTRAL) == [
        "parallel.expert_tensor: 8 tensor ranks do not divide model.mlp.ffn_hidden_size = 100; "
        "allowed: 1, or a parallel.tensor of 1, 2, 4 or 5"
    ]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (4, "2 of 4 tensor ranks: all share each expert, or none does; allowed: 1 or 4"),
        (1, "2, but parallel.tensor is 1, and ranks with different tokens share no expert; allowed: 1"),
    ],
)
def test_all_tensor_ranks_share_each_expert_or_none_does(tensor, reason):
    keys = (f"parallel.tensor={tensor}", "parallel.expert_tensor=2")
    problem = f"parallel.expert_tensor: {reason}; to hold less of the experts, raise parallel.expert"
    assert told(8, LLAMA, *keys, preset=MIXTRAL) == [problem]
    with pytest.raises(MtError) as error:
        resolve_dims(ParallelConfig(tensor=tensor, expert_tensor=2), 8)
    assert str(error.value) == problem


def test_a_model_without_experts_takes_no_expert_tensor():
    assert told(8, "batch.global_batch=8", "parallel.expert_tensor=1") == [
        'parallel.expert_tensor: 1, but model.mlp.kind "gated" has no experts; '
        'leave it out, or set model.mlp.kind = "moe"'
    ]


def test_another_tensor_size_keeps_how_experts_are_shared():
    def nearest(*keys: str) -> set[bool]:
        found = find_nearest(run(LLAMA, "parallel.tensor=3", "parallel.expert=8", *keys, preset=MIXTRAL), 8)
        return {layout.dims.whole_experts for layout in found}

    assert nearest("parallel.expert_tensor=1") == {True}
    assert nearest() == nearest("parallel.expert_tensor=3") == {False}


def test_nearest_layouts_keep_what_they_can_of_the_expert_axis():
    config = run(LLAMA, "parallel.tensor=3", "parallel.expert=8", preset=MIXTRAL)
    found = {describe(layout) for layout in find_nearest(config, 8)}
    assert found == {
        "tensor 4 × context 1 × data 2, expert 2",
        "tensor 2 × context 1 × data 4, expert 4",
        "tensor 2 × context 2 × data 2, expert 4",
    }


def test_no_more_layers_are_recomputed_than_there_are():
    assert told(1, "recompute.granularity=full", "recompute.layers=33") == [
        "recompute.layers: 33 of 32 layers; allowed: 1 to 32"
    ]
    assert told(1, "recompute.granularity=selective", "recompute.layers=33") == []


def test_the_nearest_layouts_change_least():
    config = run(LLAMA, "parallel.tensor=3", SP)
    assert [describe(layout) for layout in find_nearest(config, 8)] == [
        "tensor 4 + sequence × context 1 × data 2",
        "tensor 2 + sequence × context 1 × data 4",
        "tensor 2 + sequence × context 2 × data 2",
    ]
    assert all(not list(problems(config, 8)) or layout.dims.ranks == 8 for layout in find_nearest(config, 8))


def test_nearest_layouts_give_up_what_no_longer_makes_sense():
    config = run("batch.global_batch=1", "parallel.tensor=3", SP, "parallel.sharding=zero1", "parallel.shard_size=3")
    whole = next(layout for layout in find_nearest(config, 2) if layout.dims.tensor == 1)
    assert (whole.sequence, whole.dims.shard) == (False, None)


def test_a_refusal_ends_with_the_nearest_layouts():
    config = run(LLAMA, "parallel.tensor=3")
    with pytest.raises(MtError) as caught:
        plan(config, 8, read_profile("nvidia-h200"))
    assert str(caught.value.problems[-1]) == (
        "parallel: this layout cannot run on 8 ranks; nearest that pass: tensor 4 × context 1 × data 2; "
        "tensor 2 × context 1 × data 4; tensor 2 × context 2 × data 2"
    )


def test_where_no_layout_passes_the_next_numbers_of_ranks_are_told():
    assert suggest_nearest(run("parallel.tensor=2", LLAMA), 7).allowed == (
        "no layout of 7 passes; with 4 ranks: tensor 2 × context 1 × data 2; "
        "with 8 ranks: tensor 2 × context 1 × data 4"
    )
    assert suggest_nearest(run("batch.micro_batch=3"), 1).allowed == "no layout of 1 passes; nor one of fewer"


def test_a_pipeline_is_a_factor_of_the_ranks():
    assert told(8, LLAMA, "parallel.pipeline=4") == []
    assert build_layout(run(LLAMA, "parallel.pipeline=4"), 8).dims.data == 2
    assert told(6, LLAMA, "parallel.pipeline=4") == [
        "parallel: tensor 1 × context 1 × pipeline 4 does not make 6 ranks; "
        "allowed: tensor × context × data × pipeline = 6"
    ]
    (nearest, *_) = find_nearest(run(LLAMA, "parallel.pipeline=4"), 8)
    assert nearest.dims.ranks == 8


def test_keys_of_a_pipeline_need_one():
    assert told(8, LLAMA, "pipeline.schedule=zbv", 'pipeline.layout="Et|tL"') == [
        "pipeline.schedule: 'zbv', but parallel.pipeline is 1; leave it out, or set parallel.pipeline above 1",
        "pipeline.layout: 'Et|tL', but parallel.pipeline is 1; leave it out, or set parallel.pipeline above 1",
    ]
