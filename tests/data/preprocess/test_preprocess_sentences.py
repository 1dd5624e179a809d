"""`--split-sentences`: one pass, a record of what did it, and white space where it is asked for."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.indexed.reader import IndexedReader
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess
from mt_data.preprocess.sentences import SLICE_CHARACTERS, SentenceSplitting, choose_splitter, split_sentences

pytestmark = pytest.mark.skipif(
    not (find_spec("sentencex") and find_spec("nltk")), reason="sentencex or nltk is not installed"
)

TEXT = "Dr. Smith went home.  He slept.\n\nThen 3.14 was it?\nYes! \n"


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> Path:
    """nltk's data for English, trained here in the form that nltk downloads it."""
    from nltk import data
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.parent.mkdir(parents=True)
    monkeypatch.setattr(data, "path", [str(tmp_path / "nltk")])  # nltk writes nowhere else
    trainer = PunktTrainer("\n".join(texts) + " Dr. Smith saw Dr. Jones and Dr. Brown. " * 30)
    save_punkt_params(trainer.get_params(), dir=str(folder))
    return folder


@pytest.fixture
def no_punkt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])


@pytest.mark.usefixtures("no_punkt")
def test_sentencex_without_punkt_data():
    splitting = choose_splitter()
    assert splitting.splitter == "sentencex"
    assert split_sentences(TEXT, splitting) == ["Dr. Smith went home.", "He slept.", "Then 3.14 was it?", "Yes!"]
    assert split_sentences(" \n", splitting) == []
    assert split_sentences("\n One. ", splitting) == ["One."]


@pytest.mark.usefixtures("punkt")
def test_punkt_where_its_data_is_installed():
    splitting = choose_splitter()
    assert splitting.splitter == "nltk punkt"
    assert split_sentences(TEXT, splitting) == ["Dr. Smith went home.", "He slept.", "Then 3.14 was it?", "Yes!"]


@pytest.mark.parametrize("splitter", ["nltk punkt", "sentencex"])
def test_white_space_stays_with_the_sentence_before(splitter: str, request: pytest.FixtureRequest):
    request.getfixturevalue("punkt" if splitter == "nltk punkt" else "no_punkt")
    splitting = choose_splitter(keep_newlines=True)
    assert splitting.splitter == splitter
    kept = ["Dr. Smith went home.  ", "He slept.\n\n", "Then 3.14 was it?\n", "Yes! \n"]
    assert split_sentences(TEXT, splitting) == kept


@pytest.mark.usefixtures("no_punkt")
def test_real_text_comes_back_whole(texts: list[str]):
    text = "\n\n".join(texts).strip()
    long = text * (SLICE_CHARACTERS // len(text) + 1) + " Ça va? Ünïcode — 日本。 Yes."
    kept = split_sentences(long, SentenceSplitting("sentencex", "", "english", keep_newlines=True))
    assert "".join(kept) == long
    assert len(kept) > 1000


@pytest.mark.usefixtures("no_punkt")
def test_a_language_that_nothing_here_knows():
    with pytest.raises(
        MtError, match="--lang: no punkt data for 'klingon' is installed, and sentencex has no such name"
    ):
        choose_splitter("klingon")


@pytest.mark.usefixtures("no_punkt")
def test_one_pass_makes_the_pair_and_says_how(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "", "One.")))
    encoding = EncodingOptions(TokenizerConfig(type="bytes"), append_eod=True, splitting=choose_splitter())
    report = preprocess(job := PreprocessJob((path,), str(tmp_path / "out"), encoding))
    reader = IndexedReader(tmp_path / "out_text_sentence")
    assert reader.lengths.tolist() == [20, 9, 17, 5, 5]  # the end of document counts for the last sentence
    assert reader.get(3).tolist() == [*b"Yes!", 256]
    assert reader.documents.tolist() == [0, 4, 4, 5]
    assert report.sequences == {"text": 5}
    record = json.loads((tmp_path / "out_text_sentence.json").read_text())
    assert record["splitter"] == "sentencex"
    assert record["language"] == "english"
    assert sorted(p.name for p in tmp_path.glob("out*")) == [f"out_text_sentence.{s}" for s in ("bin", "idx", "json")]
    preprocess(replace(job, encoding=replace(encoding, splitting=None)))
    assert len(IndexedReader(tmp_path / "out_text_document")) == 2
