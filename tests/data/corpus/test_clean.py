"""`mt data openwebtext clean`."""

from pathlib import Path

import pytest

from data.corpus.conftest import read_records, write_records
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.corpus.clean import CleaningRules, clean

ENGLISH = "The library is open to everyone who lives in the town, and most of its books may be taken home. "
FRENCH = "La bibliothèque est ouverte à tous les habitants de la ville, et la plupart des livres peuvent sortir. "


def test_texts_are_repaired_and_those_of_other_languages_or_too_short_left_out(tmp_path: Path):
    source = write_records(
        tmp_path / "in.jsonl",
        {"text": ENGLISH * 20, "url": "long"},
        {"text": FRENCH * 20, "url": "french"},
        {"text": ENGLISH, "url": "short"},
        {"text": f"{ENGLISH * 10}It\u00e2\u20ac\u2122s free.", "url": "broken"},
    )
    counts = clean([source], tmp_path / "out.jsonl", CleaningRules(min_tokens=100))
    records = read_records(tmp_path / "out.jsonl")
    assert [record["url"] for record in records] == ["long", "broken"]
    assert str(records[1]["text"]).endswith("It's free.")
    assert counts == {"records": 4, "kept": 1, "other language": 1, "too short": 1, "repaired": 1, "written": 2}


def test_length_is_counted_in_tokens_of_a_tokenizer(tmp_path: Path):
    source = write_records(tmp_path / "in.jsonl", {"text": "word " * 30}, {"text": "word " * 10})
    rules = CleaningRules(language="any", min_tokens=100, tokenizer=TokenizerConfig(type="bytes"))
    assert clean([source], tmp_path / "out.jsonl", rules)["too short"] == 1


def test_workers_change_nothing(tmp_path: Path):
    source = write_records(tmp_path / "in.jsonl", *({"text": f"{ENGLISH * 9} {i}"} for i in range(50)))
    rules = CleaningRules(min_tokens=10)
    clean([source], tmp_path / "one", rules)
    clean([source], tmp_path / "two", rules, workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_language_that_is_not_known(tmp_path: Path):
    source = write_records(tmp_path / "in.jsonl", {"text": "a"})
    with pytest.raises(MtError, match="--language: 'english'; any, ace, af, am"):
        clean([source], tmp_path / "out", CleaningRules(language="english"))
