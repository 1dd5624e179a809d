"""Saver `core`: writes GPT, BERT and T5 for Megatron-Core, cut for any number of tensor, pipeline and expert ranks.

They hold weights alone. Those marked as a release Megatron loads as with --finetune; those of an iteration need
--no-load-optim --no-load-rng.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mt_ckpt.megatron.dist_writer import write_dist
from mt_ckpt.megatron.fusing import fuse
from mt_ckpt.megatron.kinds import model_problems
from mt_ckpt.megatron.layout import RELEASE, TRACKER, Layout, iteration_name, misfits
from mt_ckpt.megatron.names import parameters
from mt_ckpt.megatron.rank_files import write_rank_files
from mt_ckpt.megatron.t5 import NOTE
from mt_ckpt.megatron.tables import Parameter
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_directory
from mt_models.config import TransformerConfig

WRITERS = {"torch": write_rank_files, "torch_dist": write_dist}
IMPLEMENTATIONS = ("transformer_engine", "local")


def save(
    path: Path,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    target_tensor_parallel_size: int = 1,
    target_pipeline_parallel_size: int = 1,
    target_virtual_pipeline_parallel_size: int = 1,
    target_expert_parallel_size: int = 1,
    target_ckpt_format: str = "torch",
    target_iteration: int | None = None,
    saver_transformer_impl: str = "transformer_engine",
    moe_grouped_gemm: bool = False,
) -> None:
    """Write a checkpoint, whole or not at all; bits and dtypes are unchanged.

    `saver_transformer_impl` and `moe_grouped_gemm` say whose names the files bear; `torch_dist` files bear Transformer
    Engine's in any case. With `target_iteration` they are that iteration's, else a release.
    """
    for option, given, known in (
        ("--target-ckpt-format", target_ckpt_format, tuple(WRITERS)),
        ("--saver-transformer-impl", saver_transformer_impl, IMPLEMENTATIONS),
    ):
        if given not in known:
            raise MtError(option, f"unknown name {given!r}", f"allowed: {', '.join(known)}")
    raise_if(model_problems(config, "saver core", pipeline=target_pipeline_parallel_size))
    layout = Layout(
        target_tensor_parallel_size,
        target_pipeline_parallel_size,
        target_virtual_pipeline_parallel_size,
        engine=saver_transformer_impl == "transformer_engine",
        expert=target_expert_parallel_size,
        grouped=moe_grouped_gemm,
    )
    raise_if([*misfits(config, layout, uneven=True), *_not_options(target_iteration)])
    if config.kind == "t5" and config.final_norm:
        print(f"note: {path}: {NOTE}", file=sys.stderr)
    with atomic_directory(path) as temporary:
        directory = temporary / iteration_name(target_iteration)
        stream = fused(config, tensors, layout.tensor)
        WRITERS[target_ckpt_format](directory, config, stream, layout, iteration=target_iteration or 0)
        for file in tokenizer_files:
            shutil.copy(file, temporary / file.name)
        (temporary / TRACKER).write_text(RELEASE if target_iteration is None else str(target_iteration))


def _not_options(iteration: int | None) -> Iterator[Problem]:
    """Options that say what cannot be."""
    if iteration is not None and iteration < 1:
        allowed = "a positive number; leave it out for a release"
        yield Problem("--target-iteration", f"{iteration} is no iteration that Megatron reads", allowed)


Fused = Iterator[tuple[str, Parameter, Tensor]]


def fused(config: TransformerConfig, tensors: Iterable[tuple[str, Tensor]], size: int) -> Fused:
    """Megatron's tensors, whole and in their logical shapes, each as soon as its last canonical part has come.

    The experts of a layer share their parts, and come one after the other.
    """
    names = parameters(config)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, one in names.items():
        groups.setdefault(one.parts, []).append(name)
    owners = {part: parts for parts in groups for part in parts}
    waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for part, tensor in tensors:
        parts = owners[part]
        waiting.setdefault(parts, {})[part] = tensor
        if len(waiting[parts]) == len(parts):
            come = waiting.pop(parts)
            for name in groups[parts]:
                yield name, names[name], fuse(config, [come[part] for part in parts], names[name], size)
    assert not waiting, f"incomplete {', '.join(part for come in waiting.values() for part in come)}"
