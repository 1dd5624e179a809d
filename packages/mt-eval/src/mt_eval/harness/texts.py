"""Texts that go on until a stop string, as lm-evaluation-harness asks for them, through the generation engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError, Problem, raise_if
from mt_eval.finite import NonFiniteOutput
from mt_eval.generation.requests import Output, Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.generation.text import Detokenizer, StopFinder

if TYPE_CHECKING:
    from mt_eval.generation.engine import Engine

MAX_NEW_TOKENS = 256
"""Most new tokens where a task says nothing, as everywhere in lm-evaluation-harness."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most new tokens; the first that is given counts."""
DRAW = ("do_sample", "temperature", "top_k", "top_p")
"""Names of what says how a token is chosen."""
NEUTRAL: Mapping[str, object] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "use_cache": True,
}
"""Settings that change nothing with this value, which some tasks give; any other value is refused."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How far a text goes and how its tokens are chosen."""

    stops: tuple[str, ...]
    """The text ends before the first of these that is complete."""
    max_new_tokens: int
    sampling: SamplingOptions

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any], where: str) -> "TextOptions":
        """The options that a task's `generation_kwargs` ask for; `MtError` for those that cannot be obeyed.

        The likeliest token is taken unless `do_sample` or a temperature above 0 asks for draws.
        """
        rest = dict(kwargs)
        until = rest.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [length for name in LENGTHS if (length := rest.pop(name, None)) is not None]
        draw = {name: rest.pop(name, None) for name in DRAW}
        raise_if(_find_problems(until, lengths, draw, rest, f"{where}: generation_kwargs"))
        draws = bool(draw["temperature"]) if draw["do_sample"] is None else draw["do_sample"]
        sampling = SamplingOptions(top_k=1)
        if draws:
            temperature = 1.0 if draw["temperature"] is None else float(draw["temperature"])
            top_p = 0.0 if draw["top_p"] in (None, 1) else float(draw["top_p"])
            sampling = SamplingOptions(temperature, int(draw["top_k"] or 0), top_p)
        stops = tuple(filter(None, until))
        return cls(stops, int(lengths[0]) if lengths else MAX_NEW_TOKENS, sampling)

    def check(self, seq_length: int, where: str) -> None:
        """Refuse more new tokens than leave room for a prompt."""
        if not 0 < self.max_new_tokens < seq_length:
            actual = f"{self.max_new_tokens} new tokens in a model that reads {seq_length}"
            raise MtError(f"{where}: max_gen_toks", actual, f"1 to {seq_length - 1}")


def _find_problems(
    until: object, lengths: Sequence[object], draw: Mapping[str, object], rest: Mapping[str, object], where: str
) -> Iterator[Problem]:
    """What is of a wrong type, and what cannot be obeyed."""
    if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
        yield Problem(where, f"until = {until!r}", "a text or a list of texts")
    for length in lengths:
        if type(length) is not int:
            yield Problem(where, f"{length!r} new tokens", "a whole number")
    for name, value in draw.items():
        if value is not None and (type(value) is bool) is not (name == "do_sample"):
            yield Problem(where, f"{name} = {value!r}", "true or false" if name == "do_sample" else "a number")
        elif value is not None and not isinstance(value, int | float):
            yield Problem(where, f"{name} = {value!r}", "a number")
    allowed = f"until, {', '.join((*LENGTHS, *DRAW))}"
    for name, value in rest.items():
        if name not in NEUTRAL or NEUTRAL[name] != value:
            yield Problem(where, f"{name} = {value!r} is not supported", allowed)


@dataclass(slots=True)
class _Growing:
    """A text that is being made."""

    pieces: Detokenizer
    finder: StopFinder
    hidden: frozenset[int]
    """Special tokens, which are no text."""
    text: str = ""

    def push(self, output: Output) -> bool:
        """Add what a step brought; whether a stop string has ended the text."""
        if output.token is not None and output.finish != "stop" and output.token not in self.hidden:
            self.text += self.finder.push(self.pieces.push(output.token))
        if output.finish and not self.finder.stopped:
            self.text += self.finder.push(self.pieces.flush())
            self.text += "" if self.finder.stopped else self.finder.flush()
        return self.finder.stopped


def generate_texts(
    engine: "Engine",
    prompts: Sequence[Sequence[int]],
    options: Sequence[TextOptions],
    *,
    tokenizer: Tokenizer,
    ends: frozenset[int],
    seq_length: int,
    seed: int = 0,
) -> list[str]:
    """What follows each prompt, up to a stop string, an end or the most new tokens; decoded without the prompt.

    A prompt that leaves too little room loses tokens on the left. Draws depend on the seed and the place among prompts.
    """
    from mt_core.progress import progress

    hidden = frozenset(
        (*getattr(tokenizer, "special", {}).values(), *getattr(tokenizer, "additional_special_tokens_ids", ()))
    )
    results, running = [""] * len(prompts), dict[int, tuple[int, _Growing]]()
    left = iter(range(len(prompts)))
    with progress("generating", len(prompts), "texts") as advance:
        while True:
            while not engine.stats.waiting and (number := next(left, None)) is not None:
                option = options[number]
                prompt = tuple(prompts[number])[-(seq_length - option.max_new_tokens) :]
                request = Request(prompt, option.max_new_tokens, option.sampling, seed, ends, sample=number)
                growing = _Growing(Detokenizer(tokenizer), StopFinder(option.stops), hidden)
                running[engine.add(request)] = number, growing
            if engine.idle:
                return results
            for output in engine.step():
                number, growing = running[output.request]
                if output.finish == "error":
                    raise NonFiniteOutput(f"generate_until, request {number + 1}", "NaN or infinite logits")
                if growing.push(output) or output.finish:
                    engine.remove(output.request)
                    results[number] = growing.text
                    del running[output.request]
                    advance(1)
