"""The training state of a Megatron-Core checkpoint in `torch` format, with the distributed optimizer or without."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.convert_format.buckets import bucket_size, lay_out, starts_in_file
from mt_ckpt.convert_format.groups import numbered, steps_of
from mt_ckpt.convert_format.megatron import common_state, config_of
from mt_ckpt.convert_format.state import KINDS, MASTER, RandomStates, TrainingState
from mt_ckpt.megatron import pickles
from mt_ckpt.megatron.layout import rank_directory
from mt_ckpt.megatron.names import EMBED, HEAD, IGNORED
from mt_ckpt.megatron.torch_files import CHUNK, State, TorchFiles
from mt_core.errors import MtError, Problem, raise_if

DISTRIBUTED = "distrib_optim.pt"
IN_VECTORS = {MASTER: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")

Kinds = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
"""Kind → chunk of the model → name there → tensor, of one rank."""
States = Mapping[int, Mapping[int, State]]


def read_torch(directory: Path, tensor: int | None = None, true_vocab_size: int | None = None) -> TrainingState:
    """One iteration; for a target of Megatron's with `tensor` ranks, padding is kept."""
    files = TorchFiles(directory)
    config = config_of(files, tensor, true_vocab_size)
    states = files.states()
    raise_if(_problems(directory, files, states))
    optimizers = {(stage, rank): _of_rank(files, states, stage, rank) for stage, rank in _ranks(files)}
    first = states[0][0]
    groups = optimizer_of(first["optimizer"], directory)["param_groups"]
    counts = optimizer_of(first["optimizer"], directory).get("state", {}).values()
    random = {at: states[at[0]][at[1]].get("rng_state") for at in optimizers}
    common = common_state(directory, config, first, groups, steps_of(groups, [*counts]))

    def moments(kind: str) -> Iterator[tuple[str, Tensor]]:
        held: dict[int, dict[int, State]] = {stage: {} for stage in range(files.pipeline)}
        for (stage, rank), kinds in optimizers.items():
            held[stage][rank] = kinds[kind]
        return files.tensors(config, held)

    def weights() -> Iterator[tuple[str, Tensor]]:
        return files.tensors(config, states)

    full = all(MASTER in kinds for kinds in optimizers.values())
    return TrainingState(
        weights=weights,
        optimizer={kind: partial(moments, kind) if kind != MASTER or full else weights for kind in KINDS},
        random=RandomStates(files.tensor, files.pipeline, random) if all(random.values()) else None,
        **common,
    )


def _ranks(files: TorchFiles) -> list[tuple[int, int]]:
    return [(stage, rank) for stage in range(files.pipeline) for rank in range(files.tensor)]


def _problems(directory: Path, files: TorchFiles, states: States) -> Iterator[Problem]:
    if (getattr(files.args, "num_experts", None) or 0) > 1:
        allowed = "save it in torch_dist format, or convert the weights alone with mt ckpt convert"
        yield Problem(str(directory), "experts have optimizers of their own in torch format", allowed)
    lacking = [f"{at}" for at in _ranks(files) if not states[at[0]][at[1]].get("optimizer")]
    if lacking:
        yield Problem(str(directory), "holds no optimizer (--no-save-optim?)", "use mt ckpt convert for the weights")


def optimizer_of(found: Any, where: Path) -> dict[str, Any]:
    """The state of torch's optimizer in what Megatron saved of its own."""
    if isinstance(found, list | tuple):
        if len(found) != 1:
            raise MtError(str(where), f"{len(found)} optimizers", "only runs with one optimizer can be converted")
        found = found[0]
    for name in ("optimizer", "optimizer_state_dict"):
        found = found.get(name, found)
    return found


