"""Micro-batches as tensors. The one file of mt-data that imports torch (extra `mt-data[torch]`)."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from mt_core.errors import MtError
from mt_core.types import Dataset
from mt_data.sampler import sample_ids


def batches(
    dataset: Dataset,
    *,
    micro_batch: int,
    consumed: int,
    data_rank: int = 0,
    data_size: int = 1,
    workers: int = 0,
    vocab_size: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches from sample `consumed` on, until the dataset ends.

    Each has `tokens` and `labels` int64 [B, T] and `loss_mask` float32 [B, T], in CPU memory (pinned where there is a
    CUDA device). `workers` processes read ahead; the order is the same without. With `vocab_size`, an id that a model
    of that vocabulary lacks is an `MtError`, where the embedding would fail without saying why.
    """
    ids = sample_ids(len(dataset), consumed=consumed, micro_batch=micro_batch, data_rank=data_rank, data_size=data_size)
    loader = DataLoader(
        dataset,  # pyright: ignore[reportArgumentType] - it asks for a base class where the two methods do
        batch_sampler=map(list, ids),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws from it: the global generator belongs to the model
    )
    for batch in loader:
        if vocab_size is not None:
            _check_vocabulary(batch, vocab_size)
        yield batch


def _collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def _check_vocabulary(batch: Mapping[str, torch.Tensor], vocab_size: int) -> None:
    largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
    if largest >= vocab_size:
        raise MtError(
            "data.paths",
            f"hold token id {largest}, the model's vocabulary has {vocab_size}",
            "data made with the model's own tokenizer",
        )
