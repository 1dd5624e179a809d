"""Batches as tensors: orders, loader processes, reading ahead."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_data.batching.loading import load_batches, read_ahead
from mt_data.config import GPTData
from mt_data.datasets.gpt.dataset import build_splits

Corpus = Callable[[str, Sequence[int]], str]


@pytest.fixture
def dataset(corpus: Corpus, tmp_path: Path) -> Dataset:
    """25 samples of 4 tokens."""
    config = GPTData(paths=(corpus("a", (20, 31, 50)),), split="1", seq_length=4)
    train = build_splits(config, samples=(25, 0, 0), seed=1, cache_dir=tmp_path / "cache").train
    assert train is not None
    return train


def test_batches_stack_samples(dataset: Dataset):
    batches = list(load_batches(dataset, micro_batch=2, consumed=3))
    assert len(batches) == 11
    for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("loss_mask", torch.float32)):
        assert batches[0][name].dtype == dtype
        assert batches[0][name].tolist() == [dataset[3][name].tolist(), dataset[4][name].tolist()]


def test_loader_processes_change_nothing(dataset: Dataset):
    where = {"micro_batch": 2, "consumed": 4, "data_rank": 1, "data_size": 2}
    alone, with_workers = list(load_batches(dataset, **where)), list(load_batches(dataset, **where, workers=2))
    assert [b["tokens"].tolist() for b in with_workers] == [b["tokens"].tolist() for b in alone]


def test_the_models_random_numbers_are_left_alone(dataset: Dataset):
    before = torch.random.get_rng_state()
    list(load_batches(dataset, micro_batch=2, consumed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_id_outside_the_models_vocabulary(dataset: Dataset):
    list(load_batches(dataset, micro_batch=5, consumed=0, vocab_size=350))
    with pytest.raises(MtError, match="hold token id 3[0-9][0-9], the model's vocabulary has 300; data made with"):
        list(load_batches(dataset, micro_batch=5, consumed=0, vocab_size=300))


@pytest.mark.parametrize("name", ["text", "text_enc", "text_dec"])
def test_an_id_outside_the_vocabulary_of_an_encoder_or_decoder(name: str):
    samples = [{name: np.array([1, 40])}]
    with pytest.raises(MtError, match="hold token id 40, the model's vocabulary has 40"):
        list(load_batches(samples, micro_batch=1, consumed=0, vocab_size=40))


def test_other_orders(dataset: Dataset):
    def first(order: str, consumed: int) -> list[list[int]]:
        batches = islice(load_batches(dataset, micro_batch=2, consumed=consumed, order=order), 13)
        return [[*map(list, batch["tokens"].tolist())] for batch in batches]

    assert first("sequential", 0) == [
        [dataset[i]["tokens"].tolist() for i in range(at, min(at + 2, 25))] for at in range(0, 25, 2)
    ]
    assert first("cyclic", 0)[12] == first("cyclic", 24)[0]  # an epoch later
    with pytest.raises(MtError, match="order: unknown name 'cylic'; did you mean 'cyclic'\\? allowed: single, sequen"):
        load_batches(dataset, micro_batch=2, consumed=0, order="cylic")


def test_a_rank_without_samples_in_the_last_group_gets_an_empty_batch(dataset: Dataset):
    batches = list(load_batches(dataset, micro_batch=2, consumed=24, data_rank=1, data_size=2, order="sequential"))
    assert batches == [{}]


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_reading_ahead_changes_nothing(dataset: Dataset, prefetch: int):
    batches = load_batches(dataset, micro_batch=2, consumed=0, prefetch=prefetch)
    assert [b["tokens"].tolist() for b in batches] == [
        b["tokens"].tolist() for b in load_batches(dataset, micro_batch=2, consumed=0, workers=1)
    ]


def test_memory_is_pinned_only_where_there_is_a_gpu(dataset: Dataset):
    batch = next(load_batches(dataset, micro_batch=2, consumed=0))
    assert batch["tokens"].is_pinned() == torch.cuda.is_available()
    assert not next(load_batches(dataset, micro_batch=2, consumed=0, pin=False))["tokens"].is_pinned()


def test_items_are_drawn_before_they_are_asked_for():
    drawn, three = [], threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            drawn.append(i)
            if i == 3:
                three.set()
            yield i

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 0
    assert three.wait(5)  # 1 and 2 wait in the queue, the thread holds 3
    ahead.close()  # pyright: ignore[reportAttributeAccessIssue]
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(5)
            assert not thread.is_alive()
    assert drawn == [0, 1, 2, 3]


def test_what_the_dataset_raises_is_raised_in_its_turn():
    def items() -> Iterator[int]:
        yield 1
        raise MtError("data", "is damaged")

    ahead = read_ahead(items(), 2)
    assert next(ahead) == 1
    with pytest.raises(MtError, match="data: is damaged"):
        next(ahead)


def test_an_iterator_that_is_given_up_leaves_no_thread_behind():
    items = read_ahead(iter(range(100)), 2)
    assert next(items) == 0
    items.close()
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