def _of_rank(files: TorchFiles, states: States, stage: int, rank: int) -> Kinds:
    state = states[stage][rank]
    path = files.path / rank_directory(rank, stage, files.pipeline) / DISTRIBUTED
    keys = sorted((key for key in state if CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    chunks = {key: _parameters(state[key]) for key in keys}
    if path.is_file():
        alone = (EMBED, HEAD) if files.pipeline > 1 and not files.args.untie_embeddings_and_output_weights else ()
        return dict(_from_vectors(path, chunks, vars(files.args), stage, alone))
    return _from_lists(files.path, state["optimizer"], chunks)


def _parameters(model: State) -> dict[str, Tensor]:
    """The parameters of a chunk, in the order of named_parameters()."""
    return {name: value for name, value in model.items() if isinstance(value, Tensor) and not IGNORED.search(name)}


def _from_vectors(
    path: Path, chunks: Mapping[str, Mapping[str, Tensor]], args: Mapping[str, Any], stage: int, alone: Sequence[str]
) -> Iterator[tuple[str, dict[str, dict[str, Tensor]]]]:
    """Slices of the flat vectors of the distributed optimizer, which stay in the file until they are used."""
    held = _buffers(path, len(chunks))
    found: dict[str, dict[str, dict[str, Tensor]]] = {kind: {} for kind in KINDS}
    for number, (chunk, parameters) in enumerate(chunks.items()):
        numels = {name: tensor.numel() for name, tensor in parameters.items()}
        buckets = lay_out(numels, bucket_size(args, stage, number), alone)
        expected, stored = sum(bucket.numel for bucket in buckets), held[number]["numel_unpadded"]
        if expected != stored:
            found_text = f"vectors of {stored} elements, where the parameters in {len(buckets)} buckets take {expected}"
            raise MtError(str(path), found_text, "args must say how it was saved: overlap_grad_reduce, ddp_bucket_size")
        starts = starts_in_file(buckets)
        for kind, key in IN_VECTORS.items():
            vector = held[number][key]
            found[kind][chunk] = {
                name: vector[start : start + numels[name]].view(parameters[name].shape)
                for name, start in ((name, starts[name]) for name in parameters)
            }
    yield from found.items()


def _buffers(path: Path, chunks: int) -> list[Mapping[str, Any]]:
    """The vectors of each chunk of the model."""
    found = pickles.read(path)
    parts = [part for part in (found if isinstance(found, list) else [found]) if part is not None]
    if not all(isinstance(part, dict) and part.get("buckets_coalesced") for part in parts):
        allowed = "load it in Megatron with --ckpt-convert-update-legacy-dist-opt-format and save it again"
        raise MtError(str(path), "keeps buckets apart, as before February 2024", allowed)
    buffers = [part[number] for part in parts for number in sorted(key for key in part if type(key) is int)]
    if len(buffers) != chunks or any(len(buffer) != 1 for buffer in buffers):
        kinds = sum(len(buffer) for buffer in buffers)
        raise MtError(str(path), f"{kinds} kinds of parameters in {chunks} chunks", "only one dtype can be converted")
    return [next(iter(buffer.values())) for buffer in buffers]


def _from_lists(where: Path, saved: Any, chunks: Mapping[str, Mapping[str, Tensor]]) -> Kinds:
    """Tensors of an optimizer that every rank has whole: moments by id, masters by group (§1.4)."""
    outer: Any = saved[0] if isinstance(saved, list | tuple) and len(saved) == 1 else saved
    inner = optimizer_of(saved, where)
    masters = next((outer[name] for name in MASTERS if name in outer), None)
    names = {(chunk, name): tensor for chunk, model in chunks.items() for name, tensor in model.items()}
    dims = {f"{chunk} {name}": tensor.dim() for (chunk, name), tensor in names.items()}
    kinds = [kind for kind in KINDS if kind != MASTER or masters is not None]
    found: dict[str, dict[str, dict[str, Tensor]]] = {kind: {chunk: {} for chunk in chunks} for kind in kinds}
    for label, group, place, number in numbered(dims, inner["param_groups"], str(where)):
        chunk, _, name = label.partition(" ")
        values = dict(inner["state"][number])
        if masters is not None:
            values[MASTER] = masters[group][place]
        for kind in kinds:
            if values[kind].numel() != math.prod(names[chunk, name].shape):
                raise MtError(f"{where}: {name}", f"{kind} has shape {tuple(values[kind].shape)}", "copy it again")
            found[kind][chunk][name] = values[kind]
    return found
