"""What each rank of a stage should hold of a tensor, and that copies on several ranks are equal.

Source: docs/specs/checkpoints.md §3.10.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mt_ckpt.megatron.parameters.names import OUTPUT_LAYER
from mt_ckpt.megatron.parameters.table import DOWN_PROJECTIONS, Parameter, Shape
from mt_ckpt.tensor_streams.streams import bitwise_equal
from mt_core.errors import MtError, Problem

Shards = Mapping[str, Mapping[int, Tensor]]
"""Local name of the whole model → rank → its share."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a stage: rank x · tensor + t is tensor rank t of expert rank x."""

    tensor: int
    expert: int = 1
    experts: int = 0
    """Number of experts of a layer; 0 in a model without."""

    @property
    def experts_each(self) -> int:
        """Experts of one rank."""
        return self.experts // self.expert

    def first_expert(self, rank: int) -> int:
        """The first of a rank's experts."""
        return rank // self.tensor * self.experts_each

    def owners(self, parameter: Parameter) -> range:
        """The ranks that hold a share of a tensor: all, or those that have its expert."""
        if parameter.expert is None:
            return range(self.tensor * self.expert)
        first = parameter.expert // self.experts_each * self.tensor
        return range(first, first + self.tensor)

    def name(self, rank: int) -> str:
        """What to call a rank in a message."""
        expert = f" of expert rank {rank // self.tensor}" if self.expert > 1 else ""
        return f"tensor rank {rank % self.tensor}{expert}"

    def problems(self, where: str) -> Iterator[Problem]:
        """Experts that ranks cannot share evenly."""
        if self.experts % self.expert or (self.expert > 1 and not self.experts):
            problem = f"args ask for {self.experts} experts on {self.expert} expert ranks"
            yield Problem(where, problem, "as many on each: correct args")


def shard_problems(
    where: str, names: Mapping[str, Parameter], shapes: Mapping[str, Shape], tensors: Shards, ranks: Ranks
) -> Iterator[Problem]:
    """Everything wrong with names, shapes and dtypes."""
    for name in sorted(names.keys() | tensors.keys()):
        if name not in names:
            yield Problem(f"{where}: {name}", "unexpected tensor", "the model that args describe has none of this name")
        elif ranks.experts_each or names[name].expert is None:
            shards, owners = tensors.get(name, {}), ranks.owners(names[name])
            if sorted(shards) != [*owners]:
                yield Problem(f"{where}: {name}", f"stored by {len(shards)} ranks", f"all {len(owners)} should have it")
            else:
                yield from _misshapen(f"{where}: {name}", shapes[name], shards, ranks)


def _misshapen(where: str, right: Shape, shards: Mapping[int, Tensor], ranks: Ranks) -> Iterator[Problem]:
    dtype = next(iter(shards.values())).dtype
    for rank, tensor in shards.items():
        if tuple(tensor.shape) != right:
            yield Problem(where, f"has shape {tuple(tensor.shape)} on {ranks.name(rank)}", f"args ask for {right}")
        if tensor.dtype != dtype:
            kinds = f"is {tensor.dtype} on {ranks.name(rank)}, {dtype} on others"
            yield Problem(where, kinds.replace("torch.", ""), "store it in one dtype")


def cut_as_stored(name: str, parameter: Parameter, tensors: Shards, ranks: Ranks) -> Parameter:
    """The parameter as ranks hold it: the rows of projections to compressed features may be cut, or whole on each.

    Source: docs/specs/checkpoints.md §3.7.
    """
    if not name.endswith(DOWN_PROJECTIONS):
        return parameter
    rows, rest = divmod(parameter.shapes[0][0], ranks.tensor)
    cut = not rest and all(share.shape[:1] == (rows,) for share in tensors.get(name, {}).values())
    return replace(parameter, cut=0) if cut else parameter


def rank_shards(where: str, parameter: Parameter, shards: Mapping[int, Tensor], ranks: Ranks) -> list[Tensor]:
    """What the tensor ranks hold, in order; `MtError` if a rank's copy differs from the rank's that it repeats."""
    owners = ranks.owners(parameter)
    for rank in owners:
        repeats = owners[0] + (rank % ranks.tensor if parameter.cut is not None else 0)
        if repeats != rank and not bitwise_equal(shards[repeats], shards[rank]):
            problem = f"{ranks.name(rank)} holds another copy than {ranks.name(repeats)}"
            raise MtError(where, problem, "copies are equal in a checkpoint that is whole: use another iteration")
    return [shards[rank] for rank in owners[: ranks.tensor]]


def copy_problems(where: str, copies: Mapping[str, str], repeated: Shards, originals: Shards) -> Iterator[Problem]:
    """Tensors stored under a second name too, which differ from those under the first."""
    for second, first in copies.items():
        if all(bitwise_equal(tensor, originals[first][rank]) for rank, tensor in repeated[second].items()):
            continue
        if second == OUTPUT_LAYER:
            problem = "the last stage's copy of the embedding differs from the first stage's, to which args tie it"
            yield Problem(where, problem, "set args.untie_embeddings_and_output_weights if it was trained so")
        else:
            yield Problem(f"{where}: {second}", f"differs from {first}, whose copy it is", "use another iteration")
