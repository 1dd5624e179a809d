"""What the ranks of a pipeline hold, send and take; a pipeline of one stage is the run without one."""

from math import prod

import pytest

from core.planning.configs import h200, run
from mt_core.errors import MtError
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.layout_string import Stage
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import build_schedule
from mt_core.pipeline.stages import balance_stages, number_layers
from mt_core.planning.activations import count_activations
from mt_core.planning.communication import micro_batches, transfers
from mt_core.planning.memory import by_category
from mt_core.planning.pipeline.pipeline_plan import (
    PipelinePlan,
    balance_by_time,
    check_pipeline,
    count_split_share,
    plan_pipeline,
    plan_schedule,
)
from mt_core.planning.plan import plan
from mt_core.planning.stage_model import cut_run, get_kind
from mt_core.planning.step_time import predict_passes

SEQUENCE = 8192 * 4096 * 2
"""Bytes of a micro-batch's features in bf16, llama3-8b."""


def make(gpus: int, *overrides: str, preset: str = "llama3-8b") -> PipelinePlan:
    config = run("batch.global_batch=16", *overrides, preset=preset)
    return plan_pipeline(config, check_pipeline(config, gpus), h200())


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ()),
        (1, ("recompute.granularity=full", "recompute.method=block", "recompute.layers=8")),
        (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.sharding=zero1")),
        (4, ("parallel.tensor=4",)),
        (4, ("parallel.context=2", "parallel.sharding=fsdp")),
        (2, ("parallel.sharding=zero1", "parallel.overlap_param_gather=false", "runtime.compile=true")),
    ],
)
def test_one_stage_is_the_whole_run(ranks, overrides):
    """Memory is equal to the byte; a step that is not cut into pieces may only differ by rounding."""
    config = run("batch.global_batch=16", *overrides)
    whole = plan(config, ranks, h200())
    schedule = build_schedule("1f1b", ScheduleSize(1, micro_batches(config, whole.layout)))
    (one,) = plan_schedule(config, whole.layout, h200(), schedule, number_layers([32])).plans
    assert by_category(one.items) == by_category(whole.items)
    assert [(t.what, t.calls, t.size) for t in one.transfers] == [(t.what, t.calls, t.size) for t in whole.transfers]
    assert one.step.seconds == pytest.approx(whole.step.seconds, rel=1e-9)
    for name, seconds in whole.step.parts.items():
        assert one.step.parts[name] == pytest.approx(seconds, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
@pytest.mark.parametrize(("preset", "tied"), [("llama3-8b", False), ("gpt2-124m", True)])
def test_ranks_have_all_tensors_and_only_a_tied_embedding_twice(schedule, preset, tied):
    """In V shape the first and the last stage are on one rank, which needs no copy."""
    config = run("batch.global_batch=16", preset=preset)
    size = ScheduleSize(2, 16, 1 if schedule == "1f1b" else 2)
    placement = build_schedule(schedule, size).placement
    stages = balance_stages(config.model.layers, placement.stages)
    names: list[str] = []
    for rank in range(2):
        part = cut_run(config, [stages[number] for number in placement.get_stages(rank)])
        names += part.model.canonical_shapes()
    expected = list(config.model.canonical_shapes())
    if tied and placement.shape == "loop":
        expected.append("embed.weight")
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize(("preset", "layers"), [("llama3-8b", 32), ("deepseek-v2-lite", 27), ("gemma-2-2b", 26)])
def test_stages_share_the_arithmetic_and_the_activations(preset, layers):
    """Layers of several kinds too: a first one without experts, and windows in every other one."""
    config = run("batch.global_batch=16", preset=preset)
    layout = check_pipeline(config, 1)
    parts = [cut_run(config, [stage]) for stage in number_layers([3, layers - 12, 9])]
    for length in (0, 16384):
        total = sum(part.model.flops_per_token(length) for part in parts)
        assert total == pytest.approx(config.model.flops_per_token(length), rel=1e-12)
    saved = sum(count_activations(part, layout).saved for part in parts)
    assert saved == pytest.approx(count_activations(config, layout).saved, rel=1e-12)
    assert [part.model.vocab_size for part in parts] == [0, 0, config.model.vocab_size]
    assert [part.model.layers for part in parts] == [3, layers - 12, 9]


def test_a_stage_of_dense_layers_before_experts_is_planned_as_dense_layers_are():
    config = run("model.mlp.dense_layers=2", "parallel.expert=2", preset="deepseek-v2-lite")
    layout = check_pipeline(config, 2)
    dense = config.model_copy(update={"model": config.model.model_copy(update={"mlp": config.model.mlp.dense})})
    ours, theirs = (cut_run(each, [Stage(range(2))]) for each in (config, dense))
    assert count_activations(ours, layout) == count_activations(theirs, layout)
    assert predict_passes(ours, layout, h200()) == predict_passes(theirs, layout, h200())
    assert {t.axis for t in transfers(ours, layout)} == {t.axis for t in transfers(theirs, layout)} == {"data"}
    mixed = cut_run(config, [Stage(range(2, 4))])
    assert "expert" in {t.axis for t in transfers(mixed, layout)}
    assert predict_passes(mixed, layout, h200()) != predict_passes(ours, layout, h200())
    assert get_kind(ours, layout) != get_kind(mixed, layout) == get_kind(cut_run(config, [Stage(range(5, 7))]), layout)


def test_stages_of_equal_time_have_fewer_of_the_longer_layers():
    long = ("model.mlp.dense_layers=4", "model.mlp.dense_ffn_hidden_size=43776")
    config = run(*long, "model.layers=28", "parallel.pipeline=4", preset="deepseek-v2-lite")
    layout = check_pipeline(config, 4)
    stages = balance_by_time(config, layout, h200(), Placement(4))
    seconds = [predict_passes(cut_run(config, [stage]), layout, h200()).seconds for stage in stages]
    even = [predict_passes(cut_run(config, [s]), layout, h200()).seconds for s in number_layers([7] * 4)]
    assert len(stages[0].layers) < 7
    assert max(seconds) < 0.9 * max(even)
    assert max(seconds) < 1.2 * min(seconds)


def test_weights_lie_where_their_layers_are():
    made = make(4, "parallel.pipeline=4", "pipeline.num_layers_in_first_stage=5")
    embedding, layer = 128_256 * 4096, prod((1,)) * (8_030_261_248 - 2 * 128_256 * 4096 - 4096) // 32
    weights = [by_category(each.items)["weights"] / 2 for each in made.plans]
    assert weights == [embedding + 5 * layer, 9 * layer, 9 * layer, 9 * layer + 4096 + embedding]


def test_earlier_ranks_hold_more_microbatches():
    config = run("batch.global_batch=16")
    saved = count_activations(config, check_pipeline(run("parallel.pipeline=4"), 4)).saved / 4
    made = make(4, "parallel.pipeline=4")
    assert made.timeline.peak_activations == pytest.approx([4 * saved, 3 * saved, 2 * saved, saved])
    assert [by_category(each.items)["activations"] for each in made.plans] == list(made.timeline.peak_activations)
    assert "logits" in by_category(made.plans[3].items)
    assert "logits" not in by_category(made.plans[0].items)


def test_features_go_to_the_next_stage_and_gradients_to_the_one_before():
    def count(*overrides: str) -> list[list[tuple[str, str, float, float]]]:
        plans = make(4, "parallel.pipeline=4", *overrides).plans
        return [
            [(t.collective, t.phase, t.calls, t.size) for t in each.transfers if t.axis == "pipeline"] for each in plans
        ]

    ahead, back = ("send", "forward", 1, SEQUENCE), ("send", "backward", 1, SEQUENCE)
    assert count() == [[ahead], [ahead, back], [ahead, back], [back]]
    twice = [("send", "forward", 2, SEQUENCE), ("send", "backward", 2, SEQUENCE)]
    assert count("pipeline.schedule=zbv") == [[ahead, back], twice, twice, [ahead, back]]
    assert make(4, "parallel.pipeline=4").sent == 16 * 2 * SEQUENCE


def test_tensor_ranks_send_their_share_of_a_sequence():
    made = make(8, "parallel.pipeline=4", "parallel.tensor=2", "parallel.sequence=true")
    assert {t.size for t in made.plans[1].transfers if t.axis == "pipeline"} == {SEQUENCE / 2}
    assert {t.span for t in made.plans[1].transfers if t.axis == "pipeline"} == {8}


def test_a_tied_embedding_is_summed_over_the_ends_unless_they_are_one_rank():
    def find(*overrides: str) -> list[int]:
        made = make(4, "parallel.pipeline=4", *overrides, preset="gpt2-124m")
        rows = [[t for t in each.transfers if t.phase == "reduce" and t.axis == "pipeline"] for each in made.plans]
        assert {t.size for row in rows for t in row} <= {4 * 50_304 * 768}
        return [len(row) for row in rows]

    assert find() == [1, 0, 0, 1]
    assert find("pipeline.layout=Et|t*2|t|t*2|t|t*2|t|t*2L", "pipeline.schedule=zbv") == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.pipeline=4", "pipeline.layout=E|t*16|t*16|L"),
        (
            "parallel.pipeline=4",
            "pipeline.layout=Et*16||t*16|L",
            "recompute.granularity=full",
            "recompute.method=block",
        ),
        ("parallel.pipeline=2", "parallel.sharding=fsdp", "pipeline.schedule=zb-2p"),
        ("parallel.pipeline=2", "parallel.sharding=zero1", "pipeline.schedule=interleaved", "parallel.context=2"),
        ("parallel.pipeline=2", "pipeline.schedule=dualpipev", "parallel.tensor=2", "parallel.sequence=true"),
    ],
)
def test_parts_of_every_rank_s_step_add_up_to_it(overrides):
    made = make(4, *overrides)
    assert {each.step.seconds for each in made.plans} == {made.seconds}
    for each in made.plans:
        assert sum(each.step.parts.values()) == pytest.approx(made.seconds)
        assert min(each.step.parts.values()) >= 0


