"""BERT, which Megatron's args describe as a GPT, and its heads, which they hardly mention."""

from collections.abc import Iterator

from mt_ckpt.megatron.args.gpt import read_activation
from mt_ckpt.megatron.args.table import Arguments, Row, Settings, Source
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.table import TASK_HEADS
from mt_core.errors import Problem
from mt_models.config import BertConfig

TYPES = "embedding.tokentype_embeddings.weight"
PREDICTS = "lm_head.dense.weight"
"""What BERT has and GPT has not."""
HEADS = {True: ("gelu",), False: ("gelu", "gelu_tanh")}
"""Activations of the head in Megatron-Core, whatever the blocks have; the old classes also have the blocks' tanh."""
BERT_ONLY = (PREDICTS, *(f"{module}.weight" for module in TASK_HEADS.values()))
"""Tensors of which a BERT has one and a GPT none."""


def _write_head(config: BertConfig, layout: Layout) -> Arguments:
    """Arguments of activations; fused, the blocks' GELU is the tanh approximation and the head's exact."""
    tanh_head = get_head_activation(config) == "gelu_tanh"
    return {"openai_gelu": tanh_head, "bias_gelu_fusion": config.mlp.activation == "gelu_tanh" and not tanh_head}


def _read_head(source: Source) -> Settings:
    head = "gelu_tanh" if not source.core and source.get("openai_gelu") else "gelu"
    blocks = "silu" if source.get("swiglu") else read_activation(source)
    return {"head_activation": None if head == blocks else head}


def _read_binary_head(source: Source) -> Settings:
    """Settings of what BERT has beside the language model; older args do not say whether it has a binary head."""
    types = source.shapes.get(TYPES, (0,))[0]
    if task := _read_task_head(source):
        return {"token_types": types, "pooler": True, "binary_head": False, "lm_head": False, "task_head": task}
    declared = source.get("bert_binary_head")
    binary = types > 0 if declared is None else bool(declared)
    return {"token_types": types, "pooler": binary, "binary_head": binary}


def _read_task_head(source: Source) -> Settings | None:
    """The head of a task that the old classes fine-tuned, if there is one."""
    for kind, module in TASK_HEADS.items():
        if shape := source.shapes.get(f"{module}.weight"):
            return {"kind": kind} | ({"classes": shape[0]} if kind == "classification" else {})
    return None


ROWS = (
    Row(_write_head, _read_head),
    Row(lambda config, layout: {"bert_binary_head": config.binary_head}, _read_binary_head),
)
"""Settings that BERT has besides those of a GPT."""


def get_head_activation(config: BertConfig) -> str:
    """The language-model head's activation."""
    return config.head_activation or config.mlp.activation


def bert_errors(config: BertConfig, where: str, core: bool = True) -> Iterator[Problem]:
    """Settings that the BERT of Megatron-Core, or of the old classes, cannot have."""
    if config.task_head is not None and config.task_head.kind == "regression":
        yield Problem(where, "cannot carry a task_head of kind 'regression'", "Megatron has none: --saver hf or native")
        return
    whole, ours, head, heads = config.binary_head, config.mlp.activation, get_head_activation(config), HEADS[core]
    if config.task_head is not None and core:
        yield Problem(where, "cannot carry task_head", "Megatron's old classes have one: --saver legacy")
        return
    wanted: dict[str, object] = {"norm_place": "before"}
    if config.task_head is None:
        wanted |= {"lm_head": True, "pooler": whole, "token_types": 2 if whole else 0}
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
