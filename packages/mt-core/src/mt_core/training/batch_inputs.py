"""From a micro-batch of a dataset to the arguments of a model's losses: this context rank's part of it.

A model declares the keys that it takes (`Model.batch_keys`); a key that it does not declare is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.contracts import BatchKey, Model
from mt_core.distributed.mesh import Axis
from mt_core.errors import Problem, raise_if
from mt_core.parallel.context.zigzag import local_positions, shard_sequence
from mt_core.plugins import did_you_mean
from mt_core.training.seeds import make_sample_keys

Batch = Mapping[str, Tensor]

LOSS_MASK = "loss_mask"
"""The key of [B, T], 1 where a label counts in the loss: the training step multiplies by it, no model takes it."""
POSITIONS = "position_ids"
"""The key of the tokens' positions, which context parallelism fills in where a batch has none."""
DROPOUT_KEYS = "dropout_keys"
"""The key of int32 [B], what the dropout of each sample depends on; only training adds it, and to every batch."""
ROW_POSITIONS = "row_positions"
"""The key of int64 [T], the index of each token in its row, which context parallelism fills in beside dropout keys."""
UNUSED = frozenset({"dataset_id", DROPOUT_KEYS})
"""Keys that say where a sample is from, and that a model need not take."""


class ModelInputs(NamedTuple):
    """One micro-batch on the model's device; T is this rank's share of the sequence."""

    arguments: dict[str, Tensor]
    """Keyword arguments of `Model.losses`."""
    loss_mask_BT: Tensor | None


def prepare_inputs(model: Model, batch: Batch, context: Axis, device: torch.device) -> ModelInputs:
    """The arguments and the loss mask that a batch is to a model; `MtError` names unknown and missing keys."""
    keys: Mapping[str, BatchKey] = model.batch_keys
    raise_if(batch_problems(keys, batch, model.config.kind))

    def local(tensor: Tensor, *, per_token: bool) -> Tensor:
        tensor = to_device(tensor, device)
        return shard_sequence(tensor, context, 1) if per_token and context.size > 1 else tensor

    arguments = {
        key.argument: local(batch[name], per_token=key.per_token)
        for name, key in keys.items()
        if key.argument is not None and name in batch
    }
    filled = (POSITIONS, ROW_POSITIONS) if DROPOUT_KEYS in batch else (POSITIONS,)
    for key in (keys[name] for name in filled if name in keys and name not in batch and context.size > 1):
        assert key.argument is not None
        arguments[key.argument] = to_device(local_positions(batch["labels"].shape[1], context), device)
    return ModelInputs(arguments, local(batch[LOSS_MASK], per_token=True) if LOSS_MASK in batch else None)


def add_dropout_keys(batches: Sequence[Batch], seed: int, *, consumed: int, data: Axis) -> list[Batch]:
    """This rank's micro-batches of the step that begins after `consumed` samples, with keys for dropout.

    A sample's key depends on the seed and on its number in the run alone, whatever micro-batch and rank it is on.
    """
    first, keyed = consumed, []
    for batch in batches:
        count = len(batch["labels"])
        keyed.append({**batch, DROPOUT_KEYS: make_sample_keys(seed, first + data.rank * count, count)})
        first += data.size * count
    return keyed


def batch_problems(keys: Mapping[str, BatchKey], batch: Batch, kind: str) -> Iterator[Problem]:
    """What a batch has that the model does not take, and what it lacks."""
    for name in batch:
        if name not in keys and name != LOSS_MASK and name not in UNUSED:
            yield Problem("batch", f"unknown key {name!r} for a model of kind {kind!r}", did_you_mean(name, list(keys)))
    for name, key in keys.items():
        if key.required and name not in batch:
            actual = ", ".join(batch)
            yield Problem("batch", f"has no {name!r}, only {actual}", f"a model of kind {kind!r} needs it")


def check_equal_sizes(batches: Sequence[Batch], world: Axis) -> None:
    """Refuse micro-batches whose numbers of labels differ between ranks; every rank must call it with as many.

    All ranks raise the same `MtError`, so that none waits for the others.
    """
    sizes = torch.tensor([batch["labels"].numel() for batch in batches])
    largest, negated = world.max_(torch.stack([sizes, -sizes])).tolist()
    raise_if(_unequal_problems(largest, [-size for size in negated]))


def _unequal_problems(largest: Sequence[int], smallest: Sequence[int]) -> Iterator[Problem]:
    """What differs between ranks, by the sizes of their micro-batches."""
    pairs = [(number, *ends) for number, ends in enumerate(zip(smallest, largest, strict=True), 1)]
    wrong = [f"{low} to {high} tokens in micro-batch {number}" for number, low, high in pairs if low != high]
    if wrong:
        more = f" and in {len(wrong) - 3} more" if len(wrong) > 3 else ""
        actual = f"ranks have {', '.join(wrong[:3])}{more}"
        hint = (
            'parallel.token_dispatcher = "all_gather" needs equal ones: make samples of one length, or set "all_to_all"'
        )
        yield Problem("batch", actual, hint)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there, for which the host does not wait: from unpinned memory it would, for all work queued before it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def count_untrained(batches: Sequence[Batch]) -> int:
    """Number of samples of which no token counts in the loss; none where batches have no loss mask."""
    return sum(int((~batch[LOSS_MASK].any(dim=1)).sum()) for batch in batches if LOSS_MASK in batch)


def valid_tokens(batches: Sequence[Batch]) -> float:
    """Number of tokens that count in the loss; none where batches have no loss mask."""
    return float(sum(batch[LOSS_MASK].sum(dtype=torch.float64) for batch in batches if LOSS_MASK in batch))
