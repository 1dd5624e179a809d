"""Saver `core`: writes GPT, BERT and T5 for Megatron-Core, cut for any number of tensor, pipeline and expert ranks.

They hold weights alone. Those marked as a release Megatron loads as with --finetune; those of an iteration need
--no-load-optim --no-load-rng.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mt_ckpt.formats import (
    Chunks,
    EncoderStages,
    ExpertRanks,
    FileFormat,
    GroupedExperts,
    Iteration,
    LayerNames,
    Stages,
    TensorRanks,
)
from mt_ckpt.megatron.args.model_types import model_problems
from mt_ckpt.megatron.args.t5 import NORM_NOTES
from mt_ckpt.megatron.layout import (
    RELEASE,
    TRACKER,
    Layout,
    iteration_name,
    layout_errors,
)
from mt_ckpt.megatron.parameters.fusion import Rows, fuse
from mt_ckpt.megatron.parameters.names import parameters
from mt_ckpt.megatron.parameters.t5_pipeline import encoder_stages
from mt_ckpt.megatron.parameters.table import Parameter
from mt_ckpt.megatron.torch_format.writer import write_rank_files
from mt_core.errors import Problem, raise_if
from mt_core.files import atomic_directory
from mt_models.config import TransformerConfig


def save(
    path: Path,
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    target_tensor_parallel_size: TensorRanks = 1,
    target_pipeline_parallel_size: Stages = 1,
    target_encoder_pipeline_parallel_size: EncoderStages = None,
    target_virtual_pipeline_parallel_size: Chunks = 1,
    target_expert_parallel_size: ExpertRanks = 1,
    target_ckpt_format: FileFormat = "torch",
    target_iteration: Iteration = None,
    saver_transformer_impl: LayerNames = "transformer_engine",
    moe_grouped_gemm: GroupedExperts = False,
) -> None:
    """Write a checkpoint, whole or not at all; bits and dtypes are unchanged.

    `torch_dist` files bear Transformer Engine's names in any case.
    """
    raise_if(model_problems(config, "saver core"))
    layout = Layout(
        target_tensor_parallel_size,
        target_pipeline_parallel_size,
        target_virtual_pipeline_parallel_size,
        engine=saver_transformer_impl == "transformer_engine",
        expert=target_expert_parallel_size,
        grouped=moe_grouped_gemm,
        encoder=encoder_stages(config, target_pipeline_parallel_size, target_encoder_pipeline_parallel_size),
    )
    raise_if([*layout_errors(config, layout, uneven=True), *_not_options(target_iteration)])
    if config.kind == "t5":
        print(f"note: {path}: {NORM_NOTES[config.final_norm]}", file=sys.stderr)
    with atomic_directory(path) as temporary:
        directory = temporary / iteration_name(target_iteration)
        stream = fused(config, tensors, layout.tensor)
        _writer(target_ckpt_format)(directory, config, stream, layout, iteration=target_iteration or 0)
        finish_root(temporary, tokenizer_files, target_iteration)


def finish_root(root: Path, tokenizer_files: Iterable[Path], iteration: int | None = None) -> None:
    """Put beside what was written the tokenizer and the tracker, which says where to look."""
    for file in tokenizer_files:
        shutil.copy(file, root / file.name)
    (root / TRACKER).write_text(RELEASE if iteration is None else str(iteration))


def _writer(form: str) -> Callable[..., None]:
    if form == "torch":
        return write_rank_files
    from mt_ckpt.megatron.dist_format.writer import write_dist  # here, since it takes a second

    return write_dist


def _not_options(iteration: int | None) -> Iterator[Problem]:
    """Options that say what cannot be."""
    if iteration is not None and iteration < 1:
        allowed = "a positive number; leave it out for a release"
        yield Problem("--target-iteration", f"{iteration} is no iteration that Megatron reads", allowed)


FusedTensors = Iterator[tuple[str, Parameter, Rows]]


def fused(config: TransformerConfig, tensors: Iterable[tuple[str, Tensor]], size: int) -> FusedTensors:
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
