"""`args` of old checkpoints made complete: what they do not say, because they are older than the setting or absent
(NVIDIA's NGC), is taken from the tensors' shapes; the number of attention heads alone leaves no trace in any shape.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.parameters.names import EMBED, LAYER
from mt_core.errors import Problem

POSITIONS = "embedding.position_embeddings.weight"
STACKS = {"gpt": "decoder", "bert": "encoder", "t5": "encoder"}
"""The stack that tells sizes, by kind of model."""
NOT_LEGACY: Mapping[str, Any] = {
    "num_experts": None,
    "qk_layernorm": False,
    "window_size": None,
    "use_rope_scaling": False,
    "multi_latent_attention": False,
    "retro_add_retriever": False,
    "apply_layernorm_1p": False,
}
"""Settings that the old classes lack or that we cannot read from them, and their only value."""

Stages = Sequence[Sequence[Mapping[str, Tensor]]]
"""The chunks of every stage, in the order of their layers, each as all tensor ranks hold it."""


def complete_args(args: Any, chunks: Stages, heads: int | None, *, kind: str, pipeline: int) -> Namespace:
    """The args, with what they do not say; `heads` is the user's word."""
    tensor, stack = len(chunks[0]), STACKS[kind]
    declared = {name: value for name, value in vars(args or Namespace()).items() if value is not None}
    if declared.get("num_experts") in (1, [1]):
        del declared["num_experts"]  # an ordinary feed-forward layer
    if declared.get("use_rotary_position_embeddings"):
        declared.setdefault("position_embedding_type", "rope")
    seen = dict(_sizes(chunks, tensor, stack)) | {"num_attention_heads": heads}
    if args is None:
        seen |= dict(_switches(chunks, seen, tensor, stack))
    sizes = {"tensor_model_parallel_size": tensor}
    if "pipeline_model_parallel_size" not in declared:
        sizes["pipeline_model_parallel_size"] = pipeline
    return Namespace(**(seen | declared | sizes))


def _sizes(chunks: Stages, tensor: int, stack: str) -> Iterator[tuple[str, Any]]:
    """What scant args may lack; their switches, if absent, are off."""
    first = chunks[0][0]
    if EMBED in first:
        yield "padded_vocab_size", sum(len(state[EMBED]) for state in chunks[0] if EMBED in state)
        yield "hidden_size", first[EMBED].shape[1]
    if POSITIONS in first:
        yield "max_position_embeddings", len(first[POSITIONS])
    if (fc2 := f"{stack}.layers.0.mlp.linear_fc2.weight") in first:
        yield "ffn_hidden_size", first[fc2].shape[1] * tensor
    for name in ("encoder", "decoder"):
        if layers := sum(_layers(chunk[0], name) for chunk in chunks):
            yield "num_layers" if name == stack else f"{name}_num_layers", layers


def _layers(state: Mapping[str, Tensor], stack: str) -> int:
    return len({at[1] for name in state if name.startswith(stack) and (at := LAYER.match(name))})


def _switches(chunks: Stages, sizes: Mapping[str, Any], tensor: int, stack: str) -> Iterator[tuple[str, Any]]:
    """What a file without args must be, as the releases of its time could make it."""
    first, last = chunks[0][0], chunks[-1][0]
    attention, mlp = f"{stack}.layers.0.self_attention", f"{stack}.layers.0.mlp"
    yield "add_bias_linear", f"{mlp}.linear_fc1.bias" in first
    yield "add_qkv_bias", f"{attention}.linear_qkv.bias" in first
    yield "normalization", "LayerNorm" if f"{stack}.final_layernorm.bias" in last else "RMSNorm"
    yield "position_embedding_type", "learned_absolute" if POSITIONS in first else "unknown without args"
    yield "bias_gelu_fusion", True
    fc1, fc2 = first.get(f"{mlp}.linear_fc1.weight"), first.get(f"{mlp}.linear_fc2.weight")
    yield "swiglu", fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]
    qkv, heads = first.get(f"{attention}.linear_qkv.weight"), sizes["num_attention_heads"]
    if qkv is not None and heads and qkv.shape[1] % heads == 0:
        groups = (len(qkv) * tensor // (qkv.shape[1] // heads) - heads) // 2
        yield "num_query_groups", groups
        yield "group_query_attention", groups != heads


def problems(args: Namespace, where: str, heads: int | None, version: float) -> Iterator[Problem]:
    """What is wrong with the number of heads, and what of the args the old classes did not have."""
    values = vars(args)
    heads_declared, hidden, tensor = (
        values["num_attention_heads"],
        values.get("hidden_size"),
        values["tensor_model_parallel_size"],
    )
    if not heads_declared:
        allowed = "convert it with --num-attention-heads; NGC's 345M models have 16"
        yield Problem(where, "nothing says how many attention heads there are", allowed)
    elif heads and heads != heads_declared:
        yield Problem(where, f"--num-attention-heads {heads}, but args say {heads_declared}", "leave the option out")
    elif hidden and not values.get("kv_channels") and hidden % heads_declared:
        yield Problem(where, f"{heads_declared} attention heads in a hidden_size of {hidden}", f"a divisor of {hidden}")
    elif heads_declared % tensor:
        yield Problem(where, f"{heads_declared} attention heads on {tensor} tensor ranks", f"a multiple of {tensor}")
    for name, only in NOT_LEGACY.items():
        if values.get(name, only) != only:
            yield Problem(
                where, f"args.{name} is {values[name]!r}", f"only {only!r} is implemented for the old classes"
            )
    if version < 2 and values.get("group_query_attention"):
        yield Problem(where, f"grouped queries in checkpoint version {version}", "none before version 2.0")
