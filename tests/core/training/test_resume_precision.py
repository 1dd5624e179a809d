"""Going on in another precision: masters and moments are cast, and the loss scale is what the new run configures."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import LAYOUTS, run_config
from mt_core.checkpoint.native import resolve
from mt_core.config.sections import PrecisionConfig
from mt_core.distributed.mesh import Axis
from mt_core.training.loss_scale import LossScale
from mt_core.training.state import TrainState
from mt_core.verification.measure import save_state
from mt_core.verification.ranks import run_ranks
from rank_states import batches_of, gradients, state_of, step

UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of one rounding."""
SCALE = 64.0
OVERFLOWED = LossScale(16.0, good_steps=1, overflows_left=1)
"""The scale of the saved fp16 run, as if it had overflowed."""


def config_of(dtype: str, parallel: dict[str, Any] | None = None, **precision: Any) -> Any:
    precision = {"dtype": dtype, "initial_loss_scale": SCALE, **precision}
    return run_config(precision=precision, parallel=parallel or {}, batch={"micro_batch": 2, "global_batch": 8})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """The checkpoint of two steps in each precision."""
    folders = {}
    for dtype in UNIT:
        config, folder = config_of(dtype), tmp_path_factory.mktemp(dtype)
        state = state_of(config)
        for number in range(2):
            step(config, state, number)
            state.position.step += 1
        if dtype == "fp16":
            state.loss_scale.value, state.loss_scale.good_steps, state.loss_scale.overflows_left = 16.0, 1, 1
        save_state(config, state, folder)
        folders[dtype] = resolve(folder)
    return folders


def resume(config: Any, start: Path, ranks: int = 1) -> TrainState:
    state = state_of(config, ranks)
    state.load(start, config.precision)
    return state


def main_state(state: TrainState) -> dict[str, torch.Tensor]:
    """Main parameters and the optimizer's state of one rank, by name."""
    mains = state.data_parallel.main_params
    moments = {f"{key}.{name}": value for name, p in mains.items() for key, value in state.optimizer.state[p].items()}
    return {**mains, **moments}


@pytest.mark.parametrize(("old", "new"), [*product(UNIT, UNIT)])
def test_a_run_goes_on_in_another_precision(old, new, saved):
    before, config = resume(config_of(old), saved[old]), config_of(new)
    state = resume(config, saved[old])
    wide = torch.float64 if new == "fp64" else torch.float32
    expected, actual = main_state(before), main_state(state)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        cast = tensor if name.startswith("step.") else tensor.to(wide)
        assert actual[name].dtype == cast.dtype, name
        assert torch.equal(actual[name], cast), name
    loss = gradients(config, state, batches_of(config, state.data_parallel.mesh, 2))
    reference = gradients(config_of(old), before, batches_of(config, before.data_parallel.mesh, 2))
    assert float(loss) == pytest.approx(float(reference), rel=8 * max(UNIT[old], UNIT[new]))
    assert step(config, state, 2).norm.isfinite()
    for name in state.data_parallel.main_params:
        assert not torch.equal(actual[name], expected[name].to(wide)), f"{name} is trained"


@pytest.mark.parametrize(("old", "new"), [*product(UNIT, UNIT)])
def test_the_loss_scale_is_the_saved_one_between_fp16_runs_and_begins_afresh_otherwise(old, new, saved):
    expected = OVERFLOWED if (old, new) == ("fp16", "fp16") else LossScale.initial(config_of(new).precision)
    assert resume(config_of(new), saved[old]).loss_scale == expected


def test_a_changed_loss_scale_is_obeyed(saved):
    fixed = resume(config_of("fp16", loss_scale=128.0), saved["fp16"])
    assert fixed.loss_scale == LossScale.initial(PrecisionConfig(dtype="fp16", loss_scale=128.0))
    assert resume(config_of("fp16", min_loss_scale=32.0), saved["fp16"]).loss_scale.value == 32.0
    assert resume(config_of("fp16", hysteresis=1, initial_loss_scale=2.0), saved["fp16"]).loss_scale == OVERFLOWED


def test_a_scale_that_was_fixed_is_no_start_for_one_that_follows_the_gradients(tmp_path):
    config = config_of("fp16", loss_scale=128.0)
    save_state(config, state_of(config), tmp_path)
    state = resume(config_of("fp16"), resolve(tmp_path))
    assert state.loss_scale == LossScale(SCALE, overflows_left=config.precision.hysteresis)


def test_a_shorter_window_is_over_at_the_next_finite_step():
    config, scale = PrecisionConfig(dtype="fp16", loss_scale_window=3), LossScale(4.0, good_steps=7, overflows_left=2)
    scale.after_step(config, finite=True)
    assert (scale.value, scale.good_steps) == (8.0, 0)


PAIRS = [("fp64", "fp32"), ("fp32", "fp64"), ("bf16", "fp64"), ("fp64", "fp16")]


def resumed_parts(axis: Axis, layout: str, saved: dict[str, Path]) -> list[dict[str, torch.Tensor]]:
    """What this rank would save of each pair, right after it has resumed; then a step must succeed."""
    told = []
    for old, new in PAIRS:
        config = config_of(new, LAYOUTS[layout][1])
        state = resume(config, saved[old], axis.size)
        tensors = {f"{part}.{name}": t.clone() for part, all_ in state.parts().items() for name, t in all_}
        assert step(config, state, 2).norm.isfinite()
        told.append(tensors)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero1 2", "fsdp 2"])
def test_a_sharded_state_is_cast_as_a_whole_one_is(layout, saved):
    ranks = run_ranks(2, resumed_parts, layout, saved)
    for number, (old, new) in enumerate(PAIRS):
        parts = resume(config_of(new), saved[old]).parts()
        whole = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors}
        sharded = ranks[0][number] | ranks[1][number]
        assert sharded.keys() == whole.keys()
        assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items()), (old, new)
