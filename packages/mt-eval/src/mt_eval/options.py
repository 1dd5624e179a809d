"""Command-line options that several commands share, as dataclasses; only `mt` imports this module (Typer is mt-cli's).

A command takes the dataclasses as parameters; `spread` shows Typer one option for each of their fields.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from mt_core.plugins import components

if TYPE_CHECKING:
    from mt_data.config import TokenizerConfig


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Make each field of a command's dataclass parameters an option of its own."""
    hints: dict[str, Any] = get_type_hints(command, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        annotation = hints[parameter.name]
        parameters += _options(annotation) if is_dataclass(annotation) else [parameter.replace(annotation=annotation)]

    @functools.wraps(command)
    def spread_command(**values: Any) -> None:
        groups: dict[str, Any] = {name: group for name, group in hints.items() if is_dataclass(group)}
        taken = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**taken, **values)

    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    spread_command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    spread_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_command


def _options(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a checkpoint becomes a model."""

    loader: Annotated[
        str | None,
        Option(
            help="Checkpoint format; found from the directory if not given.",
            autocompletion=lambda: list(components("ckpt-loader")),
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            help="auto, cpu or cuda; auto is a GPU if there is one.", autocompletion=lambda: ["auto", "cpu", "cuda"]
        ),
    ] = "auto"
    dtype: Annotated[
        str, Option(help="fp32 or bf16, of weights and activations.", autocompletion=lambda: ["fp32", "bf16"])
    ] = "fp32"


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """Another source for the tokenizer than the checkpoint."""

    tokenizer_type: Annotated[
        str | None,
        Option(
            help="Tokenizer to use; the checkpoint's own if not given.",
            autocompletion=lambda: list(components("tokenizer")),
        ),
    ] = None
    vocab_file: Annotated[Path | None, Option(help="vocab.json of GPT2BPETokenizer.")] = None
    merge_file: Annotated[Path | None, Option(help="merges.txt of GPT2BPETokenizer.")] = None
    tokenizer_model: Annotated[Path | None, Option(help="tokenizer.json or its directory.")] = None

    def config(self) -> "TokenizerConfig | None":
        """The tokenizer that the options name, its kind found from the files if not given; None if they name none."""
        from mt_data.options import make_tokenizer_config

        given = {name: value for name, value in asdict(self).items() if value is not None}
        return make_tokenizer_config(given) if given else None


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What every evaluation task takes."""

    load_dir: Annotated[Path, Option(help="Checkpoint: a run, a step or a Hugging Face directory.")]
    data: Annotated[Path, Option(help="The file to evaluate on.")]
    seq_length: Annotated[int | None, Option(min=1, help="Longest input in tokens.", show_default=False)] = None
    batch_size: Annotated[
        int | None, Option(min=1, help="Sequences in a batch; changes the speed only.", show_default=False)
    ] = None
    output: Annotated[Path | None, Option(help="Also write the results to this JSON file.")] = None
