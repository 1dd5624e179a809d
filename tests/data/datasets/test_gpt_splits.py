"""From a data section to datasets: items, splits, blends, the index cache, and what each refuses."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mt_core.errors import MtError
from mt_data.blending.blend import blend_by_weights, blend_exhaustively
from mt_data.blending.build import Splits
from mt_data.config import GPTData, TokenizerConfig
from mt_data.datasets.gpt.dataset import build_gpt_dataset, build_splits
from mt_data.datasets.gpt.indices import IndexRequest
from mt_data.indexed.cache import IndexCache
from mt_data.indexed.reader import IndexedReader

Corpus = Callable[[str, Sequence[int]], str]

LENGTHS = (7, 3, 5, 9, 2, 4)


def splits(tmp_path: Path, samples: tuple[int | None, int | None, int | None], **section: object) -> Splits:
    config = GPTData.model_validate({"seq_length": 4, **section})
    return build_splits(config, samples=samples, seed=1234, cache_dir=tmp_path / "cache")


def items(dataset: object, name: str = "tokens") -> list[list[int]]:
    return [dataset[i][name].tolist() for i in range(len(dataset))]  # pyright: ignore


def test_the_golden_items(corpus: Corpus, tmp_path: Path):
    train = splits(tmp_path, (10, 0, 0), paths=(corpus("a", LENGTHS),), split="1,0,0").train
    assert train is not None
    assert len(train) == 14
    assert items(train)[:2] == [[304, 200, 201, 202], [300, 301, 302, 303]]
    assert items(train, "labels")[:2] == [[200, 201, 202, 600], [301, 302, 303, 304]]
    assert {name: array.dtype.name for name, array in train[0].items()} == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
    }


def test_one_epoch_serves_every_token_once(corpus: Corpus, tmp_path: Path):
    train = splits(tmp_path, (None, 0, 0), paths=(corpus("a", LENGTHS),), split="1").train
    served = sorted(token for item in items(train) for token in item)
    assert len(served) == 28
    assert len(set(served)) == 28


def test_a_partial_last_sample_is_padded_and_masked(corpus: Corpus, tmp_path: Path):
    reader = IndexedReader(corpus("p", (5, 4, 2)))
    request = IndexRequest(range(3), None, seq_length=4, seed=1234, keep_partial=True)
    dataset = build_gpt_dataset(reader, request, IndexCache(tmp_path / "cache"))
    padded = [{k: v.tolist() for k, v in dataset[i].items()} for i in range(3)]
    assert padded[1] == {"tokens": [203, 300, 301, 0], "labels": [300, 301, 0, 0], "loss_mask": [1, 1, 0, 0]}


def test_the_end_of_document_can_be_left_out_of_the_loss(tmp_path: Path, corpus: Corpus):
    lengths = (60,) * 4  # sequence 2 is 200 to 259: it holds the id 256
    section = {"paths": (corpus("e", lengths),), "split": "1", "tokenizer": TokenizerConfig(type="bytes")}
    train = splits(tmp_path, (None, 0, 0), **section, eod_mask_loss=True).train
    masks, tokens = np.array(items(train, "loss_mask")), np.array(items(train))
    assert (tokens == 256).sum() == 1
    assert np.array_equal(masks, (tokens != 256).astype(np.float32))
    assert np.all(np.array(items(splits(tmp_path, (None, 0, 0), **section).train, "loss_mask")) == 1)


def test_splits_share_no_sequence(corpus: Corpus, tmp_path: Path):
    built = splits(tmp_path, (None, None, None), paths=(corpus("s", (9,) * 10),), split="6,2,2")
    owners = [{token // 100 for item in items(d) for token in item} for d in (built.train, built.valid, built.test)]
    assert owners == [{1, 2, 3, 4, 5, 6}, {7, 8}, {9, 10}]


def test_an_empty_split_is_an_error_that_names_it(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match=r"the valid split of .*/s: is empty: 5 sequences, split '969,30,1'; a larger"):
        splits(tmp_path, (5, 5, 0), paths=(corpus("s", (9,) * 5),))


def test_an_empty_split_that_nobody_wants_is_none(corpus: Corpus, tmp_path: Path):
    built = splits(tmp_path, (5, None, 0), paths=(corpus("s", (9,) * 5),))
    assert built.train is not None
    assert (built.valid, built.test) == (None, None)


def test_documents_without_tokens_end_in_an_error(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match="the train split of .*/none: is empty: 0 sequences"):
        splits(tmp_path, (5, 0, 0), paths=(corpus("none", (0, 0)),))


def test_no_paths(tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.paths: names no data; prefixes of \.bin/\.idx pairs"):
        splits(tmp_path, (5, 0, 0))


def test_a_missing_shard(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.paths: no file .*shard_2\.bin and .*; did you mean .*shard_1"):
        splits(tmp_path, (5, 0, 0), paths=(corpus("shard_1", LENGTHS), str(tmp_path / "shard_2")))


def test_a_weighted_blend_is_megatrons(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", LENGTHS), corpus("b", (6,) * 5)
    train = splits(tmp_path, (10, 0, 0), paths=("3", a, "1", b), split="1,0,0").train
    assert train is not None
    assert len(train) == 11  # 8 + 3: shares are rounded up
    parts = [
        build_gpt_dataset(IndexedReader(prefix), IndexRequest(range(count), n, 4, 1234), IndexCache(tmp_path / "cache"))
        for prefix, count, n in ((a, 6, 9), (b, 5, 4))
    ]
    dataset, sample = [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 1, 2, 3, 1, 4, 5, 6, 2, 7]
    assert items(train) == [parts[d][s]["tokens"].tolist() for d, s in zip(dataset, sample, strict=True)]


def test_paths_without_weights_are_mixed_by_their_size(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (41,)), corpus("b", (0, 21))
    for wanted, order in ((None, blend_exhaustively([10, 5])), (6, blend_by_weights([10, 5], 6))):
        train = splits(tmp_path, (wanted, 0, 0), paths=(a, b), split="1").train
        assert [int(tokens[0] >= 200) for tokens in items(train)] == order[0].tolist()


def test_paths_without_weights_do_not_repeat(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match="one epoch without weights: 15 train samples, 16 are wanted; give weights"):
        splits(tmp_path, (16, 0, 0), paths=(corpus("a", (41,)), corpus("b", (21,))), split="1")


def test_weights_need_a_number_of_samples(corpus: Corpus, tmp_path: Path):
    with pytest.raises(MtError, match="weights need a number of train samples"):
        splits(tmp_path, (None, 0, 0), paths=("1", corpus("a", (41,))), split="1")


def test_a_blend_that_takes_more_than_a_dataset_was_built_for(corpus: Corpus, tmp_path: Path):
    paths = ["0.9", corpus("main", (5,))]
    for n in range(9):  # each is given a whole sample for its 0.01, which makes the blend twice as long as asked
        paths += ["0.01", corpus(f"minor{n}", (5,))]
    with pytest.raises(MtError, match=r"/main: has 1[0-9] samples, the blend takes 1[0-9]; ask for more samples"):
        splits(tmp_path, (10, 0, 0), paths=paths, split="1")


def test_a_second_build_reads_the_cache(corpus: Corpus, tmp_path: Path):
    section = {"paths": (corpus("a", LENGTHS),), "split": "1"}
    splits(tmp_path, (10, 0, 0), **section)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sorted(path.suffix for path in before) == [".npy"] * 3
    splits(tmp_path, (10, 0, 0), **section)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_other_lengths_under_the_same_name_are_another_cache_entry(corpus: Corpus, tmp_path: Path):
    for lengths in (LENGTHS, LENGTHS[::-1]):
        splits(tmp_path, (10, 0, 0), paths=(corpus("a", lengths),), split="1")
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_damaged_cache_file(corpus: Corpus, tmp_path: Path):
    section = {"paths": (corpus("a", LENGTHS),), "split": "1"}
    splits(tmp_path, (10, 0, 0), **section)
    next((tmp_path / "cache").glob("*sample.npy")).write_bytes(b"\x93NUMPY")
    with pytest.raises(MtError, match=r"sample\.npy: is damaged .*; remove it, it is built again"):
        splits(tmp_path, (10, 0, 0), **section)


def test_others_wait_for_the_builder(corpus: Corpus, tmp_path: Path):
    config = GPTData(paths=(corpus("a", LENGTHS),), split="1", seq_length=4)
    wanted = {"samples": (10, 0, 0), "seed": 1234, "cache_dir": tmp_path / "cache"}
    waited: list[Splits] = []
    waiter = threading.Thread(target=lambda: waited.append(build_splits(config, **wanted, builder=False)))
    waiter.start()
    time.sleep(0.2)
    assert not waited
    built = build_splits(config, **wanted)
    waiter.join(10)
    assert items(waited[0].train) == items(built.train)


def test_waiting_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cache = IndexCache(tmp_path, builder=False, timeout_s=0.3, message_interval_s=0.1)
    with pytest.raises(MtError, match=r"key-x\.npy: the process that builds it did not finish within 0\.3 s"):
        cache.get_arrays("key", ("x",), dict)
    assert "waiting for" in capsys.readouterr().err


READER = """
import pickle, sys
from mt_data.indexed.reader import IndexedReader
reader = pickle.loads(sys.stdin.buffer.read())
print(reader.get(3, 1, 2).tolist())
"""


def test_a_reader_sent_to_another_process_opens_the_files_there(corpus: Corpus):
    import pickle

    sent = pickle.dumps(IndexedReader(corpus("a", LENGTHS)))
    assert len(sent) < 500
    ran = subprocess.run([sys.executable, "-c", READER], input=sent, capture_output=True, check=True)
    assert ran.stdout.decode().strip() == "[401, 402]"
