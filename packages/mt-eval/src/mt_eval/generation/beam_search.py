"""Beam search: the `width` likeliest texts of a prompt, kept side by side (docs/specs/evaluation.md §4.1).

A step looks at the 2 · width likeliest continuations of all open beams; more where several tokens are ends, so that
`width` of them end nothing. Those that end are finished if they are among the first `width`; the first `width` of the
rest are the open beams of the next step. A score is the sum of the log-probabilities of the new tokens, the end
included, divided by their number to the power of the length penalty.

Shape suffixes: N open beams, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence as Values
from typing import TYPE_CHECKING, Literal

from mt_eval.generation.log_probs import find_likeliest
from mt_eval.generation.requests import Beam, BeamOptions, Request
from mt_eval.generation.sequences import CachedModel, Sequence

if TYPE_CHECKING:
    from torch import Tensor


class BeamSearch:
    """The open and the finished beams of one request, and their sequences in the cache."""

    def __init__(self, request: Request, options: BeamOptions, cached: CachedModel, sequence: Sequence) -> None:
        """Begin with the sequence of the prompt, which was opened for `options.width` copies."""
        self.options, self.sequences = options, [sequence]
        self._request, self._cached = request, cached
        self._sums = [0.0]
        self._finished: list[Beam] = []

    @property
    def new_tokens(self) -> int:
        """Tokens of each open beam."""
        return len(self.sequences[0].tokens) - len(self._request.prompt)

    def advance(self, logits_NV: "Tensor") -> list[Beam] | None:
        """Extend the open beams by the logits that follow them; all beams, the best first, once the search has ended.

        It ends at `max_new_tokens`, where open beams compete with the finished ones; or before, when `width` beams are
        finished and the worst of them is no worse than the best open one, were that to end as it is.
        """
        length, ends, width = self.new_tokens + 1, self._request.ends, self.options.width
        chosen = list[tuple[int, int, float]]()
        for rank, (parent, token, total) in enumerate(self._find_candidates(logits_NV)):
            if token not in ends:
                chosen.append((parent, token, total))
            elif rank < width:
                self._finish(self._write_text(parent), total, length, "stop")
        chosen = chosen[:width]
        if length == self._request.max_new_tokens:
            for parent, token, total in chosen:
                self._finish((*self._write_text(parent), token), total, length, "length")
            return self._finished
        best = max((self._score(total, length) for _, _, total in chosen), default=None)
        if best is None or (len(self._finished) == width and self._finished[-1].score >= best):
            return self._finished
        self._follow([parent for parent, _, _ in chosen])
        for sequence, (_, token, _) in zip(self.sequences, chosen, strict=True):
            sequence.tokens.append(token)
        self._sums = [total for _, _, total in chosen]
        return None

    def close(self) -> None:
        """Give all blocks back."""
        for sequence in self.sequences:
            self._cached.close(sequence)
        self.sequences = []

    def _find_candidates(self, logits_NV: "Tensor") -> Values[tuple[int, int, float]]:
        """The likeliest continuations as (number of the beam, token, sum of log-probabilities), the likeliest first."""
        import torch

        count = (1 + max(len(self._request.ends), 1)) * self.options.width
        sums_N1 = torch.tensor(self._sums, dtype=torch.float64, device=logits_NV.device)[:, None]
        totals = (logits_NV.double().log_softmax(-1) + sums_N1).flatten()
        best, places = find_likeliest(totals[None], min(count, len(totals)))
        pairs = zip(places[0].tolist(), best[0].tolist(), strict=True)
        vocab = logits_NV.shape[-1]
        return [(place // vocab, place % vocab, total) for place, total in pairs if total > -torch.inf]

    def _score(self, total: float, length: int) -> float:
        return total / length**self.options.length_penalty

    def _write_text(self, parent: int) -> tuple[int, ...]:
        return tuple(self.sequences[parent].tokens[len(self._request.prompt) :])

    def _finish(self, tokens: tuple[int, ...], total: float, length: int, finish: Literal["stop", "length"]) -> None:
        """Keep a beam if it is among the best `width`; of equal ones those that came first."""
        self._finished.append(Beam(tokens, self._score(total, length), total, finish))
        self._finished.sort(key=lambda beam: -beam.score)
        del self._finished[self.options.width :]

    def _follow(self, parents: Values[int]) -> None:
        """Make the sequences those of the next open beams: copies of their parents, and for the last child itself."""
        children = Counter(parents)
        for number, sequence in enumerate(self.sequences):
            if not children[number]:
                self._cached.close(sequence)
        following = list[Sequence]()
        for parent in parents:
            children[parent] -= 1
            sequence = self.sequences[parent]
            following.append(self._cached.fork(sequence) if children[parent] else sequence)
        self.sequences = following
