"""Megatron-Core's names of a model's tensors: local ones, Transformer Engine's, and those without layer numbers."""

import re
from collections.abc import Iterator
from dataclasses import replace

from mt_ckpt.megatron.parameters.table import (
    COPIES,
    EXPERTS,
    OUTSIDE,
    TASK_HEADS,
    WHOLE_NAMES,
    is_buffer,
    stacks,
)
from mt_ckpt.megatron.parameters.table import Parameter as Parameter
from mt_models.config import TransformerConfig

WORD_EMBEDDINGS, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
LEAVES = ("weight", "bias")
LAYER = re.compile(r"(?:encoder|decoder)\.layers\.(\d+)\.")
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
IGNORED = re.compile(r"(_extra_state|rotary_pos_emb\.inv_freq)$")
"""State of FP8 kernels, None or empty otherwise, and a buffer of old releases."""
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
FUSED_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms by local name, and by the name that they have as a part of Transformer Engine's linear layer after them; those
with latent attention, whose input goes to several layers, apart (docs/specs/checkpoints.md §2.5, §3.7)."""


def list_parameters(config: TransformerConfig, *, buffers: bool = True) -> dict[str, Parameter]:
    """Every tensor of the model under its local name, with its layer's and its expert's numbers in the whole model.

    Without `buffers`, only those that optimizers have a state of.
    """
    tensors: dict[str, Parameter] = {}
    for module, parameter in OUTSIDE.items():
        if module in TASK_HEADS.values() and module != TASK_HEADS.get(_get_task(config)):
            continue
        tensors |= {f"{module}.{leaf}": _named(parameter, "", leaf) for leaf in LEAVES}
    for name, stack in stacks(config).items():
        for n in range(stack.layers):
            ours, theirs = f"{stack.ours}layers.{n}.", f"{name}.layers.{n}"
            for module, parameter in stack.block.items():
                tensors |= {
                    f"{theirs}.{module}.{leaf}": _name_in_layer(config, ours, leaf, parameter) for leaf in LEAVES
                }
            tensors |= _experts(config, n)
            tensors |= {f"{theirs}.{name}": Parameter((f"{ours}{our}",)) for name, our in WHOLE_NAMES.items()}
        final = Parameter((f"{stack.ours}norm",))
        tensors |= {f"{name}.final_layernorm.{leaf}": _named(final, "", leaf) for leaf in LEAVES}
    shapes = config.canonical_shapes()
    dims = slice(0, None), slice(1, None)
    return {
        name: replace(
            parameter, shapes=tuple(shapes[part][dims[parameter.expert is not None]] for part in parameter.parts)
        )
        for name, parameter in tensors.items()
        if all(part in shapes for part in parameter.parts) and (buffers or not is_buffer(name))
    }


def _get_task(config: TransformerConfig) -> str:
    """The kind of a BERT's task head; nothing of other models."""
    return config.task_head.kind if config.kind == "bert" and config.task_head else ""


def second_names(config: TransformerConfig, name: str) -> list[str]:
    """Other names under which Megatron stores a tensor once more."""
    known = COPIES.items() if config.kind == "t5" else ()
    return [second + name.removeprefix(first) for first, second in known if name.startswith(first)]


def count_layers(config: TransformerConfig, name: str) -> int:
    """Layers of the stack that a tensor of a layer belongs to."""
    return stacks(config)[name.partition(".")[0]].layers


def shift_layer_index(name: str, by: int) -> str:
    """A local name whose layer's number is moved by so many."""
    return LAYER.sub(lambda match: f"{match[0][: match.start(1) - match.start()]}{int(match[1]) + by}.", name)


def strip_layer_index(name: str) -> str:
    """A local name without its layer's number, as all layers of a stack share it."""
    return LAYER.sub(lambda match: match[0][: match.start(1) - match.start()], name)


def _name_in_layer(config: TransformerConfig, prefix: str, leaf: str, parameter: Parameter) -> Parameter:
    parts, cut = parameter.parts, parameter.cut
    if parts == ("mlp.gate", "mlp.up") and config.mlp.kind == "dense":
        parts, cut = ("mlp.up",), 0
    if leaf == "bias" and len(parts) == 1 and cut == 1:
        cut = None  # rows of the product are summed over ranks, then the bias is added once
    return _named(Parameter(parts, cut), prefix, leaf)


def _named(parameter: Parameter, prefix: str, leaf: str) -> Parameter:
    return replace(parameter, parts=tuple(f"{prefix}{part}.{leaf}" for part in parameter.parts))


def _experts(config: TransformerConfig, layer: int) -> Iterator[tuple[str, Parameter]]:
    """The experts of a layer, one after the other for each of their two linear layers."""
    for module, parameter in EXPERTS.items():
        parts = tuple(f"layers.{layer}.{part}.weight" for part in parameter.parts)
        for e in range(config.mlp.experts if config.mlp.kind == "moe" else 0):
            yield (
                f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.{module}.weight",
                Parameter(parts, parameter.cut, e),
            )


def local_name(name: str) -> str:
    """The local name of a tensor for its local or Transformer Engine's name."""
    for local, fused in (FUSED_NORMS | FUSED_LATENT_NORMS).items():
        name = name.replace(fused, local)
    return name


def has_experts(config: TransformerConfig, name: str) -> bool:
    """Whether the layer that a name is of has experts."""
    layer = LAYER.match(name)
    return config.mlp.kind == "moe" and layer is not None and int(layer[1]) >= config.mlp.dense_layers


def fuse_norm(config: TransformerConfig, name: str) -> str:
    """The name of a norm, for its local one, as a part of a linear layer; other names are kept."""
    for local, fused in (FUSED_LATENT_NORMS if config.attention.kind == "mla" else FUSED_NORMS).items():
        name = name.replace(f".{local}", f".{fused}")
    return name


def te_name(config: TransformerConfig, name: str, *, experts: bool) -> str:
    """Transformer Engine's name of a tensor for its local name, in a layer with or without experts.

    A norm before experts is fused with no linear layer.
    """
    return name if experts and ".pre_mlp_layernorm." in name else fuse_norm(config, name)
