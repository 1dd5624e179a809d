"""Score the texts of JSON lines: each line again, with `scores` and the `scorer` that gave them.

A text that cannot be scored has `scores` null, and `unscored` says why; it is never given a score.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeGuard

from mt_core.contracts import ToxicityScorer
from mt_core.errors import Problem
from mt_data.corpus.records import Record, to_line
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.json_documents import BadLine, check_texts, parse_object
from mt_data.text_io.lines import check_inputs, read_chunks
from mt_eval.detoxify.score_cache import CachedScorer, hash_text, open_cache
from mt_eval.finetuning.examples import raise_problems

TEXT = "text"


def score_file(source: Path, output: Path, scorer: ToxicityScorer, *, cache: Path | None = None) -> dict[str, int]:
    """Score each line of a file; counts of what came out. A run that was stopped goes on where it was."""
    check_inputs([source])
    options = {"scorer": hash_text(scorer.identity), "batch": scorer.batch_size}
    step = CorpusStep("detoxify score", output, (source,), options)
    with open_cache(cache) as file:
        cached = CachedScorer(scorer, file)
        return run_step(step, _cut(read_records(source), scorer.batch_size), lambda batch: score_batch(batch, cached))


def _cut(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while batch := list(islice(records, size)):
        yield batch


def score_batch(records: Sequence[Record], cached: CachedScorer) -> StepOutput:
    """The scored lines of some records."""
    produced = StepOutput()
    for record, scores in zip(records, cached.score([record[TEXT] for record in records]), strict=True):
        unscored = isinstance(scores, str)
        line = {name: value for name, value in record.items() if name not in ("scores", "scorer", "unscored")}
        line |= {"scores": None, "unscored": scores} if unscored else {"scores": dict(scores)}
        produced.data += to_line(line | {"scorer": cached.scorer.name})
        produced.counts.update(["texts", "unscored" if unscored else "scored"])
    return produced


def read_records(path: Path, *, scored: bool = False) -> Iterator[Record]:
    """The objects of a file's lines, each with a text, and if `scored` with the scores that `score_file` adds.

    All that is wrong with up to 4,096 lines is one `MtError`. Blank lines are left out.
    """
    for chunk in read_chunks(path):
        records, problems = list[Record](), list[Problem]()
        for number, line in enumerate(chunk.lines, start=chunk.first):
            try:
                if line.strip():
                    records.append(_read_record(line, scored=scored))
            except BadLine as err:
                allowed = "what mt task detoxify score wrote" if scored else f'{{"{TEXT}": "…"}} on every line'
                problems.append(Problem(f"{path}:{number}", str(err), allowed))
        raise_problems(problems)
        yield from records


def _read_record(line: bytes, *, scored: bool) -> Record:
    record = parse_object(line)
    check_texts(record, (TEXT,))
    if scored:
        scores = record.get("scores", "")
        if scores is not None and not (isinstance(scores, dict) and is_score(scores.get("toxicity"))):
            raise BadLine("has no scores with a toxicity from 0 to 1, and no null in their place")
    return record


def is_score(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def get_toxicity(record: Record) -> float | None:
    """The toxicity of a scored line; None if it has none."""
    return None if record["scores"] is None else float(record["scores"]["toxicity"])
