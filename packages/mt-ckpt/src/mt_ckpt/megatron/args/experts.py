"""Megatron's `args` of a mixture of experts and our settings for them.

Source: docs/specs/checkpoints.md §1.2. A group's score is the sum of its best scores, as many as a token has experts in
each group that it may choose from; releases before 0.12 took two, which is the same for DeepSeek's models.
"""

from collections.abc import Iterator
from typing import Any

from mt_ckpt.megatron.args.table import Arguments, Settings, Source
from mt_ckpt.megatron.layout import Layout
from mt_models.config import GPTConfig, MoE

BALANCING = {"sequence": "seq_aux_loss", "micro_batch": "aux_loss", "global_batch": "global_aux_loss"}
"""Our scopes of the balance loss to Megatron's names."""
SCOPES = {theirs: ours for ours, theirs in BALANCING.items()}


def get_single(value: Any) -> Any:
    """The element of a list of one, as newer releases write balance losses and their coefficients."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def write_experts(config: GPTConfig, layout: Layout) -> Arguments:
    """The arguments of a mixture of experts."""
    mlp = config.mlp
    assert mlp.kind == "moe"
    return {
        "num_experts": mlp.experts,
        "moe_ffn_hidden_size": mlp.ffn_hidden_size,
        "moe_layer_freq": [int(layer >= mlp.dense_layers) for layer in range(config.layers)] if mlp.dense_layers else 1,
        "moe_grouped_gemm": layout.grouped,
        "moe_shared_expert_intermediate_size": mlp.shared_ffn_hidden_size,
        "moe_shared_expert_gate": mlp.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
        "sequence_parallel": layout.tensor > 1,  # training demands it
        **_write_router(mlp),
    }


def _write_router(mlp: MoE) -> Arguments:
    limited = mlp.top_groups is not None
    return {
        "moe_router_topk": mlp.top_k,
        "moe_router_pre_softmax": mlp.score == "softmax" and not mlp.normalized,
        "moe_router_score_function": mlp.score,
        "moe_router_topk_scaling_factor": mlp.scaling_factor if mlp.scaling_factor != 1 else None,
        "moe_router_num_groups": mlp.groups if limited else None,
        "moe_router_group_topk": mlp.top_groups,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": mlp.expert_bias,
        "moe_router_bias_update_rate": mlp.expert_bias_update_rate,
        "moe_router_load_balancing_type": BALANCING[mlp.aux_loss_scope] if mlp.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": mlp.aux_loss_coeff,
        "moe_z_loss_coeff": mlp.z_loss_coeff or None,
        "moe_input_jitter_eps": mlp.jitter or None,
    }


def read_experts(source: Source, size: int) -> Settings:
    """Settings of a mixture of experts, which are as wide as a dense layer of `size` features unless args say more."""
    return {
        "mlp.kind": "moe",
        "mlp.ffn_hidden_size": source.get("moe_ffn_hidden_size") or size,
        "mlp.experts": source.get("num_experts"),
        "mlp.shared_ffn_hidden_size": source.get("moe_shared_expert_intermediate_size"),
        "mlp.shared_gate": bool(source.get("moe_shared_expert_gate")),
        **_read_dense_layers(source, size),
        **_read_router(source),
    }


def _read_dense_layers(source: Source, size: int) -> Settings:
    """Settings of the first layers, which a list marks with 0 where they have no experts; each layer has a mark."""
    frequency = source.get("moe_layer_freq")
    dense = frequency.count(0) if isinstance(frequency, list) else 0
    return {"mlp.dense_layers": dense, "mlp.dense_ffn_hidden_size": size} if dense else {}


def unsupported_layers(frequency: object, layers: object) -> Iterator[tuple[str, str]]:
    """What is wrong with which layers have experts: all, or all after the first ones, which a list says."""
    if frequency is None or frequency == 1:
        return
    marks = frequency if isinstance(frequency, list) else []
    dense = marks.count(0)
    if not marks or len(marks) != layers or dense == layers or marks != [0] * dense + [1] * (len(marks) - dense):
        allowed = f"experts in all layers, or in all after the first: 1, or 0 and then 1 for each of {layers} layers"
        yield f"args.moe_layer_freq is {frequency!r}", allowed


def _read_router(source: Source) -> Settings:
    """Settings of the router; sigmoid scores of several experts always add up to one, and that of one is its own."""
    top_k, score = source.get("moe_router_topk") or 2, source.get("moe_router_score_function") or "softmax"
    normalized = top_k > 1 if score == "sigmoid" else not source.get("moe_router_pre_softmax")
    kind = get_single(source.get("moe_router_load_balancing_type")) or "aux_loss"
    coeff = (get_single(source.get("moe_aux_loss_coeff")) or 0.0) if kind in SCOPES else 0.0
    return {
        "mlp.top_k": top_k,
        "mlp.score": score,
        "mlp.normalized": normalized,
        "mlp.scaling_factor": source.get("moe_router_topk_scaling_factor") or 1.0,
        "mlp.aux_loss_coeff": coeff,
        "mlp.aux_loss_scope": SCOPES[kind] if coeff else "sequence",
        "mlp.z_loss_coeff": source.get("moe_z_loss_coeff") or 0.0,
        "mlp.jitter": source.get("moe_input_jitter_eps") or 0.0,
        **_read_expert_bias(source),
        **_read_groups(source, top_k),
    }


def _read_expert_bias(source: Source) -> Settings:
    rate = source.get("moe_router_bias_update_rate")
    biased = bool(source.get("moe_router_enable_expert_bias"))
    return {"mlp.expert_bias": biased} | ({} if rate is None else {"mlp.expert_bias_update_rate": rate})


def _read_groups(source: Source, top_k: int) -> Settings:
    top_groups = source.get("moe_router_group_topk")
    if not top_groups:
        return {}
    return {
        "mlp.groups": source.get("moe_router_num_groups") or 1,
        "mlp.top_groups": top_groups,
        "mlp.group_best": max(1, top_k // top_groups),
    }
