"""The generation engine: requests come and go at any step, and share one pass over the model and one cache.

A step gives one token to every request whose prompt is computed, and what is left of its budget of tokens to prompts,
the oldest first. A request starts when there are blocks for all of its tokens, so none has to be stopped halfway; it
waits its turn. A request that could never have enough blocks is refused at once.

Shape suffixes: N tokens of a pass, D hidden size, V vocabulary.
"""

import random
from collections import deque
from collections.abc import Sequence as Values
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mt_core.errors import Problem, raise_if
from mt_eval.finite import ADVICE
from mt_eval.generation.beam_search import BeamSearch
from mt_eval.generation.requests import Finish, Output, Request, Stats, TokenLogProb
from mt_eval.generation.sequences import CachedModel, Decoded, EngineOptions, Sequence

if TYPE_CHECKING:
    from torch import Tensor

    from mt_eval.generation.ranks.shared_model import SharedModel
    from mt_models.models.gpt import GPT

LOG_PROB_ROWS = 32
"""Tokens of a prompt whose log-probabilities are computed at a time."""


@dataclass(slots=True)
class Running:
    """A request that has blocks."""

    id: int
    request: Request
    sequence: Sequence
    draws: random.Random
    prompt_log_probs: list[TokenLogProb | None] = field(default_factory=lambda: [None])
    search: BeamSearch | None = None

    @property
    def sequences(self) -> list[Sequence]:
        """All that it has in the cache: the beams of a search, else one."""
        return self.search.sequences if self.search else [self.sequence]

    @property
    def new_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.sequence.tokens) - len(self.request.prompt)