def test_the_step_is_bubble_and_work():
    made = make(4, "parallel.pipeline=4")
    assert made.seconds > made.timeline.seconds
    assert made.busiest == 3  # with the loss
    assert made.fullest == 0
    assert 3 / 16 < made.timeline.bubble < 0.5


def test_recompute_keeps_little_and_costs_time():
    plain, full = make(4, "parallel.pipeline=4"), make(4, "parallel.pipeline=4", "recompute.granularity=full")
    assert max(full.timeline.peak_activations) < 0.1 * max(plain.timeline.peak_activations)
    assert full.seconds > 1.2 * plain.seconds


def test_gradients_that_wait_need_what_was_recomputed():
    """Between the two halves of a backward pass a rank holds whole layers, of which only inputs were kept before."""
    full, held = "recompute.granularity=full", {}
    for schedule in ("1f1b", "zb-h1"):
        made = [make(4, "parallel.pipeline=4", f"pipeline.schedule={schedule}", *words) for words in ((), (full,))]
        held[schedule] = [each.timeline.peak_activations[3] for each in made]
    assert held["1f1b"][1] < 0.1 * held["1f1b"][0]
    assert held["zb-h1"][1] >= held["1f1b"][0]
    assert held["zb-h1"][1] <= held["zb-h1"][0]


