"""Checkpoints of Megatron's old classes, written row by row from the words of docs/specs/checkpoints.md §1 to §3.

Nothing of mt_ckpt is used, so that reading them back tests it.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STYLES = {
    "2019": {
        "stack": "transformer",
        "attn_norm.": "input_layernorm.",
        "qkv.": "attention.query_key_value.",
        "out.": "attention.dense.",
        "mlp_norm.": "post_attention_layernorm.",
        "up.": "mlp.dense_h_to_4h.",
        "down.": "mlp.dense_4h_to_h.",
        "norm.": "final_layernorm.",
        "lm_head.norm.": "layernorm.",
    },
}
STYLES["2021"] = STYLES["2019"] | {
    "stack": "encoder",
    "qkv.": "self_attention.query_key_value.",
    "out.": "self_attention.dense.",
}
STYLES["2023"] = STYLES["2021"] | {
    "attn_norm.": "input_norm.",
    "mlp_norm.": "post_attention_norm.",
    "norm.": "final_norm.",
    "lm_head.norm.": "norm.",
}
STYLES["engine"] = STYLES["2023"] | {
    "attn_norm.": "self_attention.layernorm_qkv.layer_norm_",
    "qkv.": "self_attention.layernorm_qkv.",
    "out.": "self_attention.proj.",
    "mlp_norm.": "layernorm_mlp.layer_norm_",
    "up.": "layernorm_mlp.fc1_",
    "down.": "layernorm_mlp.fc2_",
}


LEAVES = ("weight", "bias")


def random_weights(config: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A canonical tensor for every name."""
    random = torch.Generator().manual_seed(0)
    shapes = config.canonical_shapes()
    return {name: (torch.randn(shape, generator=random) / 4).to(dtype) for name, shape in shapes.items()}


def write_legacy(
    root: Path,
    config: Any,
    weights: dict[str, Tensor],
    *,
    version: float | None = 3.0,
    ranks: tuple[int, int, int] = (1, 1, 1),
    style: str = "2023",
    args: Any = "as of the version",
    rows: int = 64,
    file: str = "model_optim_rng.pt",
    tracker: str = "release",
    zipped: bool = True,
) -> Path:
    """Write a checkpoint for tensor ranks × stages × chunks; `rows` of the embedding include padding of noise."""
    tensor, pipeline, virtual = ranks
    if args == "as of the version":
        args = arguments(config, version, ranks, rows)
    padded = ("embed.weight", "head.weight", "head.bias")
    weights = weights | {name: _padded(weights[name], rows) for name in padded if name in weights}
    directory = root / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
    for t in range(tensor):
        for p in range(pipeline):
            each = config.layers // (pipeline * virtual)
            starts = [c * (config.layers // virtual) + p * each for c in range(virtual)]
            chunks = [
                _chunk(
                    *(config, weights, STYLES[style], version),
                    rank=(t, tensor),
                    layers=range(start, start + each),
                    ends=(p == 0 and c == 0, p == pipeline - 1 and c == virtual - 1, pipeline > 1),
                )
                for c, start in enumerate(starts)
            ]
            state = {"model": chunks[0]} if virtual == 1 else {f"model{c}": chunk for c, chunk in enumerate(chunks)}
            state |= {} if version is None else {"checkpoint_version": version}
            state |= {} if args is None else {"args": args}
            path = directory / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "")) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"iteration": 7, **state}, path, _use_new_zipfile_serialization=zipped)
    (root / "latest_checkpointed_iteration.txt").write_text(f"{tracker}\n")
    return root


def _padded(tensor: Tensor, rows: int) -> Tensor:
    noise = torch.randn(rows - len(tensor), *tensor.shape[1:], generator=torch.Generator().manual_seed(1))
    return torch.cat([tensor, noise.to(tensor.dtype)])


def arguments(config: Any, version: float | None, ranks: tuple[int, int, int], rows: int) -> Namespace:
    """What a release of that time kept: sizes, and switches where they are on."""
    switches = {
        "swiglu": config.mlp.kind == "gated",
        "bias_gelu_fusion": config.mlp.activation == "gelu_tanh",
        "untie_embeddings_and_output_weights": config.kind == "gpt" and not config.tied,
        "group_query_attention": config.attention.num_kv_heads != config.attention.heads,
    }
    args = Namespace(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.attention.heads,
        max_position_embeddings=config.max_seq_len,
        padded_vocab_size=rows,
        layernorm_epsilon=config.norm.eps,
        params_dtype=torch.float32,
        save=Path("checkpoints"),
        **{name: True for name, on in switches.items() if on},
    )
    if (version or 0) < 3:
        args.model_parallel_size = ranks[0]
        return args
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = ranks[:2]
    args.num_query_groups, args.kv_channels = config.attention.num_kv_heads, config.attention.head_size
    args.ffn_hidden_size, args.add_bias_linear = config.mlp.ffn_hidden_size, config.mlp.bias
    args.normalization = "RMSNorm" if config.norm.kind == "rms" else "LayerNorm"
    if config.kind == "gpt" and config.position.kind == "rope":
        args.position_embedding_type, args.rotary_base = "rope", config.position.theta
    return args


