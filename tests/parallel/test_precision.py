"""16-bit arithmetic: how far it may be from exact and from other layouts, and the loss scale of fp16.

Bands count roundings. From the embedding to a gradient there are about 70 in sequence for two layers: 11 in a block's
forward pass, twice that in its backward pass, a few at the ends. Each is at most u = 2⁻⁸ in bf16 and 2⁻¹¹ in fp16, and
they are independent, so a gradient's relative error is about √70 u: the band is 10 u, 3.9 % and 0.49 %. Measured in the
2-norm over all models and layouts below, worst tensor: 2.9 % and 0.39 %. In a loss, a mean over 128 tokens, and in the
norm of the whole gradient errors cancel: band u, measured 0.1 u and 0.4 u. Adam's first updates have one size whatever
the gradient's, so those of small elements may differ wholly: in the second step both bands are 4 u.
"""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from layouts import LAYOUTS, run_config
from mt_cli.verify.record import records
from mt_core.checkpoint.native import resolve
from mt_core.config.sections import PrecisionConfig
from mt_core.distributed.mesh import Axis
from mt_core.training.loss_scale import LossScale
from mt_core.training.step import update
from mt_core.verification.measure import Record, gather_state, measure, save_state
from mt_core.verification.ranks import run_ranks
from rank_states import batches_of, gradients, state_of, step

UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of one rounding."""
MODELS = ["gqa", "learned-biased"]
CHOSEN = ["tensor 2, sequence", "zero1 2", "fsdp 2", "context 2, ring", "context 2, all-to-all"]
BATCH = {"micro_batch": 2, "global_batch": 8}


def config_of(model: str, dtype: str, parallel: dict[str, Any] | None = None) -> Any:
    precision = {"dtype": dtype, "initial_loss_scale": 64.0}
    return run_config(model, precision=precision, parallel=parallel or {}, batch=BATCH)


@pytest.fixture(scope="session")
def recorded(compute_once) -> dict[tuple[str, str, str], Record]:
    """Runs by layout, model and dtype, all on the same ranks."""

    def run() -> dict[tuple[str, str, str], Record]:
        cases = [(layout, model, dtype) for layout in CHOSEN for model in MODELS for dtype in UNIT]
        configs = [config_of(model, dtype, LAYOUTS[layout][1]) for layout, model, dtype in cases]
        return dict(zip(cases, records(configs, 2, steps=2), strict=True))

    return compute_once("precision, layouts", run)


@cache
def of_one_rank(model: str, dtype: str) -> Record:
    return measure(config_of(model, dtype), 1, steps=2)


def worst_gradient(record: Record, reference: Record) -> float:
    """Of the first step: the largest relative error in the 2-norm of a gradient, those that are nothing but rounding
    left out: a key's bias moves all scores of a query alike."""
    pairs = [
        (record.gradients[0][name].double(), exact.double())
        for name, exact in reference.gradients[0].items()
        if not name.endswith("attn.k.bias")
    ]
    return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)


def worst(found: list[float], exact: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))


def assert_near(found: Record, exact: Record, unit: float) -> None:
    assert worst_gradient(found, exact) <= 10 * unit
    for values, reference in ((found.losses, exact.losses), (found.norms, exact.norms)):
        assert worst(values[:1], reference[:1]) <= unit
        assert worst(values, reference) <= 4 * unit


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ["one rank", *CHOSEN])
def test_gradients_are_within_10_roundings_of_fp64_and_norm_and_loss_within_1(layout, model, dtype, recorded):
    found = of_one_rank(model, dtype) if layout == "one rank" else recorded[layout, model, dtype]
    assert_near(found, of_one_rank(model, "fp64"), UNIT[dtype])


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", CHOSEN)
def test_layouts_are_as_near_to_one_rank_of_their_own_precision(layout, model, dtype, recorded):
    assert_near(recorded[layout, model, dtype], of_one_rank(model, dtype), UNIT[dtype])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ["zero1 2", "fsdp 2"])
def test_bf16_data_parallelism_only_reorders_sums_in_fp32(layout, model, recorded):
    found, one = recorded[layout, model, "bf16"], of_one_rank(model, "bf16")
    assert worst_gradient(found, one) <= 8 * 2.0**-24
    assert worst(found.losses, one.losses) <= 8 * 2.0**-24


