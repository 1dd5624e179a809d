"""Time of one GPU's arithmetic in a step: matrix products, attention, and kernels bound by memory.

A matrix product takes its FLOPs over the profile's rate; every other kernel, the bytes it reads and writes over the
copy rate. Kernels' own start-up, and the lower rate of small matrices, are left out: a small model is slower than this.
"""

from dataclasses import dataclass

from mt_core.config.run_config import TransformerRun
from mt_core.parallel.layout import Layout, experts_of
from mt_core.planning.activations import hidden, routed, rows_per_token, tokens_of
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.parameters import parameters_of, rank_vocabulary
from mt_core.planning.precision import BYTES, state_bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Elements read and written for each token by one layer's kernels that are no matrix product."""

    model: int
    """In units of the model size: norms and residual sums."""
    turned: int
    """In units of queries and keys: rotary positions."""
    gated: int
    """In units of the hidden features of a gated layer: its activation and product."""
    dense: int
    """The same for a dense layer."""


TRAFFIC = {
    (True, "forward"): Traffic(8, 2, 3, 2),  # norm and sum in one kernel: two in, two out, twice; one in, one out; …
    (True, "backward"): Traffic(8, 2, 5, 3),
    (False, "forward"): Traffic(10, 9, 5, 2),  # each function by itself
    (False, "backward"): Traffic(12, 9, 13, 3),
}
"""By whether blocks are compiled."""
ROUTED = 7
"""Elements read and written for each feature of an expert's row: gathered 2, put back 2, weighted 2, added up 1."""
LOGITS, COMPILED_LOGITS = 10, 3
"""Numbers read and written for each logit by the loss and its gradient: in fp32 or wider, and compiled, as they are."""
OPTIMIZER = 40
"""Bytes for each fp32 weight: norm 4, clipping 8, clearing 4, and 28 in and out of Adam."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds."""

    products: float
    """Matrix products of one micro-batch's forward pass; backward takes twice that."""
    attention_forward: float
    attention_backward: float
    """The attention core."""
    kernels_forward: float
    kernels_backward: float
    """Norms, activations, sums, positions."""
    again: float
    """What recompute repeats in one micro-batch."""
    loss: float
    """From logits to their gradient, in one micro-batch."""
    accumulate: float
    """Adding one micro-batch's gradients to the sum."""
    optimizer: float
    """Once a step."""

    @property
    def forward(self) -> float:
        """One micro-batch's forward pass."""
        return self.products + self.attention_forward + self.kernels_forward + self.loss / 2

    @property
    def backward(self) -> float:
        """One micro-batch's backward pass."""
        return (
            2 * self.products + self.attention_backward + self.kernels_backward
            + self.again + self.loss / 2 + self.accumulate
        )  # fmt: skip


def compute(config: TransformerRun, layout: Layout, profile: Profile) -> Compute:
    """The arithmetic of one GPU."""
    model, length, tokens = config.model, config.data.seq_length, tokens_of(config, layout)
    rates, copy, tensor = profile.rates_of(config.precision.dtype), profile.copy_tb_s * 1e12, layout.dims.tensor
    third = tokens / tensor / 3 / 1e12  # a third of a token's FLOPs is forward, on each tensor rank
    matrices = model.flops_per_token(0)
    core = third * (model.flops_per_token(length) - matrices)
    matrices += _repeated(config, layout)
    products, output = third * matrices / rates.gemm, third * 6 * model.vocab_size * model.hidden_size / rates.gemm
    forward, core_forward = _kernels(config, layout, "forward") / copy, core / rates.attention_forward
    again = {
        "none": 0.0,
        "selective": core_forward,
        "full": (products - output + core_forward + forward) * _share_again(config, layout),
    }[layout.recompute.granularity]
    return Compute(
        products=products,
        attention_forward=core_forward,
        attention_backward=2 * core / rates.attention_backward,
        kernels_forward=forward,
        kernels_backward=_kernels(config, layout, "backward") / copy,
        again=again,
        loss=tokens * rank_vocabulary(model, tensor) * _bytes_of_logit(config) / copy,
        accumulate=_accumulate(config, layout) / copy,
        optimizer=_optimizer(config, layout) / copy,
    )


def _repeated(config: TransformerRun, layout: Layout) -> float:
    """FLOPs of a token that other tensor ranks do as well: those of its experts, unless they share the sequence."""
    if not experts_of(config.model):
        return 0.0
    flops = (
        6
        * config.model.layers
        * rows_per_token(config.model)
        * 3
        * config.model.mlp.ffn_hidden_size
        * config.model.hidden_size
    )
    return flops * (layout.dims.tensor / layout.sequence_parts - 1)


def _share_again(config: TransformerRun, layout: Layout) -> float:
    """Part of the layers whose forward pass runs twice."""
    if layout.recompute.method == "uniform":
        return 1.0
    return min(layout.recompute.layers / config.model.layers, 1.0)


def _kernels(config: TransformerRun, layout: Layout, phase: str) -> float:
    """Bytes moved by all layers for one micro-batch."""
    model, tensor, each = config.model, layout.dims.tensor, TRAFFIC[config.runtime.compile, phase]
    part = model.attention
    turned = (part.heads + part.num_kv_heads) * part.head_size / tensor if model.position.kind == "rope" else 0
    elements = each.model * model.hidden_size / layout.sequence_parts + each.turned * turned
    elements *= tokens_of(config, layout)
    elements += (each.dense if model.mlp.kind == "dense" else each.gated) * hidden(config, layout)
    if experts_of(model):
        elements += ROUTED * routed(config, layout) * model.hidden_size
    return elements * model.layers * BYTES[config.precision.dtype]


def _bytes_of_logit(config: TransformerRun) -> int:
    """Moved by the loss and its gradient."""
    if config.runtime.compile:
        return COMPILED_LOGITS * BYTES[config.precision.dtype]
    return LOGITS * state_bytes(config.precision).wide


def _accumulate(config: TransformerRun, layout: Layout) -> float:
    """A gradient read, the sum read and written."""
    each, dims = state_bytes(config.precision), layout.dims
    count = parameters_of(config.model, dims.tensor, dims.expert).total
    if layout.sharding == "fsdp":
        return (2 * each.weight + each.wide) * count  # widened for the reduction
    return (each.weight + 2 * each.gradient) * count


def _optimizer(config: TransformerRun, layout: Layout) -> float:
    each, dims = state_bytes(config.precision), layout.dims
    shared = parameters_of(config.model, dims.tensor, dims.expert).shared(dims)
    return (OPTIMIZER * each.wide / 4 + each.weight) * shared
