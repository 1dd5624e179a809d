"""Gradients that are not finite: the run ends with the step, the rank and a parameter, or leaves the step out.

One token id is poisoned: its row of the embedding is infinite. One rank reads it, in the third step, and so has a loss
that is not a number; the others hear of it only through the gradients.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from layouts import LAYOUTS, run_config
from mt_core.checkpoint.async_save import AsyncWriter
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.native import resolve, steps
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.errors import MtError
from mt_core.training.batch_inputs import Batch
from mt_core.training.loop import Run, train
from mt_core.training.signals import GracefulStop
from mt_core.training.state import TrainState
from mt_core.verification.measure import random_batches
from mt_core.verification.ranks import run_ranks
from rank_states import CPU, state_of

POISONED, BAD_STEP, STEPS = 60, 3, 6


class Weights:
    """A sink that keeps this rank's main parameters, and what was written, after each step."""

    name: ClassVar[str] = "weights"

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.main_params: dict[int, list[Tensor]] = {}
        self.lines: list[Mapping[str, Any]] = []

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Copy them."""
        self.lines.append(dict(metrics))
        self.main_params[int(metrics["step"])] = [
            m.detach().clone() for m in self.state.data_parallel.main_params.values()
        ]

    def close(self) -> None:
        """Nothing is open."""


def config_of(policy: str, **sections: Any) -> Any:
    values = {
        "optim": {"nonfinite": policy, "lr": 1e-2},
        "precision": {"dtype": "fp32"},
        "train": {"steps": STEPS},
        "lr_schedule": {"decay": "constant"},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
        "batch": {"micro_batch": 2, "global_batch": 4},
    }
    return run_config(**(values | sections))


def data(config: Any, mesh: Mesh) -> Iterator[Batch]:
    """Batches of all steps; the last data rank finds the poisoned token at the end of a sequence of the bad step."""
    for step in range(STEPS):
        for batch in random_batches(config, mesh, step, documents=False):
            tokens = batch["tokens"].clamp(max=POISONED - 1)
            if step + 1 == BAD_STEP and mesh.data.rank == mesh.data.size - 1:
                tokens[-1, -1] = POISONED
            yield {**batch, "tokens": tokens}


def poisoned(state: TrainState, seed: int) -> TrainState:
    """Fill the weights, one row of them infinite."""

    def get(name: str) -> Tensor:
        tensor = state.model.initial(seed, name).clone()
        if name == "embed.weight":
            tensor[POISONED] = torch.inf
        return tensor

    state.fill(get)
    return state


def trained(config: Any, folder: Path, ranks: int = 1, *, poison: bool = True) -> Weights:
    """Run the loop as `mt train` does, as one of `ranks` joined ranks."""
    state = state_of(config, ranks)
    if poison:
        poisoned(state, config.runtime.seed)
    mesh, sink = state.data_parallel.mesh, Weights(state)
    run = Run(
        config=config,
        state=state,
        mesh=mesh,
        device=CPU,
        train_batches=data(config, mesh),
        valid_batches={},
        sinks=[sink],
        writer=AsyncWriter(folder, Ranks(mesh.world.rank, mesh.world.size, "test")),
        global_batch=lambda samples: config.batch.global_batch,
    )
    assert train(run, GracefulStop())
    return sink


def on_rank(
    axis: Axis, policy: str, parallel: dict[str, Any], folder: Path, model: str = "gqa"
) -> tuple[str, list[bool]]:
    """Standard error, and for each step from the second on whether it moved this rank's weights."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        sink = trained(config_of(policy, parallel=parallel, model=model), folder, axis.size)
    return stderr.getvalue(), moved(sink)


def moved(sink: Weights) -> list[bool]:
    """Of each step from the second on, whether it moved the weights."""
    pairs = [(sink.main_params[number - 1], sink.main_params[number]) for number in range(2, STEPS + 1)]
    return [not all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairs]


def assert_loads(folder: Path, step: int, model: str = "gqa") -> None:
    """The last committed checkpoint is that of `step`, and a fresh state takes it."""
    assert [path.name for path in steps(folder)][-1] == f"step-{step:08d}"
    config = config_of("stop", model=model)
    state = state_of(config)
    state.load(resolve(folder), config.precision)
    assert state.position.step == step


