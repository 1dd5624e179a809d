"""The training state of a Megatron-Core checkpoint in `torch` format, with the distributed optimizer or without."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.layout import StageRank, rank_directory
from mt_ckpt.megatron.optimizer import KINDS, MASTER, MOMENTS
from mt_ckpt.megatron.optimizer.buckets import bucket_size, lay_out, starts_in_file
from mt_ckpt.megatron.optimizer.distrib_optim import DISTRIBUTED, IN_VECTORS
from mt_ckpt.megatron.optimizer.param_groups import (
    by_optimizer,
    count_steps,
    list_stages_without_experts,
    number_parameters,
    tied_across_stages,
)
from mt_ckpt.megatron.parameters.names import IGNORED, second_names
from mt_ckpt.megatron.parameters.table import is_buffer
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.torch_format.reader import CHUNK, State, TorchFiles
from mt_ckpt.megatron.training_state.common_state import common_state, layout_from_args, list_optimizers, read_config
from mt_ckpt.megatron.training_state.state import RandomStates, TrainingState, drop_buffers
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import TransformerConfig

MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")

Chunks = Mapping[str, Mapping[str, Tensor]]
"""Chunk of the model → name there → tensor, of one rank."""
Kinds = Mapping[str, Chunks]
Buffers = list[Mapping[str, Any]]
"""The vectors of each chunk of the model."""
States = Mapping[int, Mapping[int, State]]


def read_torch(
    directory: Path,
    tensor: int | None = None,
    true_vocab_size: int | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> TrainingState:
    """One iteration; for a target of Megatron's with `tensor` ranks, padding is kept.

    `given` arguments of Megatron's go before those of the files.
    """
    files = TorchFiles(directory, given=given)
    config = read_config(files, tensor, true_vocab_size)
    states = files.states()
    raise_if(_problems(directory, files, states))
    raise_if(list_stages_without_experts(config, layout_from_args(vars(files.args)), str(directory)))
    optimizers = _read_optimizers(files, states, config)
    first = states[0][0]
    saved = unwrap_optimizers(first["optimizer"], directory, files.expert)
    groups = [group for optimizer in saved for group in optimizer["param_groups"]]
    counts = [values for optimizer in saved for values in optimizer.get("state", {}).values()]
    random = {at: states[at[0]][at[1]].get("rng_state") for at in optimizers}
    common = common_state(directory, config, {**first, "args": files.args}, groups, count_steps(groups, counts))

    def moments(kind: str) -> Iterator[tuple[str, Tensor]]:
        tensors: dict[int, dict[int, State]] = {stage: {} for stage in range(files.pipeline)}
        for (stage, rank), kinds in optimizers.items():
            tensors[stage][rank] = kinds[kind]
        return files.tensors(config, tensors, buffers=False)

    def weights() -> Iterator[tuple[str, Tensor]]:
        return files.tensors(config, states)

    full, masters = all(MASTER in kinds for kinds in optimizers.values()), drop_buffers(weights)
    return TrainingState(
        weights=weights,
        optimizer={kind: partial(moments, kind) if kind != MASTER or full else masters for kind in KINDS},
        random=RandomStates(files.tensor, files.pipeline, random) if all(random.values()) else None,
        **common,
    )


def _problems(directory: Path, files: TorchFiles, states: States) -> Iterator[Problem]:
    if not all(state.get("optimizer") for stage in states.values() for state in stage.values()):
        yield Problem(str(directory), "holds no optimizer (--no-save-optim?)", "use mt ckpt convert for the weights")


def unwrap_optimizers(optimizer: Any, where: Path, expert_ranks: int) -> list[dict[str, Any]]:
    """The states of torch's optimizers in what Megatron saved of its own: one, and one of experts that ranks share."""
    saved, count = list_optimizers(optimizer), 1 if expert_ranks == 1 else 2
    if len(saved) != count:
        problem = f"{len(saved)} optimizers where args say {expert_ranks} expert ranks"
        raise MtError(str(where), problem, f"runs with {count} can be converted then")
    for name in ("optimizer", "optimizer_state_dict"):
        saved = [saved_optimizer.get(name, saved_optimizer) for saved_optimizer in saved]
    return saved


def _read_optimizers(files: TorchFiles, states: States, config: TransformerConfig) -> dict[StageRank, Kinds]:
    """What every rank has of the optimizers; what all expert ranks share may be in the first one's file alone."""
    optimizers: dict[StageRank, Kinds] = {}
    for stage, ranks in states.items():
        for rank, state in ranks.items():
            kinds_of_rank = _read_rank(files, state, config, (stage, rank))
            first = optimizers.get((stage, rank % files.tensor), {})
            optimizers[stage, rank] = {
                kind: {chunk: {**first.get(kind, {}).get(chunk, {}), **tensors} for chunk, tensors in chunks.items()}
                for kind, chunks in kinds_of_rank.items()
            }
    return optimizers


