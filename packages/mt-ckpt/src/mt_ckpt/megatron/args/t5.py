"""T5, whose encoder Megatron's args describe as a GPT; its positions are learned vectors or relative biases.

Releases differ in norms: older ones end encoder and decoder with one; newer ones do where Transformer Engine
is installed (0.16.1 and 0.19.2 were run), and elsewhere do not.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from mt_ckpt.megatron.args.table import Arguments, Row, Settings, Source
from mt_ckpt.megatron.layout import Layout
from mt_core.errors import Problem
from mt_models.config import T5Config

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


def _write_layers(config: T5Config, layout: Layout) -> Arguments:
    return {"encoder_num_layers": config.layers, "decoder_num_layers": config.decoder_layers}


def _read_layers(source: Source) -> Settings:
    layers = source.get("decoder_num_layers") or source.get("encoder_num_layers") or source.get("num_layers")
    return {"decoder_layers": layers}


def _write_stages(config: T5Config, layout: Layout) -> Arguments:
    """Arguments of the encoder's stages, as Megatron 0.8 to 0.11 have them; no setting of ours depends on them."""
    if not layout.encoder:
        return {}
    return {
        "encoder_tensor_model_parallel_size": layout.tensor,
        "encoder_pipeline_model_parallel_size": layout.encoder,
        "pipeline_model_parallel_size": layout.pipeline - layout.encoder,
    }


def _write_positions(config: T5Config, layout: Layout) -> Arguments:
    if config.position.kind != RELATIVE:
        return {}
    return {
        "position_embedding_type": RELATIVE,
        "relative_attention_num_buckets": config.position.buckets,
        "relative_attention_max_distance": config.position.max_distance,
    }


def _read_positions(source: Source) -> Settings:
    if source.get("position_embedding_type") != RELATIVE:
        return {"position": {"kind": "learned"}}
    buckets, distance = (source.get(f"relative_attention_{name}") for name in ("num_buckets", "max_distance"))
    return {"position": {"kind": RELATIVE, "buckets": buckets or 32, "max_distance": distance or 128}}


def _read_head(source: Source) -> Settings:
    tied = not source.get("untie_embeddings_and_output_weights")
    return {"tied": tied, "head_bias": tied}


ROWS = (
    Row(_write_layers, _read_layers),
    Row(
        lambda config, layout: dict.fromkeys(("encoder_seq_length", "decoder_seq_length"), config.max_seq_len),
        lambda source: {},
    ),
    Row(_write_stages, lambda source: {}),
    Row(_write_positions, _read_positions),
    Row(lambda config, layout: {}, lambda source: {"final_norm": NORM in source.shapes}),
    Row(lambda config, layout: {"untie_embeddings_and_output_weights": not config.tied}, _read_head),
)
"""Settings that T5 has besides those of a GPT that is like its encoder."""


def t5_errors(config: T5Config, where: str, core: bool = True) -> Iterator[Problem]:
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