class Engine:
    """Runs requests together, each as if it were alone."""

    def __init__(self, model: "GPT | SharedModel", options: EngineOptions | None = None) -> None:
        """The model is in eval mode, or one that ranks share; the cache is allocated at once."""
        self.options, self.config = options or EngineOptions(), model.config
        self.cached = CachedModel(model, self.options)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Running] = {}
        self._next_id = 0

    @property
    def idle(self) -> bool:
        """Nothing waits or runs."""
        return not self._waiting and not self._running

    @property
    def stats(self) -> Stats:
        """What the engine is doing now."""
        pool = self.cached.pool
        return Stats(len(self._running), len(self._waiting), pool.free, pool.blocks, self.cached.prefix_hits)

    def add(self, request: Request) -> int:
        """Put a request into the queue and return its id; `MtError` for one that can never run."""
        raise_if(self.find_problems(request))
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def find_problems(self, request: Request) -> list[Problem]:
        """Why a request can never run on this engine."""
        problems, vocab = [], self.config.vocab_size
        if wrong := next((token for token in request.prompt if token >= vocab), None):
            problems.append(Problem("prompt", f"token {wrong} is not in the vocabulary", f"ids below {vocab}"))
        length, most = len(request.prompt), self.config.max_seq_len
        if length + request.max_new_tokens > most:
            actual = f"{length} tokens and {request.max_new_tokens} new ones exceed the model's {most} positions"
            problems.append(Problem("prompt", actual, f"at most {most} together"))
        elif (needed := request.width * self.cached.count_blocks(_longest(request))) > self.cached.pool.blocks:
            blocks, size = self.cached.pool.blocks, self.cached.pool.block_size
            actual = f"needs {needed} blocks of {size} tokens, the cache has {blocks}"
            problems.append(Problem("prompt", actual, "a larger cache (cache_gib), or fewer tokens"))
        if request.width > (most := self.options.max_running):
            problems.append(Problem("beam_width", f"{request.width}", f"at most {most} (max_running)"))
        return problems

    def remove(self, request: int) -> None:
        """Forget a request and give its blocks back at once; one that has ended is no longer there to forget."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != request)
        running = self._running.pop(request, None)
        if running is not None and running.search is not None:
            running.search.close()
        elif running is not None:
            self.cached.close(running.sequence)

    def step(self) -> list[Output]:
        """Start what can start, compute one pass, and return what has become known, at most one output a request."""
        outputs = self._start()
        parts = self._plan()
        if not parts:
            return outputs
        if (decoded := self._decode(parts)) is not None:
            return outputs + self._draw([running for running, *_ in parts], decoded)
        x_ND = self.cached.run([(sequence, count) for _, sequence, count in parts])
        ready, first = [], 0
        for running, sequence, count in parts:
            problem = self._score_prompt(running, x_ND[first : first + count])
            first += count
            if problem is not None:
                outputs.append(self._fail(running, problem))
            elif not sequence.left:
                ready.append((running, first - 1))
        if not ready:
            return outputs
        logits_NV = self.cached.compute_logits(x_ND[[row for _, row in ready]])
        decoded = Decoded(logits_NV, logits_NV.amax(-1).isfinite().tolist())
        return outputs + self._draw([running for running, _ in ready], decoded)

    def _decode(self, parts: Values[tuple[Running, Sequence, int]]) -> Decoded | None:
        """Compute a step of one token a sequence as it was recorded; None if it is another step, or none is."""
        scored = any(running.request.prompt_log_probs and not running.new_tokens for running, *_ in parts)
        if scored or any(count > 1 for *_, count in parts):
            return None
        return self.cached.decode([sequence for _, sequence, _ in parts])

    def _start(self) -> list[Output]:
        """Give blocks to waiting requests in their order; those that have nothing to compute end here."""
        outputs, width = [], sum(running.request.width for running in self._running.values())
        while self._waiting and width + self._waiting[0][1].width <= self.options.max_running:
            number, request = self._waiting[0]
            if request.max_new_tokens == 0 and not request.prompt_log_probs:
                outputs.append(Output(number, None, finish="length"))
            else:
                reuse = not request.prompt_log_probs
                sequence = self.cached.open(request.prompt, _longest(request), reuse=reuse, copies=request.width)
                if sequence is None:
                    break
                draws = random.Random(f"{request.seed}:{request.sample}")
                self._running[number] = running = Running(number, request, sequence, draws)
                if request.beams is not None:
                    running.search = BeamSearch(request, request.beams, self.cached, sequence)
                width += request.width
            self._waiting.popleft()
        return outputs

    def _plan(self) -> list[tuple[Running, Sequence, int]]:
        """Which sequences compute how many tokens in this step: single ones first."""
        all_running = [(running, sequence) for running in self._running.values() for sequence in running.sequences]
        singles = [(running, sequence, 1) for running, sequence in all_running if sequence.left == 1]
        budget, prompts = self.cached.chunk_tokens - len(singles), []
        for running, sequence in all_running:
            if budget and (left := sequence.left) > 1:
                prompts.append((running, sequence, min(left, budget)))
                budget -= prompts[-1][-1]
        return singles + prompts

    def _score_prompt(self, running: Running, x_ND: "Tensor") -> str | None:
        """Keep the log-probabilities of the prompt's tokens that follow these rows; what is wrong with their logits."""
        from mt_eval.generation.log_probs import score_tokens

        request, sequence = running.request, running.sequence
        scores = running.prompt_log_probs
        if not request.prompt_log_probs or len(scores) == len(request.prompt):
            return None
        targets = request.prompt[len(scores) : len(scores) + len(x_ND)]
        for start in range(0, len(targets), LOG_PROB_ROWS):
            rows = slice(start, min(start + LOG_PROB_ROWS, len(targets)))
            logits_NV = self.cached.compute_logits(x_ND[rows])
            finite = logits_NV.amax(-1).isfinite().tolist()
            if False in finite:
                return _describe_place(sequence.computed - len(x_ND) + start + finite.index(False) + 1)
            scores += score_tokens(logits_NV, targets[rows], request.log_probs or 0)
        return None

    def _draw(self, ready: Values[Running], decoded: Decoded) -> list[Output]:
        """Draw a token of each request from the logits that follow its last one."""
        from mt_eval.generation.sampling import choose_each

        logits_NV, finite = decoded.logits_NV, decoded.finite
        failed = {running.id: running for running, is_finite in zip(ready, finite, strict=True) if not is_finite}
        outputs = [self._fail(running, _describe_place(running.sequences[0].computed)) for running in failed.values()]
        good = [row for row, running in enumerate(ready) if running.id not in failed]
        single = [row for row in good if ready[row].search is None]
        options = [ready[row].request.sampling.after(ready[row].new_tokens) for row in single]
        if decoded.likeliest is not None and all(option.greedy for option in options):
            tokens = [decoded.likeliest[row] for row in single]
        else:
            draws = [
                0.0 if option.greedy else ready[row].draws.random() for row, option in zip(single, options, strict=True)
            ]
            tokens = choose_each(logits_NV[single], options, draws)
        for row, token in zip(single, tokens, strict=True):
            outputs.append(self._emit(ready[row], token, logits_NV[row : row + 1]))
        searches = {ready[row].id: ready[row] for row in good if ready[row].search is not None}
        for running in searches.values():
            outputs += self._advance(running, logits_NV[[row for row in good if ready[row] is running]])
        return outputs

    def _advance(self, running: Running, logits_NV: "Tensor") -> list[Output]:
        """Take a beam search a token further; its only output, if it ends."""
        assert running.search is not None
        beams = running.search.advance(logits_NV)
        if beams is None:
            return []
        return [self._end(running, Output(running.id, None, beams=tuple(beams)), beams[0].finish)]

    def _emit(self, running: Running, token: int, logits_1V: "Tensor") -> Output:
        """Append a token to its request, and end the request if it is the last."""
        from mt_eval.generation.log_probs import score_tokens

        request, first = running.request, running.new_tokens == 0
        prompt = tuple(running.prompt_log_probs) if first and request.prompt_log_probs else None
        if request.max_new_tokens == 0:
            return self._end(running, Output(running.id, None, prompt_log_probs=prompt), "length")
        log_prob, alternatives = None, ()
        if request.log_probs is not None:
            (score,) = score_tokens(logits_1V, [token], request.log_probs)
            log_prob, alternatives = score.log_prob, score.alternatives
        running.sequence.tokens.append(token)
        output = Output(running.id, token, log_prob, alternatives, prompt)
        if token in request.ends:
            return self._end(running, output, "stop")
        return self._end(running, output, "length") if running.new_tokens == request.max_new_tokens else output

    def _fail(self, running: Running, problem: str) -> Output:
        return self._end(running, Output(running.id, None, error=problem), "error")

    def _end(self, running: Running, output: Output, finish: Finish) -> Output:
        self.remove(running.id)
        return replace(output, finish=finish)


def _longest(request: Request) -> int:
    """Tokens that a request has in the cache at its end: the last one is drawn, but never computed."""
    return len(request.prompt) + max(request.max_new_tokens - 1, 0)


def _describe_place(tokens: int) -> str:
    return str(Problem(f"after token {tokens}", "the model computes NaN or infinite logits here", ADVICE))
