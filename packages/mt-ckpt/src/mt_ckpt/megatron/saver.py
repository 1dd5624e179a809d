"""Saver `core`: writes Megatron-Core's GPT checkpoints, cut for any number of tensor ranks and pipeline stages.

They hold weights alone and are marked as a release, which Megatron loads as with --finetune.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mt_ckpt.megatron.arguments import check_carried
from mt_ckpt.megatron.dist_writer import write_dist
from mt_ckpt.megatron.layout import RELEASE, TRACKER, Layout, misfits
from mt_ckpt.megatron.names import Parameter, fuse, parameters
from mt_ckpt.megatron.rank_files import write_rank_files
from mt_core.errors import MtError, raise_if
from mt_core.files import atomic_directory
from mt_models.config import GPTConfig

WRITERS = {"torch": write_rank_files, "torch_dist": write_dist}
IMPLEMENTATIONS = ("transformer_engine", "local")


def save(
    path: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    target_tensor_parallel_size: int = 1,
    target_pipeline_parallel_size: int = 1,
    target_virtual_pipeline_parallel_size: int = 1,
    target_ckpt_format: str = "torch",
    saver_transformer_impl: str = "transformer_engine",
) -> None:
    """Write a checkpoint, whole or not at all; bits and dtypes are unchanged.

    `saver_transformer_impl` says whose names the files bear; `torch_dist` files bear Transformer Engine's in any case.
    """
    for option, given, known in (
        ("--target-ckpt-format", target_ckpt_format, tuple(WRITERS)),
        ("--saver-transformer-impl", saver_transformer_impl, IMPLEMENTATIONS),
    ):
        if given not in known:
            raise MtError(option, f"unknown name {given!r}", f"allowed: {', '.join(known)}")
    check_carried(config)
    layout = Layout(
        target_tensor_parallel_size,
        target_pipeline_parallel_size,
        target_virtual_pipeline_parallel_size,
        engine=saver_transformer_impl == "transformer_engine",
    )
    raise_if(misfits(config, layout))
    with atomic_directory(path) as temporary:
        WRITERS[target_ckpt_format](temporary / RELEASE, config, fused(config, tensors, layout.tensor), layout)
        for file in tokenizer_files:
            shutil.copy(file, temporary / file.name)
        (temporary / TRACKER).write_text(RELEASE)


Fused = Iterator[tuple[str, Parameter, Tensor]]


def fused(config: GPTConfig, tensors: Iterable[tuple[str, Tensor]], size: int) -> Fused:
    """Megatron's tensors, whole and in their logical shapes, each as soon as its last canonical part has come."""
    names = parameters(config)
    owners = {part: name for name, one in names.items() for part in one.parts}
    waiting: dict[str, dict[str, Tensor]] = {}
    for part, tensor in tensors:
        name = owners[part]
        parts = waiting.setdefault(name, {})
        parts[part] = tensor
        if len(parts) == len(names[name].parts):
            del waiting[name]
            yield name, names[name], fuse(config, [parts[part] for part in names[name].parts], names[name], size)
    assert not waiting, f"incomplete {', '.join(waiting)}"
