"""GPT, BERT or T5: which of them a checkpoint holds, and its args: a GPT's with what the others have besides."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.args.bert import HEADS, PREDICTS, bert_errors, bert_from_args, bert_to_args
from mt_ckpt.megatron.args.gpt import unsupported_settings, write_args
from mt_ckpt.megatron.args.reading import read_args
from mt_ckpt.megatron.args.t5 import encoder_args, t5_errors, t5_from_args, t5_to_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.table import Shape
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import BertConfig, GPTConfig, Learned, NoPosition, T5Config, TransformerConfig, TransformerSection

SHARED = tuple(name for name in TransformerSection.model_fields if name != "kind")
"""What all have."""


def detect_model_type(names: Mapping[str, Any]) -> str:
    """The kind of model that has tensors of such names, which are Core's."""
    modules = {name.partition(".layers.")[0] for name in names}
    if "encoder" not in modules:
        return "bert" if PREDICTS in names else "gpt"
    return "t5" if "decoder" in modules else "bert"


def read_model(
    args: Any, shapes: Mapping[str, Shape], where: str, true_vocab_size: int | None = None, *, core: bool = True
) -> TransformerConfig:
    """The model that args and the shapes of tensors, under Core's names, describe; `core` is false of the old classes.

    One `MtError` names everything that is missing or not implemented.
    """
    kind = detect_model_type(shapes)
    if kind == "gpt":
        return read_args(args, where, true_vocab_size)
    gpt = read_args(encoder_args(args) if kind == "t5" else args, where, true_vocab_size)
    raise_if(_not_implemented(gpt, args, kind, where))
    shared = gpt.model_dump(include={*SHARED})
    try:
        if kind == "bert":
            return BertConfig.model_validate(shared | bert_from_args(gpt, args, shapes, core=core))
        return T5Config.model_validate(shared | t5_from_args(gpt, args, shapes))
    except ValidationError as err:
        problems = (Problem(where, f"args: {e['msg']}", "the checkpoint cannot be read") for e in err.errors())
        raise MtError.from_problems(problems) from None


def _not_implemented(config: GPTConfig, args: Any, kind: str, where: str) -> Iterator[Problem]:
    """What GPT may have and other kinds may not."""
    declared = getattr(args, "position_embedding_type", None) or "learned_absolute"
    positions = ("learned_absolute", "relative") if kind == "t5" else ("learned_absolute",)
    if declared not in positions:
        yield Problem(where, f"args.position_embedding_type is {declared!r}", f"of {kind}: {', '.join(positions)}")
    if kind == "bert" and not config.tied:
        yield Problem(where, "args.untie_embeddings_and_output_weights is True", "of bert: False")
    if config.mlp.kind == "moe":
        yield Problem(where, f"args.num_experts is {config.mlp.experts}", f"of {kind}: None")


def as_gpt(config: TransformerConfig) -> GPTConfig:
    """The GPT whose args are those of a BERT, or of T5's encoder; a GPT is itself."""
    if config.kind == "gpt":
        return config
    shared = config.model_dump(include={*SHARED})
    learned = config.kind == "bert" or config.position.kind == "learned"
    more = {"position": (Learned() if learned else NoPosition()).model_dump()}
    return GPTConfig.model_validate(shared | more | {"tied": config.kind == "bert" or config.tied})


def model_args(config: TransformerConfig, layout: Layout, *, dtype: Any, form: str) -> Namespace:
    """The args of a model."""
    stack = replace(layout, pipeline=layout.encoder or layout.pipeline)
    args = write_args(as_gpt(config), stack, dtype=dtype, form=form)
    if config.kind == "bert":
        bert_to_args(args, config)
    elif config.kind == "t5":
        t5_to_args(args, config, layout)
    return args


def model_problems(config: TransformerConfig, where: str, *, heads: tuple[str, ...] = HEADS) -> Iterator[Problem]:
    """What Megatron cannot be told of a model; `heads` are activations that a BERT's head may have."""
    plain = config
    if config.kind == "bert":
        yield from bert_errors(config, where, heads)
    elif config.kind == "t5":
        yield from t5_errors(config, where)
        plain = config.model_copy(update={"attention": config.attention.model_copy(update={"scale": None})})
    yield from unsupported_settings(as_gpt(plain), where)
