"""Folders of RACE: files of questions on a passage, each with four options, of which one is right.

Source: docs/specs/evaluation.md §3.4.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from mt_core.errors import Problem, suggest_file
from mt_eval.finetuning.examples import UNLABELLED, Example, clean_text

LETTERS = "ABCD"
"""Names of the options, whose places are the labels."""
BLANK = re.compile("_+")
"""What an option fills in, in questions that are sentences with a gap."""


def read_folder(path: Path, *, labelled: bool) -> Iterator[Example | Problem]:
    """Each question of a folder's .txt files, or what is wrong with it; a line is a JSON object.

    If `labelled`, a passage without answers is a problem.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        allowed = "a folder such as RACE/train/middle" if path.exists() else suggest_file(path)
        yield Problem(str(path), "holds no .txt files" if path.is_dir() else "is no folder", allowed)
    for file in files:
        lines = [(number, line) for number, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
        if not lines:
            yield Problem(str(file), "is empty", "a JSON object on each line")
        for number, line in lines:
            yield from _read_line(file, number, line, labelled=labelled)


def _read_line(file: Path, number: int, line: bytes, *, labelled: bool) -> Iterator[Example | Problem]:
    where = f"{file}:{number}"
    try:
        passage = json.loads(line)
    except ValueError as err:
        yield Problem(where, f"is no JSON ({err})", "an object with article, questions, options and answers")
        return
    if problem := _find_misfit(passage, labelled=labelled):
        yield Problem(where, *problem)
        return
    article = clean_text(passage["article"])
    answers = passage.get("answers") or [""] * len(passage["questions"])
    for place, (question, options, answer) in enumerate(
        zip(passage["questions"], passage["options"], answers, strict=True)
    ):
        where = f"{file}:{number}, question {place + 1}"
        if problem := _find_question_misfit(question, options, answer):
            yield Problem(where, *problem)
            continue
        texts = tuple((clean_text(fill_in(question, option)), article) for option in options)
        label = LETTERS.index(answer) if answer else UNLABELLED
        yield Example(f"{file.stem}-{number}-{place + 1}", texts, label)


def _find_misfit(passage: object, *, labelled: bool) -> tuple[str, str] | None:
    """What is wrong with a passage as a whole, and what is allowed."""
    names = ("article", "questions", "options", *(["answers"] if labelled else []))
    if not isinstance(passage, dict):
        return "is no object", f"an object with {', '.join(names)}"
    if missing := [name for name in names if name not in passage]:
        return f"has no {', '.join(missing)}", f"an object with {', '.join(names)}"
    if not isinstance(passage["article"], str) or not passage["article"].strip():
        return "article is empty or no text", "a passage"
    lists = [passage[name] for name in ("questions", "options", "answers") if name in passage]
    if not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists) or not lists[0]:
        return "questions, options and answers are no lists of equal length", "one of each for every question"
    return None


def _find_question_misfit(question: object, options: object, answer: object) -> tuple[str, str] | None:
    """What is wrong with one question, and what is allowed."""
    if not isinstance(question, str):
        return f"question is {question!r}", "a text"
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return f"options are {options!r}", "four texts"
    if len(options) != len(LETTERS):
        return f"{len(options)} options", f"{len(LETTERS)}, called {', '.join(LETTERS)}"
    if answer not in ("", *LETTERS):
        return f"answer {answer!r}", f"allowed: {', '.join(LETTERS)}"
    return None


def fill_in(question: str, option: str) -> str:
    """The option in each gap of the question, or behind a question without any."""
    return BLANK.sub(lambda _: option, question) if "_" in question else f"{question} {option}"
