"""Layers bring their own costs and sizes: planning and the rules of layouts count what a model's configuration says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from core.planning.configs import h200, run
from mt_core.distributed.topology import ParallelDims
from mt_core.parallel.cuts import CutSize
from mt_core.parallel.layout import Layout, axis_problems
from mt_core.planning.activations import count_activations
from mt_core.planning.communication import transfers
from mt_core.planning.compute import compute
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor, get_layer_costs


@dataclass(frozen=True)
class StateSpace:
    """A model whose layers mt-core has never seen: it answers as mixtures and attention do."""

    base: Any
    layers: int = 4
    hidden_size: int = 64
    vocab_size: int = 128

    def layer_costs(self, shape: RankShape, layers: Sequence[int] | None = None, /) -> LayerCosts:
        state = SavedTensor("states of all chunks", shape.tokens * 16 * shape.element_size / shape.tensor, core=True)
        projected = SavedTensor("projected input", shape.tokens * 128 * shape.element_size / shape.tensor)
        return LayerCosts(saved=(projected, state), gradient_bytes=512, forward_bytes=1e9, tensor_reductions=1)

    def cut_sizes(self) -> list[CutSize]:
        return [CutSize("model.mixer.channels", 24)]

    def canonical_shapes(self) -> Any:
        return self.base.canonical_shapes()

    def canonical_cuts(self) -> Any:
        return self.base.canonical_cuts()

    def flops_per_token(self, sequence: int) -> float:
        return self.layer_flops(sequence, range(self.layers)) + 6e5

    def layer_flops(self, sequence: int, layers: Sequence[int], /) -> float:
        return len(layers) * (1e6 + sequence)


def plan_state_space(*overrides: str, tensor: int = 1) -> tuple[Any, Layout]:
    config = run("batch.global_batch=4", "data.seq_length=512", *overrides)
    config = config.model_construct(**{**dict(config), "model": StateSpace(config.model)})
    return config, Layout(ParallelDims(tensor=tensor), micro_batch=2)


def test_a_new_layer_s_saved_tensors_are_counted():
    config, layout = plan_state_space()
    saved = 2 * 512 * (128 + 16) * 2
    assert count_activations(config, layout).saved == 4 * saved
    _, halved = plan_state_space(tensor=2)
    assert count_activations(config, halved).saved == 4 * saved / 2


def test_a_new_layer_s_traffic_and_reductions_are_counted():
    config, layout = plan_state_space(tensor=2)
    assert compute(config, layout, h200()).kernels_forward == pytest.approx(4 * 1e9 / (h200().copy_tb_s * 1e12))
    (forward,) = [t for t in transfers(config, layout) if (t.axis, t.phase) == ("tensor", "forward")]
    assert forward.calls == 4 + 1  # one result a layer, and that of the embedding


def test_a_new_layer_s_sizes_limit_the_ranks_that_divide_it():
    config, layout = plan_state_space(tensor=5)
    assert [str(problem) for problem in axis_problems(config, layout)] == [
        "parallel.tensor: 5 does not divide model.mixer.channels 24; allowed: 1, 2, 3, 4, 6, 8, 12 or 24"
    ]


def test_costs_of_parts_add_up():
    one = LayerCosts(saved=(SavedTensor("x", 3.0),), forward_bytes=5, tensor_reductions=1)
    other = LayerCosts(saved=(SavedTensor("y", 4.0, core=True),), forward_bytes=7, routed_bytes=2)
    total = one + other
    assert [tensor.name for tensor in total.saved] == ["x", "y"]
    assert (total.forward_bytes, total.tensor_reductions, total.routed_bytes) == (12, 1, 2)


def test_the_costs_of_a_block_are_those_of_its_parts():
    config = run("batch.global_batch=4")
    costs = get_layer_costs(config, Layout(ParallelDims(tensor=4), sequence=True))
    assert costs.tensor_reductions == 2
    assert len([tensor for tensor in costs.saved if tensor.core]) == 1


@pytest.mark.parametrize(
    ("size", "ranks", "fits", "local"),
    [
        (CutSize("heads", 8), 4, True, 2),
        (CutSize("heads", 8), 16, False, 0),
        (CutSize("num_kv_heads", 8, repeats=True), 16, True, 1),
        (CutSize("num_kv_heads", 8, repeats=True), 12, False, 1),
    ],
)
def test_sizes_fit_whole_slices_or_repeated_ones(size, ranks, fits, local):
    assert (size.fits(ranks), size.local(ranks)) == (fits, local)
