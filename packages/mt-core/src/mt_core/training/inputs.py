"""From a micro-batch of a dataset to what the model takes, this context rank's part of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.parallel.axis import Axis
from mt_core.parallel.context.sequence import local_positions, split_sequence

Batch = Mapping[str, Tensor]


class Inputs(NamedTuple):
    """One micro-batch on the model's device; T is this rank's share of the sequence."""

    tokens_BT: Tensor
    labels_BT: Tensor
    loss_mask_BT: Tensor
    positions: Tensor | None
    """[T] or [B, T]; None for 0, 1, 2, …"""
    documents_BT: Tensor | None
    """A number for each token; tokens see those of equal numbers. None where all are one document."""


def inputs(batch: Batch, context: Axis, device: torch.device) -> Inputs:
    """Tokens, labels, loss mask, and what the batch says of positions and documents."""
    part = {
        name: split_sequence(tensor.to(device, non_blocking=True), context, 1)
        for name, tensor in {**batch, **_documents(batch)}.items()
        if name in ("tokens", "labels", "loss_mask", "position_ids", "documents")
    }
    positions = part.get("position_ids")
    if positions is None and context.size > 1:
        positions = local_positions(batch["tokens"].shape[1], context).to(device)
    return Inputs(part["tokens"], part["labels"], part["loss_mask"], positions, part.get("documents"))


def _documents(batch: Batch) -> dict[str, Tensor]:
    """Each token's document, by the position at which the document begins."""
    if "cu_seqlens" in batch:
        tokens_BT = batch["tokens"]
        at_BT = torch.arange(tokens_BT.shape[1], dtype=batch["cu_seqlens"].dtype).expand(tokens_BT.shape).contiguous()
        return {"documents": torch.searchsorted(batch["cu_seqlens"], at_BT, right=True)}
    if "attention_mask" in batch:  # [B, 1, T, T], true where a token must not look
        return {"documents": batch["attention_mask"][:, 0].to(torch.uint8).argmin(-1)}
    return {}


def valid_tokens(batches: Sequence[Batch]) -> float:
    """Number of tokens that count in the loss."""
    return float(sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in batches))
