"""`mt data openwebtext filter-ngrams`."""

from pathlib import Path

import pytest

from data.corpus.conftest import read_records, write_records
from mt_core.errors import MtError
from mt_data.corpus.decontaminate import EvaluationSet, NgramFilter, filter_ngrams, parse_evaluation_set
from mt_data.corpus.ngrams import NgramIndex, NgramSizes, PassageCut, cut_passages, list_ngrams

SIZES = NgramSizes()
LEAK = "the quick brown fox jumps over the lazy dog while seven wizards watch"
FILLER = "Many people came to see it. " * 20


def test_the_ngrams_of_a_text():
    words = LEAK.split()
    assert list(list_ngrams(" ".join(words[:7]), SIZES)) == []
    assert list(list_ngrams(" ".join(words[:9]), SIZES)) == [" ".join(words[:9])]
    longer = [*words, "again", "today"]
    assert list(list_ngrams("The Quick—brown " + " ".join(longer[3:]), SIZES)) == [
        " ".join(longer[at : at + 13]) for at in range(3)
    ]


def test_a_passage_is_cut_with_its_surroundings():
    index = NgramIndex({LEAK: ("task",)}, SIZES)
    before, after = f"{'Left side. ' * 40}", f". {'Right side. ' * 40}"
    kept, matches = cut_passages(f"{before}{LEAK.title()}{after}", index, PassageCut())
    assert matches == [LEAK]
    left, right = kept
    assert before.startswith(left)
    assert left.endswith(".")
    assert 199 <= len(before) - len(left) <= 200 + len("Left side. ")
    assert after.endswith(right)
    assert 200 <= len(after) - len(right) <= 200 + len("Right side. ")


def test_short_pieces_are_dropped_and_a_clean_text_stays_whole():
    index = NgramIndex({LEAK: ("task",)}, SIZES)
    assert cut_passages(f"Short. {LEAK}. Short. {FILLER}", index, PassageCut())[0] == [
        (f". Short. {FILLER}")[200:].partition(".")[2]
    ]
    assert cut_passages(f"It is. {LEAK}.", index, PassageCut()) == ([], [LEAK])
    assert cut_passages("Clean.", index, PassageCut()) == (["Clean."], [])


def test_shorter_ngrams_are_found_anywhere_in_a_text_of_more_than_the_longest():
    key = " ".join(LEAK.split()[:8])
    index = NgramIndex({key: ("task",)}, SIZES)
    words = [*("word" for _ in range(6)), *key.split()]
    match = index.first_match(" ".join(words))
    assert match is not None
    assert (match.start, match.key) == (6 * 5, key)
    assert index.first_match(key) is None  # fewer than 13 words are never tested


def test_passages_of_a_task_leave_the_corpus(tmp_path: Path):
    task = write_records(tmp_path / "quiz.ndjson", {"question": LEAK}, {"question": "too short"})
    common = "these words stand in the corpus again and again so they are common"
    (tmp_path / "plain.txt").write_text(f"{common}\n")
    corpus = write_records(
        tmp_path / "in.jsonl",
        {"text": f"{FILLER}{LEAK}. {FILLER}", "url": "leaks"},
        {"text": f"{FILLER}", "url": "clean"},
        {"text": LEAK, "url": "nothing else"},
        *({"text": f"{common}. {i}", "url": f"common {i}"} for i in range(10)),
    )
    tasks = [EvaluationSet(task, "question"), EvaluationSet(tmp_path / "plain.txt")]
    counts = filter_ngrams([corpus], tmp_path / "out", tasks, NgramFilter())
    assert counts == {
        **{"records": 13, "cut": 1, "untouched": 11, "nothing left": 1, "written": 13},
        **{"n-grams": 2, "common n-grams": 1},
    }
    records = read_records(tmp_path / "out")
    assert [record["url"] for record in records[:3]] == ["leaks", "leaks", "clean"]
    assert [record["split_id"] for record in records[:3]] == [
        "quiz-plain-0000000001-0000",
        "quiz-plain-0000000001-0001",
        "quiz-plain-0000000002-0000",
    ]
    assert not any("quick brown" in str(record["text"]) for record in records)


def test_a_text_in_too_many_pieces_is_dropped_whole(tmp_path: Path):
    task = write_records(tmp_path / "quiz.jsonl", {"text": LEAK})
    corpus = write_records(tmp_path / "in.jsonl", {"text": f"{FILLER * 2}{LEAK}. " * 5 + FILLER * 2})
    counts = filter_ngrams([corpus], tmp_path / "out", [EvaluationSet(task)], NgramFilter(cut=PassageCut(most=5)))
    assert counts["dropped whole"] == 1
    assert (tmp_path / "out").read_bytes() == b""


def test_a_task_without_long_texts(tmp_path: Path):
    task = write_records(tmp_path / "quiz.jsonl", {"text": "short"})
    with pytest.raises(MtError, match="quiz.jsonl: no text of at least 8 words; evaluation sets with longer texts"):
        filter_ngrams([task], tmp_path / "out", [EvaluationSet(task)], NgramFilter())


def test_a_task_names_a_file_and_its_key(tmp_path: Path):
    assert parse_evaluation_set("a.jsonl:question") == EvaluationSet(Path("a.jsonl"), "question")
    assert parse_evaluation_set("a.jsonl") == EvaluationSet(Path("a.jsonl"), "text")