class OnCPU(TorchFunctionMode):
    """What asks for a CUDA device gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.mark.slow
@settings(deadline=None)  # the first call imports megatron-core
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1.0, 2.0**14]))
def test_the_scale_moves_exactly_as_megatron_cores(overflows, window, hysteresis, least):
    scalers = pytest.importorskip("megatron.core.optimizer.grad_scaler")
    config = PrecisionConfig(
        dtype="fp16", initial_loss_scale=2.0**16, min_loss_scale=least, loss_scale_window=window, hysteresis=hysteresis
    )
    ours = LossScale.initial(config)
    with OnCPU():
        theirs = scalers.DynamicGradScaler(
            initial_scale=2.0**16,
            min_scale=least,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=window,
            hysteresis=hysteresis,
        )
        for overflow in overflows:
            ours.after_step(config, finite=not overflow)
            theirs.update(torch.tensor([overflow]))
            assert ours.value == float(theirs.scale)


def test_a_scripted_sequence_of_overflows():
    config = PrecisionConfig(dtype="fp16", initial_loss_scale=2.0**32, loss_scale_window=3, hysteresis=2)
    scale, powers = LossScale.initial(config), []
    for told in "x.xx...xx":
        scale.after_step(config, finite=told == ".")
        powers.append(int(torch.tensor(scale.value).log2()))
    assert powers == [32, 32, 31, 30, 30, 30, 31, 31, 30]


def test_the_scale_never_falls_below_its_least_value():
    config = PrecisionConfig(dtype="fp16", initial_loss_scale=4.0, min_loss_scale=2.0, hysteresis=1)
    scale = LossScale.initial(config)
    for _ in range(5):
        scale.after_step(config, finite=False)
    assert scale.value == 2.0
    assert not scale.searches(config), "an overflow at the least scale is an error"


@pytest.mark.parametrize("precision", [{"dtype": "fp16", "loss_scale": 128.0}, {"dtype": "bf16"}, {"dtype": "fp32"}])
@pytest.mark.parametrize("finite", [True, False])
def test_a_fixed_scale_never_moves(precision, finite):
    config = PrecisionConfig(**precision, loss_scale_window=1, hysteresis=1)
    scale = LossScale.initial(config)
    scale.after_step(config, finite=finite)
    assert scale.value == precision.get("loss_scale", 1.0)
    assert not scale.searches(config)


def test_a_fixed_scale_does_not_show_in_the_gradients():
    found = [
        measure(run_config(precision={"dtype": "fp16", "loss_scale": scale}, batch=BATCH), 1, steps=1)
        for scale in (64.0, 128.0)
    ]
    assert worst_gradient(*found) <= UNIT["fp16"], "only subnormal numbers know of it"


def overflowing(axis: Axis, parallel: dict[str, Any]) -> list[tuple[bool, bool, float]]:
    """For each step: whether the norm was finite, whether this rank's main parameters moved, and the scale after it."""
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**24, "hysteresis": 2, "loss_scale_window": 2}
    config, told = run_config(parallel=parallel, precision=precision, batch=BATCH), []
    state = state_of(config, axis.size)
    for number in range(14):
        before = [main_param.detach().clone() for main_param in state.data_parallel.main_params.values()]
        found = step(config, state, number)
        state.loss_scale.after_step(config.precision, finite=bool(found.norm.isfinite()))
        moved = not all(
            torch.equal(a, b) for a, b in zip(before, state.data_parallel.main_params.values(), strict=True)
        )
        told.append((bool(found.norm.isfinite()), moved, state.loss_scale.value))
    return told


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1 2", "fsdp 2", "tensor 2, sequence"])
def test_an_overflow_skips_the_step_on_all_ranks_alike(layout):
    here, there = run_ranks(2, overflowing, LAYOUTS[layout][1])
    assert here == there
    finite = [good for good, _, _ in here]
    assert not finite[0], "the scale begins where it overflows"
    assert any(finite), "and comes down"
    assert [moved for _, moved, _ in here] == finite, "exactly the finite steps moved weights"


def test_the_scale_and_its_history_are_saved_and_restored(tmp_path):
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**24, "loss_scale_window": 4}
    config = run_config(precision=precision, batch=BATCH)
    state = state_of(config)
    for finite in (False, False, True, True):
        step(config, state)
        state.loss_scale.after_step(config.precision, finite=finite)
    assert state.loss_scale == LossScale(2.0**23, good_steps=2, overflows_left=0)
    save_state(config, state, tmp_path)
    resumed = state_of(config)
    resumed.load(resolve(tmp_path), config.precision)
    assert resumed.loss_scale == state.loss_scale


def clipped(axis: Axis, layouts: list[str], clip_norm: float) -> list[tuple[float, float, float]]:
    """The norm found, that of the whole gradient, and that of the step which plain descent then takes."""
    told = []
    for layout in layouts:
        config = run_config("repeated-groups", parallel=LAYOUTS[layout][1])
        state = state_of(config, axis.size)
        gradients(config, state, batches_of(config, state.data_parallel.mesh))
        whole, before = gather_state(state, "gradient"), gather_state(state, "weight")
        descent = torch.optim.SGD(state.data_parallel.main_params.values(), lr=1.0)
        found = update(state.data_parallel, descent, lr=1.0, clip_norm=clip_norm)
        after = gather_state(state, "weight")
        told.append((float(found.norm), norm(whole), norm({n: before[n] - after[n] for n in before})))
    return told


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5


@pytest.fixture(scope="session")
def all_clipped(compute_once) -> dict[str, tuple[float, float, float]]:
    """What `clipped` finds at a norm of 0.01, by layout."""

    def run() -> dict[str, tuple[float, float, float]]:
        found = {}
        for ranks in (2, 4):
            layouts = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
            found |= dict(zip(layouts, run_ranks(ranks, clipped, layouts, 0.01)[0], strict=True))
        return found

    return compute_once("precision, clipped", run)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_clipped_by_its_true_norm(layout, all_clipped):
    found, true, taken = all_clipped[layout]
    assert found == pytest.approx(true, rel=1e-12)
    assert taken == pytest.approx(0.01 * true / (true + 1e-6), rel=1e-12)


@pytest.mark.parametrize("clip_norm", [0.0, 1e9])
def test_a_norm_of_zero_or_a_large_one_clips_nothing(clip_norm):
    ((_, true, taken),) = clipped_on_one_rank(clip_norm)
    assert taken == pytest.approx(true, rel=1e-12)


def clipped_on_one_rank(clip_norm: float) -> list[tuple[float, float, float]]:
    return run_ranks(2, clipped, ["zero1 2"], clip_norm)[0]
