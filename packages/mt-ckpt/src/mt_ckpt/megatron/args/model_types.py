"""GPT, BERT or T5: which of them a checkpoint holds, and its args: a GPT's with what the others have besides."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.args import bert, t5
from mt_ckpt.megatron.args.gpt import read_args, write_args
from mt_ckpt.megatron.args.table import Row, Source, describe_invalid_args, read_rows
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.parameters.table import Shape, is_tied
from mt_core.errors import Problem, raise_if
from mt_models.config import BertConfig, GPTConfig, Learned, NoPosition, T5Config, TransformerConfig, TransformerSection

SHARED = tuple(name for name in TransformerSection.model_fields if name != "kind")
"""Settings that all model types have."""
NOT_COMPARED = ("attention.core", "attention.window_layers", "dropout.embedding")
"""Settings that another one says as well, or that change no weight: args have one rate for embeddings and layers."""
REASONS = {
    "mlp.capacity_factor": "Megatron drops tokens of a micro-batch, mt those of a sequence",
    "attention.norm_eps": "all norms of Megatron's have the same",
}
"""Why Megatron's args do not carry a setting, where it is not that they lack it."""
VERSION = 3.0
"""checkpoint_version since 2021: query, key and value interleaved by group."""


def _keep(args: Any) -> Any:
    return args


def _no_errors(config: TransformerConfig, where: str, core: bool) -> Iterator[Problem]:
    return iter(())


@dataclass(frozen=True)
class ModelType:
    """What distinguishes a type of model from a GPT."""

    config: type[TransformerConfig]
    rows: tuple[Row, ...] = ()
    """Settings besides those of a GPT."""
    positions: tuple[str, ...] = ()
    """Values of position_embedding_type that it may have; any that a GPT may have, if empty."""
    gpt_args: Callable[[Any], Any] = _keep
    """The args of the GPT that is like its first stack."""
    errors: Callable[[Any, str, bool], Iterator[Problem]] = _no_errors
    """Settings that Megatron-Core's model of the type, or that of the old classes, cannot have."""


MODEL_TYPES: Mapping[str, ModelType] = {
    "gpt": ModelType(GPTConfig),
    "bert": ModelType(BertConfig, bert.ROWS, ("learned_absolute",), errors=bert.bert_errors),
    "t5": ModelType(T5Config, t5.ROWS, ("learned_absolute", t5.RELATIVE), t5.encoder_args, t5.t5_errors),
}


def detect_model_type(names: Mapping[str, Any]) -> str:
    """The type of model that has tensors of such names, which are Core's."""
    modules = {name.partition(".layers.")[0] for name in names}
    if "encoder" not in modules:
        return "bert" if any(name in names for name in bert.BERT_ONLY) else "gpt"
    return "t5" if "decoder" in modules else "bert"


def read_model(
    args: Any, shapes: Mapping[str, Shape], where: str, true_vocab_size: int | None = None, *, core: bool = True
) -> TransformerConfig:
    """The model that args and the shapes of tensors, under Core's names, describe; `core` is false of the old classes.

    One `MtError` names everything that is missing or not implemented.
    """
    kind = detect_model_type(shapes)
    model_type = MODEL_TYPES[kind]
    gpt = read_args(model_type.gpt_args(args), where, true_vocab_size)
    if kind == "gpt":
        return gpt
    raise_if(_not_implemented(gpt, args, kind, where))
    settings = read_rows(model_type.rows, Source(vars(args).get, shapes, core))
    try:
        return model_type.config.model_validate(gpt.model_dump(include={*SHARED}) | settings)
    except ValidationError as err:
        raise describe_invalid_args(err, where) from None


def _not_implemented(config: GPTConfig, args: Any, kind: str, where: str) -> Iterator[Problem]:
    """What GPT may have and other types may not."""
    positions = MODEL_TYPES[kind].positions
    declared = getattr(args, "position_embedding_type", None) or "learned_absolute"
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
    learned = config.kind == "bert" or config.position.kind == "learned"
    position = (Learned() if learned else NoPosition()).model_dump()
    shared = config.model_dump(include={*SHARED})
    return GPTConfig.model_validate(shared | {"position": position, "tied": is_tied(config)})


def model_args(config: TransformerConfig, layout: Layout, *, dtype: Any, form: str) -> Namespace:
    """The args of a model."""
    stack = replace(layout, pipeline=layout.encoder or layout.pipeline)
    args = write_args(as_gpt(config), stack, dtype=dtype, form=form)
    for row in MODEL_TYPES[config.kind].rows:
        vars(args).update(row.write(config, layout))
    return args


def build_common_state(
    config: TransformerConfig, layout: Layout, *, dtype: Any, form: str, iteration: int
) -> dict[str, Any]:
    """What a checkpoint of a model alone has beside tensors."""
    return {
        "args": model_args(config, layout, dtype=dtype, form=form),
        "checkpoint_version": VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }


def model_problems(config: TransformerConfig, where: str, *, core: bool = True) -> Iterator[Problem]:
    """Settings that Megatron's args cannot express, of Megatron-Core or of the old classes."""
    yield from MODEL_TYPES[config.kind].errors(config, where, core)
    if config.kind == "t5":  # whose errors name a scale
        config = config.model_copy(update={"attention": config.attention.model_copy(update={"scale": None})})
    yield from _unsupported_settings(as_gpt(config), where)


def _unsupported_settings(config: GPTConfig, where: str) -> Iterator[Problem]:
    """Settings that would change if the arguments were read back."""
    if config.attention.kind == "mla" and config.position.kind != "rope":
        problem = f"cannot carry position.kind = {config.position.kind!r} with attention.kind = 'mla'"
        yield Problem(where, problem, "Megatron's latent attention always rotates; or use --saver native")
        return
    args = write_args(config, Layout(1, 1, 1, engine=False), dtype=None, form="torch")
    for lost in _changed(config.model_dump(), read_args(args, where).model_dump()):
        reason = REASONS.get(lost.partition(" ")[0])
        allowed = f"{reason}; or use --saver native" if reason else "or use --saver native"
        yield Problem(where, f"cannot carry {lost}", allowed)


def _changed(ours: Mapping[str, Any], kept: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that differ; of two parts of different kinds, only the kind."""
    for name, value in ours.items():
        other, path = kept.get(name), prefix + name
        if isinstance(value, dict) and isinstance(other, dict) and value.get("kind") == other.get("kind"):
            yield from _changed(value, other, f"{path}.")
        elif isinstance(value, dict):
            yield f"{path}.kind = {value['kind']!r}" if "kind" in value else path
        elif other != value and path not in NOT_COMPARED:
            yield f"{path} = {value!r}"
