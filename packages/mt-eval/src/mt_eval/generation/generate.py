"""Grow several prompts of different lengths in one batch, with a key/value cache.

The batch is filled up to its shortest prompt, then advances one position at a time; while a position is still inside a
longer prompt, the prompt's token is taken instead of the chosen one. No padding is ever attended to.

Shape suffixes: B prompts, T tokens, V vocabulary.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from mt_core.errors import Problem, raise_if
from mt_eval.finite import NonFiniteOutput
from mt_eval.generation.sampling import SamplingOptions, choose_tokens

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
    import torch

    check_prompts(prompts, max_new_tokens=max_new_tokens, max_seq_len=model.config.max_seq_len)
    options = options or SamplingOptions()
    if max_new_tokens == 0:
        return
    device = next(model.parameters()).device
    draws = [random.Random(f"{seed}:{index}") for index in range(len(prompts))]
    lengths = [len(prompt) for prompt in prompts]
    last = [length + max_new_tokens for length in lengths]
    position = min(lengths)
    cache = model.make_cache(len(prompts), max(last) - 1)
    tokens_BT = torch.tensor([list(prompt[:position]) for prompt in prompts], device=device)
    while any(position < end for end in last):
        with torch.inference_mode():
            logits_BV = model(tokens_BT, cache)[:, -1]
            inside = [position < length for length in lengths]
            draws_B = [0.0 if given else draw.random() for given, draw in zip(inside, draws, strict=True)]
            draws_B = torch.tensor(draws_B, dtype=torch.float64, device=device)
            finite_B = logits_BV.amax(-1).isfinite()
            chosen_B = choose_tokens(logits_BV.masked_fill(~finite_B[:, None], 0), options, draws_B)
            chosen, finite = torch.stack((chosen_B, finite_B.long())).tolist()
        for row, given in enumerate(inside):
            if not finite[row] and position < last[row]:
                raise NonFiniteOutput(f"prompt {row + 1}, after token {position}", "NaN or infinite logits")
            if given:
                chosen[row] = prompts[row][position]
            elif position < last[row]:
                if chosen[row] in ends:
                    last[row] = position
                else:
                    yield row, chosen[row]
        tokens_BT = torch.tensor(chosen, device=device)[:, None]
        position += 1


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
