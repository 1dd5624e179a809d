"""Megatron's `args` of attention and our settings for them: of grouped queries, or multi-head latent attention.

Source: docs/specs/checkpoints.md §1.2, §3.7.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.args.table import Arguments, Row, Settings, Source, rename
from mt_ckpt.megatron.layout import Layout
from mt_models.config import GPTConfig

LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "nope_head_size": "qk_head_dim",
    "rope_head_size": "qk_pos_emb_head_dim",
    "v_head_size": "v_head_dim",
}
"""Sizes of latent attention, ours to theirs."""
ONLY: Mapping[str, Any] = {
    "qk_layernorm": True,
    "window_size": None,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
}
"""Arguments beside latent attention, and their only value that we implement, or Megatron."""


def is_latent(source: Source) -> bool:
    """Whether args ask for latent attention."""
    return bool(source.get("multi_latent_attention"))


def _write_kind(config: GPTConfig, layout: Layout) -> Arguments:
    part = config.attention
    if part.kind != "mla":
        return {"multi_latent_attention": False}
    return {"multi_latent_attention": True, **{theirs: getattr(part, ours) for ours, theirs in LATENT.items()}}


def _read_kind(source: Source) -> Settings:
    if not is_latent(source):
        return {"attention.kind": "gqa"}
    sizes = {f"attention.{ours}": source.get(theirs) for ours, theirs in LATENT.items()}
    return {"attention.kind": "mla", **sizes}


def _write_kv_heads(config: GPTConfig, layout: Layout) -> Arguments:
    part = config.attention
    return {"num_query_groups": part.num_kv_heads, "group_query_attention": part.num_kv_heads != part.heads}


def _read_kv_heads(source: Source) -> Settings:
    if is_latent(source):
        return {}
    name = "num_query_groups" if source.get("group_query_attention") else "num_attention_heads"
    return {"attention.num_kv_heads": source.get(name)}


def _read_head_size(source: Source) -> Settings:
    if is_latent(source):
        return {}
    size = source.get("kv_channels") or source.get("hidden_size") // source.get("num_attention_heads")
    return {"attention.head_size": size}


def _write_qk_norm(config: GPTConfig, layout: Layout) -> Arguments:
    """Arguments of norms in attention: those of compressed features are asked for like those of heads."""
    return {"qk_layernorm": config.attention.kind == "mla" or config.attention.qk_norm}


def _read_qk_norm(source: Source) -> Settings:
    return {} if is_latent(source) else {"attention.qk_norm": bool(source.get("qk_layernorm"))}


def _write_window(config: GPTConfig, layout: Layout) -> Arguments:
    part = config.attention
    layers = [int(part.get_window(number) is not None) for number in range(config.layers)]
    return {
        "window_size": (part.window - 1, 0) if part.window else None,
        "window_attn_skip_freq": layers if part.window_layers else None,
    }


def _read_window(source: Source) -> Settings:
    if is_latent(source):
        return {}
    left, _ = source.get("window_size") or (-1, 0)
    if left < 0:
        return {"attention.window": None, "attention.window_layers": None}
    layers = _read_window_layers(source.get("window_attn_skip_freq"), source.get("num_layers"))
    return {"attention.window": left + 1, "attention.window_layers": layers}


def _read_window_layers(frequency: Any, layers: int) -> tuple[bool, ...] | None:
    """A list says which layers have the window; a number n, that every n-th has none."""
    if frequency is None:
        return None
    if isinstance(frequency, int):
        pattern = [(number + 1) % frequency != 0 for number in range(layers)]
    else:
        pattern = [bool(windowed) for windowed in frequency]
    period = next(p for p in range(1, layers + 1) if all(pattern[n] == pattern[n % p] for n in range(layers)))
    return None if all(pattern) else tuple(pattern[:period])


def unsupported_latent_attention(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What args ask of latent attention that ours has not, or do not say."""
    for theirs in LATENT.values():
        size = args.get(theirs)
        if not (size is None and theirs == "q_lora_rank") and (type(size) is not int or size < 1):
            yield f"args.{theirs} is {size!r}", "it must be a positive integer with latent attention"
    for name, only in ONLY.items():
        if (args.get(name) or None) != (only or None):
            yield f"args.{name} is {args.get(name)!r}", f"with latent attention only {only!r} is implemented"
    if args.get("add_bias_linear", not args.get("disable_bias_linear", False)):
        yield "args.add_bias_linear is True", "with latent attention only False is implemented"


ATTENTION_ROWS = (
    Row(_write_kind, _read_kind),
    rename("attention.heads", "num_attention_heads"),
    Row(_write_kv_heads, _read_kv_heads),
    Row(lambda config, layout: {"kv_channels": config.attention.head_size}, _read_head_size),
    Row(_write_qk_norm, _read_qk_norm),
    Row(_write_window, _read_window),
)
"""Settings of attention, but for its biases and dropout."""
