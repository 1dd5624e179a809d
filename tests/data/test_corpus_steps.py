"""The steps of `mt data openwebtext` and `wikipedia`, one at a time."""

import json
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_data.config import TokenizerConfig
from mt_data.corpus import step as step_module
from mt_data.corpus.clean import CleaningRules, clean
from mt_data.corpus.decontaminate import EvaluationSet, NgramFilter, filter_ngrams, parse_evaluation_set
from mt_data.corpus.duplicates import (
    DuplicateSearch,
    compute_jaccard,
    compute_signature,
    find_duplicates,
    make_shingles,
)
from mt_data.corpus.groups import DocumentForest, group_duplicates, remove_duplicates
from mt_data.corpus.ngrams import NgramIndex, NgramSizes, PassageCut, cut_passages, list_ngrams
from mt_data.corpus.records import add_ids
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.corpus.urls import SiteBlacklist, classify_url, filter_urls
from mt_data.corpus.wikipedia import clean_article, extract_articles

ENGLISH = "The import_library is open to everyone who lives in the town, and most of its books may be taken home. "
FRENCH = "La bibliothèque est ouverte à tous les habitants de la ville, et la plupart des livres peuvent sortir. "


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# Steps


def counting(seen: list[int], stop_at: int | None = None):
    def produce(item: int) -> StepOutput:
        if item == stop_at:
            raise MtError("item", "is bad")
        seen.append(item)
        produced = StepOutput(f"{item}\n".encode())
        produced.counts["items"] = 1
        return produced

    return produce


def test_a_step_goes_on_where_it_was_stopped(tmp_path: Path):
    step, seen = CorpusStep("count", tmp_path / "out", ()), []
    with pytest.raises(MtError, match="item: is bad"):
        run_step(step, range(10), counting(seen, stop_at=6))
    assert not step.output.exists()
    assert run_step(step, range(10), counting(seen)) == {"items": 10}
    assert seen == list(range(10))
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(10))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.report.json"}


def test_an_interrupt_inside_an_item_neither_loses_nor_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, after = CorpusStep("count", tmp_path / "out", ()), step_module._add_output

    def interrupted(state: step_module.StepState, result: StepOutput, size: int) -> step_module.StepState:
        if state.items == 3:  # its data is written, but not yet counted
            raise KeyboardInterrupt
        return after(state, result, size)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_add_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_step(step, range(9), counting([]))
    assert run_step(step, range(9), counting([])) == {"items": 9}
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(9))


@pytest.mark.parametrize("killed_at", range(6))
def test_what_a_kill_leaves_behind_the_journal_is_written_again(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
):
    """The part is longer than the journal says, as when the process dies between the two."""
    monkeypatch.setattr(step_module, "JOURNAL_INTERVAL_S", 0.0)
    step = CorpusStep("count", tmp_path / "out", ())
    with pytest.raises(MtError):
        run_step(step, range(9), counting([], stop_at=killed_at))
    with step.part.open("ab") as part:
        part.write(b"torn li")
    run_step(step, range(9), counting([]))
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(9))


def test_a_finished_step_is_not_run_again_unless_its_input_or_options_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, seen = tmp_path / "in", []
    source.write_text("a")
    run_step(CorpusStep("count", tmp_path / "out", (source,)), range(2), counting(seen))
    assert run_step(CorpusStep("count", tmp_path / "out", (source,)), range(2), counting(seen)) == {"items": 2}
    assert f"count: {tmp_path}/out is already made from these inputs" in capsys.readouterr().err
    assert len(seen) == 2
    run_step(CorpusStep("count", tmp_path / "out", (source,), {"seed": 2}), range(2), counting(seen))
    source.write_text("ab")
    run_step(CorpusStep("count", tmp_path / "out", (source,), {"seed": 2}), range(2), counting(seen))
    assert len(seen) == 6


