"""Megatron's `torch` format, read: the files of all model-parallel ranks, put together tensor by tensor.

Source: docs/specs/checkpoints.md §1, §3.

Files are memory-mapped and checked by their tensors' shapes before any tensor is read. Ranks of a pipeline stage are
numbered expert rank · tensor ranks + tensor rank.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.layout import RANK_FILE, rank_file
from mt_ckpt.megatron.parameters.experts import count_experts, unstack_experts
from mt_ckpt.megatron.parameters.fusion import canonical, join, stored_shape
from mt_ckpt.megatron.parameters.names import (
    IGNORED,
    LAYER,
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    list_parameters,
    local_name,
    second_names,
    shift_layer_index,
)
from mt_ckpt.megatron.parameters.pipeline import declared_stages, stacks_in, stage_problems, used
from mt_ckpt.megatron.parameters.replicas import (
    Ranks,
    Shards,
    copy_problems,
    cut_as_stored,
    rank_shards,
    shard_problems,
)
from mt_ckpt.megatron.parameters.table import Parameter, Shape
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.tensor_streams.streams import bitwise_equal
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import TransformerConfig

State = Mapping[str, Any]
CHUNK = re.compile(r"model\d*")
"""`model`, or with virtual stages `model0`, `model1`, …"""


def read_state(path: Path) -> State:
    """What a rank's file holds."""
    state = safe_unpickle.read(path)
    if not isinstance(state, dict):
        raise MtError(str(path), f"holds a {type(state).__name__}", "a file that Megatron saved holds a dict")
    return state


def core_state(path: Path) -> State:
    """What a rank's file of Megatron-Core holds."""
    state = read_state(path)
    if any(
        CHUNK.fullmatch(key) and isinstance(value, dict) and "language_model" in value for key, value in state.items()
    ):
        raise MtError(str(path), "holds Megatron's old classes", "use --loader legacy")
    return state


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """Files of Megatron-Core need no rearrangement."""
    return tensor


