"""What a job did, counted as it goes; small enough to stand in every line of the journal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from mt_core.errors import Problem
from mt_data.preprocess.encoding import EncodedPiece

EXAMPLES = 5
"""Skipped lines that the report names."""


@dataclass(slots=True)
class Report:
    """What was done."""

    documents: int = 0
    """Lines that became documents, empty ones included."""
    skipped: int = 0
    """Lines that did not."""
    examples: list[Problem] = field(default_factory=list)
    """The first of them."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Of each key, end-of-document ids included."""
    sequences: dict[str, int] = field(default_factory=dict)
    """Of each key."""
    empty: dict[str, int] = field(default_factory=dict)
    """Of each key, documents without a token."""
    bytes: int = 0
    """Of the text, decompressed."""
    disk_bytes: int = 0
    """Of the input on the disk."""
    resumed_bytes: int = 0
    """How many of `bytes` an earlier run had done."""
    seconds: float = 0.0
    """Of this run."""

    def count(self, piece: EncodedPiece) -> None:
        """Add a piece."""
        for key, encoded in piece.keys.items():
            self.tokens[key] = self.tokens.get(key, 0) + len(encoded.tokens)
            self.sequences[key] = self.sequences.get(key, 0) + len(encoded.lengths)
            self.empty[key] = self.empty.get(key, 0) + int((encoded.sequences == 0).sum())
        self.documents += len(next(iter(piece.keys.values())).sequences)
        self.skipped += len(piece.problems)
        self.examples += piece.problems[: EXAMPLES - len(self.examples)]
        self.bytes += piece.bytes
        self.disk_bytes += piece.disk_bytes

    @property
    def all_tokens(self) -> int:
        """Tokens of all keys."""
        return sum(self.tokens.values())

    @property
    def megabytes_per_second(self) -> float:
        """Text that this run got through."""
        return (self.bytes - self.resumed_bytes) / 1e6 / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` takes them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The report that an earlier run left, its bytes counted as resumed."""
        problems = [Problem(**problem) for problem in values["examples"]]
        return cls(**{**values, "examples": problems, "resumed_bytes": values["bytes"], "seconds": 0.0})
