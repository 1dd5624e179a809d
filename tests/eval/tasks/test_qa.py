"""Question answering: what is asked, how answers are compared, and what is wrong with files."""

import json
import random
import runpy
import statistics
import string
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mt_core.errors import MtError
from mt_eval.tasks.command import app
from mt_eval.tasks.qa import Answering, Question, answer, compute_metrics, list_samples, read_questions, score
from mt_eval.tasks.qa_scoring import compare_words, matches, normalize, split_words

RIVERS = ("Which river flows through Paris?", ["The Seine", "Seine", "river Seine"])
QUESTIONS = [
    {"question": RIVERS[0], "answers": RIVERS[1], "ctxs": [{"title": "Paris", "text": "It lies on the Seine."}] * 7},
    {"question": "Who wrote it?", "answers": ["J. K. Rowling"], "contexts": [{"text": "A book."}]},
    {"question": "And then?", "answers": ["", "nothing"]},
]
WORDS = ["a", "the", "An", "seine", "Seine,", "J.K.", "U.S.", "well-known", "river", "it's", "42", "—", "theatre"]


def reference_words(text):
    """F1's words, character by character."""
    kept = "".join(c if c.isalnum() or ord(c) > 127 or c.isspace() else " " for c in text.lower())
    return [word for word in kept.split() if word not in {"a", "an", "the"}]


def reference_overlap(prediction, gold):
    said, right = reference_words(prediction), reference_words(gold)
    left, common = list(right), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(said), common / len(right)
    return precision, recall, 2 * precision * recall / (precision + recall)


def reference_normalized(text):
    kept = "".join(c for c in text.lower() if c.isalnum() or ord(c) > 127 or c.isspace())
    return " ".join(word for word in kept.split() if word not in {"a", "an", "the"})


def test_scores_are_those_of_a_reference_on_drawn_texts():
    draw = random.Random(3)
    for _ in range(300):
        said = " ".join(draw.choices(WORDS, k=draw.randint(0, 6)))
        golds = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        overlap = compare_words(said, golds)
        assert overlap is not None
        found = (overlap.precision, overlap.recall, overlap.f1)
        assert found == pytest.approx(reference_overlap(said, golds[0]), rel=1e-12)
        normalized = [reference_normalized(gold) for gold in golds]
        assert matches(said, golds) == (reference_normalized(said) in normalized)


def test_scores_are_squads():
    """lm-evaluation-harness brings SQuAD's own script; its F1 takes punctuation away, as exact match does."""
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        pytest.skip("lm-eval is not installed")
    path = Path(package.origin).with_name("tasks") / "qasper" / "metrics.py"
    squad = SimpleNamespace(**runpy.run_path(str(path)))
    draw = random.Random(4)
    for _ in range(300):
        said, gold = (" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(2))
        assert normalize(said) == squad.normalize_answer(said)
        assert matches(said, [gold]) == (squad.normalize_answer(said) == squad.normalize_answer(gold))
        said, gold = (text.translate(str.maketrans("", "", string.punctuation)) for text in (said, gold))
        overlap = compare_words(said, [gold])
        assert overlap is not None
        assert overlap.f1 == pytest.approx(squad.f1_abstractive([said], [gold]), rel=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "words", "hit"),
    [
        ("the Seine", RIVERS[1], (1, 1, 1), True),
        ("The river Seine.", RIVERS[1], (1 / 2, 1, 2 / 3), True),
        ("Seine Seine Seine", RIVERS[1], (1 / 3, 1, 1 / 2), False),
        ("U.S.", ["U S"], (1, 1, 1), False),  # F1 puts spaces, exact match nothing
        ("US", ["U.S."], (0, 0, 0), True),
        ("Answer: Seine", RIVERS[1], (1 / 2, 1, 2 / 3), True),
        ("A: the Seine", RIVERS[1], (1, 1, 1), True),
        ("a seine", ["Seine"], (1, 1, 1), True),
        ("", RIVERS[1], (0, 0, 0), False),
        ("the", ["an"], (0, 0, 0), True),
        ("nothing", ["", "nothing"], None, True),
        ("", ["", "nothing"], None, True),
    ],
)
def test_a_prediction_has_the_scores_that_the_rules_give(prediction, answers, words, hit):
    overlap = compare_words(prediction, answers)
    assert matches(prediction, answers) is hit
    if words is None or overlap is None:
        assert words is None
        assert overlap is None
    else:
        assert (overlap.precision, overlap.recall, overlap.f1) == pytest.approx(words)


def test_words_within_words_stay():
    assert split_words("The theatre, a-la-carte: an Athena") == ["theatre", "la", "carte", "athena"]
    assert normalize("The theatre, a-la-carte: an Athena") == "theatre alacarte athena"


