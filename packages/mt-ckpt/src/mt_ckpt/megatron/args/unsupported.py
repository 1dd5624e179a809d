"""Arguments of Megatron's that ask for something that GPT lacks, by name (docs/specs/checkpoints.md §1.2)."""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.args.experts import SCOPES, get_single

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")
"""Arguments without which there is no telling what the model is."""
PLAIN: Mapping[str, Any] = {
    "multi_latent_attention": False,
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
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
"""Arguments of a model with experts that change what is computed, and the only value that we implement."""
SCORES = ("softmax", "sigmoid")
BALANCING = (*SCOPES, "none")
POSITIONS = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}


def problems(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is missing or not implemented, and what is."""
    for name in SIZES:
        if type(args.get(name)) is not int or args[name] < 1:
            yield f"args.{name} is {args.get(name)!r}", "it must be a positive integer"
    for name, only in PLAIN.items():
        if args.get(name) is not None and args[name] != only:
            yield f"args.{name} is {args[name]!r}", f"only {only!r} is implemented"
    for name, known in (("position_embedding_type", POSITIONS), ("normalization", NORMS)):
        if args.get(name) is not None and args[name] not in known:
            yield f"args.{name} is {args[name]!r}", f"implemented: {', '.join(known)}"
    if args.get("apply_layernorm_1p") and args.get("normalization") != "RMSNorm":
        yield "args.apply_layernorm_1p is True", "only with RMSNorm is it implemented"
    window = args.get("window_size")
    if window is not None and (len(window) != 2 or window[1] > 0):
        yield f"args.window_size is {window!r}", "tokens before a token and none after it, such as (4095, 0)"
    if args.get("num_experts"):
        yield from _unsupported_expert_args(args)


def _unsupported_expert_args(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, only in EXPERTS.items():
        if args.get(name, only) not in (only, None) or (name == "swiglu" and not args.get(name)):
            yield f"args.{name} is {args.get(name)!r}", f"with experts only {only!r} is implemented"
    if args.get("add_bias_linear", not args.get("disable_bias_linear", False)):
        yield "args.add_bias_linear is True", "with experts only False is implemented"
    frequency = args.get("moe_layer_freq")
    if (
        frequency is not None
        and frequency != 1
        and not (isinstance(frequency, list) and all(n == 1 for n in frequency))
    ):
        yield f"args.moe_layer_freq is {frequency!r}", "experts in every layer, or in none, are implemented"
    score = args.get("moe_router_score_function")
    if score is not None and score not in SCORES:
        yield f"args.moe_router_score_function is {score!r}", f"implemented: {', '.join(SCORES)}"
    balancing = get_single(args.get("moe_router_load_balancing_type"))
    if balancing is not None and balancing not in BALANCING:
        yield f"args.moe_router_load_balancing_type is {balancing!r}", f"implemented: {', '.join(BALANCING)}"
