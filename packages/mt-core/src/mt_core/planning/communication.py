"""What one GPU sends in one step: each collective with its size, how often, and what it hides behind.

Bytes sent follow the ring algorithm: (n − 1) / n of the data for a gather, a scattered reduction or an exchange, twice
that for an all-reduce. A collective's time is bytes sent ÷ the link's bus bandwidth, and a latency for each call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mt_core.config.run_config import PlannedRun
from mt_core.parallel.layout import Layout
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.layer_costs import count_tokens, get_layer_costs
from mt_core.planning.parameters import count_parameters
from mt_core.planning.precision import BYTES, state_bytes
from mt_core.planning.stage_model import count_ends

Phase = Literal["forward", "backward", "reduce", "gather"]
"""In every micro-batch's forward or backward pass; once a step: after the last backward, before the first forward."""

SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "send": lambda n: 1.0,
}
"""Bytes that one of n ranks sends, per byte of the whole tensor."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of collective in a step."""

    axis: str
    ranks: int
    collective: str
    what: str
    phase: Phase
    calls: float
    """In one micro-batch, or in the step for phases that come once."""
    size: float
    """Bytes of the whole tensor of one call."""
    hidden: str = ""
    """What it runs beside; empty if everything waits for it."""
    span: int = 1
    """Ranks from the first to the last of the axis, which tells whether it leaves a node."""

    @property
    def sent(self) -> float:
        """Bytes that one GPU sends in one micro-batch, or once."""
        return self.calls * self.size * SENT[self.collective](self.ranks)

    def seconds(self, profile: Profile) -> float:
        """Time of all `calls` if nothing else runs."""
        rate = profile.link_gb_s if self.span <= profile.gpus_per_node else profile.network_gb_s
        return self.sent / (rate * 1e9) + self.calls * profile.latency_us * 1e-6


def micro_batches(config: PlannedRun, layout: Layout) -> int:
    """Micro-batches of one rank in a step."""
    return config.batch.global_batch // (layout.micro_batch * layout.dims.data)


def transfers(config: PlannedRun, layout: Layout) -> list[Transfer]:
    """Every collective of a step that carries more than a few numbers."""
    rows = (*_tensor(config, layout), *_context(config, layout), *_expert(config, layout), *_data(config, layout))
    return [row for row in rows if row.calls and row.size]


def _tensor(config: PlannedRun, layout: Layout) -> Iterator[Transfer]:
    dims, model, a = layout.dims, config.model, BYTES[config.precision.dtype]
    if dims.tensor == 1:
        return
    size = count_tokens(config, layout) * model.hidden_size * a
    n, each = dims.tensor, get_layer_costs(config, layout).tensor_reductions
    calls, recomputed = each * model.layers, each * _count_recomputed(layout, model.layers)
    embedding, head = count_ends(model)

    def row(collective: str, what: str, phase: Phase, calls: float, hidden: str = "") -> Transfer:
        return Transfer("tensor", n, collective, what, phase, calls, size, hidden, n)

    if layout.sequence:
        yield row("all-gather", "inputs of qkv and up projections, of the output layer", "forward", calls + head)
        what = "results of out and down projections, of the embedding"
        yield row("reduce-scatter", what, "forward", calls + embedding)
        if recomputed:
            yield row("all-gather", "inputs, computed again", "backward", recomputed)
            yield row("reduce-scatter", "results, computed again", "backward", recomputed)
        what = "gradients of out and down projections, of the embedding"
        yield row("all-gather", what, "backward", calls + embedding)
        yield row("all-gather", "inputs, for the weights' gradients", "backward", calls + head, "matrix products")
        yield row("reduce-scatter", "gradients of those inputs", "backward", calls + head, "matrix products")
        whole = _count_partial(config, layout) * state_bytes(config.precision).wide
        experts = count_parameters(model, n, dims.expert, dims.expert_tensor).experts
        routers = "" if not experts else ", of routers and experts" if dims.whole_experts else ", of routers"
        what = f"gradients of norms and row biases{routers}"
        yield Transfer("tensor", n, "all-reduce", what, "reduce", 1, whole, span=n)
    else:
        yield row("all-reduce", "results of out and down projections, of the embedding", "forward", calls + embedding)
        if recomputed:
            yield row("all-reduce", "results, computed again", "backward", recomputed)
        yield row(
            "all-reduce",
            "gradients of qkv's, up's and the output's inputs",
            "backward",
            calls + head,
            "matrix products",
        )


def _count_partial(config: PlannedRun, layout: Layout) -> float:
    """Elements of this rank's masters of which tensor ranks have parts of the gradient; only experts are many."""
    dims = layout.dims
    count = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor)
    experts = count.experts if dims.expert_tensor == 1 else 0
    return count.whole - experts + experts / dims.expert_shard_group_size


def _count_recomputed(layout: Layout, layers: int) -> int:
    """Layers whose whole forward pass runs a second time."""
    if layout.recompute.granularity != "full":
        return 0
    return layers if layout.recompute.method == "uniform" else min(layout.recompute.layers, layers)


