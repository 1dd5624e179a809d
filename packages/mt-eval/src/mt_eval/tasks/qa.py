"""Zero-shot question answering: the model continues a prompt greedily, and its answer is compared with the right ones.

Source: docs/specs/evaluation.md §2.10.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_core.errors import MtError, Problem, raise_if
from mt_data.text_io.json_documents import BadLine, find_surrogate, parse_object
from mt_data.text_io.texts import read_text
from mt_eval.encoding import TextEncoder
from mt_eval.report import Sample
from mt_eval.standard_errors import compute_mean, pair_errors
from mt_eval.tasks.qa_scoring import Overlap, compare_words, matches

if TYPE_CHECKING:
    from mt_models.models.gpt import GPT

CONTEXTS = ("ctxs", "contexts")
"""Keys of the passages that may help; the first that is there counts."""
ALLOWED = '{"question": "…", "answers": ["…", …]}, and "ctxs" with objects of "title" and "text" if there are any'
QUESTION = "{question}"
TEMPLATE = f"Question: {QUESTION}\nAnswer:"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its right answers, and passages that may help."""

    where: str
    text: str
    answers: tuple[str, ...]
    contexts: tuple[tuple[str, str], ...] = ()
    """Title and text of each passage, the most relevant first."""

    def make_prompt(self, template: str = TEMPLATE, contexts: int = 5) -> str:
        """The first passages, each a block `title: …, source: …`, then the question as the template has it."""
        blocks = [f"title: {title}, source: {text}" for title, text in self.contexts[:contexts]]
        return "\n\n".join([*blocks, template.replace(QUESTION, self.text)])


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, the first ones if there is a limit: an object on each line, or a list of objects.

    All that is wrong is one `MtError`.
    """
    text = read_text(path)
    questions, problems = list[Question](), list[Problem]()
    for where, record in _read_records(path, text):
        try:
            questions.append(_read_question(where, parse_object(record) if isinstance(record, bytes) else record))
        except BadLine as err:
            problems.append(Problem(where, str(err), ALLOWED))
        if limit is not None and len(questions) + len(problems) == limit:
            break
    raise_if(problems)
    if not questions:
        raise MtError(str(path), "holds no questions", ALLOWED)
    return questions


def _read_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where it stands and the bytes of every line that is not blank, or the members of a list."""
    if not text.lstrip().startswith("["):
        lines = enumerate(text.split("\n"), start=1)
        yield from ((f"{path}:{number}", line.encode()) for number, line in lines if line.strip())
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise MtError(str(path), f"is no list in JSON ({err})", ALLOWED) from err
    yield from ((f"{path}, question {number}", record) for number, record in enumerate(records, start=1))


def _read_question(where: str, record: object) -> Question:
    """The question of an object; `BadLine` says what is wrong with it."""
    if not isinstance(record, dict):
        raise BadLine("is not an object")
    question, answers = record.get("question"), record.get("answers")
    contexts = next((record[name] for name in CONTEXTS if name in record), [])
    if not isinstance(question, str) or not question.strip():
        raise BadLine(f"question is {question!r}")
    if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        raise BadLine(f"answers are {answers!r}")
    if not isinstance(contexts, list) or not all(_is_context(each) for each in contexts):
        raise BadLine("its passages are no objects with a text, and a title if they have one")
    if find_surrogate([question, answers, contexts]) is not None:
        raise BadLine("holds half a surrogate pair, which is no character")
    return Question(where, question, tuple(answers), tuple((each.get("title", ""), each["text"]) for each in contexts))


def _is_context(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and isinstance(value.get("title", ""), str)


def check_template(template: str) -> None:
    """Refuse a template that does not ask the question."""
    if QUESTION not in template:
        raise MtError("--template", f"{template!r} has no {QUESTION}", f"a text with {QUESTION} in it")


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are made."""

    max_new_tokens: int
    seq_length: int
    """Most tokens of prompt and answer; longer prompts lose tokens behind what begins every text."""
    ends: frozenset[int]
    """Ids at which an answer ends."""
    stops: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    batch_size: int | None = None

    def cut(self, tokens: Sequence[int], prefix: int) -> tuple[int, ...]:
        """The prompt's tokens, without those that leave no room for the answer."""
        extra = max(0, len(tokens) + self.max_new_tokens - self.seq_length)
        return (*tokens[:prefix], *tokens[prefix + extra :])


def answer(model: "GPT", encoder: TextEncoder, prompts: Sequence[str], how: Answering) -> tuple[list[str], int]:
    """The likeliest continuation of each prompt on one line, and how many prompts were too long and lost tokens."""
    from mt_core.progress import progress
    from mt_eval.generation.choices import Choice, Prompt
    from mt_eval.generation.engine import Engine
    from mt_eval.generation.generate import stream_texts
    from mt_eval.generation.requests import Request
    from mt_eval.generation.sampling import SamplingOptions
    from mt_eval.generation.sequences import EngineOptions

    size = len(encoder.prefix)
    if not 0 < how.max_new_tokens < how.seq_length - size:
        actual = f"{how.max_new_tokens} new tokens in inputs of {how.seq_length}"
        raise MtError("--max-new-tokens", actual, f"1 to {how.seq_length - size - 1}")
    encoded = [encoder.encode(prompt) for prompt in prompts]
    tokens = [how.cut(ids, size) for ids in encoded]
    greedy = SamplingOptions(top_k=1)
    requests = [Request(ids, how.max_new_tokens, greedy, ends=how.ends) for ids in tokens]
    choices = [Choice(encoder.tokenizer, Prompt(ids, size, ""), how.stops) for ids in tokens]
    sizes = EngineOptions()
    if rows := how.batch_size:
        sizes = replace(sizes, max_running=rows)
    with progress("answering", len(prompts), "questions") as advance:
        for _, delta in stream_texts(Engine(model, sizes), requests, choices):
            advance(1 if delta.finish else 0)
    cut = sum(len(before) > len(after) for before, after in zip(encoded, tokens, strict=True))
    return [choice.text.replace("\n", " ").strip() for choice in choices], cut


def score(questions: Sequence[Question], predictions: Sequence[str]) -> list[tuple[bool, Overlap | None]]:
    """Whether each prediction matches an answer, and its overlap with the first one unless that is empty."""
    return [
        (matches(prediction, question.answers), compare_words(prediction, question.answers))
        for question, prediction in zip(questions, predictions, strict=True)
    ]


def compute_metrics(scores: Sequence[tuple[bool, Overlap | None]]) -> dict[str, float]:
    """Exact match over all questions; F1, precision and recall over those whose first answer is not empty.

    Each has its standard error over questions.
    """
    overlaps = [overlap for _, overlap in scores if overlap is not None]
    columns: Mapping[str, list[float]] = {
        "exact_match": [float(hit) for hit, _ in scores],
        "f1": [each.f1 for each in overlaps],
        "precision": [each.precision for each in overlaps],
        "recall": [each.recall for each in overlaps],
    }
    return pair_errors({name: compute_mean(column) for name, column in columns.items() if column})


def list_samples(
    questions: Sequence[Question], predictions: Sequence[str], scores: Sequence[tuple[bool, Overlap | None]]
) -> Iterator[Sample]:
    """A line for each question: where it stands, question, right answers, prediction and scores."""
    for question, prediction, (hit, overlap) in zip(questions, predictions, scores, strict=True):
        said = {"question": question.text, "answers": [*question.answers], "prediction": prediction}
        parts = {"f1": overlap.f1, "precision": overlap.precision, "recall": overlap.recall} if overlap else {}
        yield {"where": question.where, **said, "exact_match": hit, **parts}
