"""`mt ckpt convert-format`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mt_ckpt.megatron.training_state.convert import ConversionResult


def register(app: typer.Typer) -> None:
    """Add the command to `mt ckpt`."""
    app.command()(convert_format)


def convert_format(
    load_dir: Annotated[Path, typer.Option(help="Run or checkpoint to read: Megatron-Core's, or mt's own.")],
    save_dir: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    to: Annotated[str, typer.Option(help="Format to write: torch, torch_dist or native.")],
    target_tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Tensor ranks to cut for; the source's if not given.")
    ] = None,
    target_pipeline_parallel_size: Annotated[int | None, typer.Option(help="Pipeline stages, likewise.")] = None,
    target_virtual_pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Chunks of each pipeline stage, likewise.")
    ] = None,
    target_expert_parallel_size: Annotated[int | None, typer.Option(help="Expert ranks, likewise.")] = None,
    target_optimizer: Annotated[
        str,
        typer.Option(
            help="How the optimizer is stored: distributed (as Megatron's newest release takes it), "
            "fully_sharded_model_space (torch_dist of Megatron-Core 0.11), or plain."
        ),
    ] = "distributed",
    saver_transformer_impl: Annotated[
        str | None, typer.Option(help="Names of transformer_engine or local layers; the source's if not given.")
    ] = None,
    moe_grouped_gemm: Annotated[
        bool | None,
        typer.Option(
            "--moe-grouped-gemm/--no-moe-grouped-gemm",
            help="Experts by TEGroupedMLP's names, in torch files; as the source has them if not given.",
        ),
    ] = None,
    true_vocab_size: Annotated[int | None, typer.Option(help="Rows of the embedding that are no padding.")] = None,
    megatron_args: Annotated[
        Path | None, typer.Option(help="JSON file of Megatron's arguments that the files lack.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back and compare it, bit by bit.")] = False,
) -> None:
    """Convert a training state: weights, optimizer, scheduler, random state and position.

    Example:
      mt ckpt convert-format --load-dir megatron-run --save-dir run --to native
    """
    from mt_ckpt.megatron.training_state.convert import Target
    from mt_ckpt.megatron.training_state.convert import convert_format as run

    target = Target(
        to,
        tensor=target_tensor_parallel_size,
        pipeline=target_pipeline_parallel_size,
        virtual=target_virtual_pipeline_parallel_size,
        expert=target_expert_parallel_size,
        implementation=saver_transformer_impl,
        grouped=moe_grouped_gemm,
        optimizer=target_optimizer,
    )
    _print_result(
        run(load_dir, save_dir, target, true_vocab_size=true_vocab_size, megatron_args=megatron_args, verify=verify), to
    )


def _print_result(done: "ConversionResult", to: str) -> None:
    """Say what was carried into the format `to`, and what was not."""
    state = done.state
    print(f"wrote {done.path}: {to}, from {done.source_format}")
    print(f"carried: weights, master weights, both moments, scheduler, {len(state.groups)} parameter groups")
    print(f"position: iteration {state.iteration}, {state.samples:,} samples, {state.optimizer_steps} optimizer steps")
    for line in done.lost:
        print(f"not carried: {line}")
    for line in done.hints:
        print(f"to go on: {line}")
    if done.proven:
        print("verified: every tensor and count is read back as it was")