def _context(config: PlannedRun, layout: Layout) -> Iterator[Transfer]:
    dims, layers, n = layout.dims, config.model.layers, layout.dims.context
    if n == 1:
        return
    costs = get_layer_costs(config, layout)
    keys, heads = costs.kv_bytes, costs.query_bytes
    wide = state_bytes(config.precision).wide / BYTES[config.precision.dtype]
    recomputed = layers if layout.recompute.granularity == "selective" else _count_recomputed(layout, layers)

    def row(collective: str, what: str, phase: Phase, calls: float, size: float, hidden: str = "") -> Transfer:
        return Transfer("context", n, collective, what, phase, calls, size, hidden, dims.span("context"))

    match layout.cp_comm_type:
        case "ring":
            forward, core = "keys and values, around the ring", "attention core"
            yield row("send", forward, "forward", (n - 1) * layers, keys, core)
            yield row("send", f"{forward}, for backward", "backward", (n - 1) * (layers + recomputed), keys, core)
            yield row("send", "their gradients in fp32", "backward", n * layers, keys * wide, core)
        case "all_gather":
            yield row("all-gather", "keys and values", "forward", layers, n * keys)
            if recomputed:
                yield row("all-gather", "keys and values, computed again", "backward", recomputed, n * keys)
            yield row("reduce-scatter", "their gradients in fp32", "backward", layers, n * keys * wide)
        case _:
            yield row("all-to-all", "queries, keys, values and results", "forward", layers, heads + keys)
            if recomputed:
                yield row("all-to-all", "the same, computed again", "backward", recomputed, heads + keys)
            yield row("all-to-all", "their gradients", "backward", layers, heads + keys)


def _expert(config: PlannedRun, layout: Layout) -> Iterator[Transfer]:
    """Rows or tokens of the width of the model, there and back; the transpose of each in the backward pass."""
    dims, layers = layout.dims, config.model.layers
    if dims.expert == 1:
        return
    costs = get_layer_costs(config, layout)
    recomputed = _count_recomputed(layout, layers)

    def row(collective: str, what: str, phase: Phase, calls: float, size: float) -> Transfer:
        return Transfer("expert", dims.expert, collective, what, phase, calls, size, span=dims.span("expert"))

    if layout.token_dispatcher == "all_to_all":
        size = costs.routed_bytes
        yield row("all-to-all", "tokens to their experts and back", "forward", 2 * layers, size)
        if recomputed:
            yield row("all-to-all", "the same, computed again", "backward", 2 * recomputed, size)
        yield row("all-to-all", "their gradients", "backward", 2 * layers, size)
        return
    size = dims.expert * costs.mixed_bytes
    yield row("all-gather", "tokens to every expert", "forward", layers, size)
    yield row("reduce-scatter", "results of experts", "forward", layers, size)
    if recomputed:
        yield row("all-gather", "tokens, computed again", "backward", recomputed, size)
        yield row("reduce-scatter", "results, computed again", "backward", recomputed, size)
    yield row("all-gather", "gradients of results", "backward", layers, size)
    yield row("reduce-scatter", "gradients of tokens", "backward", layers, size)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Parameters that the same ranks share."""

    elements: int
    shard: str
    """The axis whose ranks have different parts of them."""
    replica: str
    """The axis whose ranks have the same part."""
    units: int
    """Parts that FSDP gathers one by one."""
    kept: int = 0
    """Elements that FSDP keeps gathered from forward to backward."""
    of: str = ""


def _data(config: PlannedRun, layout: Layout) -> Iterator[Transfer]:
    dims = layout.dims
    count = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor)
    apart = count.experts if dims.expert > 1 else 0
    layers = config.model.layers
    rest = _Shared(count.total - apart, "shard", "replica", layers + 1, count.ends)
    yield from _shared(config, layout, rest)
    if apart:
        experts = _Shared(apart, "expert_shard", "expert_replica", layers, of=" of experts")
        yield from _shared(config, layout, experts)


def _shared(config: PlannedRun, layout: Layout, part: _Shared) -> Iterator[Transfer]:
    each = state_bytes(config.precision)
    dims = layout.dims
    shards, replicas = dims.sizes[part.shard], dims.sizes[part.replica]
    if shards * replicas == 1 or not part.elements:
        return
    reducing = "last backward pass" if layout.overlap_grad_reduce else ""
    shared = {"n": shards, "span": dims.span(part.shard)}
    buckets = -(-part.elements // layout.bucket_size)

    def row(collective: str, what: str, phase: Phase, calls: float, size: float, hidden: str, *, n: int, span: int):
        return Transfer("data", n, collective, what.format(of=part.of), phase, calls, size / calls, hidden, span)

    if layout.sharding == "fsdp" and shards > 1:
        weights, fetched = each.weight * part.elements, each.weight * (part.elements - part.kept)
        yield row("all-gather", "weights{of}", "forward", part.units, weights, "forward pass", **shared)
        yield row("all-gather", "weights{of}, for backward", "backward", part.units, fetched, "backward pass", **shared)
        gradients = each.wide * part.elements
        yield row("reduce-scatter", "gradients{of}", "backward", part.units, gradients, "backward pass", **shared)
    elif layout.sharding == "zero1" and shards > 1:
        gradients, weights = each.gradient * part.elements, each.weight * part.elements
        yield row("reduce-scatter", "gradients{of}", "reduce", buckets, gradients, reducing, **shared)
        gathering = "first forward pass" if layout.overlap_param_gather else ""
        yield row("all-gather", "updated weights{of}", "gather", buckets, weights, gathering, **shared)
    if replicas > 1:
        size = (each.wide if layout.sharding == "fsdp" else each.gradient) * part.elements / shards
        what = "gradients{of}" if shards == 1 else "parts of gradients{of}, among copies"
        reducing = "" if layout.sharding == "zero1" and shards > 1 else reducing  # its parts come too late
        yield row("all-reduce", what, "reduce", buckets, size, reducing, n=replicas, span=dims.span(part.replica))
