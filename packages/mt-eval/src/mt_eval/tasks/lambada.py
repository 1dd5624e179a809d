"""LAMBADA cloze accuracy: is the last word of a passage the model's first choice? (docs/specs/evaluation.md §3.3)

Strict: the last white-space separated word, however many tokens it has, after the passage without it; its tokens are
what the encoded whole has beyond the encoded context. Published figures are strict. Loose: the last token only. A
passage counts only if every token of its target is the arg-max.

Shape suffixes: B passages in a batch, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_core.progress import progress
from mt_data.text_io.inputs import guess_format
from mt_data.text_io.texts import read_documents
from mt_eval.encoding import TextEncoder
from mt_eval.finite import NonFiniteOutput
from mt_eval.report import Sample
from mt_eval.standard_errors import compute_mean, pair_errors

if TYPE_CHECKING:
    from mt_models.models.gpt import GPT

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cloze:
    """A passage as tokens, of which the last `target` have to be predicted."""

    tokens: Tokens
    target: int
    prefix: int = 0
    """How many of the first tokens stand before every text; they stay when a long passage loses its beginning."""
    where: str = "passage"


def strict(text: str, encoder: TextEncoder) -> Cloze:
    """The last word, after a space and the stripped passage without it."""
    word = text.split()[-1]
    context, target = encoder.encode_pair(text[: text.rindex(word)].strip(), f" {word}")
    return Cloze((*context, *target), len(target), len(encoder.prefix))


def loose(text: str, encoder: TextEncoder) -> Cloze:
    """The last token of the passage."""
    return Cloze((*encoder.prefix, *encoder.encode_plain(text)), 1, len(encoder.prefix))


MODES = {"strict": strict, "loose": loose}


def read_passages(path: Path) -> list[tuple[str, str]]:
    """Where it stands and the text of every passage of a JSONL or Parquet file."""
    passages = list(read_documents(path, format="parquet" if guess_format(path) == "parquet" else "jsonl"))
    if not passages:
        raise MtError(str(path), "holds no passages", 'lines of {"text": "…"}')
    return passages


def make_clozes(passages: Iterable[tuple[str, str]], mode: str, encoder: TextEncoder) -> list[Cloze]:
    """One cloze a passage `(where, text)`; one that leaves nothing to predict, or to predict from, is an error."""
    result = []
    for where, text in passages:
        if len(text.split()) < 2:
            raise MtError(where, f"passage {text!r} has fewer than two words", "a context and a last word")
        cloze = MODES[mode](text, encoder)
        if not 1 <= cloze.target < len(cloze.tokens):
            actual = f"the tokenizer joins the last word of {text!r} to the context, or drops it"
            raise MtError(where, actual, "a passage whose last word has tokens of its own")
        result.append(replace(cloze, where=where))
    return result


def get_max_tokens(examples: Mapping[str, Sequence[Cloze]]) -> int:
    """Tokens in the longest cloze of any mode."""
    return max(len(cloze.tokens) for mode in examples.values() for cloze in mode)


def compute_choices(model: "GPT", clozes: Iterable[Cloze], *, seq_length: int, batch_size: int) -> dict[Tokens, Tokens]:
    """For each token sequence, the arg-max at each of its target tokens, each predicted from the true ones before it.

    Of clozes with the same tokens the longest target counts. Sequences longer than `seq_length` + 1 lose tokens behind
    the prefix. Batches hold sequences of similar length. Logits without a finite maximum are an `MtError` naming the
    passage and the token.
    """
    import torch

    device = next(model.parameters()).device
    by_tokens = {cloze.tokens: cloze for cloze in sorted(clozes, key=lambda cloze: cloze.target)}
    order = sorted(by_tokens.values(), key=lambda cloze: len(cloze.tokens), reverse=True)
    result = {}
    with torch.inference_mode(), progress("answering", len(order), "passages") as advance:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            rows = [_cut_left(cloze, seq_length + 1) for cloze in batch]
            tokens_BT = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
            for row, tokens in enumerate(rows):
                tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            largest_BT, chosen_BT = model(tokens_BT[:, :-1].to(device)).max(-1)
            finite_BT = largest_BT.isfinite().tolist()
            for cloze, tokens, chosen_T, finite_T in zip(batch, rows, chosen_BT.tolist(), finite_BT, strict=True):
                targets = slice(len(tokens) - 1 - cloze.target, len(tokens) - 1)
                if not all(finite_T[targets]):
                    place = len(cloze.tokens) - cloze.target + finite_T[targets].index(False)
                    raise NonFiniteOutput(f"{cloze.where}, token {place - cloze.prefix + 1}", "NaN or infinite logits")
                result[cloze.tokens] = tuple(chosen_T[targets])
            advance(len(rows))
    return result


def _cut_left(cloze: Cloze, most: int) -> Tokens:
    """At most so many tokens: the prefix and the last others."""
    rest = most - cloze.prefix
    return cloze.tokens[: cloze.prefix] + cloze.tokens[cloze.prefix :][-rest:]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says in place of the end of a passage."""

    target: Tokens
    prediction: Tokens

    @property
    def correct(self) -> bool:
        """Whether every token is right."""
        return self.prediction == self.target

    def dump(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Plain values, tokens as texts."""
        target, prediction = (tokenizer.decode([*tokens]) for tokens in (self.target, self.prediction))
        return {"target": target, "prediction": prediction, "correct": self.correct}


def answer(
    model: "GPT", examples: Mapping[str, Sequence[Cloze]], *, seq_length: int, batch_size: int
) -> dict[str, list[Answer]]:
    """What the model says of each passage in each mode; a sequence that two modes share is computed once."""
    clozes = [cloze for mode in examples.values() for cloze in mode]
    if (longest := max(cloze.prefix + cloze.target for cloze in clozes)) > seq_length:
        raise MtError("--seq-length", f"{seq_length} is shorter than a target", f"at least {longest}")
    choices = compute_choices(model, clozes, seq_length=seq_length, batch_size=batch_size)
    return {
        mode: [Answer(c.tokens[-c.target :], choices[c.tokens][-c.target :]) for c in mode_examples]
        for mode, mode_examples in examples.items()
    }


def compute_metrics(answers: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """The accuracy of each mode, with its standard error over passages."""
    return pair_errors(
        {f"{mode}_accuracy": compute_mean([each.correct for each in row]) for mode, row in answers.items()}
    )


def list_samples(
    passages: Sequence[tuple[str, str]], answers: Mapping[str, Sequence[Answer]], tokenizer: Tokenizer
) -> Iterator[Sample]:
    """A line for each passage: where it stands, its text, and target, prediction and whether that is right by mode."""
    for number, (where, text) in enumerate(passages):
        yield {"where": where, "text": text} | {mode: row[number].dump(tokenizer) for mode, row in answers.items()}
