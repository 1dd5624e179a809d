"""DeepSeek-V2 and V3: latent attention, and experts in all but the first layers, a shared one among them.

The norms of compressed features have an epsilon of their own. Several shared experts are one that is as wide as all of
them. V2's `group_limited_greedy` chooses groups by their best expert, V3 by its two best, scored by sigmoids, with a
bias of the choice. Layers of V3's files that predict further tokens are refused as tensors that no model here has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mt_ckpt.huggingface.families.decoder import ALWAYS, KEYS, MLP, NORMS, decoder_names
from mt_ckpt.huggingface.families.family import Complaint, Family, Key
from mt_ckpt.huggingface.families.ignored_keys import ANY, IGNORED
from mt_ckpt.huggingface.families.moe import IN_TRANSFORMERS, OURS
from mt_models.config import GPTConfig

LATENT_ATTENTION = {
    "self_attn.q_proj": "attn.q",
    "self_attn.q_a_proj": "attn.q_down",
    "self_attn.q_a_layernorm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.q_up",
    "self_attn.kv_a_proj_with_mqa": "attn.kv_down",
    "self_attn.kv_a_layernorm": "attn.kv_norm",
    "self_attn.kv_b_proj": "attn.kv_up",
    "self_attn.o_proj": "attn.out",
}
SHARED = {f"mlp.shared_experts.{name}_proj": f"mlp.shared.{name}" for name in OURS}
COMPRESSED_EPS = 1e-6
"""Epsilon of the norms of compressed features, whatever that of the others."""
SIZES = {
    "attention.q_lora_rank": Key("q_lora_rank", 1536, nullable=True),
    "attention.kv_lora_rank": Key("kv_lora_rank", 512),
    "attention.nope_head_size": Key("qk_nope_head_dim", 128),
    "attention.rope_head_size": Key("qk_rope_head_dim", 64),
    "attention.v_head_size": Key("v_head_dim", 128),
    "mlp.ffn_hidden_size": Key("moe_intermediate_size"),
    "mlp.experts": Key("n_routed_experts"),
    "mlp.top_k": Key("num_experts_per_tok"),
    "mlp.scaling_factor": Key("routed_scaling_factor", 1.0),
    "mlp.dense_layers": Key("first_k_dense_replace", 0),
}
GREEDY, LIMITED = "greedy", "group_limited_greedy"


def _norm_eps(raw: Mapping[str, Any]) -> float | None:
    return None if KEYS["norm.eps"].read(raw) == COMPRESSED_EPS else COMPRESSED_EPS


def _dense_width(raw: Mapping[str, Any]) -> int | None:
    width = raw.get("intermediate_size")  # if it is no number, `_complaints` says so
    return (width if type(width) is int else 1) if raw.get("first_k_dense_replace") else None


def _top_groups(raw: Mapping[str, Any]) -> int | None:
    return None if raw.get("topk_group", 1) == raw.get("n_group", 1) else raw.get("topk_group", 1)


def _shared_width(raw: Mapping[str, Any]) -> int | None:
    counts = raw.get("n_shared_experts"), raw.get("moe_intermediate_size")
    return counts[0] * counts[1] if all(type(count) is int for count in counts) else None  # pyright: ignore[reportOptionalOperand]


def _limited(raw: Mapping[str, Any]) -> bool:
    return raw.get("topk_method") == LIMITED


def _complaints(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    """Keys that repeat others, and choices of experts that we do not make."""
    rotated, plain = (SIZES[f"attention.{name}_head_size"].read(raw) for name in ("rope", "nope"))
    heads = raw.get("num_attention_heads")
    repeated = {"head_dim": rotated, "num_key_value_heads": heads}
    if type(rotated) is int and type(plain) is int:
        repeated["qk_head_dim"] = rotated + plain
    for name, value in repeated.items():
        if raw.get(name) not in (None, value):
            yield f"{name} is {raw[name]!r}", f"only {value!r} is implemented, which other keys give"
    shared = raw.get("n_shared_experts", 2)
    if type(shared) is not int or shared < 1:
        yield f"n_shared_experts is {shared!r}", "it must be a positive integer"
    if raw.get("first_k_dense_replace") and type(raw.get("intermediate_size")) is not int:
        yield f"intermediate_size is {raw.get('intermediate_size')!r}", "the first layers need it"


def _complaints_of_v2(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    yield from _complaints(raw)
    if raw.get("topk_method", GREEDY) not in (GREEDY, LIMITED):
        yield f"topk_method is {raw['topk_method']!r}", f"allowed: {GREEDY}, {LIMITED}"


def _complaints_of_v3(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    """Keys without which other defaults than ours count."""
    yield from _complaints(raw)
    for name in ("first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"):
        if raw.get(name) is None:
            yield f"has no {name}", "of deepseek_v3 it must be given"


def _write_v2(config: GPTConfig) -> Iterator[tuple[str, Any]]:
    yield from _write(config)
    limited = config.mlp.kind == "moe" and config.mlp.top_groups not in (None, config.mlp.groups)
    yield "topk_method", LIMITED if limited else GREEDY


def _write(config: GPTConfig) -> Iterator[tuple[str, Any]]:
    part = config.mlp
    if part.kind != "moe":
        return
    yield "num_key_value_heads", config.attention.heads
    yield "intermediate_size", part.dense_ffn_hidden_size or part.ffn_hidden_size
    yield "n_shared_experts", (part.shared_ffn_hidden_size or 0) // part.ffn_hidden_size
    yield "n_group", part.groups
    yield "topk_group", part.top_groups or part.groups


def _limits(config: GPTConfig) -> Iterator[str]:
    part = config.mlp
    width = part.shared_ffn_hidden_size or 0 if part.kind == "moe" else 0
    if part.kind == "moe" and (width == 0 or width % part.ffn_hidden_size):
        yield f"mlp.shared_ffn_hidden_size = {width or None}, not a multiple of {part.ffn_hidden_size}"


NAMES = decoder_names(NORMS | LATENT_ATTENTION | IN_TRANSFORMERS | SHARED | MLP)
BIAS = {"model.layers.{n}.mlp.gate.e_score_correction_bias": "layers.{n}.mlp.router.bias"}
ALIKE = {name: value for name, value in ALWAYS.items() if name != "mlp.bias"} | {
    "attention.kind": "mla",
    "attention.norm_eps": _norm_eps,
    "attention.scale": None,
    "mlp.kind": "moe",
    "mlp.shared_ffn_hidden_size": _shared_width,
    "mlp.shared_gate": False,
    "mlp.dense_ffn_hidden_size": _dense_width,
}
"""What both always have."""
ALSO_READ = (
    *("head_dim", "qk_head_dim", "num_key_value_heads", "intermediate_size"),
    *("n_shared_experts", "topk_method", "n_group", "topk_group"),
)
UNREAD = IGNORED | {"aux_loss_alpha": ANY, "seq_aux": ANY, "ep_size": ANY}

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    prefix="model.",
    names=NAMES,
    keys={name: key for name, key in KEYS.items() if name not in ("attention.num_kv_heads", "attention.head_size")}
    | SIZES,
    always=ALIKE
    | {
        "mlp.score": "softmax",
        "mlp.normalized": False,
        "mlp.groups": lambda raw: raw.get("n_group", 1) if _limited(raw) else 1,
        "mlp.top_groups": lambda raw: _top_groups(raw) if _limited(raw) else None,
        "mlp.group_best": lambda raw: 1 if _limited(raw) else 2,
    },
    also_written=_write_v2,
    also_read=ALSO_READ,
    ignored=UNREAD | {"scoring_func": "softmax"},
    required={"norm_topk_prob": False, "moe_layer_freq": 1},
    complaints=_complaints_of_v2,
    limits=_limits,
    interleaved=True,
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    names=replace(NAMES, table={**NAMES.table, **BIAS}),
    keys={**DEEPSEEK_V2.keys, "mlp.normalized": Key("norm_topk_prob", True), "mlp.groups": Key("n_group", 1)},
    always=ALIKE
    | {"mlp.score": "sigmoid", "mlp.expert_bias": True, "mlp.top_groups": _top_groups, "mlp.group_best": 2},
    also_written=_write,
    ignored=UNREAD | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": ANY},
    required={"moe_layer_freq": 1, "rope_interleave": True},
    complaints=_complaints_of_v3,
    also_read=tuple(name for name in ALSO_READ if name != "topk_method"),
    further_layers="num_nextn_predict_layers",
    token_ids={"bos_token_id": 0, "eos_token_id": 1},
)
