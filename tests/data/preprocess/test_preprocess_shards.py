"""Parts of one input on several machines, partitions in Megatron's order, and workers of a Ray cluster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.indexed.reader import IndexedReader
from mt_data.preprocess.command import parse_shard
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess
from mt_data.tools.merge import find_pairs, merge_pairs

BYTES = EncodingOptions(TokenizerConfig(type="bytes"), append_eod=True)


@pytest.fixture
def job(jsonl: Path, tmp_path: Path) -> Callable[..., PreprocessJob]:
    def make(name: str, **changes: object) -> PreprocessJob:
        short = tmp_path / "short.txt"
        short.write_text("a short text between two others")
        job = PreprocessJob((jsonl, short, jsonl), str(tmp_path / name / "out"), BYTES)
        return replace(job, **changes)  # pyright: ignore[reportArgumentType]

    return make


def outputs(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


@pytest.mark.parametrize("parts", [2, 3, 11])
def test_shards_merge_to_what_one_run_makes(job: Callable[..., PreprocessJob], tmp_path: Path, parts: int):
    preprocess(whole := job("whole"))
    for part in reversed(range(parts)):
        preprocess(job("parts", shard=(part, parts)))
    width = len(str(parts))
    assert [Path(prefix).name for prefix in find_pairs([str(tmp_path / "parts")])] == [
        f"out_{part:0{width}}-of-{parts}_text_document" for part in range(parts)
    ]
    merge_pairs(find_pairs([str(tmp_path / "parts" / "out_*_text_document")]), str(tmp_path / "merged"))
    assert outputs(str(tmp_path / "merged")) == outputs(whole.prefix("text"))


def test_a_missing_shard_is_named(job: Callable[..., PreprocessJob], tmp_path: Path):
    for part in (0, 2):
        preprocess(job("parts", shard=(part, 4)))
    with pytest.raises(MtError, match=r"out_\*-of-4_text_document: parts 1/4, 3/4 are missing; run mt data preprocess"):
        find_pairs([str(tmp_path / "parts")])


@pytest.mark.parametrize(("text", "shown"), [("1", "'1'"), ("a/b", "'a/b'"), ("-1/2", "'-1/2'")])
def test_a_shard_that_is_none(text: str, shown: str):
    assert parse_shard("3/16") == (3, 16)
    with pytest.raises(MtError, match=f"--shard: {shown}; I/N, such as 0/4 to 3/4"):
        parse_shard(text)


def test_options_that_do_not_go_together(job: Callable[..., PreprocessJob]):
    with pytest.raises(MtError) as error:
        preprocess(job("x", shard=(4, 4), partitions=2))
    assert str(error.value).splitlines() == [
        "--shard: 4/4; 0/4 to 3/4",
        "--partitions: deals out documents of the whole input, --shard takes a part of it; only one",
    ]
    with pytest.raises(MtError, match="--partitions: 0; 1 or more"):
        preprocess(job("x", partitions=0))
    with pytest.raises(MtError, match="--shard: 0/0; such as 0/4"):
        preprocess(job("x", shard=(0, 0)))


def test_partitions_deal_out_documents_in_turn(job: Callable[..., PreprocessJob], texts: list[str], tmp_path: Path):
    preprocess(this := job("dealt", partitions=3))
    everything = [*texts, "a short text between two others", *texts]
    dealt = [text for partition in range(3) for text in everything[partition::3]]
    reader = IndexedReader(this.prefix("text"))
    texts_in_order = [bytes(reader.get(i)[:-1].tolist()).decode() for i in range(len(reader))]
    assert texts_in_order == [text for text in dealt if text]
    assert reader.document_count == len(dealt)
    assert sorted(path.name for path in (tmp_path / "dealt").iterdir()) == [
        f"out_text_document.{s}" for s in ("bin", "idx")
    ]


@pytest.mark.slow
def test_a_ray_cluster_makes_the_same_bytes(job: Callable[..., PreprocessJob]):
    pytest.importorskip("ray")
    preprocess(here := job("here"))
    preprocess(there := job("there", engine="ray", workers=1))
    assert outputs(here.prefix("text")) == outputs(there.prefix("text"))
    bad = job("bad", engine="ray", workers=1)
    bad.inputs[0].write_text("{")
    with pytest.raises(MtError, match=r"texts\.jsonl:1: is not JSON"):
        preprocess(bad)
