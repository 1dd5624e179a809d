"""Micro-batches as tensors. The one file of mt-data that imports torch (extra `mt-data[torch]`)."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.read_ahead import read_ahead
from mt_data.samplers.orders import sampler
from mt_data.samplers.share import Share

Batch = dict[str, torch.Tensor]


def batches(
    dataset: Dataset,
    *,
    micro_batch: int,
    consumed: int,
    data_rank: int = 0,
    data_size: int = 1,
    order: str = "single",
    workers: int = 0,
    prefetch: int = 2,
    pin: bool | None = None,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches from sample `consumed` on, in an order of `mt_data.samplers.orders`.

    Each array of a sample is stacked to a tensor [B, …] in CPU memory, pinned where there is a CUDA device unless
    `pin` says otherwise. Each of `workers` processes, or a thread if there are none, reads `prefetch` micro-batches
    ahead; the order is the same without. With `vocab_size`, an id that a model of that vocabulary lacks is an
    `MtError`, where the embedding would fail without saying why.
    """
    pin = torch.cuda.is_available() if pin is None else pin
    ids = sampler(order)(len(dataset), consumed, Share(micro_batch, data_rank, data_size))
    loader = DataLoader(
        dataset,  # pyright: ignore[reportArgumentType] - it asks for a base class where the two methods do
        batch_sampler=map(list, ids),
        num_workers=workers,
        prefetch_factor=max(1, prefetch) if workers else None,
        collate_fn=_collate,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws from it: the global generator belongs to the model
    )
    if not workers:
        device = torch.cuda.current_device() if pin and torch.cuda.is_available() else None
        loader = read_ahead(_loaded(loader, device), prefetch)
    return _checked(loader, vocab_size)


def _loaded(loader: DataLoader, device: int | None) -> Iterator[Batch]:
    """What the loader gives. A thread runs this: left alone, it would pin memory on the first GPU, not the rank's."""
    if device is not None:
        torch.cuda.set_device(device)
    yield from loader


def _checked(loaded: Iterator[Batch] | DataLoader, vocab_size: int | None) -> Iterator[Batch]:
    for batch in loaded:
        if vocab_size is not None:
            _check_vocabulary(batch, vocab_size)
        yield batch


def _collate(samples: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Tensors of the samples' arrays; no samples, an empty part of a last group, are no tensors."""
    names = samples[0] if samples else ()
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in names}


def _check_vocabulary(batch: Mapping[str, torch.Tensor], vocab_size: int) -> None:
    names = ("tokens", "labels", "text", "text_enc", "text_dec")
    largest = max((int(batch[name].max()) for name in names if name in batch), default=-1)
    if largest >= vocab_size:
        raise MtError(
            "data.paths",
            f"hold token id {largest}, the model's vocabulary has {vocab_size}",
            "data made with the model's own tokenizer",
        )
