"""Files of tasks: what is read of them, how texts become samples, and what is wrong with a file told by its line."""

from pathlib import Path

import pytest

from eval.finetuning.task_files import passage, write_mnli, write_race, write_tsv
from mt_core.errors import MtError
from mt_eval.finetuning.examples import (
    EncodedExamples,
    EpochOrder,
    Example,
    Lengths,
    clean_text,
    encode_pair,
    name_sets,
)
from mt_eval.finetuning.glue import LAYOUTS
from mt_eval.finetuning.race import fill_in
from mt_eval.finetuning.sections import GLUEData, RACEData, get_classes, load_sets, read_examples, read_tests

TASKS = Path(__file__).parents[4] / "shared" / "data" / "tasks"
REAL = {"mnli": "MNLI", "mrpc": "MRPC", "qqp": "QQP", "rte": "RTE"}


def glue(task, *train, **more):
    return GLUEData(seq_length=16, task=task, train_paths=tuple(map(str, train)), epoch_samples=1, **more)


def race(*train, **more):
    return RACEData(seq_length=32, max_qa_length=8, train_paths=tuple(map(str, train)), epoch_samples=1, **more)


def read(data, labelled=True):
    examples, problems = read_examples(data, data.train_paths, labelled=labelled)
    assert problems == []
    return examples


def problems_of(data, labelled=True):
    return [str(problem) for problem in read_examples(data, data.train_paths, labelled=labelled)[1]]


class Words:
    """A tokenizer whose ids are given as words."""

    cls, sep, pad = 101, 102, 0

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def test_text_is_one_line_without_space_before_punctuation():
    assert clean_text("  There is\n\n a   cat .\tIt sleeps , or not ? ") == "There is a cat. It sleeps, or not?"
    assert clean_text("the .NET of 3 .5") == "the .NET of 3 .5"


def test_a_pair_is_cut_at_its_end_and_still_ends_with_sep():
    first, second = [1, 2, 3], [4, 5, 6]
    assert encode_pair(Words(), first, second, Lengths(20)) == ([101, 1, 2, 3, 102, 4, 5, 6, 102], [0] * 5 + [1] * 4)
    assert encode_pair(Words(), first, second, Lengths(7)) == ([101, 1, 2, 3, 102, 4, 102], [0] * 5 + [1] * 2)
    assert encode_pair(Words(), first, second, Lengths(20, 2)) == ([101, 1, 2, 102, 4, 5, 6, 102], [0] * 4 + [1] * 4)
    assert encode_pair(Words(), first, None, Lengths(4)) == ([101, 1, 2, 102], [0] * 4)


def test_a_sample_has_a_row_for_each_choice():
    examples = [Example("a", (("1 2", "3"), ("4", "3")), 1), Example("b", (("1", "2 3"),), 0)]
    choices, pair = EncodedExamples(examples, Words(), Lengths(7))
    assert choices["text"].tolist() == [[101, 1, 2, 102, 3, 102, 0], [101, 4, 102, 3, 102, 0, 0]]
    assert choices["types"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0]]
    assert choices["padding_mask"].sum(1).tolist() == [6, 5]
    assert (pair["text"].tolist(), int(pair["labels"])) == ([101, 1, 102, 2, 3, 102, 0], 0)


def test_every_epoch_has_the_samples_in_another_order():
    examples = [Example(str(n), ((str(n + 1), None),), n) for n in range(7)]
    order = EpochOrder(EncodedExamples(examples, Words(), Lengths(4)), epoch_samples=6, length=12, seed=3)
    labels = [int(order[n]["labels"]) for n in range(12)]
    assert len({*labels[:6]}) == len({*labels[6:]}) == 6
    assert labels[:6] != labels[6:]
    assert [int(order[n]["labels"]) for n in reversed(range(12))] == labels[::-1]


def test_mnli_reads_columns_by_their_names_and_quotes_as_characters(tmp_path):
    rows = [('He said "no', 'A "quote" here', "neutral"), ("It\tis", "", "")][:1]
    train = write_mnli(tmp_path / "train.tsv", rows)
    assert read(glue("mnli", train)) == [Example("0", (('He said "no', 'A "quote" here'),), 2)]
    test = write_mnli(tmp_path / "test.tsv", rows, labelled=False)
    assert read_tests(glue("mnli", train), [str(test)]) == {
        "test": [Example("0", (('He said "no', 'A "quote" here'),), -1)]
    }


