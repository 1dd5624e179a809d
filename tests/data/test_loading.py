"""Batches in training order: Megatron's `single` sampler, resumption anywhere, loader processes."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_core.errors import MtError
from mt_core.types import Dataset
from mt_data.config import DataConfig
from mt_data.sampler import sample_ids
from mt_data.splits import build_splits
from mt_data.torch import batches

Corpus = Callable[[str, Sequence[int]], str]


@pytest.fixture
def dataset(corpus: Corpus, tmp_path: Path) -> Dataset:
    """25 samples of 4 tokens."""
    config = DataConfig(paths=(corpus("a", (20, 31, 50)),), split="1", seq_length=4)
    train = build_splits(config, samples=(25, 0, 0), seed=1, cache_dir=tmp_path / "cache").train
    assert train is not None
    return train


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, [[4, 5], [8, 9], [12, 13], [16, 17]]), (1, [[6, 7], [10, 11], [14, 15], [18, 19]])],
)
def test_the_order_is_megatrons(rank: int, expected: list[list[int]]):
    ids = sample_ids(21, consumed=4, micro_batch=2, data_rank=rank, data_size=2)
    assert [list(group) for group in ids] == expected


@given(st.integers(0, 200), st.integers(0, 12), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_the_position_is_valid_under_another_number_of_ranks(
    total: int, steps: int, micro_batch: int, ranks: int, ranks_after: int
):
    def served(consumed: int, ranks: int, steps: int | None) -> list[int]:
        streams = [
            islice(sample_ids(total, consumed=consumed, micro_batch=micro_batch, data_rank=r, data_size=ranks), steps)
            for r in range(ranks)
        ]
        return [i for groups in zip(*streams, strict=True) for group in groups for i in group]

    before = served(0, ranks, steps)
    after = served(len(before), ranks_after, None)
    both = before + after
    assert both == list(range(len(both)))
    assert total - len(both) < micro_batch * max(ranks, ranks_after)


def test_a_position_behind_the_end():
    assert list(sample_ids(8, consumed=8, micro_batch=2)) == []
    with pytest.raises(MtError, match="data: 9 samples are consumed, the dataset has 8"):
        next(sample_ids(8, consumed=9, micro_batch=2))


def test_batches_stack_samples(dataset: Dataset):
    found = list(batches(dataset, micro_batch=2, consumed=3))
    assert len(found) == 11
    for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("loss_mask", torch.float32)):
        assert found[0][name].dtype == dtype
        assert found[0][name].tolist() == [dataset[3][name].tolist(), dataset[4][name].tolist()]


def test_loader_processes_change_nothing(dataset: Dataset):
    where = {"micro_batch": 2, "consumed": 4, "data_rank": 1, "data_size": 2}
    alone, with_workers = list(batches(dataset, **where)), list(batches(dataset, **where, workers=2))
    assert [b["tokens"].tolist() for b in with_workers] == [b["tokens"].tolist() for b in alone]


def test_the_models_random_numbers_are_left_alone(dataset: Dataset):
    before = torch.random.get_rng_state()
    list(batches(dataset, micro_batch=2, consumed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_id_outside_the_models_vocabulary(dataset: Dataset):
    list(batches(dataset, micro_batch=5, consumed=0, vocab_size=350))
    with pytest.raises(MtError, match="hold token id 3[0-9][0-9], the model's vocabulary has 300; data made with"):
        list(batches(dataset, micro_batch=5, consumed=0, vocab_size=300))
