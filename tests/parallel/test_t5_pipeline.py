"""T5 in stages of a pipeline computes what one rank computes, in fp64, gradient by gradient, under every schedule."""

from functools import cache
from typing import Any

import pytest

from layouts import PIPELINES, SAMPLES, run_config
from mt_cli.verify.record import record, records
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record, measure
from mt_models.config import GQA, Dense, Gated, LayerNorm, Learned, Relative, RMSNorm
from tiny import t5

pytestmark = pytest.mark.slow

RTOL = 1e-12
SIZES = {"hidden_size": 32, "vocab_size": 61, "vocab_divisor": 4, "max_seq_len": 16, "init_std": 0.2, "layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "relative": {
        "decoder_layers": 3,
        "attention": GQA(heads=4, num_kv_heads=2, head_size=6, qk_norm=True),
        "mlp": Gated(ffn_hidden_size=48, activation="gelu_tanh"),
        "norm": RMSNorm(),
        "position": Relative(buckets=8, max_distance=12),
        "tied": True,
        "scaled_head": True,
    },
    "of Megatron": {
        "decoder_layers": 3,
        "attention": GQA(heads=4, num_kv_heads=4, head_size=8, qkv_bias=True, out_bias=True),
        "mlp": Dense(ffn_hidden_size=48, bias=True),
        "norm": LayerNorm(),
        "position": Learned(),
        "dropout": {"attention": 0.2, "hidden": 0.1, "embedding": 0.3},
        "tied": True,
        "head_bias": True,
    },
    "untied": {"decoder_layers": 3, "attention": GQA(heads=4, num_kv_heads=4, head_size=8)},
}
LAYOUTS: dict[str, str] = {
    "1f1b 2": "relative",
    "gpipe 2": "of Megatron",
    "interleaved 2 of 3 stages": "of Megatron",
    "zb-2p 2, uneven": "of Megatron",
    "dualpipev 2, ends alone": "of Megatron",
    "1f1b 4, ends alone": "of Megatron",
    "interleaved 4": "relative",
    "zb-h1 4": "untied",
    "zbv 4": "of Megatron",
    "1f1b 2 × tensor 2, sequence": "relative",
    "interleaved 2 × zero1 2": "of Megatron",
    "zbv 2 × fsdp 2": "relative",
}
"""Layouts of `PIPELINES`, each with a model: the decoder begins with a stage, or within one."""
RECOMPUTE = [{}, {"granularity": "full", "method": "block", "layers": 1}, {"granularity": "selective"}]


def config_of(model: str, layout: str = "") -> Any:
    _, parallel, pipeline = PIPELINES.get(layout, (1, {}, {}))
    length = int(layout.split()[1].rstrip(",")) if layout else 1
    recompute = RECOMPUTE[list(LAYOUTS).index(layout) % len(RECOMPUTE)] if layout else {}
    sections = {"parallel": parallel | {"pipeline": length}, "pipeline": pipeline, "recompute": recompute}
    plain = run_config(**sections)
    return plain.model_copy(update={"model": t5(**SIZES | MODELS[model])})


@cache
def expected(model: str) -> Record:
    """The same run on one rank, in one batch."""
    config = config_of(model)
    batch = config.batch.model_copy(update={"micro_batch": SAMPLES})
    return measure(config.model_copy(update={"batch": batch}), 1)


@cache
def recorded(ranks: int) -> dict[str, Record]:
    """All layouts of so many ranks, on the same ones."""
    layouts = [layout for layout in LAYOUTS if PIPELINES[layout][0] == ranks]
    configs = [config_of(LAYOUTS[layout], layout) for layout in layouts]
    return dict(zip(layouts, records(configs, ranks, timeout_s=600.0), strict=True))


def disagreements(found: Record, reference: Record) -> list[str]:
    return [f"{d.quantity}: {d.relative:.1e}" for d in compare_records(found, reference) if not d.relative <= RTOL]


def test_every_schedule_is_among_the_layouts():
    assert {config_of(model, layout).pipeline.schedule for layout, model in LAYOUTS.items()} == {*SCHEDULES}


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_norms_gradients_and_weights_of_three_steps_are_those_of_one_rank(ranks):
    assert {layout: disagreements(found, expected(LAYOUTS[layout])) for layout, found in recorded(ranks).items()} == {
        layout: [] for layout in recorded(ranks)
    }


def test_twenty_steps_of_a_tied_model_end_with_the_weights_of_one_rank():
    whole, staged = config_of("of Megatron"), config_of("of Megatron", "interleaved 2 of 3 stages")
    batch = staged.batch.model_copy(update={"micro_batch": 2})
    found = record(staged.model_copy(update={"batch": batch}), 2, steps=20)
    assert disagreements(found, measure(whole, 1, steps=20)) == []


def test_checkpoints_move_to_stages_and_from_them(tmp_path):
    """Saved by stages and by one rank, each goes on from the other's."""
    staged, whole = config_of("relative", "interleaved 4"), config_of("relative")
    record(staged, 4, steps=2, save=tmp_path / "staged")
    measure(whole, 1, steps=2, save=tmp_path / "whole")
    run = expected("relative")
    last = Record(run.losses[2:], run.norms[2:], run.gradients[2:], run.weights, run.metrics[2:])
    assert disagreements(measure(whole, 1, steps=1, start=resolve(tmp_path / "staged")), last) == []
    moved = record(staged, 4, steps=1, start=resolve(tmp_path / "whole"), save=tmp_path / "moved")
    assert disagreements(moved, last) == []
    for part in ("model", "optim"):
        names = {frozenset(open_part(resolve(tmp_path / run) / part)) for run in ("staged", "whole", "moved")}
        assert len(names) == 1