ROWS = {
    "cola": ("s1|0|*|Bad it is.", "s1|1||It is good."),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "1|7|8|A b .|B a ."),
    "qnli": ("index|question|sentence|label", "4|Who?|Me.|not_entailment"),
    "qqp": ("id|qid1|qid2|question1|question2|is_duplicate", "9|1|2|Why?|How?|0"),
    "rte": ("index|sentence1|sentence2|label", "3|A.|B.|entailment"),
    "sst-2": ("sentence|label", "so good|1"),
    "sts-b": ("index|genre|sentence1|sentence2|score", "5|news|A.|B.|3.800", "6|news|A.|A.|5"),
    "wnli": ("index|sentence1|sentence2|label", "0|A.|B.|1"),
}
EXAMPLES = {
    "cola": [("1", "Bad it is.", None, 0), ("2", "It is good.", None, 1)],
    "mrpc": [("7-8", "A b.", "B a.", 1)],
    "qnli": [("4", "Who?", "Me.", 1)],
    "qqp": [("9", "Why?", "How?", 0)],
    "rte": [("3", "A.", "B.", 0)],
    "sst-2": [("2", "so good", None, 1)],
    "sts-b": [("5", "A.", "B.", 3.8), ("6", "A.", "A.", 5.0)],
    "wnli": [("0", "A.", "B.", 1)],
}


@pytest.mark.parametrize("task", ROWS)
def test_each_task_of_glue_has_its_layout(task, tmp_path):
    rows = [tuple(line.split("|")) for line in ROWS[task]]
    start = "\ufeff" if task == "mrpc" else ""
    examples = read(glue(task, write_tsv(tmp_path / "train.tsv", *rows, start=start)))
    assert examples == [Example(uid, ((first, second),), label) for uid, first, second, label in EXAMPLES[task]]
    assert {*ROWS, "mnli"} == {*LAYOUTS}


def test_numbers_are_labels_from_0_to_5(tmp_path):
    rows = [("0", "A.", "B.", score) for score in ("5.1", "-0.5", "nan", "much", "2.5")]
    path = write_tsv(tmp_path / "a.tsv", ("index", "sentence1", "sentence2", "score"), *rows)
    with pytest.raises(MtError) as error:
        load_sets(glue("sts-b", path))
    assert [str(problem).removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        f"a.tsv:{line}: label {score!r}; a number from 0 to 5"
        for line, score in enumerate(("5.1", "-0.5", "nan", "much"), 2)
    ]
    (sample,) = EncodedExamples([Example("a", (("1", "2"),), 2.5)], Words(), Lengths(7))
    assert (sample["labels"].dtype, float(sample["labels"])) == ("float32", 2.5)
    assert get_classes(glue("sts-b")) == []


def test_races_options_fill_the_gap_or_follow_the_question(tmp_path):
    first, second = read(race(write_race(tmp_path / "train", passage("cat", "wood"))))
    assert first.texts[1] == ("The cat lives in the wood.", "There is a cat. It lives in the wood. Nobody has seen it.")
    assert second.texts[0][0] == "Who has seen it? A man."
    assert (first.uid, first.label, second.uid, second.label) == ("1-1-1", 1, "1-1-2", 3)
    assert fill_in("__ and _", "x") == "x and x"
    assert get_classes(race()) == ["A", "B", "C", "D"]


def test_all_that_is_wrong_with_all_files_is_one_report(tmp_path):
    header = ("index", "sentence1", "sentence2", "label")
    bad = write_tsv(
        tmp_path / "bad.tsv",
        header,
        ("0", "A.", "B.", "maybe"),
        ("1", "A.", "entailment"),
        ("2", " ", "B.", "entailment"),
    )
    short, empty = write_tsv(tmp_path / "short.tsv", header[:3], ("0", "A.", "B.")), write_tsv(tmp_path / "empty.tsv")
    bare, latin = write_tsv(tmp_path / "bare.tsv", header), tmp_path / "latin.tsv"
    latin.write_bytes("index\tsentence1\n0\tcafé\n".encode("latin-1"))
    files = [bad, short, empty, bare, latin, tmp_path / "bad.tvs"]
    with pytest.raises(MtError) as error:
        load_sets(glue("rte", *files))
    assert [str(problem).removeprefix(f"{tmp_path}/") for problem in error.value.problems] == [
        "bad.tsv:2: label 'maybe'; allowed: entailment, not_entailment",
        "bad.tsv:3: 3 columns, others have 4; a tab between columns, and none in them",
        "bad.tsv:4: sentence1 is empty; a text",
        "short.tsv:1: has no column 'label', only index, sentence1, sentence2; a first line with the names of rte's "
        "columns, tabs between them",
        "empty.tsv: is empty; lines of sentence1, sentence2 and label",
        "bare.tsv: has no line after the names of its columns; at least one example",
        "latin.tsv:2: byte 0xe9 is not UTF-8; convert the file",
        f"bad.tvs: cannot be read (No such file or directory); did you mean {bad}?",
    ]  # fmt: skip


