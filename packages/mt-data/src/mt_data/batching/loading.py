"""Micro-batches as tensors, read ahead of training.

The one file of mt-data that imports torch (extra `mt-data[torch]`).
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.batching.samplers import DataParallelRank, get_sampler

Batch = dict[str, torch.Tensor]
Item = TypeVar("Item")
STOP_CHECK_S = 0.1
"""How long the thread may live on after its iterator is gone, or the main thread has ended."""


def load_batches(
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
    """This rank's micro-batches from sample `consumed` on, in an order of `mt_data.batching.samplers`.

    Each array of a sample is stacked to a tensor [B, …] in CPU memory, pinned where there is a CUDA device unless
    `pin` says otherwise. Each of `workers` processes, or a thread if there are none, reads `prefetch` micro-batches
    ahead; the order is the same without. With `vocab_size`, an id that a model of that vocabulary lacks is an
    `MtError`, where the embedding would fail without saying why.
    """
    pin = torch.cuda.is_available() if pin is None else pin
    ids = get_sampler(order)(len(dataset), consumed, DataParallelRank(micro_batch, data_rank, data_size))
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
        loader = read_ahead(_iterate_loader(loader, device), prefetch)
    return _check_batches(loader, vocab_size)


@dataclass(frozen=True, slots=True)
class FilledUp:
    """A dataset whose samples have one label each, with its last sample without a label, −1, behind its own."""

    samples: Dataset
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The sample, or what fills up, which counts in no loss."""
        if index < len(self.samples):
            return self.samples[index]
        last = self.samples[len(self.samples) - 1]
        return {**last, "labels": np.full_like(last["labels"], -1)[()]}


def fill_up(dataset: Dataset, multiple: int) -> Dataset:
    """The dataset filled up to a multiple of so many samples, so that every rank has whole micro-batches."""
    return FilledUp(dataset, -(-len(dataset) // multiple) * multiple)


def _iterate_loader(loader: DataLoader, device: int | None) -> Iterator[Batch]:
    """What the loader gives. A thread runs this: left alone, it would pin memory on the first GPU, not the rank's."""
    if device is not None:
        torch.cuda.set_device(device)
    yield from loader


def _check_batches(loaded: Iterator[Batch] | DataLoader, vocab_size: int | None) -> Iterator[Batch]:
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


def read_ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items in their order, up to `depth` of them drawn ahead; 0 draws each when it is asked for.

    What the iterable raises is raised here, after the items before it. The thread that draws is no daemon, and looks
    itself whether the process wants to end: an interpreter that ends while it is inside torch aborts.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_fill_queue, args=(items, ready, stopped), name="read-ahead")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType] - there is an item where there is no error
    finally:
        stopped.set()
        thread.join()


def _fill_queue(items: Iterable[Item], ready: "queue.Queue", stopped: threading.Event) -> None:
    try:
        for item in items:
            if not _put_item(ready, (item, None), stopped):
                return
        _put_item(ready, (None, StopIteration()), stopped)
    except BaseException as error:  # of whatever kind: it is raised where the items are wanted
        _put_item(ready, (None, error), stopped)


def _put_item(ready: "queue.Queue", item: object, stopped: threading.Event) -> bool:
    """Whether the item could be put; not if nobody will get it any more."""
    while not stopped.is_set() and threading.main_thread().is_alive():
        try:
            ready.put(item, timeout=STOP_CHECK_S)
        except queue.Full:
            continue
        return True
    return False
