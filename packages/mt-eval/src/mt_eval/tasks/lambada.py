"""LAMBADA cloze accuracy: is the last word of a passage the model's first choice? (docs/specs/evaluation.md §3.3)

Strict: the last white-space separated word, however many tokens it has, after the passage without it. Published
figures are strict. Loose: the last token only. A passage counts only if every token of its target is the arg-max.

Shape suffixes: B passages in a batch, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_core.progress import progress
from mt_eval.documents import read_json_lines

if TYPE_CHECKING:
    from mt_models.models.gpt import GPT

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cloze:
    """A passage as tokens, of which the last `target` have to be predicted."""

    tokens: Tokens
    target: int


def strict(text: str, tokenizer: Tokenizer) -> Cloze:
    """The last word, tokenised with a space before it, after the stripped passage tokenised alone."""
    word = text.split()[-1]
    context = tokenizer.encode(text[: text.rindex(word)].strip())
    target = without_bos(tokenizer, tokenizer.encode(f" {word}"))
    return Cloze((*context, *target), len(target))


def without_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a word inside a text: Llama2Tokenizer begins whatever it encodes with a beginning-of-text id."""
    return ids[1:] if ids and ids[0] == getattr(tokenizer, "bos", None) else ids


def loose(text: str, tokenizer: Tokenizer) -> Cloze:
    """The last token of the passage."""
    return Cloze(tuple(tokenizer.encode(text)), 1)


MODES = {"strict": strict, "loose": loose}


def read_passages(path: Path) -> list[tuple[str, str]]:
    """`file:line` and text of every passage of a JSONL file."""
    passages = list(read_json_lines(path))
    if not passages:
        raise MtError(str(path), "holds no passages", 'lines of {"text": "…"}')
    return passages


def make_clozes(passages: Iterable[tuple[str, str]], mode: str, tokenizer: Tokenizer) -> list[Cloze]:
    """One cloze a passage `(where, text)`; a passage that leaves nothing to predict from is an error."""
    result = []
    for where, text in passages:
        if len(text.split()) < 2:
            raise MtError(where, f"passage {text!r} has fewer than two words", "a context and a last word")
        result.append(MODES[mode](text, tokenizer))
    return result


def get_max_tokens(examples: Mapping[str, Sequence[Cloze]]) -> int:
    """Tokens in the longest cloze of any mode."""
    return max(len(cloze.tokens) for mode in examples.values() for cloze in mode)


def compute_hits(
    model: "GPT", target_lengths: Mapping[Tokens, int], *, seq_length: int, batch_size: int
) -> dict[Tokens, Tokens]:
    """For each token sequence, 1 or 0 for each of its last `target_lengths` tokens: is it the arg-max, teacher forced?

    Sequences longer than `seq_length` + 1 lose tokens on the left. Batches hold sequences of similar length.
    """
    import torch

    device = next(model.parameters()).device
    order = sorted(target_lengths, key=len, reverse=True)
    result = {}
    with torch.inference_mode(), progress("answering", len(order), "passages") as advance:
        for first in range(0, len(order), batch_size):
            rows = [row[-seq_length - 1 :] for row in order[first : first + batch_size]]
            tokens_BT = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
            for row, tokens in enumerate(rows):
                tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            labels_BT = tokens_BT[:, 1:].to(device)
            hits_BT = model(tokens_BT[:, :-1].to(device)).argmax(-1) == labels_BT
            for key, tokens, hit_T in zip(order[first:], rows, hits_BT.int().tolist(), strict=False):
                result[key] = tuple(hit_T[len(tokens) - 1 - target_lengths[key] : len(tokens) - 1])
            advance(len(rows))
    return result


def count_correct(
    model: "GPT", examples: Mapping[str, Sequence[Cloze]], *, seq_length: int, batch_size: int
) -> dict[str, int]:
    """Passages answered right in each mode; a sequence that two modes share is computed once."""
    target_lengths: dict[Tokens, int] = {}
    for cloze in (cloze for mode in examples.values() for cloze in mode):
        if cloze.target > seq_length:
            raise MtError("--seq-length", f"{seq_length} is shorter than a target", f"at least {cloze.target}")
        target_lengths[cloze.tokens] = max(target_lengths.get(cloze.tokens, 0), cloze.target)
    hits_by_tokens = compute_hits(model, target_lengths, seq_length=seq_length, batch_size=batch_size)
    return {
        mode: sum(all(hits_by_tokens[c.tokens][-c.target :]) for c in mode_examples)
        for mode, mode_examples in examples.items()
    }