def _read_rank(files: TorchFiles, state: State, config: TransformerConfig, at: StageRank) -> Kinds:
    stage, rank = at
    name = rank_directory(rank % files.tensor, stage, files.pipeline, rank // files.tensor, files.expert)
    keys = sorted((key for key in state if CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    chunks = {key: _parameters(state[key], config) for key in keys}
    path = files.path / name / DISTRIBUTED
    if path.is_file():
        return _from_vectors(path, chunks, files, stage, tied_across_stages(config, files.pipeline))
    return _from_lists(files, state["optimizer"], chunks)


def _parameters(model: State, config: TransformerConfig) -> dict[str, Tensor]:
    """The parameters of a chunk, in the order of named_parameters()."""
    copies = {copy for name in model for copy in second_names(config, name)}
    return {
        name: value
        for name, value in model.items()
        if isinstance(value, Tensor) and name not in copies and not IGNORED.search(name) and not is_buffer(name)
    }


def _from_vectors(path: Path, chunks: Chunks, files: TorchFiles, stage: int, alone: Collection[str]) -> Kinds:
    """Slices of the flat vectors of distributed optimizers, which stay in the file until they are used."""
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {kind: {chunk: {} for chunk in chunks} for kind in KINDS}
    buffers_by_optimizer = _buffers(path, len(chunks), files.expert)
    for number, (chunk, parameters) in enumerate(chunks.items()):
        size = bucket_size(vars(files.args), stage, number)
        for members, buffers in zip(by_optimizer(parameters, files.expert), buffers_by_optimizer, strict=True):
            if buffers is None:
                continue
            buckets = lay_out({name: tensor.numel() for name, tensor in members.items()}, size, alone)
            expected, stored = sum(bucket.numel for bucket in buckets), buffers[number]["numel_unpadded"]
            if expected != stored:
                problem = (
                    f"vectors of {stored} elements, where the parameters in {len(buckets)} buckets take {expected}"
                )
                raise MtError(
                    str(path), problem, "args must say how it was saved: overlap_grad_reduce, ddp_bucket_size"
                )
            starts = starts_in_file(buckets)
            for kind, key in IN_VECTORS.items():
                vector = buffers[number][key]
                for name, like in members.items():
                    tensors[kind][chunk][name] = vector[starts[name] : starts[name] + like.numel()].view(like.shape)
    return tensors


def _buffers(path: Path, chunks: int, expert_ranks: int) -> list[Buffers | None]:
    """The vectors of each optimizer; None for one that another rank's file has."""
    content = safe_unpickle.read(path)
    parts = content if isinstance(content, list) else [content]
    if not all(part is None or (isinstance(part, dict) and part.get("buckets_coalesced")) for part in parts):
        allowed = "load it in Megatron with --ckpt-convert-update-legacy-dist-opt-format and save it again"
        raise MtError(str(path), "keeps buckets apart, as before February 2024", allowed)
    if len(parts) != (count := 1 if expert_ranks == 1 else 2):
        problem = f"vectors of {len(parts)} optimizers where args say {expert_ranks} expert ranks"
        raise MtError(str(path), problem, f"those of {count}")
    buffers = [part and [part[n] for n in sorted(key for key in part if type(key) is int)] for part in parts]
    for chunk_buffers in buffers:
        if chunk_buffers is not None and (
            len(chunk_buffers) != chunks or any(len(buffer) != 1 for buffer in chunk_buffers)
        ):
            kinds = sum(len(buffer) for buffer in chunk_buffers)
            problem = f"{kinds} kinds of parameters in {chunks} chunks"
            raise MtError(str(path), problem, "only one dtype can be converted")
    return [chunk_buffers and [next(iter(buffer.values())) for buffer in chunk_buffers] for chunk_buffers in buffers]


def _from_lists(files: TorchFiles, saved: Any, chunks: Chunks) -> Kinds:
    """Tensors of optimizers that every rank has whole: moments by id, masters by group.

    Source: docs/specs/checkpoints.md §1.4.
    """
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
    where, inner = files.path, unwrap_optimizers(saved, files.path, files.expert)
    names = {f"{chunk} {name}": tensor for chunk, model in chunks.items() for name, tensor in model.items()}
    for outer, torch_optimizer, members in zip(
        list_optimizers(saved), inner, by_optimizer(names, files.expert), strict=True
    ):
        masters = next((outer[name] for name in MASTERS if name in outer), None)
        dims = {label: tensor.dim() for label, tensor in members.items()}
        for label, group, place, number in number_parameters(dims, torch_optimizer["param_groups"], str(where)):
            values = {kind: torch_optimizer["state"][number][kind] for kind in MOMENTS}
            if masters is not None:
                values[MASTER] = masters[group][place]
            chunk, _, name = label.partition(" ")
            for kind, value in values.items():
                if value.numel() != members[label].numel():
                    raise MtError(f"{where}: {name}", f"{kind} has shape {tuple(value.shape)}", "copy it again")
                tensors.setdefault(kind, {}).setdefault(chunk, {})[name] = value
    return tensors
