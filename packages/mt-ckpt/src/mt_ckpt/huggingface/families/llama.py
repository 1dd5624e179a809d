"""Llama (and Yi, SmolLM, Vicuna, which are Llamas), and Mistral, which has a sliding window and no biases."""

from mt_ckpt.huggingface.families.decoder import (
    ALWAYS,
    AS_MANY_GROUPS_AS_HEADS,
    ATTENTION,
    ATTENTION_BIASES,
    KEYS,
    MLP,
    NO_ATTENTION_BIASES,
    NORMS,
    decoder_names,
    whole_heads,
)
from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.windows import Window

NAMES = decoder_names(NORMS | ATTENTION | MLP)

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    names=NAMES,
    keys=KEYS
    | ATTENTION_BIASES
    | {"attention.num_kv_heads": AS_MANY_GROUPS_AS_HEADS, "mlp.bias": Key("mlp_bias", False)},
    always=ALWAYS,
    limits=whole_heads,
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    names=NAMES,
    keys=KEYS,
    always=ALWAYS | NO_ATTENTION_BIASES,
    window=Window(default=4096),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
