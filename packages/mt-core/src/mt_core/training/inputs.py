"""From a micro-batch of a dataset to what the model takes, this context rank's part of it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.zigzag import local_positions, split_sequence

Batch = Mapping[str, Tensor]

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "tokens": "tokens",
        "text": "tokens",
        "text_dec": "tokens",
        "labels": "labels",
        "loss_mask": "loss_mask",
        "position_ids": "positions",
        "documents": "documents",
        "padding_mask": "documents",
    }
)
"""What a batch calls a tensor [B, T, …] that every model takes. A decoder's padding comes last; no text sees it."""
MORE: Mapping[str, str] = MappingProxyType(
    {
        "types": "types_BT",
        "is_random": "order_B",
        "text_enc": "encoder_tokens_BS",
        "enc_mask": "encoder_documents_BS",
    }
)
"""What it calls tensors that only some models take, and their keyword for each."""


class Inputs(NamedTuple):
    """One micro-batch on the model's device; T is this rank's share of the sequence."""

    tokens_BT: Tensor
    labels_BT: Tensor
    loss_mask_BT: Tensor
    positions: Tensor | None
    """[T] or [B, T]; None for 0, 1, 2, …"""
    documents_BT: Tensor | None
    """A number for each token; tokens see those of equal numbers. None where all are one document."""
    more: Mapping[str, Tensor]
    """What else the model takes, by keyword."""


def inputs(batch: Batch, context: Axis, device: torch.device) -> Inputs:
    """Tokens, labels, loss mask, what the batch says of positions and documents, and what some models need besides."""
    wanted = {name: t for name, t in {**batch, **_documents(batch)}.items() if name in NAMES or name in MORE}
    found = {name: to_device(tensor, device) for name, tensor in wanted.items()}
    part = {NAMES[name]: split_sequence(tensor, context, 1) for name, tensor in found.items() if name in NAMES}
    positions = part.get("positions")
    if positions is None and context.size > 1:
        positions = to_device(local_positions(batch["labels"].shape[1], context), device)
    more = {MORE[name]: tensor for name, tensor in found.items() if name in MORE}
    return Inputs(part["tokens"], part["labels"], part["loss_mask"], positions, part.get("documents"), more)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there, for which the host does not wait: from unpinned memory it would, for all work queued before it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