def test_of_many_problems_the_first_are_named_and_the_rest_counted(tmp_path):
    file = write_tsv(tmp_path / "a.tsv", ("sentence", "label"), *[("so", "?")] * 30, ("so", "1"))
    with pytest.raises(MtError) as error:
        load_sets(glue("sst-2", file))
    assert len(error.value.problems) == 21
    assert str(error.value.problems[-1]) == f"{file}:31: and 10 more, of which this is the last; correct the files"
    sets = load_sets(glue("sst-2", file, skip_bad_rows=True))
    assert (len(sets.train), len(sets.skipped)) == (1, 30)
    all_bad = write_tsv(tmp_path / "b.tsv", ("sentence", "label"), ("so", "?"))
    with pytest.raises(MtError, match="b.tsv:2: label '\\?'; allowed: 0, 1"):
        load_sets(glue("sst-2", file, valid_paths=(str(all_bad),), skip_bad_rows=True))


def test_what_is_wrong_with_questions_is_told_by_file_and_line(tmp_path):
    good = passage("cat", "wood")
    folder = write_race(
        tmp_path / "train",
        good | {"options": [["a", "b", "c"], ["a", "b", "c", "d"]]},
        good | {"answers": ["B", "E"]},
        good | {"answers": ["B"]},
        {name: value for name, value in good.items() if name != "article"},
        good | {"article": " "},
        good | {"questions": [3, "Who?"]},
        good | {"options": ["a", ["a", "b", "c", 4]]},
    )
    (folder / "8.txt").write_text("{}\n[1]\nno\n")
    (folder / "9.txt").write_text("\n")
    assert [text.removeprefix(f"{folder}/") for text in problems_of(race(folder))] == [
        "1.txt:1, question 1: 3 options; 4, called A, B, C, D",
        "2.txt:1, question 2: answer 'E'; allowed: A, B, C, D",
        "3.txt:1: questions, options and answers are no lists of equal length; one of each for every question",
        "4.txt:1: has no article; an object with article, questions, options, answers",
        "5.txt:1: article is empty or no text; a passage",
        "6.txt:1, question 1: question is 3; a text",
        "7.txt:1, question 1: options are 'a'; four texts",
        "7.txt:1, question 2: options are ['a', 'b', 'c', 4]; four texts",
        "8.txt:1: has no article, questions, options, answers; an object with article, questions, options, answers",
        "8.txt:2: is no object; an object with article, questions, options, answers",
        "8.txt:3: is no JSON (Expecting value: line 1 column 1 (char 0)); an object with article, questions, options "
        "and answers",
        "9.txt: is empty; a JSON object on each line",
    ]  # fmt: skip
    assert problems_of(race(tmp_path)) == [f"{tmp_path}: holds no .txt files; a folder such as RACE/train/middle"]
    assert problems_of(race(folder / "1.txt")) == [
        f"{folder / '1.txt'}: is no folder; a folder such as RACE/train/middle"
    ]


def test_sets_are_named_by_as_many_folders_as_tell_them_apart():
    assert name_sets(["a/dev_matched.tsv", "a/dev_mismatched.tsv"]) == ["dev_matched", "dev_mismatched"]
    assert name_sets(["RACE/dev/middle", "RACE/test/middle"]) == ["dev-middle", "test-middle"]
    with pytest.raises(MtError, match="a/dev.tsv: is given twice; each validation or test file once"):
        name_sets(["a/dev.tsv", "b.tsv", "a/dev.tsv"])


@pytest.mark.skipif(not TASKS.is_dir(), reason="the real rows of the tasks, ../shared/data/tasks, are not here")
def test_real_rows_in_their_original_layouts_are_read(tmp_path):
    for task, folder in REAL.items():
        files = {
            path.name: tmp_path / f"{task}-{path.name}" for path in (TASKS / folder).glob("*") if path.name != "dev_ids"
        }
        for name, copy in files.items():
            rows = (TASKS / folder / name).read_text("utf-8")
            copy.write_text(rows.replace("BOM", "\ufeff", 1) if task == "mrpc" else rows, "utf-8")  # a stand-in there
        examples = read(glue(task, *[copy for name, copy in files.items() if "test" not in name]))
        examples += read(glue(task, *[copy for name, copy in files.items() if "test" in name]), labelled=False)
        assert all(first and second for example in examples for first, second in example.texts)
        assert len({example.uid for example in examples}) >= 3
    questions = read(race(*[path for path in TASKS.glob("RACE/*/*") if path.is_dir()]))
    assert len(questions) > 20
    assert {example.label for example in questions} == {0, 1, 2, 3}