def test_the_journal_of_another_input_is_not_used(tmp_path: Path):
    source, seen = tmp_path / "in", []
    source.write_text("a")
    with pytest.raises(MtError):
        run_step(CorpusStep("count", tmp_path / "out", (source,)), range(5), counting(seen, stop_at=3))
    source.write_text("ab")
    run_step(CorpusStep("count", tmp_path / "out", (source,)), range(5), counting(seen))
    assert seen == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_bad_line_stops_a_step_or_is_counted(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", {"text": "a"}, {"txt": "b"}, {"text": "c"})
    with pytest.raises(MtError, match=r"in.jsonl:2: has no key 'text', only 'txt'; one JSON object a line; --on-error"):
        clean([source], tmp_path / "out", CleaningRules(language="any", min_tokens=0))
    counts = clean([source], tmp_path / "out", CleaningRules(language="any", min_tokens=0), on_error="skip")
    assert counts == {"records": 3, "kept": 2, "bad lines": 1, "written": 2}
    with pytest.raises(MtError, match=r"inn.jsonl: no such file; did you mean .*in.jsonl\?"):
        clean([tmp_path / "inn.jsonl"], tmp_path / "out", CleaningRules())


# URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://site.org/a-page", "kept"),
        ("https://192.168.7.1:80/x?y=1", "kept"),
        ("http://site.org", "kept"),
        ("http://a", "too short"),
        ("ftp://site.org/page", "malformed"),
        ("http://site.org/a page", "malformed"),
        ("http://-site-/page", "malformed"),
        ("http://www.bad.com/page", "blacklisted site"),
        ("http://bad.co.uk/page", "blacklisted site"),
        ("http://bad.example.com/page", "kept"),
        ("http://images.exact.net/page", "blacklisted site"),
        ("http://exact.org/page", "kept"),
        ("http://site.org/a.PNG?size=1", "media or file"),
        ("http://site.org/a.tar.gz", "media or file"),
        ("http://site.org/a.html?as=.pdf", "kept"),
    ],
)
def test_the_verdict_on_a_url(url: str, expected: str):
    assert classify_url(url, SiteBlacklist(frozenset(("bad", "exact.net")))) == expected


