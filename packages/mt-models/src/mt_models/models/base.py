"""What all models have in common: initial weights, canonical names, the plan, and the choice of the attention core."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from mt_core.contracts import BatchKey, Losses, StageOutput
from mt_core.errors import MtError
from mt_core.parallel.dropout import DropoutKeys, number_positions
from mt_core.parallel.recompute import Layer, run_sequentially
from mt_core.parallel.tensor.plan import Plan
from mt_core.pipeline.layout_string import Stage
from mt_models import canonical
from mt_models.config import TransformerConfig
from mt_models.config.tensors import Tensors
from mt_models.initialization import initial
from mt_models.layers.attention_cores import Core, choose_core
from mt_models.layers.basic import Embedding
from mt_models.plan import plan

Run = Callable[[list[Layer], Tensor], Tensor]
"""Passes features through layers; recomputation replaces it."""
FEATURES = "features"
"""The name of the features that a stage of a pipeline passes on."""
Config = TypeVar("Config", bound=TransformerConfig)


class Transformer(nn.Module, Generic[Config]):
    """A module made from a configuration; parameters are uninitialised until `initialize` or a load."""

    batch_keys: ClassVar[Mapping[str, BatchKey]]
    """The keys of a batch that the model takes."""
    run_stage: ClassVar[Callable[..., StageOutput]]
    """Passes a micro-batch through one stage, as `mt_core.contracts.StagedModel` says."""
    embed: Embedding
    position: Embedding | None
    """Learned positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.run: Run = run_sequentially

    @cached_property
    def canonical_tensors(self) -> Tensors:
        """Every tensor in a checkpoint of this model, listed once: every parameter asks for those that it holds."""
        return self.config.canonical_tensors()

    def initialize(self, seed: int) -> None:
        """Fill every parameter; values depend on the seed and the parameter's canonical names only."""
        canonical.load_canonical(self, lambda name: self.initial(seed, name))

    def initial(self, seed: int, name: str) -> Tensor:
        """The initial value of canonical tensor `name`, whole."""
        return initial(self.config, seed, name=name, shape=self.canonical_tensors[name].shape)

    def plan(self, tensor: int) -> Plan:
        """How `tensor` ranks cut the model."""
        return plan(self.config, tensor)

    def to_canonical(
        self, name: str, tensor: Tensor, rank: int = 0, size: int = 1, inner: int = 1
    ) -> Iterable[tuple[str, Tensor]]:
        """Split a tensor shaped like parameter `name` (fused, padded, of one of `size` ranks) into canonical ones."""
        return canonical.to_canonical(self, self.canonical_tensors, name, tensor, (rank, size, inner))

    def from_canonical(
        self, name: str, get: Callable[[str], Any], rank: int = 0, size: int = 1, inner: int = 1
    ) -> Tensor:
        """Fuse a tensor shaped like parameter `name` from whole canonical ones, sliced where cut."""
        return canonical.from_canonical(self, self.canonical_tensors, name, get, (rank, size, inner))

    def canonical_regions(
        self, name: str, rank: int = 0, size: int = 1, inner: int = 1
    ) -> Mapping[str, tuple[slice, ...]]:
        """Which part of which canonical tensors parameter `name` holds on a rank; () is all of it."""
        return canonical.canonical_regions(self, self.canonical_tensors, name, (rank, size, inner))

    def embed_tokens(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embeddings [B, T, D] plus those of the positions, if learned; `MtError` if a sequence is too long.

        Positions are [T] or [B, T], and 0, 1, 2, … if not given.
        """
        self.check_length(tokens_BT.shape[1])
        x_BTD = self.embed(tokens_BT)
        return x_BTD if self.position is None else x_BTD + self.position(count_positions(tokens_BT, positions))

    def losses(self, tokens_BT: Tensor, labels_BT: Tensor, **inputs: Tensor) -> Losses:
        """The losses of a micro-batch, which passes through the model as one stage; inputs are those of `run_stage`."""
        whole = Stage(range(self.config.total_layers), embedding=True, loss=True)
        # run_stage of the class: FSDP2 replaces this method and that one of the object, and would run twice
        return type(self).run_stage(self, whole, {}, tokens_BT=tokens_BT, labels_BT=labels_BT, **inputs).losses

    def check_length(self, length: int) -> None:
        """Refuse a sequence that is too long."""
        if length > self.config.max_seq_len:
            allowed = f"at most model.max_seq_len = {self.config.max_seq_len}"
            raise MtError("tokens", f"a sequence of {length} tokens", allowed)

    def start_dropout(
        self, tokens_BT: Tensor, keys_B: Tensor | None, positions_T: Tensor | None = None
    ) -> DropoutKeys | None:
        """What masks depend on in training, from the samples' keys and the tokens' indices in their rows, which are
        0, 1, 2, … if not given; None where nothing is dropped or jittered. `MtError` where training lacks the keys."""
        if not self.training or not self.config.draws:
            return None
        if keys_B is None:
            where = "model.dropout" if self.config.dropout.is_active else "model.mlp.jitter"
            actual = "is on, but the batch has no 'dropout_keys', on which masks depend"
            raise MtError(where, actual, "add_dropout_keys of mt_core.training.batch_inputs, or model.eval()")
        if positions_T is None:
            positions_T = number_positions(0, tokens_BT.shape[1], tokens_BT.device)
        return DropoutKeys(keys_B, positions_T.to(torch.int32))

    def choose_core(self, device: torch.device, *needed: str) -> Core:
        """Choose the attention core of the configuration, one that supports its special scores and what is needed."""
        part = self.config.attention
        dropout = ["dropout"] if self.config.dropout.attention else []
        return choose_core(part.core, compute_device(device), frozenset([*part.special_scores, *dropout, *needed]))


def keep_parts(
    model: nn.Module,
    blocks: nn.ModuleDict,
    stages: Sequence[Stage],
    ends: tuple[Sequence[str], Sequence[str]],
    *,
    tied: bool,
) -> None:
    """Drop the blocks that no stage has, and the parts of a model before or behind them if their stage is not here.

    The embedding is one of the first; a model that is tied needs it in the last stage as well.
    """
    keep_blocks(blocks, [stage.layers for stage in stages])
    first, last = any(stage.embedding for stage in stages), any(stage.loss for stage in stages)
    before, behind = ends
    dropped = [*([] if first else before), *([] if last else behind)]
    dropped += [] if first or (last and tied) else ["embed"]
    for name in dropped:
        setattr(model, name, None)


def keep_blocks(blocks: nn.ModuleDict, ranges: Sequence[range]) -> None:
    """Drop the blocks whose numbers are in none of the ranges."""
    for number in {*blocks} - {str(number) for numbers in ranges for number in numbers}:
        del blocks[number]


def split_layers(keys: DropoutKeys | None, first: int, count: int) -> Sequence[DropoutKeys | None]:
    """The dropout keys of `count` layers from number `first` on; 0 is what comes before the layers."""
    return [None] * count if keys is None else keys.split_layers(first, count)


def count_positions(tokens_BT: Tensor, positions: Tensor | None) -> Tensor:
    """The positions given, or 0, 1, 2, … for the tokens, [T]."""
    if positions is not None:
        return positions
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)


def compute_device(device: torch.device) -> torch.device:
    """Where a module built on `device` will run: one on meta goes to the accelerator, if there is any."""
    if device.type != "meta":
        return device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
