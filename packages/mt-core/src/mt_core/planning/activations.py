"""Memory that activations take on a rank: what autograd saves of a forward pass, and what exists beside it.

What one layer saves is counted by the model's configuration (`layer_costs.py`), for the layers as they are written:
torch.compile saves less.
"""

from dataclasses import dataclass

from mt_core.config.run_config import PlannedRun
from mt_core.parallel.layout import Layout
from mt_core.planning.layer_costs import count_tokens, get_layer_costs
from mt_core.planning.parameters import rank_vocabulary
from mt_core.planning.precision import BYTES, state_bytes


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    saved: float
    """By all layers, when the forward pass ends."""
    backward: float
    """By the largest group of layers that is recomputed, and by gradients, while a layer's backward pass runs."""
    loss: float
    """By the last norm, the logits and their gradient, at the turn from forward to backward."""


def count_activations(config: PlannedRun, layout: Layout) -> Activations:
    """Bytes of activations on one rank, with the layout's recompute."""
    costs, layers, recompute = get_layer_costs(config, layout), config.model.layers, layout.recompute
    full, core = sum(tensor.size for tensor in costs.saved), sum(tensor.size for tensor in costs.saved if tensor.core)
    features = count_tokens(config, layout) * config.model.hidden_size * BYTES[config.precision.dtype]
    layer_input = features / layout.sequence_parts
    size = min(recompute.layers, layers)
    match recompute.granularity, recompute.method:
        case "selective", _:
            saved, recomputed = layers * (full - core), core
        case "full", "uniform":
            saved, recomputed = -(-layers // size) * layer_input, size * full
        case "full", _:  # the first layers are recomputed, when all others' activations are gone
            saved, recomputed = size * layer_input + (layers - size) * full, full if size == layers else 0.0
        case _:
            saved, recomputed = layers * full, 0.0
    return Activations(saved, recomputed + costs.gradient_bytes, 2 * layer_input + _count_loss(config, layout))


def _count_loss(config: PlannedRun, layout: Layout) -> float:
    """Bytes of whole logits: compiled, once; else three of them, wide, with a cut vocabulary beside the logits."""
    a, wide, tensor = BYTES[config.precision.dtype], state_bytes(config.precision).wide, layout.dims.tensor
    each = a if config.runtime.compile else 3 * wide + (a if tensor > 1 and a < wide else 0)
    return count_tokens(config, layout) * rank_vocabulary(config.model, tensor) * each