def test_means_leave_out_questions_whose_first_answer_is_empty():
    questions = [Question("f:1", *("q", ("x y",))), Question("f:2", "q", ("",)), Question("f:3", "q", ("z", "y"))]
    scores = score(questions, ["x", "", "y"])
    f1 = [2 / 3, 0.0]
    assert compute_metrics(scores) == pytest.approx(
        {
            "exact_match": 2 / 3,
            "exact_match_stderr": statistics.stdev([0, 1, 1]) / 3**0.5,
            "f1": 1 / 3,
            "f1_stderr": statistics.stdev(f1) / 2**0.5,
            "precision": 1 / 2,
            "precision_stderr": 1 / 2,
            "recall": 1 / 4,
            "recall_stderr": 1 / 4,
        },
        rel=1e-12,
    )
    first, second, _ = list_samples(questions, ["x", "", "y"], scores)
    assert first["f1"] == pytest.approx(2 / 3)
    assert second == {"where": "f:2", "question": "q", "answers": [""], "prediction": "", "exact_match": True}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_prompt_has_the_first_passages_before_the_question(tmp_path):
    lines = read_questions(write(tmp_path / "q.jsonl", QUESTIONS))
    (tmp_path / "q.json").write_text(json.dumps(QUESTIONS, indent=1))
    listed = read_questions(tmp_path / "q.json")
    assert [each.where for each in lines] == [f"{tmp_path}/q.jsonl:{n}" for n in (1, 2, 3)]
    assert [each.where for each in listed] == [f"{tmp_path}/q.json, question {n}" for n in (1, 2, 3)]
    assert [(each.text, each.answers, each.contexts) for each in lines] == [
        (each.text, each.answers, each.contexts) for each in listed
    ]
    block = "title: Paris, source: It lies on the Seine.\n\n"
    asked = f"Question: {RIVERS[0]}\nAnswer:"
    assert lines[0].make_prompt() == block * 5 + asked
    assert lines[0].make_prompt("Q {question} A", 1) == f"{block}Q {RIVERS[0]} A"
    assert lines[1].make_prompt() == "title: , source: A book.\n\nQuestion: Who wrote it?\nAnswer:"
    assert lines[2].make_prompt(contexts=0) == "Question: And then?\nAnswer:"
    assert len(read_questions(tmp_path / "q.jsonl", 2)) == 2


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path):
    path = tmp_path / "q.jsonl"
    good = {"question": "q", "answers": ["a"]}
    bad = [{"answers": ["a"]}, good | {"answers": "a"}, good | {"answers": []}, good | {"ctxs": ["text"]}, [1]]
    write(path, [good, *bad, good | {"question": "\ud800"}])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(MtError) as error:
        read_questions(path)
    assert [str(problem.actual) for problem in error.value.problems] == [
        "question is None",
        "answers are 'a'",
        "answers are []",
        "its passages are no objects with a text, and a title if they have one",
        "is a list, not an object",
        "holds half a surrogate pair, which is no character",
        "is not JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    assert [problem.where for problem in error.value.problems] == [f"{path}:{n}" for n in range(2, 9)]
    (tmp_path / "l.json").write_text("[{")
    with pytest.raises(MtError, match=r"l.json: is no list in JSON \(Expecting property name"):
        read_questions(tmp_path / "l.json")
    (tmp_path / "e.json").write_text(" \n")
    with pytest.raises(MtError, match="e.json: holds no questions"):
        read_questions(tmp_path / "e.json")


def test_answers_are_the_models_likeliest_text(model, encoder):
    prompts = ["It was", "a" * 80, "ab"]
    how = Answering(12, 64, frozenset({256}), batch_size=2)
    answers, cut = answer(model, encoder, prompts, how)
    assert cut == 1
    import torch

    for prompt, said in zip(prompts, answers, strict=True):
        ids = list(prompt.encode())[-52:]
        size = len(ids)
        with torch.inference_mode():
            while len(ids) < size + 12 and (token := model(torch.tensor([ids]))[0, -1].argmax().item()) != 256:
                ids.append(token)
        assert said == encoder.tokenizer.decode(ids[size:]).replace("\n", " ").strip()
    with pytest.raises(MtError, match="--max-new-tokens: 64 new tokens in inputs of 64; 1 to 63"):
        answer(model, encoder, prompts, Answering(64, 64, frozenset()))


def test_a_long_prompt_keeps_what_begins_every_text():
    how = Answering(2, 6, frozenset())
    assert how.cut((9, 1, 2, 3, 4, 5), 1) == (9, 3, 4, 5)
    assert how.cut((9, 1, 2, 3), 1) == (9, 1, 2, 3)


def test_the_command_reports_scores_and_writes_a_line_for_each_question(checkpoint, tmp_path):
    data, output = write(tmp_path / "q.jsonl", QUESTIONS), tmp_path / "r.json"
    words = ["qa", "--load-dir", checkpoint, "--data", data, "--output", output, "--max-new-tokens", 8]
    words += ["--device", "cpu", "--contexts", 0, "--template", "{question}", "--stop", "z"]
    printed = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).stdout
    report = json.loads(output.read_text())
    lines = [json.loads(line) for line in (tmp_path / "r.qa.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in lines] == [each["answers"] for each in QUESTIONS]
    assert all("z" not in line["prediction"] for line in lines)
    hits = [matches(line["prediction"], line["answers"]) for line in lines]
    assert report["metrics"]["exact_match"] == pytest.approx(sum(hits) / 3)
    assert report["counts"] == {"questions": 3, "cut_prompts": 0}
    assert report["settings"] | {"template": "{question}", "contexts": 0} == report["settings"]
    assert printed.startswith("qa\n")
    with pytest.raises(MtError, match=r"^--template: 'Q:' has no {question}; a text with {question} in it$"):
        CliRunner().invoke(app, [*map(str, words), "--template", "Q:"], catch_exceptions=False)
