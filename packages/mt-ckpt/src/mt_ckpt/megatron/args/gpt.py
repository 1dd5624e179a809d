"""Megatron's `args` of a GPT and our settings for them, in a table of which every row reads and writes.

What args ask for and no row reads is refused by unsupported.py; what a configuration asks for and no row writes is what
changes when the args are read back. Source: docs/specs/checkpoints.md §1.2.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.args.attention import ATTENTION_ROWS, is_latent
from mt_ckpt.megatron.args.experts import read_experts, write_experts
from mt_ckpt.megatron.args.positions import POSITION_ROWS
from mt_ckpt.megatron.args.table import (
    Arguments,
    Row,
    Settings,
    Source,
    describe_invalid_args,
    read_rows,
    rename,
    spell,
)
from mt_ckpt.megatron.args.unsupported import NORMS, problems
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.pipeline import stage_layers
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig


def _write_vocabulary(config: GPTConfig, layout: Layout) -> Arguments:
    return {"padded_vocab_size": config.vocab_rows(layout.tensor), "vocab_size": config.vocab_size}


def _all_biased(config: GPTConfig) -> bool:
    return config.attention.qkv_bias and config.attention.out_bias and config.mlp.kind != "moe" and config.mlp.bias


def _write_biases(config: GPTConfig, layout: Layout) -> Arguments:
    all_biased = _all_biased(config)
    return {"add_bias_linear": all_biased, "add_qkv_bias": config.attention.qkv_bias and not all_biased}


def _read_biases(source: Source) -> Settings:
    declared = source.get("add_bias_linear")
    biased = not source.get("disable_bias_linear") if declared is None else bool(declared)
    qkv_biased = biased or bool(source.get("add_qkv_bias"))
    settings = {} if is_latent(source) else {"attention.qkv_bias": qkv_biased, "attention.out_bias": biased}
    return settings if source.get("num_experts") else {**settings, "mlp.bias": biased}


def _write_mlp(config: GPTConfig, layout: Layout) -> Arguments:
    mlp, all_biased = config.mlp, _all_biased(config)
    dense = mlp.dense_ffn_hidden_size if mlp.kind == "moe" else None
    return {
        "ffn_hidden_size": dense or mlp.ffn_hidden_size,
        "swiglu": mlp.kind != "dense",
        "squared_relu": mlp.activation == "squared_relu",
        "openai_gelu": mlp.activation == "gelu_tanh" and not all_biased,
        "bias_gelu_fusion": mlp.activation == "gelu_tanh" and all_biased,
    } | (write_experts(config, layout) if mlp.kind == "moe" else {"num_experts": None})


def _read_mlp(source: Source) -> Settings:
    size = source.get("ffn_hidden_size") or 4 * source.get("hidden_size")
    if source.get("num_experts"):
        return read_experts(source, size)
    gated = bool(source.get("swiglu"))
    kind = "gated" if gated else "dense"
    activation = "silu" if gated else read_activation(source)
    return {"mlp.kind": kind, "mlp.ffn_hidden_size": size, "mlp.activation": activation}


def read_activation(source: Source) -> str:
    """Activation of blocks that are not gated: the fused bias-GeLU is the tanh approximation, the other one exact."""
    if source.get("squared_relu"):
        return "squared_relu"
    return "gelu_tanh" if source.get("openai_gelu") or source.get("bias_gelu_fusion") else "gelu"


def _write_offset(config: GPTConfig, layout: Layout) -> Arguments:
    return {"apply_layernorm_1p": config.norm.kind == "rms" and config.norm.offset}


def _read_offset(source: Source) -> Settings:
    rms = source.get("normalization") == "RMSNorm"
    return {"norm.offset": bool(source.get("apply_layernorm_1p"))} if rms else {}


def _read_hidden_dropout(source: Source) -> Settings:
    """Megatron has one rate for the outputs of layers and for embeddings."""
    rate = source.get("hidden_dropout") or 0.0
    return {"dropout.hidden": rate, "dropout.embedding": rate}


ROWS = (
    rename("layers", "num_layers"),
    rename("hidden_size", "hidden_size"),
    Row(_write_vocabulary, lambda source: {"vocab_size": source.get("vocab_size")}),
    rename("max_seq_len", "max_position_embeddings", "seq_length"),
    *ATTENTION_ROWS,
    Row(_write_mlp, _read_mlp),
    Row(_write_biases, _read_biases),
    spell("norm.kind", "normalization", NORMS, "LayerNorm"),
    rename("norm.eps", "norm_epsilon", "layernorm_epsilon", default=1e-5),
    Row(_write_offset, _read_offset),
    *POSITION_ROWS,
    Row(
        lambda config, layout: {"untie_embeddings_and_output_weights": not config.tied},
        lambda source: {"tied": not source.get("untie_embeddings_and_output_weights")},
    ),
    rename("init_std", "init_method_std", default=0.02),
    rename("dropout.attention", "attention_dropout", default=0.0),
    Row(lambda config, layout: {"hidden_dropout": config.dropout.hidden}, _read_hidden_dropout),
    rename("vocab_divisor", "make_vocab_size_divisible_by", default=128),
)
"""Settings of a GPT."""
WRITTEN: Mapping[str, Any] = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_query_key_layer_scaling": False,
    "tokenizer_type": None,
    "tokenizer_model": None,
    "data_parallel_random_init": False,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
}
"""Arguments that Megatron wants, and that say nothing of a model of ours."""


def read_args(args: Any, where: str, true_vocab_size: int | None = None) -> GPTConfig:
    """The configuration that `args` describe; one `MtError` names everything that is missing or not implemented."""
    raise_if(Problem(where, *problem) for problem in problems(vars(args)))
    vocab = true_vocab_size or getattr(args, "vocab_size", None) or args.padded_vocab_size
    if vocab > args.padded_vocab_size:
        allowed = f"at most padded_vocab_size = {args.padded_vocab_size}"
        raise MtError(where, f"a true vocabulary of {vocab} does not fit the embedding", allowed)
    settings = read_rows(ROWS, Source({**vars(args), "vocab_size": vocab}.get, {}))
    try:
        return GPTConfig.model_validate(settings)
    except ValidationError as err:
        raise describe_invalid_args(err, where) from None


def write_args(config: GPTConfig, layout: Layout, *, dtype: Any, form: str) -> Namespace:
    """The arguments of a model: what --use-checkpoint-args reads, and what Megatron compares before it loads."""
    args = {name: value for row in ROWS for name, value in row.write(config, layout).items()}
    return Namespace(**args, **WRITTEN, params_dtype=dtype, ckpt_format=form, **_write_layout(config, layout))


def _write_layout(config: GPTConfig, layout: Layout) -> Arguments:
    counts = stage_layers(config.layers, layout.pipeline, layout.virtual)
    assert counts, "layout_errors refuses it"
    even, virtual = len(set(counts)) == 1, layout.virtual if layout.virtual > 1 else None
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_per_virtual_pipeline_stage": counts[0] // layout.virtual if even and virtual else None,
        "decoder_first_pipeline_num_layers": None if even else counts[0],
        "decoder_last_pipeline_num_layers": None if even else counts[-1],
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.tensor,
    }
