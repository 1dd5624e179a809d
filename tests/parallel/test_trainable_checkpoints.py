"""Checkpoints of runs with frozen parameters: weights are whole, optimizer state is that of trained ones alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layouts import EXPERT_LAYOUTS, LAYOUTS, run_config
from mt_cli.verify.record import record
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.errors import MtError
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record, measure

pytestmark = pytest.mark.slow

RTOL = 1e-12
ONE_NORM = ("norm.*",)
"""32 elements, fewer than a bucket is padded to: with ZeRO-1 the second rank has no part of any main parameter."""


def config_of(layout: str | None, trainable: tuple[str, ...], **sections: Any) -> Any:
    parallel = (LAYOUTS | EXPERT_LAYOUTS)[layout][1] if layout else {}
    optim = {"lr": 1e-2, "eps": 1e-4, "trainable": trainable}
    model = "experts" if layout in EXPERT_LAYOUTS else "repeated-groups"
    return run_config(sections.pop("model", model), parallel=parallel, optim=optim, **sections)


def ranks_of(layout: str) -> int:
    return (LAYOUTS | EXPERT_LAYOUTS)[layout][0]


def contents(step: Path, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor[...] for name, tensor in open_part(step / part).items()}


def last_step(whole: Record) -> Record:
    return Record(whole.losses[2:], whole.norms[2:], whole.gradients[2:], whole.weights)


@pytest.mark.parametrize("trainable", [("layers.*.attn.*",), ONE_NORM])
@pytest.mark.parametrize(
    ("saving", "going_on"),
    [
        ("zero1 2", "tensor 2, sequence"),
        ("fsdp 2", None),
        ("zero1 2 × tensor 2, sequence", "fsdp 2"),
        ("fsdp 2 in replicas 2", "zero1 2"),
    ],
)
def test_a_run_goes_on_under_another_layout(saving, going_on, trainable, tmp_path):
    record(config_of(saving, trainable), ranks_of(saving), steps=2, save=tmp_path)
    config, ranks = config_of(going_on, trainable), ranks_of(going_on) if going_on else 1
    resumed = record(config, ranks, steps=1, start=resolve(tmp_path))
    unbroken = last_step(measure(config_of(None, trainable), 1, steps=3))
    assert max(d.relative for d in compare_records(resumed, unbroken)) <= RTOL


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("layout", ["zero1 2", "fsdp 2", "zero1 2 in replicas 2", "expert 2 × zero1 2"])
def test_a_layout_saves_every_weight_and_state_of_trained_parameters_alone(layout, dtype, tmp_path):
    model = config_of(layout, ONE_NORM).model
    precision = {"dtype": dtype}
    record(config_of(layout, ONE_NORM, precision=precision), ranks_of(layout), steps=1, save=tmp_path / "ranks")
    kind = "experts" if layout in EXPERT_LAYOUTS else "repeated-groups"
    measure(config_of(None, ONE_NORM, precision=precision, model=kind), 1, steps=1, save=tmp_path / "one")
    ours, one = resolve(tmp_path / "ranks"), resolve(tmp_path / "one")
    weights, reference = contents(ours, "model"), contents(one, "model")
    assert weights.keys() == model.canonical_shapes().keys()
    frozen = weights.keys() - {"norm.weight"}
    assert all(torch.equal(weights[name], reference[name]) for name in frozen)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float64}
    state = contents(ours, "optim")
    main_params = {"master.norm.weight"} if dtype == "bf16" else set()
    assert state.keys() == {"exp_avg.norm.weight", "exp_avg_sq.norm.weight", "step.norm.weight"} | main_params
    assert {name: t.dtype for name, t in state.items()} == {n: t.dtype for n, t in contents(one, "optim").items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("saved")
    measure(config_of(None, ("layers.0.attn.*", "norm.*")), 1, steps=1, save=run)
    return resolve(run)


def test_a_checkpoint_of_other_trainable_parameters_is_refused(saved):
    allowed = f"keep the patterns of that run, or start a new one with checkpoint.init = native:{saved}"
    with pytest.raises(MtError) as caught:
        measure(config_of(None, ("layers.1.mlp.*", "norm.*")), 1, steps=1, start=saved)
    assert [str(problem) for problem in caught.value.problems] == [
        "optim.trainable: layers.1.mlp.down.bias and 5 more without optimizer state in the checkpoint; " + allowed,
        "optim.trainable: layers.0.attn.k.bias and 6 more with optimizer state in the checkpoint would be frozen; "
        + allowed,
    ]


def test_other_patterns_for_the_same_parameters_are_no_change(saved):
    assert len(
        measure(config_of(None, ("norm.weight", "layers.0.attn.[qkv].*", "*.0.*.out.*")), 1, steps=1, start=saved).norms
    )
