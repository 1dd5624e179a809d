"""`mt ckpt`: convert checkpoints; the other commands register here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mt_ckpt.convert_format import command as convert_format
from mt_ckpt.hub import command as hub
from mt_ckpt.tools import command as tools
from mt_cli.completion import names

if TYPE_CHECKING:
    from mt_ckpt.convert import Converted

app = typer.Typer(
    help="Convert, inspect, compare and share checkpoints.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _dtypes(incomplete: str) -> list[str]:
    return [name for name in ("fp32", "bf16", "fp16") if name.startswith(incomplete)]


@app.command()
def convert(
    load_dir: Annotated[Path, typer.Option(help="Checkpoint to read.")],
    saver: Annotated[str, typer.Option(help="Format to write.", autocompletion=names("ckpt-saver"))],
    save_dir: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    loader: Annotated[
        str | None,
        typer.Option(help="Format to read; found from the files if not given.", autocompletion=names("ckpt-loader")),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Round every tensor to fp32, bf16 or fp16; else each keeps its own.", autocompletion=_dtypes),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare logits of source and result, in fp32.")] = False,
    model_type: Annotated[str | None, typer.Option(help="Refuse a source of another kind, such as GPT.")] = None,
    target_tensor_parallel_size: Annotated[
        int | None, typer.Option(help="core, legacy: tensor ranks to cut for.")
    ] = None,
    target_pipeline_parallel_size: Annotated[int | None, typer.Option(help="core, legacy: pipeline stages.")] = None,
    target_encoder_pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="core, legacy: those of them that hold a T5's encoder.")
    ] = None,
    target_virtual_pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="core, legacy: chunks of each pipeline stage.")
    ] = None,
    target_expert_parallel_size: Annotated[int | None, typer.Option(help="core: ranks that share experts.")] = None,
    target_ckpt_format: Annotated[str | None, typer.Option(help="core: torch (default) or torch_dist.")] = None,
    target_iteration: Annotated[int | None, typer.Option(help="core: iteration to mark it as; else a release.")] = None,
    target_model_type: Annotated[
        str | None, typer.Option(help="hf: family to write, such as phi3; else the first that carries the model.")
    ] = None,
    saver_transformer_impl: Annotated[
        str | None, typer.Option(help="core: names of transformer_engine (default) or local layers.")
    ] = None,
    moe_grouped_gemm: Annotated[
        bool | None, typer.Option("--moe-grouped-gemm", help="core: experts under TEGroupedMLP's names.")
    ] = None,
    megatron_args: Annotated[
        Path | None, typer.Option(help="Loader core: JSON file of Megatron's arguments that the files lack.")
    ] = None,
    true_vocab_size: Annotated[
        int | None, typer.Option(help="Loaders core, legacy: rows of the embedding that are no padding.")
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Loader legacy: heads of a model whose files have no args, such as NGC's.")
    ] = None,
) -> None:
    """Convert a checkpoint from one format to another, one tensor at a time."""
    from mt_ckpt.convert import convert as run
    from mt_ckpt.detect import detect

    given = {
        "target_tensor_parallel_size": target_tensor_parallel_size,
        "target_pipeline_parallel_size": target_pipeline_parallel_size,
        "target_encoder_pipeline_parallel_size": target_encoder_pipeline_parallel_size,
        "target_virtual_pipeline_parallel_size": target_virtual_pipeline_parallel_size,
        "target_expert_parallel_size": target_expert_parallel_size,
        "target_ckpt_format": target_ckpt_format,
        "target_iteration": target_iteration,
        "moe_grouped_gemm": moe_grouped_gemm,
        "megatron_args": megatron_args,
        "target_model_type": target_model_type,
        "saver_transformer_impl": saver_transformer_impl,
        "true_vocab_size": true_vocab_size,
        "num_attention_heads": num_attention_heads,
    }
    _report(
        run(
            loader or detect(load_dir),
            load_dir,
            saver,
            save_dir,
            dtype=dtype,
            verify=verify,
            model_type=model_type,
            options={name: value for name, value in given.items() if value is not None},
        )
    )


def _report(done: "Converted") -> None:
    from mt_ckpt.inspect import size_text

    print(f"wrote {done.path}: {done.tensors} tensors, {done.parameters:,} parameters, {size_text(done.bytes)}")
    print(f"tokenizer files: {', '.join(done.tokenizer_files) or 'none'}")
    for comparison in done.comparisons:
        print(f"verified: {comparison}")


convert_format.register(app)
tools.register(app)
hub.register(app)
