"""Saver `legacy`: writes GPT, BERT and T5 checkpoints of version 3.0 for Megatron's old classes (--use-legacy-models).

They hold weights alone and are marked as a release, which Megatron loads as with --finetune.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.formats import RELEASE, Chunks, EncoderStages, Stages, TensorRanks
from mt_ckpt.megatron.args.gpt import write_args
from mt_ckpt.megatron.args.model_types import as_gpt, model_problems
from mt_ckpt.megatron.layout import Layout, layout_errors, write_root_files
from mt_ckpt.megatron.legacy.arguments import NOT_LEGACY
from mt_ckpt.megatron.legacy.names import legacy_model
from mt_ckpt.megatron.parameters.fusion import fuse_stream
from mt_ckpt.megatron.parameters.pipeline import encoder_stages
from mt_ckpt.megatron.parameters.table import is_tied
from mt_ckpt.megatron.torch_format.reader import CHUNK
from mt_ckpt.megatron.torch_format.writer import write_rank_files
from mt_core.errors import Problem, raise_if
from mt_core.files import atomic_directory
from mt_models.config import TransformerConfig

WHERE = "saver legacy"


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
) -> None:
    """Write a checkpoint, whole or not at all; bits and dtypes are unchanged."""
    raise_if(model_problems(config, WHERE, core=False))
    sizes = target_tensor_parallel_size, target_pipeline_parallel_size, target_virtual_pipeline_parallel_size
    encoder = encoder_stages(config, target_pipeline_parallel_size, target_encoder_pipeline_parallel_size)
    layout = Layout(*sizes, engine=False, encoder=encoder)
    raise_if([*layout_errors(config, layout, WHERE), *_cannot(config, layout.tensor)])
    finish = partial(as_legacy, config)
    with atomic_directory(path) as temporary:
        stream = fuse_stream(config, tensors, layout.tensor)
        write_rank_files(temporary / RELEASE, config, stream, layout, finish=finish)
        write_root_files(temporary, tokenizer_files)


def as_legacy(config: TransformerConfig, contents: dict[str, Any]) -> dict[str, Any]:
    """What a rank's file holds, as the old classes nest and name it."""
    args = contents["args"]
    args.use_legacy_models, args.transformer_impl = True, "local"
    tied = is_tied(config)
    models = {name: legacy_model(contents[name], config.kind, tied=tied) for name in contents if CHUNK.fullmatch(name)}
    return contents | models


def _cannot(config: TransformerConfig, tensor: int) -> Iterator[Problem]:
    """What Megatron-Core has and the old classes have not."""
    if config.kind == "t5" and not (config.final_norm and config.tied):
        problem = f"a T5 with final_norm = {config.final_norm} and tied = {config.tied}"
        yield Problem(WHERE, problem, "the old classes have both")
    args = vars(write_args(as_gpt(config), Layout(1, 1, 1, engine=False), dtype=None, form="torch"))
    for name, only in NOT_LEGACY.items():
        if args.get(name, only) != only:
            yield Problem(WHERE, f"the old classes have no {name} = {args[name]!r}", "use --saver core")
    if tensor > config.attention.num_kv_heads:
        problem = f"attention.num_kv_heads = {config.attention.num_kv_heads} for {tensor} tensor ranks"
        yield Problem(WHERE, problem, "whole groups on each rank, or --saver core")
