"""Tiny configurations, and combinations of the parts that a GPT is composed of: every pair of choices is in one."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

from mt_models.config import GPTConfig

SIZES = {"layers": 2, "hidden_size": 16, "vocab_size": 37, "max_seq_len": 16, "init_std": 0.3}
GATED = {"kind": "gated", "ffn_hidden_size": 24}
DENSE = {"kind": "dense", "ffn_hidden_size": 24}
RMS, LAYER = {"kind": "rms"}, {"kind": "layer"}
ROPE, LEARNED, NO_POSITION = {"kind": "rope"}, {"kind": "learned"}, {"kind": "none"}


def attention(num_kv_heads: int = 2, **settings: Any) -> dict[str, Any]:
    return {"heads": 4, "num_kv_heads": num_kv_heads, "head_size": 6, **settings}


def tiny(**changes: Any) -> GPTConfig:
    """A Llama-like model; keyword arguments replace its fields."""
    parts = {"attention": attention(), "mlp": GATED, "norm": RMS, "position": ROPE}
    return GPTConfig.model_validate(SIZES | parts | changes)


def cover_pairs(*choices: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Few combinations of one choice each in which every two choices meet: always the one with most new pairs.

    For 3 × 2 × 2 × 3 × 2 × 2 choices these are 9 of 144.
    """
    numbered = list(product(*map(range, map(len, choices))))
    missing = {pair for numbers in numbered for pair in combinations(enumerate(numbers), 2)}
    while missing:
        best = max(numbered, key=lambda numbers: len(missing.intersection(combinations(enumerate(numbers), 2))))
        missing.difference_update(combinations(enumerate(best), 2))
        yield tuple(options[number] for options, number in zip(choices, best, strict=True))


COMBINATIONS = {
    f"{groups}-groups-{mlp['kind']}-{norm['kind']}-{position['kind']}"
    f"{'-bias' if bias else ''}{'-tied' if tied else ''}": tiny(
        attention=attention(groups, qkv_bias=bias, out_bias=bias),
        mlp=mlp | {"bias": bias},
        norm=norm,
        position=position,
        tied=tied,
    )
    for groups, mlp, norm, position, bias, tied in cover_pairs(
        (2, 1, 4), (DENSE, GATED), (RMS, LAYER), (ROPE, LEARNED, NO_POSITION), (False, True), (False, True)
    )
}

LATENT = {
    **{"kind": "mla", "heads": 4, "kv_lora_rank": 8},
    **{"nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5},
}
MOE = {"kind": "moe", "ffn_hidden_size": 24, "experts": 4, "top_k": 2}

COMBINATIONS |= {
    "experts": tiny(mlp=MOE),
    "experts-unnormalised": tiny(mlp=MOE | {"normalized": False, "aux_loss_coeff": 0.5}),
    "experts-biased-shared": tiny(
        mlp=MOE | {"score": "sigmoid", "expert_bias": True, "shared_ffn_hidden_size": 8, "shared_gate": True}
    ),
    "head-norms": tiny(attention=attention(qk_norm=True)),
    "head-norms-layer": tiny(attention=attention(qk_norm=True), norm=LAYER),
    "post-norms-offset-capped-window": tiny(
        attention=attention(softcap=2.0, scale=0.5, window=5, window_layers=[True, False]),
        norm=RMS | {"offset": True},
        post_norms=True,
        scaled_embedding=True,
        logit_softcap=3.0,
        tied=True,
    ),
    "latent": tiny(attention=LATENT),
    "experts-after-dense-layer": tiny(mlp=MOE | {"dense_layers": 1, "dense_ffn_hidden_size": 20}),
    "latent-queries-layer-scaled": tiny(
        attention=LATENT | {"q_lora_rank": 7, "norm_eps": 1e-3, "scale": 0.4}, norm=LAYER
    ),
    "yarn-window": tiny(
        attention=attention(window=4),
        position=ROPE | {"scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 8}},
    ),
}
