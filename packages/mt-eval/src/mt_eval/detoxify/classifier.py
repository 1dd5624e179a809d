"""A toxicity scorer that needs no server: logistic regression on words and parts of words, trained when it is opened.

It knows what its sentences taught it, which is little: 170 of our own come with the package, for tests and first steps.
`--labelled-data` names better ones.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

from mt_core.errors import MtError, Problem
from mt_core.plugins import import_library
from mt_data.text_io.json_documents import BadLine, check_texts, parse_object
from mt_data.text_io.texts import read_text
from mt_eval.detoxify.score import is_score
from mt_eval.finetuning.examples import raise_problems

SENTENCES = "sentences.jsonl"
TOXIC = 0.5
"""Labels above it are toxic."""
BATCH_SIZE = 512
WORD = r"\b\w+\b"


class LocalClassifier:
    """A `ToxicityScorer` with the one score `toxicity`; equal sentences give an equal classifier."""

    name: ClassVar[str] = "local"
    batch_size = BATCH_SIZE

    def __init__(
        self,
        api_key: str = "",
        *,
        labelled_data: Annotated[
            Path | None, "Train on these JSON lines, of text and toxicity from 0 to 1; a few of mt's own if not given."
        ] = None,
    ) -> None:
        import_library("sklearn", where="--scorer local", requires=["mt-eval[detoxify]"])
        own = files("mt_eval.detoxify") / SENTENCES
        raw = own.read_text("utf-8") if labelled_data is None else read_text(labelled_data)
        self._texts, self._labels = read_labelled(raw, labelled_data or Path(SENTENCES))
        digest = hashlib.sha256(raw.encode()).hexdigest()
        self.identity = f"local {digest} scikit-learn {version('scikit-learn')}"

    def score(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """The probability that each text is toxic."""
        return [{"toxicity": float(value)} for value in self._pipeline.predict_proba(texts)[:, 1]]

    @cached_property
    def _pipeline(self) -> Any:
        return make_pipeline().fit(self._texts, self._labels)


def make_pipeline() -> Any:
    """The classifier before it is trained."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    return make_pipeline(make_union(words, parts), LogisticRegression(C=10, max_iter=1000))


def read_labelled(raw: str, path: Path) -> tuple[list[str], list[int]]:
    """Texts and whether they are toxic, 0 or 1, of JSON lines; one `MtError` for what is wrong with them."""
    texts, labels, problems = list[str](), list[int](), list[Problem]()
    for number, line in enumerate(raw.split("\n"), 1):
        try:
            if line.strip():
                text, toxicity = _read_line(line)
                texts.append(text)
                labels.append(int(toxicity > TOXIC))
        except BadLine as err:
            allowed = '{"text": "…", "toxicity": 0 to 1} on every line'
            problems.append(Problem(f"{path}:{number}", str(err), allowed))
    raise_problems(problems)
    if {*labels} != {0, 1}:
        actual = f"{labels.count(0)} texts that are not toxic, and {labels.count(1)} that are"
        raise MtError(str(path), actual, f"some of both; toxic ones have a toxicity above {TOXIC}")
    if not any(re.search(WORD, text) for text in texts):
        raise MtError(str(path), "holds no word", "texts of a language")
    return texts, labels


def _read_line(line: str) -> tuple[str, float]:
    record = parse_object(line.encode())
    (text,) = check_texts(record, ("text",))
    toxicity = record.get("toxicity")
    if not is_score(toxicity):
        raise BadLine(f"toxicity is {toxicity!r}")
    return text, toxicity
