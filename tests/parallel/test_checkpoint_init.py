"""`checkpoint.init` fills any layout from a stream of tensors, of which it keeps no more than one parameter needs."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layouts import EXPERT_LAYOUTS, LAYOUTS, run_config
from mt_cli.train import compose
from mt_core.checkpoint.native import write_model
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.verification.measure import NamedTensors, gather_state
from mt_core.verification.ranks import run_ranks
from rank_states import state_of

FROZEN = {"optim": {"trainable": ("layers.*.attn.*",)}}
LARGEST = "layers.0.attn.q.weight", "layers.0.attn.k.weight", "layers.0.attn.v.weight"
"""The parts of the parameter that needs most tensors at a time."""


def make_config(layout: str | None = None, **sections: Any) -> Any:
    parallel = (LAYOUTS | EXPERT_LAYOUTS)[layout][1] if layout else {}
    return run_config("experts" if layout in EXPERT_LAYOUTS else "gqa", parallel=parallel, **sections)


def make_tensor(config: Any, name: str) -> Tensor:
    """Numbers that differ between tensors and between elements."""
    shapes = config.model.canonical_shapes()
    first = 1000.0 * [*shapes].index(name)
    return torch.arange(torch.Size(shapes[name]).numel(), dtype=torch.float64).view(shapes[name]) + first


class Checkpoint:
    """A loader that counts the tensors of its stream that are still in memory."""

    def __init__(self, config: Any) -> None:
        self.run, self.alive, self.peak = config, set(), set()

    def config(self) -> Any:
        return self.run.model

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.run.model.canonical_shapes():
            yield name, self.make_tracked(name)

    def make_tracked(self, name: str) -> Tensor:
        tensor = make_tensor(self.run, name)
        self.alive.add(name)
        weakref.finalize(tensor, self.alive.remove, name)
        self.peak = max(self.peak, {*self.alive}, key=len)
        return tensor


def test_no_more_tensors_are_in_memory_than_one_parameter_is_fused_of(monkeypatch):
    config = make_config()
    checkpoint, state = Checkpoint(config), state_of(config)
    monkeypatch.setattr(compose, "open_checkpoint", lambda path, name, options: checkpoint)
    compose.load_weights(state, "native:anywhere", seed=0)
    assert checkpoint.peak == {*LARGEST}
    assert not checkpoint.alive
    weights = gather_state(state, "weight")
    assert all(torch.equal(weights[name], make_tensor(config, name)) for name in config.model.canonical_shapes())


def fill_ranks(axis: Axis, layout: str, sections: dict[str, Any], path: Path) -> NamedTensors:
    state = state_of(make_config(layout, **sections), axis.size)
    compose.load_weights(state, f"native:{path}", seed=0)
    state.data_parallel.wait()
    return gather_state(state, "weight")


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, FROZEN], ids=["all trained", "some frozen"])
@pytest.mark.parametrize(
    "layout", ["tensor 2, sequence", "zero1 2", "replicate 2", "fsdp 2", "expert 2", "expert 2 × fsdp 2"]
)
def test_every_layout_is_filled(layout, sections, tmp_path):
    config = make_config(layout, **sections)
    names = config.model.canonical_shapes()
    write_model(tmp_path, config.model.model_dump(mode="json"), ((n, make_tensor(config, n)) for n in names))
    (weights, *_) = run_ranks((LAYOUTS | EXPERT_LAYOUTS)[layout][0], fill_ranks, layout, sections, tmp_path)
    assert weights.keys() == names.keys()
    assert all(torch.equal(weights[name], make_tensor(config, name)) for name in names)


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(tmp_path):
    config = make_config()
    shapes = config.model.canonical_shapes()
    tensors = {name: make_tensor(config, name) for name in shapes if name != "norm.weight"}
    tensors["layers.0.attn.out.weight"] = torch.zeros(2, 2)
    tensors["other.weight"] = torch.zeros(1)
    write_model(tmp_path, config.model.model_dump(mode="json"), tensors.items())
    with pytest.raises(MtError) as caught:
        compose.load_weights(state_of(config), f"native:{tmp_path}", seed=0)
    assert sorted(str(problem) for problem in caught.value.problems) == [
        f"layers.0.attn.out.weight: tensor has shape (2, 2); the model needs {shapes['layers.0.attn.out.weight']}",
        f"norm.weight: tensor is missing; shape {shapes['norm.weight']}",
        "other.weight: unexpected tensor of shape (1,); the model has no tensor of this name",
    ]
