"""Scored files: lines with their scores, texts without any, a cache by hash, and what cannot be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bad_inputs import fill_disk
from eval.detoxify.perspective_server import KEY, start_perspective
from mt_core.errors import MtError
from mt_eval.detoxify.classifier import LocalClassifier, make_pipeline, read_labelled
from mt_eval.detoxify.filter import filter_files
from mt_eval.detoxify.perspective import Perspective
from mt_eval.detoxify.score import score_file
from mt_eval.detoxify.score_cache import CachedScorer, open_cache


class WordScorer:
    """Scores a text by its number, which is all there is of it; remembers what it was asked."""

    name = "words"

    def __init__(self, identity="words", batch_size=2):
        self.identity, self.batch_size, self.asked = identity, batch_size, []

    def score(self, texts):
        self.asked += texts
        return [{"toxicity": int(text) / 10} if text.isdecimal() else "is no number" for text in texts]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_keeps_what_it_has_and_gets_scores(tmp_path):
    source = write(
        tmp_path / "a.jsonl", {"id": 7, "text": "3"}, {"text": "x", "scores": {"toxicity": 1}}, {"text": " "}
    )
    counts = score_file(source, tmp_path / "b.jsonl", WordScorer())
    assert read(tmp_path / "b.jsonl") == [
        {"id": 7, "text": "3", "scores": {"toxicity": 0.3}, "scorer": "words"},
        {"text": "x", "scores": None, "unscored": "is no number", "scorer": "words"},
        {"text": " ", "scores": None, "unscored": "is blank", "scorer": "words"},
    ]
    assert counts == {"texts": 3, "scored": 1, "unscored": 2}


def test_no_text_is_scored_twice_now_or_later(tmp_path):
    source = write(tmp_path / "a.jsonl", *({"text": text} for text in "12x13"))
    first, again, other = WordScorer(), WordScorer(), WordScorer("others")
    cache = tmp_path / "cache.jsonl"
    score_file(source, tmp_path / "b.jsonl", first, cache=cache)
    score_file(source, tmp_path / "c.jsonl", again, cache=cache)
    assert (first.asked, again.asked) == (["1", "2", "x", "3"], [])
    assert read(tmp_path / "b.jsonl") == read(tmp_path / "c.jsonl")
    score_file(source, tmp_path / "d.jsonl", other, cache=cache)
    assert other.asked == first.asked
    assert "1" not in cache.read_text().split()


def test_a_half_line_of_the_cache_is_cut_off_and_a_strange_one_refused(tmp_path):
    source, cache = write(tmp_path / "a.jsonl", {"text": "1"}, {"text": "2"}), tmp_path / "cache.jsonl"
    score_file(source, tmp_path / "b.jsonl", WordScorer(), cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-9])
    scorer = WordScorer()
    score_file(source, tmp_path / "c.jsonl", scorer, cache=cache)
    assert scorer.asked == ["2"]
    assert cache.read_bytes() == whole
    cache.write_text('{"text": "1"}\n')
    with pytest.raises(
        MtError, match=r"cache.jsonl:1: is no line of scores \('scores'\); a file that mt task detoxify"
    ):
        score_file(source, tmp_path / "d.jsonl", scorer, cache=cache)


def test_a_cache_serves_one_process_at_a_time(tmp_path):
    with open_cache(tmp_path / "cache.jsonl") as file:
        assert file is not None
        with pytest.raises(MtError, match="cache.jsonl is used by another process"), open_cache(Path(file.name)):
            pass
    with pytest.raises(MtError, match="--cache: .* is a directory"), open_cache(tmp_path):
        pass


def test_scoring_goes_on_where_the_server_gave_up(tmp_path):
    source = write(tmp_path / "a.jsonl", *({"text": f"rude {number}"} for number in range(6)))
    with start_perspective() as server:
        options = {"url": server.url, "connections": 2, "attempts": 1, "requests_per_second": 1000.0}
        server.faults = [200, 200, 200, 503]
        with pytest.raises(MtError, match="no score after 1 attempts"):
            score_file(source, tmp_path / "b.jsonl", Perspective(KEY, **options))
        assert not (tmp_path / "b.jsonl").exists()
        server.texts.clear()
        score_file(source, tmp_path / "b.jsonl", Perspective(KEY, **options))
    assert sorted(server.texts) == [f"rude {number}" for number in range(2, 6)]
    assert [line["text"] for line in read(tmp_path / "b.jsonl")] == [f"rude {number}" for number in range(6)]


def test_what_is_no_text_is_named_all_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n{"texts": "1"}\nnothing\n\n{"text": 1}\n')
    with pytest.raises(MtError) as error:
        score_file(path, tmp_path / "b.jsonl", WordScorer())
    assert [problem.where for problem in error.value.problems] == [f"{path}:{line}" for line in (2, 3, 5)]
    assert "has no key 'text', only 'texts'" in str(error.value)
    with pytest.raises(MtError, match="none.jsonl: no such file"):
        score_file(tmp_path / "none.jsonl", tmp_path / "b.jsonl", WordScorer())


def test_a_full_disk_is_one_line_and_the_cache_stays_good(tmp_path, small_disk):
    source = write(tmp_path / "a.jsonl", *({"text": str(number), "rest": "x" * 999} for number in range(10)))
    fill_disk(small_disk, left=4096)
    with pytest.raises(MtError, match="b.jsonl: the disk is full; free some space and run again"):
        score_file(source, small_disk / "b.jsonl", WordScorer())
    (small_disk / "filling").unlink()
    score_file(source, small_disk / "b.jsonl", WordScorer())
    assert len(read(small_disk / "b.jsonl")) == 10
    fill_disk(small_disk)
    with pytest.raises(MtError, match="cache.jsonl: the disk is full"):
        score_file(source, tmp_path / "c.jsonl", WordScorer(), cache=small_disk / "cache.jsonl")
    (small_disk / "filling").unlink()
    score_file(source, tmp_path / "c.jsonl", WordScorer(), cache=small_disk / "cache.jsonl")


def scored(*scores):
    return [{"text": f"text {n}", "scores": None if s is None else {"toxicity": s}} for n, s in enumerate(scores)]


def test_the_least_toxic_half_is_kept_in_a_new_order(tmp_path):
    first = write(tmp_path / "a.jsonl", *scored(0.9, 0.1, None, 0.5, 0.5, 0.2, 1.0))
    counts = filter_files([first], tmp_path / "b.jsonl", keep=0.5, seed=1)
    kept = read(tmp_path / "b.jsonl")
    assert sorted(line["text"] for line in kept) == ["text 1", "text 3", "text 5"]
    assert counts == {
        "texts": 7,
        "unscored": 1,
        "kept": 3,
        "mean toxicity": pytest.approx(3.2 / 6),
        "mean toxicity of kept": pytest.approx(0.8 / 3),
        "highest of kept": 0.5,
    }
    filter_files([first], tmp_path / "c.jsonl", keep=0.5, seed=1)
    assert read(tmp_path / "c.jsonl") == kept
    orders = set()
    for seed in range(6):
        filter_files([first], tmp_path / "d.jsonl", keep=1.0, seed=seed)
        orders.add((tmp_path / "d.jsonl").read_text())
    assert len(orders) > 1


def test_lines_without_scores_are_refused_and_so_is_keeping_none(tmp_path):
    lines = [{"text": "a"}, {"text": "b", "scores": {}}, {"text": "c", "scores": {"toxicity": 2}}]
    path = write(tmp_path / "a.jsonl", *lines, *scored(0.5, True))
    with pytest.raises(MtError) as error:
        filter_files([path], tmp_path / "b.jsonl", keep=0.5, seed=0)
    assert [problem.where for problem in error.value.problems] == [f"{path}:{line}" for line in (1, 2, 3, 5)]
    assert "has no scores with a toxicity from 0 to 1" in str(error.value)
    path = write(tmp_path / "a.jsonl", *scored(0.5, None))
    with pytest.raises(MtError, match="0.1 of 1 scored texts is none; more texts, or a larger --keep"):
        filter_files([path], tmp_path / "b.jsonl", keep=0.1, seed=0)
    assert not (tmp_path / "b.jsonl").exists()


def test_the_local_classifier_tells_its_own_sentences_from_each_other():
    from sklearn.model_selection import cross_val_predict

    from mt_eval import detoxify

    raw = (Path(detoxify.__file__).parent / "sentences.jsonl").read_text("utf-8")
    texts, labels = read_labelled(raw, Path("sentences.jsonl"))
    guessed = cross_val_predict(make_pipeline(), texts, labels, cv=5)
    assert (len(texts), sum(labels)) == (170, 60)
    assert sum(guessed == labels) / len(labels) > 0.85


def test_the_local_classifier_is_the_same_each_time_and_unsure_of_what_it_has_not_read():
    first, second = LocalClassifier(), LocalClassifier()
    texts = ["You are an idiot.", "The train leaves at nine.", "xqzt rrv ppl"]
    scores = [each["toxicity"] for each in first.score(texts)]
    assert first.identity == second.identity
    assert scores == [each["toxicity"] for each in second.score(texts)]
    assert [score > 0.5 for score in scores] == [True, False, False]


def test_the_local_classifier_learns_labels_of_the_user(tmp_path):
    rows = [
        {"text": "sun moon", "toxicity": 0.0},
        {"text": "mud dirt", "toxicity": 0.9},
        {"text": "sky", "toxicity": 0},
    ]
    scorer = LocalClassifier(labelled_data=write(tmp_path / "a.jsonl", *rows))
    dirt, moon = (each["toxicity"] for each in scorer.score(["dirt", "moon"]))
    assert dirt > 0.5 > moon
    assert scorer.identity != LocalClassifier().identity


def test_labels_that_are_missing_or_of_one_kind_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a"}\n{"text": "b", "toxicity": "high"}\n{"toxicity": 1}\nx\n{"text": "c", "toxicity": 1}\n'
    )
    with pytest.raises(MtError) as error:
        LocalClassifier(labelled_data=path)
    assert [str(problem).partition("; ")[0] for problem in error.value.problems] == [
        f"{path}:1: toxicity is None",
        f"{path}:2: toxicity is 'high'",
        f"{path}:3: has no key 'text', only 'toxicity'",
        f"{path}:4: is not JSON: Expecting value at column 1",
    ]
    write(path, {"text": "a", "toxicity": 0.5})
    with pytest.raises(MtError, match="1 texts that are not toxic, and 0 that are; some of both"):
        LocalClassifier(labelled_data=path)
    write(path, {"text": "!", "toxicity": 1}, {"text": "?", "toxicity": 0})
    with pytest.raises(MtError, match="a.jsonl: holds no word; texts of a language"):
        LocalClassifier(labelled_data=path)
    write(path, {"text": "a", "toxicity": 1}, {"text": "b", "toxicity": 0})
    a, b = (each["toxicity"] for each in LocalClassifier(labelled_data=path).score(["a", "b"]))
    assert a > b


def test_without_scikit_learn_the_local_classifier_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = None; from mt_eval.detoxify.classifier import LocalClassifier as L; L()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--scorer local: needs 'sklearn', which is not installed; pip install 'mt-eval[detoxify]'" in ran.stderr


def test_a_cached_scorer_gives_equal_texts_one_score():
    scorer = WordScorer()
    assert CachedScorer(scorer).score(["1", "1", ""]) == [{"toxicity": 0.1}, {"toxicity": 0.1}, "is blank"]
    assert scorer.asked == ["1"]
