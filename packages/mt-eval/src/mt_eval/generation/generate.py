"""Continue prompts with the generation engine: token by token as they become known, or all at once."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mt_core.errors import Problem, raise_if
from mt_eval.finite import NonFiniteOutput
from mt_eval.generation.choices import Choice, Delta
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import Output, Request
from mt_eval.generation.sampling import SamplingOptions

if TYPE_CHECKING:
    from mt_models.models.gpt import GPT

Prompts = Sequence[Sequence[int]]


def generate(
    model: "GPT",
    prompts: Prompts,
    *,
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    seed: int = 0,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Up to `max_new_tokens` new tokens for each prompt; one that draws one of `ends` ends before it.

    A prompt's draws depend on the seed and its place among the prompts, never on the other prompts.
    """
    result: list[list[int]] = [[] for _ in prompts]
    steps = stream(model, prompts, max_new_tokens=max_new_tokens, options=options, seed=seed, ends=ends)
    for prompt, token in steps:
        result[prompt].append(token)
    return result


def stream(
    model: "GPT",
    prompts: Prompts,
    *,
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    seed: int = 0,
    ends: Collection[int] = (),
) -> Iterator[tuple[int, int]]:
    """Yield (index of the prompt, new token) as soon as each token is known; parameters are those of `generate`.

    Logits without a finite maximum are an `MtError` naming the prompt and the token that they follow.
    """
    check_prompts(prompts, max_new_tokens=max_new_tokens, max_seq_len=model.config.max_seq_len)
    sampling = options or SamplingOptions()
    requests = [
        Request(tuple(prompt), max_new_tokens, sampling, seed, frozenset(ends), sample=number)
        for number, prompt in enumerate(prompts)
    ]
    for number, output in run_requests(Engine(model), requests):
        if output.token is not None and output.finish != "stop":
            yield number, output.token


def run_requests(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[int, Output]]:
    """Yield (index of the request, output) until all have ended; `MtError` if one ends with an error."""
    requests = list(requests)
    numbers = {engine.add(request): number for number, request in enumerate(requests)}
    lengths = [len(request.prompt) for request in requests]
    while not engine.idle:
        for output in engine.step():
            number = numbers[output.request]
            if output.finish == "error":
                where = f"prompt {number + 1}, after token {lengths[number]}"
                raise NonFiniteOutput(where, "NaN or infinite logits")
            lengths[number] += 1
            yield number, output


def stream_texts(engine: Engine, requests: Sequence[Request], choices: Sequence[Choice]) -> Iterator[tuple[int, Delta]]:
    """Yield (index of the request, what an output adds to its choice) until all have ended.

    A request whose text has come to a stop string leaves the engine at once.
    """
    for number, output in run_requests(engine, requests):
        delta = choices[number].add(output)
        if delta.finish and not output.finish:
            engine.remove(output.request)
        yield number, delta


def check_prompts(prompts: Prompts, *, max_new_tokens: int, max_seq_len: int) -> None:
    """Refuse, in one report, prompts that are empty or leave too little room for the new tokens."""
    problems = []
    if not prompts:
        problems.append(Problem("--prompt", "no prompt", "give at least one --prompt, or a --prompt-file"))
    if max_new_tokens < 0:
        problems.append(Problem("--max-new-tokens", f"{max_new_tokens}", "0 or more"))
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            problems.append(Problem(f"prompt {number}", "has no tokens", "at least one token"))
        elif len(prompt) + max_new_tokens > max_seq_len:
            actual = f"{len(prompt)} tokens and {max_new_tokens} new ones exceed the model's {max_seq_len} positions"
            room = max_seq_len - len(prompt)
            shorter = f"a prompt of at most {max_seq_len - 1} tokens"
            allowed = f"--max-new-tokens {room} or less" if room > 0 else shorter
            problems.append(Problem(f"prompt {number}", actual, allowed))
    raise_if(problems)