def _chunk(
    config: Any,
    weights: dict[str, Tensor],
    style: dict[str, str],
    version: float | None,
    *,
    rank: tuple[int, int],
    layers: range,
    ends: tuple[bool, bool, bool],
) -> dict[str, Any]:
    """One chunk's nested state on a tensor rank; `ends`: is it the first, the last, and are there several stages."""
    t, tensor = rank
    first, last, several = ends
    stack: dict[str, Tensor] = {}
    for number, n in enumerate(layers):
        for leaf in LEAVES:
            for name, part in _layer(config, weights, f"layers.{n}.", leaf, version, t, tensor):
                stack[f"layers.{number}.{style[name]}{leaf}"] = part
    if last:
        stack |= {style["norm."] + leaf: weights[f"norm.{leaf}"] for leaf in _leaves(weights, "norm.")}
    model: dict[str, Any] = {"language_model": {style["stack"]: stack}}
    words = weights["embed.weight"].chunk(tensor)[t].clone()
    if first:
        whole = {"position_embeddings": "position.weight", "tokentype_embeddings": "token_type.weight"}
        tables = {theirs: {"weight": weights[ours]} for theirs, ours in whole.items() if ours in weights}
        model["language_model"]["embedding"] = {"word_embeddings": {"weight": words}} | tables
    if last and config.kind == "bert":
        model |= _bert_heads(weights, model["language_model"], style, rank)
    if last and "head.weight" in weights:
        model["language_model"]["output_layer"] = {"weight": weights["head.weight"].chunk(tensor)[t].clone()}
    elif last and several:
        model["word_embeddings_for_head"] = {"weight": words}
    return model


def _bert_heads(
    weights: dict[str, Tensor], language_model: dict[str, Any], style: dict[str, str], rank: tuple[int, int]
) -> dict[str, Any]:
    """The pooler, into the language model; the other heads beside it."""
    language_model["pooler"] = {f"dense.{leaf}": weights[f"pooler.{leaf}"] for leaf in LEAVES}
    lm_head = {"bias": weights["head.bias"].chunk(rank[1])[rank[0]].clone()}
    for leaf in LEAVES:
        lm_head[f"dense.{leaf}"] = weights[f"lm_head.dense.{leaf}"]
        lm_head[style["lm_head.norm."] + leaf] = weights[f"lm_head.norm.{leaf}"]
    return {"lm_head": lm_head, "binary_head": {leaf: weights[f"binary_head.{leaf}"] for leaf in LEAVES}}


def _layer(
    config: Any, weights: dict[str, Tensor], prefix: str, leaf: str, version: float | None, t: int, tensor: int
) -> list[tuple[str, Tensor]]:
    """A layer's tensors of one kind on tensor rank `t`."""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    parts = []
    for name in ("attn_norm.", "mlp_norm."):
        if name + leaf in tensors:
            parts.append((name, tensors[name + leaf]))
    if f"attn.q.{leaf}" in tensors:
        q, k, v = (tensors[f"attn.{letter}.{leaf}"].chunk(tensor)[t] for letter in "qkv")
        parts.append(("qkv.", torch.stack(_interleaved(config, q, k, v, version))))
    for name, ours in (("out.", f"attn.out.{leaf}"), ("down.", f"mlp.down.{leaf}")):
        if ours in tensors:
            parts.append((name, tensors[ours].chunk(tensor, 1)[t].clone() if leaf == "weight" else tensors[ours]))
    if f"mlp.up.{leaf}" in tensors:
        gates = [f"mlp.gate.{leaf}"] if f"mlp.gate.{leaf}" in tensors else []
        parts.append(("up.", torch.cat([tensors[name].chunk(tensor)[t] for name in (*gates, f"mlp.up.{leaf}")])))
    return parts


def _interleaved(config: Any, q: Tensor, k: Tensor, v: Tensor, version: float | None) -> list[Tensor]:
    """Rows in the order of the version (docs/specs/checkpoints.md §3.9)."""
    d = config.attention.head_size
    heads, groups = len(q) // d, len(k) // d
    if not version:
        return [*q, *k, *v]
    if version == 1.0:
        return [part[head * d + row] for head in range(heads) for row in range(d) for part in (q, k, v)]
    rows: list[Tensor] = []
    for group in range(groups):
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            rows += q[head * d : (head + 1) * d]
        rows += [*k[group * d : (group + 1) * d], *v[group * d : (group + 1) * d]]
    return rows


def _leaves(weights: dict[str, Tensor], prefix: str) -> list[str]:
    return [leaf for leaf in LEAVES if prefix + leaf in weights]
