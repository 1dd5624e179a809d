"""T5, whose encoder Megatron's args describe as a GPT; its positions are learned vectors or relative biases.

Releases differ in norms: older ones end encoder and decoder with one; newer ones do where Transformer Engine
is installed (0.16.1 and 0.19.2 were run), and elsewhere do not.
"""

from argparse import Namespace
from collections.abc import Container, Iterator
from typing import Any

from mt_ckpt.megatron.layout import Layout
from mt_core.errors import Problem
from mt_models.config import GPTConfig, T5Config

RELATIVE = "relative"
NORM = "decoder.final_layernorm.weight"
"""On the last stage, where one looks for what a model has; the encoder has its own, or not, with it."""

NORM_NOTES = {
    True: "where Transformer Engine is not installed, newer releases of Megatron-Core have no norm at the end of T5's "
    "encoder and decoder, and ignore this one's",
    False: "where Transformer Engine is installed, Megatron-Core has a norm at the end of T5's encoder and decoder, "
    "and misses this one's",
}
"""What to tell of a T5 with these norms, and of one without."""


def encoder_args(args: Any) -> Namespace:
    """The args of a GPT that is like the encoder."""
    values = vars(args)
    relative = values.get("position_embedding_type") == RELATIVE
    layers = values.get("encoder_num_layers") or values.get("num_layers")
    return Namespace(**values | {"num_layers": layers} | ({"position_embedding_type": "none"} if relative else {}))


def t5_from_args(config: GPTConfig, args: Any, names: Container[str]) -> dict[str, Any]:
    """What T5, which has tensors of these names, has besides the GPT of its encoder's args."""
    values = vars(args)
    position: dict[str, Any] = {"kind": "learned"}
    if values.get("position_embedding_type") == RELATIVE:
        buckets, distance = (values.get(f"relative_attention_{name}") for name in ("num_buckets", "max_distance"))
        position = {"kind": RELATIVE, "buckets": buckets or 32, "max_distance": distance or 128}
    layers = values.get("decoder_num_layers") or config.layers
    head = {"tied": config.tied, "head_bias": config.tied}
    return {"decoder_layers": layers, "position": position, "final_norm": NORM in names, **head}


def t5_to_args(args: Namespace, config: T5Config, layout: Layout) -> None:
    """Change a GPT's args to those of T5; its stages are told as Megatron 0.8 to 0.11 have them."""
    if layout.encoder:
        args.encoder_tensor_model_parallel_size = layout.tensor
        args.encoder_pipeline_model_parallel_size = layout.encoder
        args.pipeline_model_parallel_size = layout.pipeline - layout.encoder
    args.encoder_num_layers, args.decoder_num_layers = config.layers, config.decoder_layers
    args.encoder_seq_length = args.decoder_seq_length = config.max_seq_len
    if config.position.kind == RELATIVE:
        args.position_embedding_type = RELATIVE
        args.relative_attention_num_buckets = config.position.buckets
        args.relative_attention_max_distance = config.position.max_distance


def t5_errors(config: T5Config, where: str) -> Iterator[Problem]:
    """Settings that Megatron's T5 cannot have."""
    if config.attention.scale is not None:
        problem = f"cannot carry attention.scale = {config.attention.scale!r}, as T5 of Hugging Face has it"
        yield Problem(where, problem, "Megatron divides scores by the square root of head_size")
    if config.attention.num_kv_heads != config.attention.heads:
        problem = f"cannot carry attention.num_kv_heads = {config.attention.num_kv_heads}"
        yield Problem(where, problem, "Megatron's cross attention has as many as heads")
    wanted = {"scaled_head": False, "head_bias": config.tied}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield Problem(where, f"cannot carry {name} = {getattr(config, name)!r}", f"Megatron's has {value!r}")
