"""Messages for what is missing on the machine, dies, or does not fit, and the lines that tell how a job is doing."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_data.config import GPTData, TokenizerConfig
from mt_data.corpus.clean import CleaningRules, clean, clean_record
from mt_data.corpus.duplicates import compute_signature
from mt_data.preprocess import encoding
from mt_data.preprocess.encoding import EncodingOptions, encode_values
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.report import PreprocessReport, show_progress
from mt_data.preprocess.run import preprocess
from mt_data.preprocess.sentences import choose_splitter
from mt_data.text_io.ordered_map import DEATHS_ALLOWED
from mt_data.text_io.ray_map import ray_map
from mt_data.tokenizers import build_tokenizer
from mt_data.tokenizers.fast_bpe import choose_encode
from mt_data.tokenizers.file_free import BytesTokenizer

RULES = CleaningRules(min_tokens=1)


def uninstall(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make `import name` fail as it does where the package is not installed."""
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write(tmp_path / "some.model", ""))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "pyarrow")
    path = write(tmp_path / "in.parquet", "PAR1")
    job = PreprocessJob((path,), str(tmp_path / "out"), EncodingOptions(TokenizerConfig(type="bytes")))
    with pytest.raises(
        MtError, match=r"in.parquet: needs 'pyarrow', which is not installed; pip install 'mt-data\[parq"
    ):
        preprocess(job)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("type_", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_models_without_the_library(type_: str, model: str, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "sentencepiece")
    message = rf"{type_}: needs 'sentencepiece', which is not installed; pip install 'mt-data\[sentencepiece\]'"
    with pytest.raises(MtError, match=message):
        build_tokenizer(TokenizerConfig(type=type_, model=model))


def test_gpt2_without_tiktoken_runs_on_the_tokenizers_library(gpt2: TokenizerConfig, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "tiktoken")
    tokenizer = build_tokenizer(gpt2)
    assert choose_encode(tokenizer, gpt2) == tokenizer.encode_batch


@pytest.mark.parametrize("missing", [("nltk",), ("nltk", "sentencex")])
def test_sentences_without_nltk(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    for name in missing:
        uninstall(monkeypatch, name)
    with pytest.raises(
        MtError, match=r"--split-sentences: needs nltk, which is not installed; pip install 'mt-data\[s"
    ):
        choose_splitter()


def test_sentences_with_neither_punkt_data_nor_sentencex(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nltk.data.path", [])
    uninstall(monkeypatch, "sentencex")
    with pytest.raises(
        MtError, match="--split-sentences: needs sentencex, which is not installed; pip install 'mt-data"
    ):
        choose_splitter()


@pytest.mark.parametrize("library", ["ftfy", "py3langid"])
def test_cleaning_without_its_libraries(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, library)
    path = write(tmp_path / "in.jsonl", '{"text": "a b"}\n')
    message = rf"mt data openwebtext clean: needs '{library}', which is not installed; pip install 'mt-data\[corpus\]'"
    with pytest.raises(MtError, match=message):
        clean([path], tmp_path / "out", RULES)
    with pytest.raises(MtError, match=message):
        clean_record(RULES, {"text": "a b"}, 0)
    assert not (tmp_path / "out").exists()


def test_near_duplicates_without_datasketch(monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "datasketch")
    with pytest.raises(
        MtError,
        match=r"mt data openwebtext find-duplicates: needs 'datasketch', which is not installed; .*'mt-data\[corpus\]'",
    ):
        compute_signature("some text", seeds=4, seed=1)


def test_the_ray_engine_without_ray(monkeypatch: pytest.MonkeyPatch):
    uninstall(monkeypatch, "ray")
    with pytest.raises(
        MtError, match=r"--engine ray: needs 'ray', which is not installed; pip install 'mt-data\[ray\]'"
    ):
        next(ray_map(abs, [1], workers=1))


def die_once(at: int, marker: Path, item: int) -> int:  # runs in a Ray worker
    if item == at and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item * 2


def die_at(bad: int, marker: Path, item: int) -> int:  # runs in a Ray worker
    if item == bad:
        with marker.open("a") as file:
            file.write("died\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return item * 2


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A local cluster of one worker that finds this module."""
    ray = pytest.importorskip("ray")
    paths = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=paths)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_what_a_killed_ray_worker_had_is_done_again(tmp_path: Path):
    results = list(ray_map(partial(die_once, 2, tmp_path / "died"), range(6), workers=1))
    assert results == [0, 2, 4, 6, 8, 10]
    assert (tmp_path / "died").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_ray_worker_that_dies_each_time(tmp_path: Path):
    results = ray_map(partial(die_at, 1, tmp_path / "deaths"), range(3), workers=1)
    assert next(results) == 0
    with pytest.raises(
        MtError, match="a Ray worker: was killed, 3 times in a row; its machine may be out of memory: run"
    ):
        next(results)
    assert (tmp_path / "deaths").read_text().count("died") == DEATHS_ALLOWED


@pytest.mark.parametrize(("ids", "wrong"), [([5, 70_000], 70_000), ([-3, 9], -3)])
def test_an_id_that_the_files_cannot_hold(ids: list[int], wrong: int, monkeypatch: pytest.MonkeyPatch):
    """A tokenizer that gives ids beyond its own vocabulary, as one with added tokens may."""

    class Liar(BytesTokenizer):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return [ids for _ in texts]

    liar: Tokenizer = Liar(TokenizerConfig(type="bytes"))
    monkeypatch.setattr(encoding, "get_tokenizer", lambda _: liar)
    message = (
        f"tokenizer: token id {wrong} does not fit into uint16, which 257 ids are stored in; ids 0 to 65535; "
        "the tokenizer's vocab_size is too small for its ids"
    )
    with pytest.raises(MtError, match=message):
        encode_values(["a text"], EncodingOptions(TokenizerConfig(type="bytes"), keys=(f"key of {wrong}",)))


def test_a_line_every_so_many_documents(capsys: pytest.CaptureFixture[str]):
    report = PreprocessReport(documents=10, tokens={"text": 50})  # of an earlier run
    with show_progress(report, 1000, 4) as show:
        for documents in (11, 12, 13, 15, 16, 25):
            report.documents = documents
            report.tokens["text"] = 5 * documents
            show()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"preprocess: {n} documents" for n in (12, 16, 25)]
    form = r"preprocess: 25 documents, [\d,]+/s, [\d,]+ tokens/s, [\d.]+ MB/s"
    assert re.fullmatch(form, lines[-1])


def test_the_command_prints_lines_at_the_interval(tmp_path: Path):
    path = write(tmp_path / "in.jsonl", '{"text": "abc"}\n' * 100)
    words = ["--input", path, "--tokenizer-type", "bytes", "--output-prefix", tmp_path / "out", "--log-interval", "100"]
    ran = subprocess.run([sys.executable, "-m", "mt_cli", "data", "preprocess", *words], capture_output=True, text=True)
    assert ran.returncode == 0
    assert re.fullmatch(r"preprocess: 100 documents, [\d,]+/s, [\d,]+ tokens/s, [\d.]+ MB/s\n", ran.stderr)
    none = subprocess.run(
        [sys.executable, "-m", "mt_cli", "data", "preprocess", *words[:-1], "0"], capture_output=True, text=True
    )
    assert none.returncode == 2
    assert "--log-interval" in none.stderr


def test_a_missing_tokenizer_of_kinds_that_need_one_is_told_by_their_name(tmp_path: Path):
    from mt_data.config import SFTData
    from mt_data.config.rules import data_problems

    path = write(tmp_path / "chat.jsonl", json.dumps({"messages": []}))
    (problem,) = data_problems(SFTData(paths=(str(path),), seq_length=4))
    assert str(problem) == "data.tokenizer: is not given; sft data needs one, the one that made the corpora"
    assert list(data_problems(GPTData(seq_length=4))) == []
