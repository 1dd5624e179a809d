"""Time of one GPU's arithmetic in a step: matrix products, attention, and kernels bound by memory.

A matrix product takes its FLOPs over the profile's rate; every other kernel, the bytes it reads and writes over the
copy rate. Kernels' own start-up, and the lower rate of small matrices, are left out: a small model is slower than this.
"""

from dataclasses import dataclass

from mt_core.config.run_config import PlannedRun
from mt_core.parallel.layout import Layout
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.layer_costs import count_tokens, get_layer_costs
from mt_core.planning.parameters import count_parameters, count_vocab_rows
from mt_core.planning.precision import BYTES, state_bytes

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
    recompute: float
    """Forward passes that recompute repeats in one micro-batch."""
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
            + self.recompute + self.loss / 2 + self.accumulate
        )  # fmt: skip


def compute(config: PlannedRun, layout: Layout, profile: Profile) -> Compute:
    """The arithmetic of one GPU."""
    model, length, tokens = config.model, config.data.seq_length, count_tokens(config, layout)
    costs = get_layer_costs(config, layout)
    rates, copy, tensor = profile.get_rates(config.precision.dtype), profile.copy_tb_s * 1e12, layout.dims.tensor
    third = tokens / tensor / 3 / 1e12  # a third of a token's FLOPs is forward, on each tensor rank
    matrices = model.flops_per_token(0)
    core = third * (model.flops_per_token(length) - matrices)
    matrices += model.layers * costs.repeated_flops
    products, output = third * matrices / rates.gemm, third * 6 * model.vocab_size * model.hidden_size / rates.gemm
    forward, core_forward = model.layers * costs.forward_bytes / copy, core / rates.attention_forward
    recompute = {
        "none": 0.0,
        "selective": core_forward,
        "full": (products - output + core_forward + forward) * _recomputed_share(config, layout),
    }[layout.recompute.granularity]
    return Compute(
        products=products,
        attention_forward=core_forward,
        attention_backward=2 * core / rates.attention_backward,
        kernels_forward=forward,
        kernels_backward=model.layers * costs.backward_bytes / copy,
        recompute=recompute,
        loss=tokens * count_vocab_rows(model, tensor) * _logit_bytes(config) / copy,
        accumulate=_accumulate(config, layout) / copy,
        optimizer=_optimizer(config, layout) / copy,
    )


def _recomputed_share(config: PlannedRun, layout: Layout) -> float:
    """Share of the layers whose forward pass runs twice."""
    if layout.recompute.method == "uniform":
        return 1.0
    return min(layout.recompute.layers / max(config.model.layers, 1), 1.0)


def _logit_bytes(config: PlannedRun) -> int:
    """Bytes that the loss and its gradient move for each logit."""
    if config.runtime.compile:
        return COMPILED_LOGITS * BYTES[config.precision.dtype]
    return LOGITS * state_bytes(config.precision).wide


def _accumulate(config: PlannedRun, layout: Layout) -> float:
    """A gradient read, the sum read and written."""
    each, dims = state_bytes(config.precision), layout.dims
    count = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor).total
    if layout.sharding == "fsdp":
        return (2 * each.weight + each.wide) * count  # widened for the reduction
    return (each.weight + 2 * each.gradient) * count


def _optimizer(config: PlannedRun, layout: Layout) -> float:
    each, dims = state_bytes(config.precision), layout.dims
    shared = count_parameters(config.model, dims.tensor, dims.expert, dims.expert_tensor).shared(dims)
    return (OPTIMIZER * each.wide / 4 + each.weight) * shared
