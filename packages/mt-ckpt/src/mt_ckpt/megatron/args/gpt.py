"""Megatron's `args` of a model, written; reading.py is the reverse. What no argument can say is refused."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.args.reading import FACTOR, LLAMA3, read_args
from mt_ckpt.megatron.args.unsupported import NORMS, POSITIONS
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.pipeline import stage_layers
from mt_core.errors import Problem
from mt_models.config import GPTConfig


def write_args(config: GPTConfig, layout: Layout, *, dtype: Any, form: str) -> Namespace:
    """The arguments of a model: what --use-checkpoint-args reads, and what Megatron compares before it loads.

    Source: docs/specs/checkpoints.md §1.2.
    """
    part, mlp, position = config.attention, config.mlp, config.position
    all_biased = part.qkv_bias and part.out_bias and mlp.kind != "moe" and mlp.bias
    theta = position.theta if position.kind == "rope" else 10_000.0
    return Namespace(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=mlp.ffn_hidden_size,
        seq_length=config.max_seq_len,
        max_position_embeddings=config.max_seq_len,
        num_attention_heads=part.heads,
        num_query_groups=part.num_kv_heads,
        group_query_attention=part.num_kv_heads != part.heads,
        kv_channels=part.head_size,
        qk_layernorm=part.qk_norm,
        position_embedding_type={ours: theirs for theirs, ours in POSITIONS.items()}[position.kind],
        add_position_embedding=position.kind == "learned",
        use_rotary_position_embeddings=position.kind == "rope",
        rotary_base=int(theta) if theta == int(theta) else theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=all_biased,
        add_qkv_bias=part.qkv_bias and not all_biased,
        swiglu=mlp.kind != "dense",
        squared_relu=mlp.activation == "squared_relu",
        openai_gelu=mlp.activation == "gelu_tanh" and not all_biased,
        bias_gelu_fusion=mlp.activation == "gelu_tanh" and all_biased,
        normalization={ours: theirs for theirs, ours in NORMS.items()}[config.norm.kind],
        norm_epsilon=config.norm.eps,
        layernorm_epsilon=config.norm.eps,
        apply_layernorm_1p=config.norm.kind == "rms" and config.norm.offset,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=config.init_std,
        untie_embeddings_and_output_weights=not config.tied,
        make_vocab_size_divisible_by=config.vocab_divisor,
        padded_vocab_size=config.vocab_rows(layout.tensor),
        vocab_size=config.vocab_size,
        tokenizer_type=None,
        tokenizer_model=None,
        params_dtype=dtype,
        ckpt_format=form,
        data_parallel_random_init=False,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        **_scaling(config),
        **_window(config),
        **_experts(config, layout),
        **_parallel(config, layout),
    )


def _scaling(config: GPTConfig) -> dict[str, Any]:
    """Arguments of scaled rotary positions; Megatron fixes all of Llama 3's settings but the factor."""
    scaling = config.position.scaling if config.position.kind == "rope" else None
    llama3, linear = (scaling if scaling and scaling.kind == kind else None for kind in ("llama3", "linear"))
    exact = llama3 is not None and llama3.model_dump(exclude={"factor"}) == LLAMA3
    return {
        "use_rope_scaling": exact,
        "rope_scaling_factor": llama3.factor if llama3 and exact else FACTOR,
        "rotary_seq_len_interpolation_factor": int(linear.factor) if linear and linear.factor.is_integer() else None,
    }


def _window(config: GPTConfig) -> dict[str, Any]:
    part = config.attention
    layers = [int(part.get_window(n) is not None) for n in range(config.layers)]
    return {
        "window_size": (part.window - 1, 0) if part.window else None,
        "window_attn_skip_freq": layers if part.window_layers else None,
    }


def _experts(config: GPTConfig, layout: Layout) -> dict[str, Any]:
    if (mlp := config.mlp).kind != "moe":
        return {"num_experts": None}
    return {
        "num_experts": mlp.experts,
        "moe_ffn_hidden_size": mlp.ffn_hidden_size,
        "moe_layer_freq": 1,
        "moe_router_topk": mlp.top_k,
        "moe_router_pre_softmax": not mlp.normalized,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if mlp.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": mlp.aux_loss_coeff,
        "moe_grouped_gemm": layout.grouped,
        "moe_shared_expert_intermediate_size": None,
        "moe_token_dispatcher_type": "alltoall",
        "sequence_parallel": layout.tensor > 1,  # training demands it
    }


def _parallel(config: GPTConfig, layout: Layout) -> dict[str, Any]:
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


def unsupported_settings(config: GPTConfig, where: str) -> Iterator[Problem]:
    """What would change if the arguments were read back."""
    args = write_args(config, Layout(1, 1, 1, engine=False), dtype=None, form="torch")
    for lost in _changed(config.model_dump(), read_args(args, where).model_dump()):
        yield Problem(where, f"cannot carry {lost}", "or use --saver native")


def _changed(ours: Mapping[str, Any], kept: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ; of two parts of different kinds, only the kind."""
    for name, value in ours.items():
        other, path = kept.get(name), prefix + name
        if isinstance(value, dict) and isinstance(other, dict) and value.get("kind") == other.get("kind"):
            yield from _changed(value, other, f"{path}.")
        elif isinstance(value, dict):
            yield f"{path}.kind = {value['kind']!r}"
        elif other != value and path not in ("attention.core", "attention.window_layers"):
            yield f"{path} = {value!r}"
