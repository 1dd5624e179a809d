"""Memory of one GPU by category. All ranks are alike: no axis gives one more than another, if experts are used equally.

A step has two high points, and the higher one counts: the turn from forward to backward, where all activations and the
logits exist, and a layer's backward pass, where a group of layers may have been computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mt_core.config.run_config import PlannedRun
from mt_core.parallel.layout import Layout
from mt_core.planning.activations import count_activations
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.layer_costs import count_tokens, get_layer_costs
from mt_core.planning.parameters import count_parameters
from mt_core.planning.precision import BYTES, state_bytes

GIB = 2**30
Category = Literal[
    "weights", "gradients", "master weights", "moments", "activations", "logits", "recompute", "buffers", "reserved"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True)
class Item:
    """A part of the memory."""

    category: Category
    what: str
    size: float
    """Bytes."""


def memory(
    config: PlannedRun, layout: Layout, profile: Profile, working: Sequence[Item] | None = None
) -> list[Item]:  # fmt: skip
    """What one GPU holds at the highest point of a step, largest categories of the state first.

    `working` stands for the activations of one micro-batch where another number is in flight.
    """
    working = count_working(config, layout) if working is None else working
    items = [*_state(config, layout), *working, *_buffers(config, layout)]
    reserved = Item("reserved", "CUDA, NCCL, libraries (estimate)", profile.reserved_gib * GIB)
    return [item for item in (*items, reserved) if item.size]


def total(items: list[Item]) -> float:
    """Bytes of all items."""
    return sum(item.size for item in items)


def by_category(items: list[Item]) -> dict[Category, float]:
    """Bytes of each category that occurs, in the order of `CATEGORIES`."""
    sums: dict[Category, float] = {}
    for category in CATEGORIES:
        if size := sum(item.size for item in items if item.category == category):
            sums[category] = size
    return sums


def _state(config: PlannedRun, layout: Layout) -> list[Item]:
    """Parameters and what the optimizer keeps: 18, 20 or 16 bytes each (precision.py), parts of it shared."""
    dims, each = layout.dims, state_bytes(config.precision)
    count = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor)
    shared = count.shared(dims)
    optimizer = [
        Item("gradients", "fp32 copies for the optimizer", each.wide_gradient * shared),
        Item("master weights", "weights that are updated", each.master * shared),
        Item("moments", "Adam's two moments", each.moments * shared),
    ]
    if layout.sharding != "fsdp":
        return [
            Item("weights", "weights", each.weight * count.total),
            Item("gradients", "sums over micro-batches", each.gradient * count.total),
            *optimizer,
        ]
    return [
        Item("weights", "outside the layers, gathered", each.weight * count.ends),
        Item("weights", "one layer gathered, one fetched", 2 * each.weight * count.block),
        Item("gradients", "this rank's part", each.wide * shared),
        Item("gradients", "of one layer, before reduction", (each.weight + each.wide) * count.block),
        Item("master weights", "this rank's part of the weights", each.wide * shared),
        Item("moments", "Adam's two moments", each.moments * shared),
    ]


def count_working(config: PlannedRun, layout: Layout) -> list[Item]:
    """Activations of one micro-batch that are kept, and what exists beside them at the higher of the two points."""
    activations = count_activations(config, layout)
    saved = Item("activations", "kept for the backward pass", activations.saved)
    if activations.loss >= activations.backward:
        return [saved, Item("logits", "logits and gradients, whole", activations.loss)]
    return [saved, Item("recompute", "layers computed again, gradients", activations.backward)]


def _buffers(config: PlannedRun, layout: Layout) -> list[Item]:
    dims, each, costs = layout.dims, state_bytes(config.precision), get_layer_costs(config, layout)
    count = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor)
    whole = count_tokens(config, layout) * config.model.hidden_size * BYTES[config.precision.dtype]
    gathers = layout.token_dispatcher == "all_gather"
    exchanged = 2 * (dims.expert * costs.mixed_bytes if gathers else costs.routed_bytes)
    keys = costs.kv_bytes * {"ring": 2, "all_gather": dims.context, "all_to_all": 1}[layout.cp_comm_type]
    return [
        Item(
            "buffers",
            "largest gradient, not yet added",
            each.weight * count.largest if layout.sharding != "fsdp" else 0,
        ),
        Item("buffers", "gathered sequence, its gradient", 2 * whole if layout.sequence else 0),
        Item("buffers", "keys, values of other ranks", keys if dims.context > 1 else 0),
        Item("buffers", "rows on their way to experts", exchanged if dims.expert > 1 else 0),
    ]
