"""The predicted step: its parts, what overlap saves, and how it compares with steps that were measured."""

from itertools import pairwise

import pytest

from core.planning.configs import LLAMA8B_8L, h200, run
from mt_core.errors import MtError
from mt_core.parallel.layout import build_layout
from mt_core.planning.compute import compute
from mt_core.planning.gpu_profile import list_profiles, read_profile
from mt_core.planning.step_time import StepTime, step_time

COMPILED = "runtime.compile=true"


def step(ranks: int, *overrides: str, preset: str = "llama3-8b") -> StepTime:
    config = run("batch.global_batch=16", *overrides, preset=preset)
    return step_time(config, build_layout(config, ranks), h200())


LAYOUTS = {
    "one": (1,),
    "replicate": (4,),
    "zero1": (4, "parallel.sharding=zero1"),
    "fsdp": (4, "parallel.sharding=fsdp"),
    "tensor": (4, "parallel.tensor=4", "parallel.sequence=true"),
    "context": (4, "parallel.context=4"),
    "experts": (8, "parallel.expert=4", "parallel.sharding=zero1", "recompute.granularity=full"),
    "all": (16, "parallel.context=2", "parallel.tensor=4", "parallel.sharding=zero1", "recompute.granularity=full"),
}


def predict_layout(layout: str) -> StepTime:
    return step(*LAYOUTS[layout], preset="mixtral-8x7b" if layout == "experts" else "llama3-8b")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up_to_the_step(layout):
    predicted = predict_layout(layout)
    assert sum(predicted.parts.values()) == pytest.approx(predicted.seconds, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_timeline_arithmetic_and_waiting_take_turns(layout):
    predicted = predict_layout(layout)
    spans = sorted((s for s in predicted.spans if not s.hidden), key=lambda span: span.start)
    assert all(before.end <= after.start + 1e-12 for before, after in pairwise(spans))
    assert max(span.end for span in predicted.spans) == pytest.approx(predicted.seconds)
    assert spans[-1].name == "optimizer"


def test_tensor_ranks_repeat_the_work_of_experts_unless_they_share_those_or_the_sequence():
    def products(*overrides: str) -> float:
        config = run("batch.global_batch=16", *overrides, preset="mixtral-8x7b")
        return compute(config, build_layout(config, 8), h200()).products

    model = run(preset="mixtral-8x7b").model
    experts = 32 * 2 * 3 * 4096 * 14336 * 6 / model.flops_per_token(0)  # share of the FLOPs of a token
    one, four = products(), ("parallel.tensor=4", "parallel.expert=2", "parallel.expert_tensor=1")
    assert products(*four[:2]) == pytest.approx(one / 4)
    assert products(*four, "parallel.sequence=true") == pytest.approx(one / 4)
    assert products(*four) == pytest.approx(one * (experts + (1 - experts) / 4))
    assert products("parallel.expert=8") == one


def test_work_is_shared_and_not_changed_by_the_axes():
    config = run()
    whole, tensor, context = (
        compute(run(*extra), build_layout(run(*extra), n), h200())
        for n, extra in ((1, ()), (4, ("parallel.tensor=4",)), (4, ("parallel.context=4",)))
    )
    assert whole.products == pytest.approx(4 * tensor.products) == pytest.approx(4 * context.products)
    flops = config.model.flops_per_token(8192) * 8192 / 1e12
    rates = h200().get_rates("bf16")
    counted = 3 * whole.products * rates.gemm + whole.attention_forward * rates.attention_forward
    assert counted + whole.attention_backward * rates.attention_backward == pytest.approx(flops)


def test_full_recompute_adds_a_forward_pass_of_the_layers():
    whole, half = (
        step(1, "recompute.granularity=full", "recompute.method=block", f"recompute.layers={n}").parts["recompute"]
        for n in (32, 16)
    )
    assert whole == pytest.approx(2 * half)
    parts = step(1).parts
    forward = (parts["matrix products"] + parts["attention"]) / 3
    assert 0.8 * forward < whole < forward * 1.1
    assert step(1, "recompute.granularity=full").parts["recompute"] == whole
    assert step(1, "recompute.granularity=selective").parts["recompute"] < 0.2 * whole


@pytest.mark.parametrize(
    ("overlap", "sharding"),
    [("overlap_grad_reduce", "replicate"), ("overlap_grad_reduce", "zero1"), ("overlap_param_gather", "zero1")],
)
def test_overlap_saves_most_of_a_reduction(overlap, sharding):
    base = f"parallel.sharding={sharding}"
    hidden, exposed = step(4, base), step(4, base, f"parallel.{overlap}=false")
    assert exposed.seconds > hidden.seconds
    assert hidden.parts["waiting for data"] < 0.3 * exposed.parts["waiting for data"]


def test_a_compiled_model_moves_less():
    assert step(1, COMPILED).parts["norms, activations, sums"] < 0.5 * step(1).parts["norms, activations, sums"]


MEGATRON = {
    "1 GPU, 8 layers": (35_837, 1, LLAMA8B_8L),
    "data 4, zero1": (10_422, 4, ("parallel.sharding=zero1",)),
    "tensor 4 + sequence": (8_104, 4, ("parallel.tensor=4", "parallel.sequence=true")),
    "context 4": (
        6_746,
        4,
        ("parallel.context=4", "data.seq_length=32768", "model.max_seq_len=32768", "batch.global_batch=4"),
    ),
}
"""Tokens/s a GPU of Megatron-Core on H200s (PERFORMANCE.md)."""


@pytest.mark.parametrize("name", MEGATRON)
def test_predictions_are_near_what_megatron_core_measures(name):
    """The prediction is what the kernels' rates allow: at most 25% above, never below, what is reached."""
    measured, ranks, overrides = MEGATRON[name]
    config = run("batch.global_batch=16", COMPILED, *overrides)
    predicted = step_time(config, build_layout(config, ranks), h200())
    tokens = config.batch.global_batch * config.data.seq_length / predicted.seconds / ranks
    assert 1.0 <= tokens / measured < 1.25


OURS = {
    "8 layers": (1_039.4, 1, LLAMA8B_8L),
    "8 layers, compiled": (957.8, 1, (*LLAMA8B_8L, COMPILED)),
    "8 layers, 2 GPUs": (
        1_001.0,
        2,
        ("model.layers=8", "batch.global_batch=8", COMPILED, "parallel.overlap_grad_reduce=false"),
    ),
}
"""ms a step of `mt train` at commit 21f38fa (docs/how-to/plan-a-run.md)."""


@pytest.mark.parametrize("name", OURS)
def test_predictions_are_near_our_own_steps(name):
    measured, ranks, overrides = OURS[name]
    assert 0.88 < step(ranks, *overrides).seconds * 1e3 / measured < 1.0


PROFILE = """
name = "slow"
memory_gib = 16.0
reserved_gib = 1.0
peak_tflops = 100.0
copy_tb_s = 0.5
gpus_per_node = 1
link_gb_s = 10.0
network_gb_s = 1.0
latency_us = 50.0
[rates.bf16]
gemm = 50.0
attention_forward = 20.0
attention_backward = 20.0
"""


def test_a_profile_may_be_the_user_s_own(tmp_path):
    (tmp_path / "slow.toml").write_text(PROFILE)
    config = run("batch.global_batch=16")
    slow = step_time(config, build_layout(config, 1), read_profile(str(tmp_path / "slow.toml")))
    assert slow.parts["matrix products"] == pytest.approx(step(1).parts["matrix products"] * 665 / 50)


def test_a_profile_without_the_dtype_is_refused(tmp_path):
    (tmp_path / "slow.toml").write_text(PROFILE)
    config = run("precision.dtype=fp32")
    with pytest.raises(MtError, match="precision.dtype: profile 'slow' has no rates for fp32; allowed: bf16"):
        step_time(config, build_layout(config, 1), read_profile(str(tmp_path / "slow.toml")))


def test_a_wrong_profile_is_refused_field_by_field(tmp_path):
    (tmp_path / "wrong.toml").write_text(PROFILE.replace("copy_tb_s = 0.5", "copy_tb = 0.5"))
    with pytest.raises(MtError) as caught:
        read_profile(str(tmp_path / "wrong.toml"))
    assert "copy_tb_s: required, but not given" in str(caught.value)
    assert "copy_tb: unknown key; did you mean 'copy_tb_s'?" in str(caught.value)


def test_an_unknown_profile_names_the_known():
    assert list_profiles() == ["nvidia-h200"]
    with pytest.raises(MtError, match="unknown profile 'nvidia-h20'; did you mean 'nvidia-h200'.* or a FILE.toml"):
        read_profile("nvidia-h20")


def test_a_profile_says_what_was_not_measured():
    profile = h200()
    assert set(profile.assumed) <= set(type(profile).model_fields)
