"""Labelled texts of any task, and the arrays that a BERT reads of them.

Source: docs/specs/evaluation.md §3.4.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt_core.errors import MtError, Problem

if TYPE_CHECKING:
    import numpy as np

    from mt_data.tokenizers.base import MaskingTokenizer

UNLABELLED = -1
"""The label of examples that have none."""
MOST_PROBLEMS = 20
"""Problems of files that are told one by one."""
BEFORE_PUNCTUATION = re.compile(r" +([.,;:!?])(?= |$)")


@dataclass(frozen=True, slots=True)
class Example:
    """A sample before it is tokenized."""

    uid: str
    """What the file calls it."""
    texts: tuple[tuple[str, str | None], ...]
    """A first text and a second, if there is one; of multiple choice, those of each choice."""
    label: float = UNLABELLED
    """Number of its class; of tasks without classes, a float, what the text is to have."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Where texts are cut off."""

    sample: int
    """Tokens of a sample, special ones included."""
    first: int | None = None
    """Most tokens of the first text."""


def clean_text(text: str) -> str:
    """One line, with single spaces, and none before punctuation that a space or the end follows."""
    return BEFORE_PUNCTUATION.sub(r"\1", " ".join(text.split()))


def encode_pair(
    tokenizer: "MaskingTokenizer", first: Sequence[int], second: Sequence[int] | None, lengths: Lengths
) -> tuple[list[int], list[int]]:
    """Tokens and their types: CLS, the first text and SEP of type 0, the second text and SEP of type 1.

    What is too long loses its end; the last token is SEP all the same.
    """
    tokens = [tokenizer.cls, *first[: lengths.first]]
    types = [0] * (len(tokens) + 1)
    if second is not None:
        tokens += [tokenizer.sep, *second]
        types += [1] * (len(second) + 1)
    tokens = [*tokens[: lengths.sample - 1], tokenizer.sep]
    return tokens, [*types[: len(tokens) - 1], int(second is not None)]


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """Examples as samples of arrays, tokenized when they are read."""

    examples: Sequence[Example]
    tokenizer: "MaskingTokenizer"
    lengths: Lengths

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> "Mapping[str, np.ndarray | np.generic]":
        """Int64 [T], or [C, T] of C choices: `text`, `types` and `padding_mask`, 1 where text is; and `labels`,
        float32 where they are no classes."""
        import numpy as np

        example = self.examples[index]
        shape = (len(example.texts), self.lengths.sample)
        text, types, mask = np.full(shape, self.tokenizer.pad), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, (tokens, kinds) in enumerate(self._encode(example)):
            text[row, : len(tokens)], types[row, : len(tokens)], mask[row, : len(tokens)] = tokens, kinds, 1
        arrays = {"text": text, "types": types, "padding_mask": mask}
        arrays = {name: array if len(array) > 1 else array[0] for name, array in arrays.items()}
        label = np.float32(example.label) if isinstance(example.label, float) else np.int64(example.label)
        return {**arrays, "labels": label}

    def _encode(self, example: Example) -> Iterator[tuple[list[int], list[int]]]:
        """Each choice; a text that several share is tokenized once."""
        distinct = list(dict.fromkeys(text for pair in example.texts for text in pair if text is not None))
        ids = dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))
        for first, second in example.texts:
            yield encode_pair(self.tokenizer, ids[first], None if second is None else ids[second], self.lengths)


class EpochOrder:
    """Samples of one epoch after another, each shuffled anew; what an epoch has no room for, another may have."""

    def __init__(self, samples: EncodedExamples, *, epoch_samples: int, length: int, seed: int) -> None:
        self.samples, self.epoch_samples, self.length, self.seed = samples, epoch_samples, length, seed
        self.epoch, self.order = -1, list[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> "Mapping[str, np.ndarray | np.generic]":
        """The sample that stands at a place of all epochs' order."""
        import numpy as np

        epoch, place = divmod(index, self.epoch_samples)
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples)).tolist()
            self.epoch = epoch
        return self.samples[self.order[place]]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one error for what is wrong with files; the first ones are named, the others counted."""
    if not problems:
        return
    shown, rest = list(problems[:MOST_PROBLEMS]), len(problems) - MOST_PROBLEMS
    if rest > 0:
        shown.append(
            Problem(str(problems[-1].where), f"and {rest} more, of which this is the last", "correct the files")
        )
    raise MtError.from_problems(shown)


def name_sets(paths: Sequence[str]) -> list[str]:
    """A name for each file or folder: its own without suffix, with as many of its folders as set it apart."""
    parts = [(*Path(path).resolve().parent.parts, Path(path).resolve().stem) for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len({*names}) == len(names):
            return names
    twice = next((path for path in paths if paths.count(path) > 1), paths[0])
    raise MtError(twice, "is given twice", "each validation or test file once")
