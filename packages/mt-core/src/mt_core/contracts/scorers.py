"""What says how toxic a text is."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol


class ToxicityScorer(Protocol):
    """Kind `toxicity-scorer`: how toxic texts are.

    Keyword-only parameters of `__init__` are options of `mt task detoxify score` and `evaluate`.
    """

    name: ClassVar[str]
    """What scored lines call it."""
    identity: str
    """Everything beside the text that a score depends on; scores of another identity are never taken for its own."""
    batch_size: int
    """How many texts it is given at a time."""

    def __init__(self, api_key: str) -> None:
        """`api_key` is what `--api-key` or its environment variable says; empty if neither does."""
        ...

    def score(self, texts: Sequence[str]) -> Sequence[Mapping[str, float] | str]:
        """The scores of each text, from 0 to 1, `toxicity` among them; or a text that says why it has none.

        No text is blank. What is wrong with the scorer itself, and not with a text, is an `MtError`.
        """
        ...