def test_stop_names_the_step_the_rank_and_the_first_bad_parameter(tmp_path):
    expected = "gradient: not finite in step 3: the loss is nan on rank 0; first bad gradient: embed.weight (rank 0)"
    with pytest.raises(MtError, match=re.escape(expected)) as refusal:
        trained(config_of("stop"), tmp_path)
    assert "optim.nonfinite = skip leaves such steps out" in str(refusal.value)
    assert_loads(tmp_path, 2)


@pytest.mark.parametrize("layout", ["replicate 2", "zero1 2", "fsdp 2"])
def test_stop_names_the_rank_whose_loss_it_was_on_every_rank(layout, tmp_path):
    with pytest.raises(
        MtError, match=r"not finite in step 3: the loss is nan on rank 1; first bad gradient: \S+weight"
    ):
        run_ranks(2, on_rank, "stop", LAYOUTS[layout][1], tmp_path)
    assert_loads(tmp_path, 2)


def test_the_rank_is_named_under_tensor_parallelism_too(tmp_path):
    with pytest.raises(MtError, match=r"step 3: the loss is nan on rank 0, nan on rank 1; first bad gradient"):
        run_ranks(2, on_rank, "stop", {"tensor": 2}, tmp_path)


def test_a_token_that_spoils_another_rank_s_experts_is_told_by_the_rank_that_read_it(tmp_path):
    parallel = {"expert": 2}
    (told, here), (_, there) = run_ranks(2, on_rank, "skip", parallel, tmp_path, "experts")
    assert here == there == [number != BAD_STEP for number in range(2, STEPS + 1)]
    assert re.fullmatch(r"mt: left out step 3: the loss is nan on rank 1; first bad gradient: \S+ \(rank 0\)\n", told)
    assert_loads(tmp_path, STEPS, "experts")


def test_a_bad_step_is_found_before_a_checkpoint_is_written_however_rarely_lines_are(tmp_path):
    config = config_of("stop", log={"every": 100}, checkpoint={"every": 4})
    with pytest.raises(MtError, match="not finite in step 3"):
        trained(config, tmp_path)
    assert steps(tmp_path) == []


def test_skip_leaves_the_step_out_and_goes_on(tmp_path, capsys):
    sink = trained(config_of("skip"), tmp_path)
    assert moved(sink) == [number != BAD_STEP for number in range(2, STEPS + 1)]
    told = capsys.readouterr().err.splitlines()
    assert told == ["mt: left out step 3: the loss is nan on rank 0; first bad gradient: embed.weight (rank 0)"]
    assert_loads(tmp_path, STEPS)


@pytest.mark.parametrize("layout", ["replicate 2", "zero1 2", "fsdp 2"])
def test_skip_leaves_the_step_out_on_every_rank_and_tells_it_once(layout, tmp_path):
    (told, here), (silence, there) = run_ranks(2, on_rank, "skip", LAYOUTS[layout][1], tmp_path)
    assert here == there == [number != BAD_STEP for number in range(2, STEPS + 1)]
    assert re.fullmatch(r"mt: left out step 3: the loss is nan on rank 1; first bad gradient: \S+ \(rank \d\)\n", told)
    assert silence == ""
    assert_loads(tmp_path, STEPS)


def test_a_skipped_step_leaves_the_moments_and_their_count_alone(tmp_path):
    state = trained(config_of("skip"), tmp_path).state
    assert {float(moments["step"]) for moments in state.optimizer.state.values()} == {STEPS - 1}
    assert all(moments["exp_avg"].isfinite().all() for moments in state.optimizer.state.values())


def test_gradients_that_overflow_under_a_fixed_scale_are_told_with_a_finite_loss(tmp_path):
    config = config_of("stop", precision={"dtype": "fp16", "loss_scale": 2.0**24})
    with pytest.raises(MtError, match=r"not finite in step 1: the loss is finite; first bad gradient: embed\.weight"):
        trained(config, tmp_path, poison=False)


def test_a_loss_scale_that_searches_its_value_is_no_error(tmp_path, capsys):
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**18, "hysteresis": 1}
    sink = trained(config_of("stop", precision=precision), tmp_path, poison=False)
    scales = [line["loss_scale"] for line in sink.lines if "loss_scale" in line]
    assert scales[0] == 2.0**18
    assert scales[1] == 2.0**17
    assert capsys.readouterr().err == ""


def test_an_overflow_at_the_least_loss_scale_is_an_error(tmp_path):
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**24, "min_loss_scale": 2.0**23, "hysteresis": 1}
    with pytest.raises(MtError, match="not finite in step 2: the loss is finite"):
        trained(config_of("stop", precision=precision), tmp_path, poison=False)