class TorchFiles:
    """An iteration's directory of `mp_rank_*` files; `given` arguments go before those of the files.

    Other releases' files are read as Core's by `read`, which opens a file and gives Core's names, and `arrange`, which
    puts the rows of a rank's share of the tensor of that name into Core's order.
    """

    def __init__(
        self,
        path: Path,
        *,
        read: Callable[[Path], State] = core_state,
        arrange: Callable[[str, Tensor], Tensor] = as_stored,
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.path, self.read, self.arrange = path, read, arrange
        first = min(path.glob("mp_rank_*/model_*rng.pt"), default=None)
        if first is None:
            raise MtError(str(path), f"holds no mp_rank_*/{RANK_FILE}", "copy the checkpoint again")
        args = read(first).get("args")
        if args is None and not given:
            problem = "has no args, which say what the model is (files of NGC and before 2020)"
            raise MtError(str(first), problem, "use --loader legacy, or give --megatron-args")
        self.args: Any = Namespace(**{**vars(args or Namespace()), **given})
        self.tensor, self.expert = (
            getattr(self.args, f"{kind}_model_parallel_size", None) or 1 for kind in ("tensor", "expert")
        )
        self.pipeline, self.encoder = declared_stages(self.args)
        apart = getattr(self.args, "encoder_tensor_model_parallel_size", None) or self.tensor
        if apart != self.tensor and self.encoder:
            problem = f"args.encoder_tensor_model_parallel_size is {apart}, tensor_model_parallel_size {self.tensor}"
            raise MtError(str(path), problem, "as many tensor ranks for the encoder as for the decoder")
        apart = getattr(self.args, "expert_tensor_parallel_size", None) or self.tensor
        if apart != self.tensor and getattr(self.args, "num_experts", None):
            problem = f"args.expert_tensor_parallel_size is {apart}, tensor_model_parallel_size {self.tensor}"
            raise MtError(str(path), problem, "files of this format lack some of the experts then: save as torch_dist")

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the first rank's tensors on the first and last stage; missing files are reported by `tensors`."""
        paths = {rank_file(self.path, 0, stage, self.pipeline, 0, self.expert) for stage in (0, self.pipeline - 1)}
        states = [self.read(path) for path in paths if path.is_file()]
        chunks = [model for state in states for chunk, model in state.items() if CHUNK.fullmatch(chunk)]
        tensors = [pair for model in chunks if isinstance(model, Mapping) for pair in model.items()]
        return {local_name(name): tuple(tensor.shape) for name, tensor in tensors if isinstance(tensor, Tensor)}

    def tensors(
        self,
        config: TransformerConfig,
        states: Mapping[int, Mapping[int, State]] | None = None,
        *,
        buffers: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors; `MtError` lists all that is wrong with files, names and shapes before the first.

        `states`, if given, take the place of the files' contents: moments, for example, under the weights' names, which
        are no buffers' names.
        """
        ranks = Ranks(self.tensor, self.expert, count_experts(config))
        names, where = list_parameters(config, buffers=buffers), str(self.path)
        files = states or self.states()
        shards = self._collect_shards(
            self._used_by_t5(files) if config.kind == "t5" and self.pipeline > 1 else files, ranks
        )
        copies = {second: name for name in names for second in second_names(config, name) if second in shards}
        if OUTPUT_LAYER not in names:
            copies |= {
                second: WORD_EMBEDDINGS
                for second in (OUTPUT_LAYER, *second_names(config, OUTPUT_LAYER))
                if second in shards
            }
        repeated = {second: shards.pop(second) for second in copies}
        names = {name: cut_as_stored(name, parameter, shards, ranks) for name, parameter in names.items()}
        rows = self.args.padded_vocab_size
        shapes = {name: stored_shape(config, parameter, self.tensor, rows) for name, parameter in names.items()}
        raise_if([*ranks.problems(where), *shard_problems(where, names, shapes, shards, ranks)])
        raise_if(copy_problems(where, copies, repeated, shards))
        yield from canonical(config, names, lambda name: self._whole(name, names[name], shards, ranks))

    def _whole(self, name: str, parameter: Parameter, shards: Shards, ranks: Ranks) -> Tensor:
        """A tensor in its logical shape."""
        stored = rank_shards(f"{self.path}: {name}", parameter, shards[name], ranks)
        return join([self.arrange(name, share) for share in stored], parameter)

    def _used_by_t5(self, files: Mapping[int, Mapping[int, State]]) -> dict[int, dict[int, State]]:
        """What the stages of a T5 make use of; its models are no virtual stages."""
        stages = [stacks_in(states[0]["model"]) for states in files.values()]
        raise_if(stage_problems(str(self.path), stages, self.encoder))
        return {
            stage: {rank: {"model": used(contents["model"])} for rank, contents in states.items()}
            for stage, states in files.items()
        }

    def _collect_shards(self, files: Mapping[int, Mapping[int, State]], ranks: Ranks) -> dict[str, dict[int, Tensor]]:
        """Memory-mapped tensors of all ranks by local name; layers and experts are numbered through.

        `MtError` names every tensor of which stages hold different copies.
        """
        shards: dict[str, dict[int, Tensor]] = {}
        differing: set[str] = set()
        chunks = sorted((key for key in files[0][0] if CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
        for states in files.values():
            for contents in states.values():
                if missing := [chunk for chunk in chunks if chunk not in contents]:
                    raise MtError(str(self.path), f"a rank lacks {', '.join(missing)}", "copy the checkpoint again")
        first: Counter[str] = Counter()
        for chunk in chunks:
            for states in files.values():
                for rank, contents in states.items():
                    first_expert = ranks.first_expert(rank)
                    for name, tensor in unstack_experts(contents[chunk], first_expert, ranks.experts_each):
                        if isinstance(tensor, Tensor) and not IGNORED.search(name):
                            name = shift_layer_index(local_name(name), first[name.partition(".")[0]])
                            if not bitwise_equal(shards.setdefault(name, {}).setdefault(rank, tensor), tensor):
                                differing.add(name)
                layers = {
                    (name.partition(".")[0], number[1]) for name in states[0][chunk] if (number := LAYER.match(name))
                }
                first.update(stack for stack, _ in layers)
        raise_if(
            Problem(f"{self.path}: {name}", "pipeline stages hold different copies of it", "the model here has one")
            for name in sorted(differing)
        )
        return shards

    def states(self) -> dict[int, dict[int, State]]:
        """Stage to rank to contents; every missing file is named."""
        paths = {
            (stage, rank): rank_file(
                self.path, rank % self.tensor, stage, self.pipeline, rank // self.tensor, self.expert
            )
            for stage in range(self.pipeline)
            for rank in range(self.tensor * self.expert)
        }
        of = f"args say {self.tensor} tensor ranks and {self.pipeline} stages"
        of += f" and {self.expert} expert ranks" if self.expert > 1 else ""
        raise_if(Problem(str(path), "missing", f"{of}: copy it") for path in paths.values() if not path.is_file())
        files: dict[int, dict[int, State]] = {stage: {} for stage in range(self.pipeline)}
        for (stage, rank), path in paths.items():
            files[stage][rank] = self.read(path)
        return files
