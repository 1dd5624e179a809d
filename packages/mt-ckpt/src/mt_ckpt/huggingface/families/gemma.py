"""Gemma and Gemma 2: norms around one, scaled embeddings, GeGLU. Gemma 2 caps scores and logits, norms what a layer
adds, and gives every other layer a window.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.huggingface.families.decoder import (
    ALWAYS,
    ATTENTION,
    ATTENTION_BIASES,
    KEYS,
    MLP,
    NORMS,
    decoder_names,
    whole_heads,
)
from mt_ckpt.huggingface.families.family import Complaint, Family, Key
from mt_ckpt.huggingface.families.ignored_keys import ANY, IGNORED
from mt_ckpt.huggingface.families.windows import Window
from mt_models.config import GPTConfig

GELU = "gelu_pytorch_tanh"
SANDWICH = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
OF_ALL = {"attention.head_size": Key("head_dim", 256), "tied": Key("tie_word_embeddings", True)}
ALWAYS_IN_ALL = ALWAYS | {"norm.offset": True, "scaled_embedding": True}


def _odd_activations(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    """The first files say "gelu" and mean its approximation; releases differ in which of the two keys counts."""
    for name, allowed in (("hidden_act", (GELU, "gelu", None)), ("hidden_activation", (GELU, None))):
        if raw.get(name) not in allowed:
            yield f"{name} is {raw[name]!r}", f"of Gemma, only {GELU!r} is implemented"


DIVISOR = Key("query_pre_attn_scalar", 256)
"""Scores are divided by its root; it need not be the head size."""


def _odd_divisor(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    divisor = DIVISOR.read(raw)
    if type(divisor) not in (int, float) or divisor <= 0:
        yield f"{DIVISOR.name} is {divisor!r}", "it must be a positive number"


def _scale(raw: Mapping[str, Any]) -> float | None:
    divisor = DIVISOR.read(raw)
    if divisor == OF_ALL["attention.head_size"].read(raw) or [*_odd_divisor(raw)]:
        return None
    return divisor**-0.5


def _scale_written(config: GPTConfig) -> Iterator[tuple[str, Any]]:
    part = config.attention
    yield DIVISOR.name, part.head_size if part.scale is None else max(1, round(part.scale**-2))


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | ATTENTION | MLP),
    keys={path: key for path, key in (KEYS | ATTENTION_BIASES | OF_ALL).items() if path != "mlp.activation"},
    always=ALWAYS_IN_ALL | {"mlp.activation": "gelu_tanh"},
    also_written=lambda config: [("hidden_act", GELU), ("hidden_activation", GELU)],
    required={"use_bidirectional_attention": False},
    complaints=_odd_activations,
    also_read=("hidden_act", "hidden_activation"),
    token_ids={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    names=decoder_names(SANDWICH | ATTENTION | MLP),
    keys=KEYS
    | ATTENTION_BIASES
    | OF_ALL
    | {
        "mlp.activation": Key("hidden_activation", "gelu_tanh", {"gelu_tanh": GELU}, {"gelu_new": "gelu_tanh"}),
        "attention.softcap": Key("attn_logit_softcapping", 50.0, nullable=True),
        "logit_softcap": Key("final_logit_softcapping", 30.0, nullable=True),
    },
    always=ALWAYS_IN_ALL | {"post_norms": True, "attention.scale": _scale},
    also_written=_scale_written,
    required={"use_bidirectional_attention": False},
    complaints=_odd_divisor,
    also_read=(DIVISOR.name,),
    ignored=IGNORED | {"hidden_act": GELU, "sliding_window_size": ANY},
    window=Window(default=4096, slides=lambda layer, raw: layer % 2 == 0, always_written=True),
    limits=whole_heads,
    token_ids={"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
)