@pytest.mark.parametrize(
    ("preset", "linear"),
    [
        ("llama3-8b", 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)),
        ("mixtral-8x7b", 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 2 * 3 * 14336 * 4096)),
    ],
)
def test_routers_and_the_head_do_not_wait_for_their_gradients(preset, linear):
    config = run(preset=preset)
    expected = 6 * linear / config.model.flops_per_token(0)
    assert count_split_share(config) == pytest.approx(expected, rel=1e-12)
    head = cut_run(config, [Stage(range(0), loss=True)])
    assert count_split_share(head) == 0


def test_passes_that_run_together_hide_no_exchange_with_experts():
    overrides = ("parallel.pipeline=2", "parallel.expert=4", "parallel.sharding=zero1", "batch.global_batch=32")
    made = make(8, *overrides, "pipeline.schedule=dualpipev", preset="mixtral-8x7b")
    plain = make(8, *overrides, "pipeline.schedule=zbv", preset="mixtral-8x7b")
    for one, other in zip(made.plans, plain.plans, strict=True):
        assert one.step.parts["waiting for expert"] == pytest.approx(other.step.parts["waiting for expert"])
    assert made.timeline.work == pytest.approx(plain.timeline.work)


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (6, ("parallel.pipeline=4",), "parallel.pipeline: 4 does not divide 6 GPUs; allowed: 1, 2, 3, 6"),
        (
            4,
            ("parallel.pipeline=4", "model.layers=30"),
            "model.layers: 30 layers do not divide evenly over 4 ranks; allowed: model.layers = 28 or 32; or "
            'pipeline.layout = "Et*7|t*8|t*8|t*7L" alone',
        ),
        (
            8,
            ("parallel.pipeline=4", "pipeline.schedule=dualpipev", "batch.global_batch=12"),
            "batch.global_batch: 6 microbatches, but dualpipev needs at least 2 × 4 ranks; allowed: 8 microbatches, "
            "batch.global_batch = 16",
        ),
    ],
)
def test_what_is_impossible_is_refused_with_what_is_not(gpus, overrides, message):
    with pytest.raises(MtError) as caught:
        make(gpus, *overrides)
    assert str(caught.value) == message


def test_the_ranks_of_a_stage_are_cut_by_the_same_rules():
    with pytest.raises(MtError) as caught:
        make(8, "parallel.pipeline=4", "parallel.tensor=3")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("parallel: tensor 3 × context 1 does not make 2 ranks")
    assert lines[-1].startswith("parallel: this layout cannot run on 2 ranks; nearest that pass: tensor 2")


def test_placements_of_a_plan_are_those_of_its_schedule():
    assert make(4, "parallel.pipeline=4", "pipeline.schedule=zbv").schedule.placement == Placement(4, 2, "v")
    several = ("pipeline.schedule=interleaved", "pipeline.virtual_stages=4")
    assert make(4, "parallel.pipeline=4", *several).schedule.placement == Placement(4, 4)
