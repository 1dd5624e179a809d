"""BERT, which Megatron's args describe as a GPT, and its heads, which they hardly mention."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.parameters.table import Shape
from mt_core.errors import Problem
from mt_models.config import BertConfig, GPTConfig

TYPES = "embedding.tokentype_embeddings.weight"
PREDICTS = "lm_head.dense.weight"
"""What BERT has and GPT has not."""
HEADS = ("gelu",)
"""Activations of the head in Megatron-Core, whatever the blocks have; the old classes also have the blocks' tanh."""


def bert_from_args(config: GPTConfig, args: Any, shapes: Mapping[str, Shape], *, core: bool) -> dict[str, Any]:
    """What BERT has besides the GPT of its args; `shapes` are of its tensors, under Core's names."""
    types = shapes.get(TYPES, (0,))[0]
    declared = getattr(args, "bert_binary_head", None)
    binary = types > 0 if declared is None else bool(declared)
    head = "gelu_tanh" if not core and getattr(args, "openai_gelu", False) else "gelu"
    head = None if head == config.mlp.activation else head
    return {"token_types": types, "head_activation": head, "pooler": binary, "binary_head": binary}


def bert_to_args(args: Namespace, config: BertConfig) -> None:
    """Change a GPT's args to those of BERT; fused, the blocks' GELU is the tanh approximation and the head's exact."""
    args.bert_binary_head = config.binary_head
    args.openai_gelu = get_head_activation(config) == "gelu_tanh"
    args.bias_gelu_fusion = config.mlp.activation == "gelu_tanh" and not args.openai_gelu


def get_head_activation(config: BertConfig) -> str:
    """The language-model head's activation."""
    return config.head_activation or config.mlp.activation


def bert_errors(config: BertConfig, where: str, heads: tuple[str, ...] = HEADS) -> Iterator[Problem]:
    """Settings that Megatron's BERT cannot have, whose head has one of these activations."""
    whole, ours, head = config.binary_head, config.mlp.activation, get_head_activation(config)
    wanted = {"norm_place": "before", "lm_head": True, "pooler": whole, "token_types": 2 if whole else 0}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield Problem(where, f"cannot carry {name} = {getattr(config, name)!r}", f"Megatron's has {value!r}")
    if head not in heads or head not in ("gelu", ours):
        known = " or ".join(repr(known) for known in heads if known in ("gelu", ours))
        problem = f"cannot carry head_activation = {head!r}, with {ours!r} in blocks"
        yield Problem(where, problem, f"Megatron's is {known}")
    biased = config.attention.qkv_bias and config.attention.out_bias and config.mlp.bias
    if ours == "gelu_tanh" and head == "gelu" and not biased:
        problem = "cannot carry mlp.activation = 'gelu_tanh' without biases"
        yield Problem(where, problem, "Megatron fuses this GELU with a bias")
