"""`mt ckpt`: convert checkpoints; the other commands register here."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mt_ckpt.conversion.megatron_flags import translate_flags
from mt_ckpt.hub import command as hub
from mt_ckpt.megatron.training_state import command as convert_format
from mt_ckpt.tools import command as tools
from mt_core.cli.completion import complete_names
from mt_core.errors import MtError, raise_if
from mt_core.plugin_options import flag

if TYPE_CHECKING:
    from mt_ckpt.conversion.convert import Converted

app = typer.Typer(
    help="Convert, inspect, compare and share checkpoints.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _dtypes(incomplete: str) -> list[str]:
    return [name for name in ("fp32", "bf16", "fp16") if name.startswith(incomplete)]


class ConvertCommand(tools.LoadSaveCommand):
    """A conversion, which takes the flags of Megatron's converter too, where they change nothing."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the words without Megatron's flags; one error names all that is wrong."""
        declared = {flag(option.name) for option in self.list_plugin_options()}
        made = translate_flags(args, declared)
        try:
            rest = super().parse_args(ctx, made.words)
        except MtError as err:
            raise MtError.from_problems([*made.problems, *err.problems]) from None
        raise_if(made.problems)
        if made.dropped and not ctx.resilient_parsing:
            print(f"note: not needed here, the files say it: {', '.join(made.dropped)}", file=sys.stderr)
        return rest


@app.command(cls=ConvertCommand, context_settings=ConvertCommand.settings)
def convert(
    ctx: typer.Context,
    load_dir: Annotated[Path, typer.Option(help="Checkpoint to read.")],
    saver: Annotated[str, typer.Option(help="Format to write.", autocompletion=complete_names("ckpt-saver"))],
    save_dir: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    loader: Annotated[
        str | None,
        typer.Option(
            help="Format to read; found from the files if not given.", autocompletion=complete_names("ckpt-loader")
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Round every tensor to fp32, bf16 or fp16; else each keeps its own.", autocompletion=_dtypes),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare logits of source and result, in fp32.")] = False,
    model_type: Annotated[str | None, typer.Option(help="Refuse a source of another kind, such as GPT.")] = None,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Add adapters of model.lora to the weights.")
    ] = False,
) -> None:
    """Convert a checkpoint from one format to another, one tensor at a time.

    The loader and the saver have options of their own, which stand below. Flags of Megatron's converter are taken where
    the files say the same, such as --model-size, or answered with the ones here.

    Example:
      mt ckpt convert --load-dir run --saver hf --save-dir hf --verify
    """
    from mt_ckpt.conversion.convert import convert as run
    from mt_core.checkpoint.detection import detect_loader

    _report(
        run(
            loader or detect_loader(load_dir),
            load_dir,
            saver,
            save_dir,
            dtype=dtype,
            verify=verify,
            model_type=model_type,
            merge_lora=merge_lora,
            options=ctx.obj or {},
        )
    )


def _report(done: "Converted") -> None:
    from mt_ckpt.tools.inspect import format_size

    print(f"wrote {done.path}: {done.tensors} tensors, {done.parameters:,} parameters, {format_size(done.bytes)}")
    print(f"tokenizer files: {', '.join(done.tokenizer_files) or 'none'}")
    for comparison in done.comparisons:
        print(f"verified: {comparison}")


convert_format.register(app)
tools.register(app)
hub.register(app)
