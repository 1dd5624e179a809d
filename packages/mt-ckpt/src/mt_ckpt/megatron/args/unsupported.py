"""Arguments of Megatron's that ask for something that GPT lacks, by name (docs/specs/checkpoints.md §1.2)."""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.args.attention import unsupported_latent_attention
from mt_ckpt.megatron.args.experts import SCOPES, get_single, unsupported_layers
from mt_ckpt.megatron.args.positions import POSITIONS, unsupported_latent_positions

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")
"""Arguments without which there is no telling what the model is."""
PLAIN: Mapping[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "mtp_num_layers": None,
    "quick_geglu": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "retro_add_retriever": False,
    "hybrid_override_pattern": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
}
"""Arguments that change what is computed, and the only value that we implement; absent or None is that value too."""
EXPERTS: Mapping[str, Any] = {
    "swiglu": True,
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
"""Arguments of a model with experts that change what is computed, and the only value that we implement."""
REASONS = {
    "moe_expert_capacity_factor": "Megatron drops tokens of a micro-batch, mt those of a sequence: null in"
    " --megatron-args leaves it out, and model.mlp.capacity_factor sets ours"
}
"""Why not another value, and what to do about it."""
SCORES = ("softmax", "sigmoid")
BALANCING = (*SCOPES, "none")
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}


def problems(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is missing or not implemented, and what is."""
    for name in SIZES:
        if type(args.get(name)) is not int or args[name] < 1:
            yield f"args.{name} is {args.get(name)!r}", "it must be a positive integer"
    for name, only in PLAIN.items():
        if args.get(name) is not None and args[name] != only:
            yield f"args.{name} is {args[name]!r}", f"only {only!r} is implemented"
    yield from _unsupported_values(args)
    for switch, problems_of_part in PARTS.items():
        if args.get(switch):
            yield from problems_of_part(args)


def _unsupported_values(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What only some values of arguments ask for."""
    for name, known in (("position_embedding_type", POSITIONS), ("normalization", NORMS)):
        if args.get(name) is not None and args[name] not in known:
            yield f"args.{name} is {args[name]!r}", f"implemented: {', '.join(known)}"
    if args.get("apply_layernorm_1p") and args.get("normalization") != "RMSNorm":
        yield "args.apply_layernorm_1p is True", "only with RMSNorm is it implemented"
    window = args.get("window_size")
    if window is not None and (len(window) != 2 or window[1] > 0):
        yield f"args.window_size is {window!r}", "tokens before a token and none after it, such as (4095, 0)"


def _unsupported_latent_args(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from unsupported_latent_attention(args)
    yield from unsupported_latent_positions(args)


def _unsupported_expert_args(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, only in EXPERTS.items():
        if args.get(name, only) not in (only, None) or (name == "swiglu" and not args.get(name)):
            allowed = f"with experts only {only!r} is implemented"
            yield f"args.{name} is {args.get(name)!r}", f"{allowed}. {REASONS[name]}" if name in REASONS else allowed
    if args.get("add_bias_linear", not args.get("disable_bias_linear", False)):
        yield "args.add_bias_linear is True", "with experts only False is implemented"
    yield from unsupported_layers(args.get("moe_layer_freq"), args.get("num_layers"))
    score = args.get("moe_router_score_function")
    if score is not None and score not in SCORES:
        yield f"args.moe_router_score_function is {score!r}", f"implemented: {', '.join(SCORES)}"
    balancing = get_single(args.get("moe_router_load_balancing_type"))
    if balancing is not None and balancing not in BALANCING:
        yield f"args.moe_router_load_balancing_type is {balancing!r}", f"implemented: {', '.join(BALANCING)}"


PARTS = {"multi_latent_attention": _unsupported_latent_args, "num_experts": _unsupported_expert_args}
"""What is wrong with the arguments of a part that one of them asks for."""