def test_urls_are_written_once_in_their_order(tmp_path: Path):
    (tmp_path / "a.txt").write_text("http://one.org/1\nhttp://two.org/1 \n\n")
    (tmp_path / "b.txt").write_text("http://two.org/1\nhttp://bad.org/1\nhttp://one.org/2\n")
    (tmp_path / "black.txt").write_text("# sites\nBad  # a comment\n")
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    counts = filter_urls(inputs, tmp_path / "black.txt", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().split() == ["http://one.org/1", "http://two.org/1", "http://one.org/2"]
    assert counts == {"urls": 6, "kept": 3, "too short": 1, "seen before": 1, "blacklisted site": 1}
    with pytest.raises(MtError, match="gone.txt: no such file; a list of sites to leave out, one name a line"):
        filter_urls(inputs, tmp_path / "gone.txt", tmp_path / "out.txt")


# Cleaning


def test_texts_are_repaired_and_those_of_other_languages_or_too_short_left_out(tmp_path: Path):
    source = write(
        tmp_path / "in.jsonl",
        {"text": ENGLISH * 20, "url": "long"},
        {"text": FRENCH * 20, "url": "french"},
        {"text": ENGLISH, "url": "short"},
        {"text": f"{ENGLISH * 10}It\u00e2\u20ac\u2122s free.", "url": "broken"},
    )
    counts = clean([source], tmp_path / "out.jsonl", CleaningRules(min_tokens=100))
    records = read(tmp_path / "out.jsonl")
    assert [record["url"] for record in records] == ["long", "broken"]
    assert str(records[1]["text"]).endswith("It's free.")
    assert counts == {"records": 4, "kept": 1, "other language": 1, "too short": 1, "repaired": 1, "written": 2}


def test_length_is_counted_in_tokens_of_a_tokenizer(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", {"text": "word " * 30}, {"text": "word " * 10})
    rules = CleaningRules(language="any", min_tokens=100, tokenizer=TokenizerConfig(type="bytes"))
    assert clean([source], tmp_path / "out.jsonl", rules)["too short"] == 1


def test_workers_change_nothing(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", *({"text": f"{ENGLISH * 9} {i}"} for i in range(50)))
    rules = CleaningRules(min_tokens=10)
    clean([source], tmp_path / "one", rules)
    clean([source], tmp_path / "two", rules, workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_language_that_is_not_known(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", {"text": "a"})
    with pytest.raises(MtError, match="--language: 'english'; any, ace, af, am"):
        clean([source], tmp_path / "out", CleaningRules(language="english"))


# Near-duplicates


def test_shingles_and_their_similarity():
    assert make_shingles("abcdefg") == {"abcde", "bcdef"}  # the last is left out
    a, b = set("abcd"), set("cdefgh")
    assert [compute_jaccard(a, b, d) for d in ("union", "min", "max")] == [2 / 8, 2 / 4, 2 / 6]
    assert compute_jaccard(set(), a) == 0


def test_signatures_estimate_the_similarity():
    a, b = ENGLISH * 3 + "x" * 40 + FRENCH, ENGLISH * 3 + "y" * 40 + FRENCH
    equal = compute_signature(a, seeds=1000, seed=1) == compute_signature(b, seeds=1000, seed=1)
    assert equal.mean() == pytest.approx(
        compute_jaccard(make_shingles(a), make_shingles(b)), abs=0.05
    )  # five standard deviations


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    other = "Quite another text, on ships and the sea, with nothing in common but the odd letter here and there."
    records = [
        {"url": "a", "text": ENGLISH * 2 + FRENCH},
        {"url": "b", "text": other},
        {"url": "a-copy", "text": ENGLISH * 2 + FRENCH},
        {"url": "a-changed", "text": ENGLISH * 2 + FRENCH.replace("ville", "cité")},
        {"url": "empty", "text": ""},
        {"url": "empty too", "text": ""},
    ]
    return write(tmp_path / "copies.jsonl", *records)


def test_duplicates_are_found_grouped_and_removed(copies: Path, tmp_path: Path):
    counts = find_duplicates([copies], tmp_path / "found", DuplicateSearch(rounds=-1))
    assert counts["records"] == 6
    pairs = {(main, *other) for line in read(tmp_path / "found") for main, others in line.items() for other in others}
    assert pairs >= {("a", "a-copy"), ("a", "a-changed")}
    assert not any(name.startswith(("b", "empty")) for pair in pairs for name in pair)
    assert group_duplicates(tmp_path / "found", tmp_path / "groups") == {"groups": 1, "documents": 3}
    assert read(tmp_path / "groups") == [{"0": ["a", "a-copy", "a-changed"]}]
    counts = remove_duplicates([copies], tmp_path / "groups", tmp_path / "out")
    assert counts == {"records": 6, "kept": 4, "duplicates": 2, "written": 4}
    assert [record["url"] for record in read(tmp_path / "out")] == ["a", "b", "empty", "empty too"]


def test_input_in_several_files_is_one_corpus(copies: Path, tmp_path: Path):
    lines = copies.read_text().splitlines(keepends=True)
    (tmp_path / "1").write_text("".join(lines[:2]))
    (tmp_path / "2").write_text("".join(lines[2:]).rstrip("\n"))
    find_duplicates([copies], tmp_path / "whole", DuplicateSearch(), workers=2)
    find_duplicates([tmp_path / "1", tmp_path / "2"], tmp_path / "parts", DuplicateSearch())
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes() != b""


def test_groups_are_transitive():
    forest = DocumentForest()
    joined = [forest.link(*pair) for pair in [("a", "b"), ("c", "d"), ("d", "b"), ("a", "c"), ("e", "e")]]
    assert joined == [True, True, True, False, False]
    assert forest.groups() == [["a", "b", "c", "d"]]


def test_what_the_duplicate_steps_refuse(copies: Path, tmp_path: Path):
    with pytest.raises(MtError, match="--num-seeds: 100 is no multiple of --num-bands 7; one that is"):
        find_duplicates([copies], tmp_path / "out", DuplicateSearch(bands=7))
    copies.rename(tmp_path / "copies.jsonl.gz")
    with pytest.raises(MtError, match="is compressed, but its texts are read in any order; decompress it first"):
        find_duplicates([tmp_path / "copies.jsonl.gz"], tmp_path / "out", DuplicateSearch())
    bad = write(tmp_path / "bad", {"a": 1})
    with pytest.raises(MtError, match="bad:1: is no line of duplicates"):
        group_duplicates(bad, tmp_path / "out")
    with pytest.raises(MtError, match="bad:1: is no group"):
        remove_duplicates([bad], bad, tmp_path / "out")


# Decontamination

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
    task = write(tmp_path / "quiz.jsonl", {"question": LEAK}, {"question": "too short"})
    common = "these words stand in the corpus again and again so they are common"
    (tmp_path / "plain.txt").write_text(f"{common}\n")
    corpus = write(
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
    records = read(tmp_path / "out")
    assert [record["url"] for record in records[:3]] == ["leaks", "leaks", "clean"]
    assert [record["split_id"] for record in records[:3]] == [
        "quiz-plain-0000000001-0000",
        "quiz-plain-0000000001-0001",
        "quiz-plain-0000000002-0000",
    ]
    assert not any("quick brown" in str(record["text"]) for record in records)


def test_a_text_in_too_many_pieces_is_dropped_whole(tmp_path: Path):
    task = write(tmp_path / "quiz.jsonl", {"text": LEAK})
    corpus = write(tmp_path / "in.jsonl", {"text": f"{FILLER * 2}{LEAK}. " * 5 + FILLER * 2})
    counts = filter_ngrams([corpus], tmp_path / "out", [EvaluationSet(task)], NgramFilter(cut=PassageCut(most=5)))
    assert counts["dropped whole"] == 1
    assert (tmp_path / "out").read_bytes() == b""


def test_a_task_without_long_texts(tmp_path: Path):
    task = write(tmp_path / "quiz.jsonl", {"text": "short"})
    with pytest.raises(MtError, match="quiz.jsonl: no text of at least 8 words; evaluation sets with longer texts"):
        filter_ngrams([task], tmp_path / "out", [EvaluationSet(task)], NgramFilter())


def test_a_task_names_a_file_and_its_key(tmp_path: Path):
    assert parse_evaluation_set("a.jsonl:question") == EvaluationSet(Path("a.jsonl"), "question")
    assert parse_evaluation_set("a.jsonl") == EvaluationSet(Path("a.jsonl"), "text")


# Ids


def test_each_record_gets_an_id(tmp_path: Path):
    inputs = [write(tmp_path / name, {"text": name}, {"text": name}) for name in "ab"]
    add_ids(inputs, tmp_path / "out", "web")
    assert [record["adlr_id"] for record in read(tmp_path / "out")] == [f"web-000000000{n}" for n in (1, 2, 3, 4)]


# Wikipedia


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    (tmp_path / "dump" / "AA").mkdir(parents=True)
    article = {"id": "7", "url": "https://en.wikipedia.org/?curid=7", "title": "Salt", "text": "Salt is a mineral."}
    write(tmp_path / "dump" / "AA" / "wiki_01", article, {**article, "id": "8", "text": ""})
    with atomic_file(tmp_path / "dump" / "AA" / "wiki_00", "w") as file:
        file.write(
            '<doc id="5" url="https://en.wikipedia.org/?curid=5" title="Tom &amp; &quot;Jerry&quot;">\n'
            'Tom & "Jerry"\n\nIt began in 1940.&lt;br&gt;\n\n\n\nIt has 161 parts.\n\n</doc>\n'
        )
    return tmp_path / "dump"


def test_articles_of_both_forms(dump: Path, tmp_path: Path):
    counts = extract_articles([dump], tmp_path / "out.jsonl")
    assert counts == {"articles": 3, "kept": 2, "too short": 1, "written": 2}
    url = "https://en.wikipedia.org/?curid="
    assert read(tmp_path / "out.jsonl") == [
        {"id": "5", "url": f"{url}5", "title": 'Tom & "Jerry"', "text": "It began in 1940.\n\nIt has 161 parts."},
        {"id": "7", "url": f"{url}7", "title": "Salt", "text": "Salt is a mineral."},
    ]
    assert extract_articles([dump], tmp_path / "long.jsonl", min_characters=20)["kept"] == 1


def test_the_title_is_taken_off_only_where_it_stands_alone():
    assert clean_article("Salt is a mineral.", "Salt") == "Salt is a mineral."
    assert clean_article("Salt\n\nA mineral.<ref name=x />", "Salt") == "A mineral."


def test_dumps_that_are_none(dump: Path, tmp_path: Path):
    with pytest.raises(MtError, match=r"dumb: no such file or folder; did you mean .*dump\?"):
        extract_articles([tmp_path / "dumb"], tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(MtError, match="none: holds no files; the folder that WikiExtractor wrote"):
        extract_articles([tmp_path / "none"], tmp_path / "out")
    for content, message in [
        ("<mediawiki>\n", ":1: is neither JSON nor inside a <doc>: '<mediawiki>'; a file that WikiExtractor wrote"),
        ('<doc id="1" title="A">\nA\n', ":1: has a <doc> that does not end; extract the dump again"),
        ('<doc id="1">\nA\n</doc>\n', ":1: has a <doc> without a title; a file that WikiExtractor wrote"),
        ('{"title": "A"}\n', ":1: has no key 'text', only 'title'"),
    ]:
        (tmp_path / "wiki_00").write_text(content)
        with pytest.raises(MtError, match=message):
            extract_articles([tmp_path / "wiki_00"], tmp_path / "out")
