"""The `GPTConfig` that Megatron's `args` describe, from tables; what they ask for and GPT lacks is refused."""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.args.unsupported import NORMS, POSITIONS, problems
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

Get = Callable[[str], Any]
LLAMA3 = {"kind": "llama3", "original_positions": 8192, "low_frequency": 1.0, "high_frequency": 4.0}
"""What --use-rope-scaling means, besides its factor."""
FACTOR = 8.0
"""Factor of --use-rope-scaling for args without a rope_scaling_factor."""


def read_args(args: Any, where: str, true_vocab_size: int | None = None) -> GPTConfig:
    """The configuration that `args` describe; one `MtError` names everything that is missing or not implemented."""
    raise_if(Problem(where, *problem) for problem in problems(vars(args)))
    get = {**vars(args)}.get
    vocab = true_vocab_size or get("vocab_size") or args.padded_vocab_size
    if vocab > args.padded_vocab_size:
        allowed = f"at most padded_vocab_size = {args.padded_vocab_size}"
        raise MtError(where, f"a true vocabulary of {vocab} does not fit the embedding", allowed)
    norm = {"kind": NORMS[get("normalization") or "LayerNorm"]}
    values = {
        "layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "vocab_size": vocab,
        "max_seq_len": args.max_position_embeddings,
        "attention": _attention(get),
        "mlp": _experts(get) if get("num_experts") else _mlp(get),
        "norm": norm
        | {"eps": get("norm_epsilon") or get("layernorm_epsilon") or 1e-5}
        | ({"offset": bool(get("apply_layernorm_1p"))} if norm["kind"] == "rms" else {}),
        "position": _position(get),
        "tied": not get("untie_embeddings_and_output_weights"),
        "init_std": get("init_method_std") or 0.02,
        "vocab_divisor": get("make_vocab_size_divisible_by") or 128,
    }
    try:
        return GPTConfig.model_validate(values)
    except ValidationError as err:
        raise MtError.from_problems(
            Problem(where, f"args: {e['msg']}", "the checkpoint cannot be read") for e in err.errors()
        ) from None


def biased(get: Get) -> bool:
    """Whether every linear layer has a bias."""
    declared = get("add_bias_linear")
    return not get("disable_bias_linear") if declared is None else bool(declared)


def _attention(get: Get) -> dict[str, Any]:
    heads = get("num_attention_heads")
    left, _ = get("window_size") or (-1, 0)
    return {
        "heads": heads,
        "num_kv_heads": get("num_query_groups") if get("group_query_attention") else heads,
        "head_size": get("kv_channels") or get("hidden_size") // heads,
        "qkv_bias": biased(get) or bool(get("add_qkv_bias")),
        "out_bias": biased(get),
        "qk_norm": bool(get("qk_layernorm")),
        "window": left + 1 if left >= 0 else None,
        "window_layers": None if left < 0 else _window_layers(get("window_attn_skip_freq"), get("num_layers")),
    }


def _window_layers(frequency: Any, layers: int) -> tuple[bool, ...] | None:
    """A list says which layers have the window; a number n, that every n-th has none."""
    if frequency is None:
        return None
    if isinstance(frequency, int):
        pattern = [(n + 1) % frequency != 0 for n in range(layers)]
    else:
        pattern = [bool(one) for one in frequency]
    period = next(p for p in range(1, layers + 1) if all(pattern[n] == pattern[n % p] for n in range(layers)))
    return None if all(pattern) else tuple(pattern[:period])


def _mlp(get: Get) -> dict[str, Any]:
    gated = bool(get("swiglu"))
    return {
        "kind": "gated" if gated else "dense",
        "ffn_hidden_size": get("ffn_hidden_size") or 4 * get("hidden_size"),
        "activation": "silu" if gated else _activation(get),
        "bias": biased(get),
    }


def _activation(get: Get) -> str:
    """Megatron's fused bias-GeLU is the tanh approximation; without fusion its GeLU is exact."""
    if get("squared_relu"):
        return "squared_relu"
    return "gelu_tanh" if get("openai_gelu") or get("bias_gelu_fusion") else "gelu"


def _experts(get: Get) -> dict[str, Any]:
    balanced = get("moe_router_load_balancing_type") in (None, "aux_loss", "seq_aux_loss")
    return {
        "kind": "moe",
        "ffn_hidden_size": get("moe_ffn_hidden_size") or get("ffn_hidden_size") or 4 * get("hidden_size"),
        "experts": get("num_experts"),
        "top_k": get("moe_router_topk") or 2,
        "normalized": not get("moe_router_pre_softmax"),
        "aux_loss_coeff": (get("moe_aux_loss_coeff") or 0.0) if balanced else 0.0,
    }


def _position(get: Get) -> dict[str, Any]:
    kind = POSITIONS[get("position_embedding_type") or "learned_absolute"]
    if kind != "rope":
        return {"kind": kind}
    scaling = None
    if get("use_rope_scaling"):
        scaling = {**LLAMA3, "factor": get("rope_scaling_factor") or FACTOR}
    elif factor := get("rotary_seq_len_interpolation_factor"):
        scaling = {"kind": "linear", "factor": factor}
    return {"kind": kind, "theta": get("rotary_base") or 10_000, "scaling": scaling}
