"""Log-likelihoods of continuations: how lm-evaluation-harness asks a model to choose among answers.

The one thing to know: rows of a batch are padded on the right, where causal attention never looks, so a score depends
on its own tokens alone. Continuations that follow the same tokens, as one-token answers to a question do, share a row.

Shape suffixes: B inputs in a batch, T tokens of an input, D hidden size, N places that are scored, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt_core.errors import Problem, raise_if
from mt_core.progress import progress
from mt_eval.finite import NonFiniteOutput
from mt_eval.tasks.evaluation import BATCH_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from mt_eval.generation.ranks.shared_model import SharedModel
    from mt_models.models.gpt import GPT

LOGIT_ROWS = 256
"""Places whose logits are computed at a time: with 128k token ids in fp64 they take 0.26 GB."""

Input = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to be scored, and those that they follow."""

    context: tuple[int, ...]
    """At least one token id; as many of the last ones are read as fit the model."""
    target: tuple[int, ...]
    """Token ids whose probability is asked for, at least one."""
    where: str
    """What people call it, in errors."""

    def cut(self, seq_length: int) -> Input:
        """Tokens to feed: the last `seq_length`, without the very last, which nothing follows."""
        return (*self.context, *self.target)[-(seq_length + 1) : -1]


@dataclass(slots=True)
class Score:
    """What the model thinks of a continuation."""

    log_prob: float = 0.0
    """Log-probability of the target after the context, in nats."""
    greedy: bool = True
    """Whether the model would have continued so by itself, always taking the likeliest token."""


def score_continuations(
    model: "GPT | SharedModel", continuations: Sequence[Continuation], *, seq_length: int, batch_size: int | None = None
) -> list[Score]:
    """Scores in the order of the continuations; long inputs come first, and lose tokens on the left.

    Continuations without a token, or longer than the model reads, are an `MtError`, all of them at once; so are logits
    that are not finite, at the first.
    """
    import torch

    raise_if(_find_problems(continuations, seq_length))
    by_input: dict[Input, list[int]] = {}
    for number, continuation in enumerate(continuations):
        by_input.setdefault(continuation.cut(seq_length), []).append(number)
    scores = [Score() for _ in continuations]
    with torch.inference_mode(), progress("scoring", len(continuations), "continuations") as advance:
        for inputs in _make_batches(by_input, model, batch_size):
            numbers = [by_input[tokens] for tokens in inputs]
            _score_batch(model, inputs, [[(n, continuations[n]) for n in group] for group in numbers], scores)
            advance(sum(map(len, numbers)))
    return scores


def _find_problems(continuations: Sequence[Continuation], seq_length: int) -> Iterator[Problem]:
    for continuation in continuations:
        if not continuation.target:
            yield Problem(continuation.where, "the continuation has no token beyond its context", "a longer one")
        elif (length := len(continuation.target)) > seq_length:
            actual = f"the continuation has {length} tokens, the model reads {seq_length}"
            yield Problem(continuation.where, actual, f"at most {seq_length}: raise --seq-length, or shorten it")


def _make_batches(
    inputs: dict[Input, list[int]], model: "GPT | SharedModel", batch_size: int | None
) -> Iterator[list[Input]]:
    """Inputs of similar length together, the longest first, so that memory is largest at the start."""
    order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    budget = BATCH_TOKENS[next(model.parameters()).device.type]
    first = 0
    while first < len(order):
        size = batch_size or max(1, budget // len(order[first]))
        yield order[first : first + size]
        first += size


def _score_batch(
    model: "GPT | SharedModel", inputs: list[Input], groups: list[list[tuple[int, Continuation]]], scores: list[Score]
) -> None:
    """Add what a batch says to the scores of the continuations of each of its inputs."""
    import torch

    device = next(model.parameters()).device
    tokens_BT = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.int64)
    places: list[tuple[int, int]] = []
    asked: list[tuple[int, int, Continuation, int]] = []  # row among the places, number, continuation, token
    for row, (tokens, group) in enumerate(zip(inputs, groups, strict=True)):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        first = len(places) + max(len(each.target) for _, each in group)
        places += [(row, place) for place in range(len(tokens) - (first - len(places)), len(tokens))]
        for number, each in group:
            start = first - len(each.target)
            asked += [(start + k, number, each, token) for k, token in enumerate(each.target)]
    x_BTD = model.hidden(tokens_BT.to(device))
    rows_N, places_N = (torch.tensor(column, device=device) for column in zip(*places, strict=True))
    x_ND = x_BTD[rows_N, places_N]
    asked.sort(key=lambda entry: entry[0])
    for start in range(0, len(places), LOGIT_ROWS):
        part = [entry for entry in asked if start <= entry[0] < start + LOGIT_ROWS]
        logits_NV = model.logits(x_ND[start : start + LOGIT_ROWS, None])[:, 0]
        _add_scores(logits_NV, start, part, scores)


def _add_scores(
    logits_NV: "Tensor", start: int, asked: list[tuple[int, int, Continuation, int]], scores: list[Score]
) -> None:
    import torch

    rows = torch.tensor([row - start for row, *_ in asked], device=logits_NV.device)
    tokens = torch.tensor([token for *_, token in asked], device=logits_NV.device)
    largest_N, chosen_N = logits_NV.max(-1)
    finite, chosen = largest_N.isfinite()[rows].tolist(), chosen_N[rows].tolist()
    log_probs = logits_NV.double().log_softmax(-1)[rows, tokens].tolist()
    for (_, number, each, token), ok, log_prob, choice in zip(asked, finite, log_probs, chosen, strict=True):
        if not ok:
            raise NonFiniteOutput(each.where, "NaN or infinite logits")
        scores[number].log_prob += log_prob
        scores[number].greedy &= choice == token
