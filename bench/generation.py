"""Time the generation engine beside transformers' generate: same random weights, prompts and device, in one process.

Both take the likeliest token each time. Requests of one length are transformers' best case. Of mixed lengths it has one
batch, padded on the left, which runs until the longest has ended; only tokens that were asked for count.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mt_ckpt.huggingface.config import write_config
from mt_ckpt.huggingface.families.llama import LLAMA
from mt_core.config.loading import read_preset
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.generation.sequences import EngineOptions
from mt_models.canonical import canonical_state
from mt_models.config import GPTConfig
from mt_models.models.gpt import GPT

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run of all requests took."""

    seconds: float
    first_token_s: float
    """Until the median request had its first token."""
    tokens: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        """New tokens, prompts' time included."""
        return sum(map(len, self.tokens)) / self.seconds


def build(preset: str, device: torch.device, dtype: torch.dtype, overrides: dict[str, Any]) -> GPT:
    """Our model of a preset's shape with random weights."""
    config = GPTConfig.model_validate(read_preset(preset).values["model"] | overrides)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = config.build()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.05)
    return model.eval().requires_grad_(False)


def build_theirs(model: GPT, attention: str) -> Any:
    """The model of transformers with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weight = next(model.parameters())
    described = write_config(LLAMA, model.config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with weight.device:
            theirs = LlamaForCausalLM(LlamaConfig(**described, attn_implementation=attention)).eval()
    finally:
        torch.set_default_dtype(before)
    state = {LLAMA.names.theirs(name): tensor for name, tensor in canonical_state(model).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return theirs


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts, and how many new tokens follow each."""

    prompts: Prompts
    new: Sequence[int]

    @property
    def most_blocks(self) -> int:
        """Blocks of 16 tokens for all requests."""
        return sum(-(-(len(prompt) + new) // 16) for prompt, new in zip(self.prompts, self.new, strict=True))


def make_load(count: int, length: int, new: int, vocab: int, *, mixed: bool = False) -> Load:
    """Random prompts of this length, or of a quarter of it up to it with as different numbers of new tokens."""
    draws = random.Random(1)
    lengths = [draws.randint(length // 4, length) if mixed else length for _ in range(count)]
    news = [draws.randint(new // 4, new) if mixed else new for _ in range(count)]
    return Load([draws.choices(range(vocab), k=each) for each in lengths], news)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_engine(engine: Engine, load: Load) -> Timing:
    """Add all requests at once and step until they have ended."""
    synchronize()
    started = time.perf_counter()
    greedy = SamplingOptions(top_k=1)
    requests = [Request(tuple(prompt), new, greedy) for prompt, new in zip(load.prompts, load.new, strict=True)]
    numbers = [engine.add(request) for request in requests]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    firsts: dict[int, float] = {}
    while not engine.idle:
        for output in engine.step():
            firsts.setdefault(output.request, time.perf_counter() - started)
            assert output.token is not None, output.error
            tokens[output.request].append(output.token)
    return Timing(
        time.perf_counter() - started, statistics.median(firsts.values()), [tokens[number] for number in numbers]
    )


def time_theirs(model: Any, load: Load) -> Timing:
    """One call of generate for all prompts, and one for a token of each, which is when it has the first ones."""
    width = max(map(len, load.prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in load.prompts], device=model.device)
    lengths = torch.tensor([[len(prompt)] for prompt in load.prompts], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - lengths).long()

    def generate(count: int) -> tuple[float, Any]:
        synchronize()
        started = time.perf_counter()
        options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
        result = model.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
        return time.perf_counter() - started, [row[:new] for row, new in zip(result, load.new, strict=True)]

    first, _ = generate(1)
    seconds, tokens = generate(max(load.new))
    return Timing(seconds, first, tokens)


def compare(ours: Callable[[], Timing], theirs: Callable[[], Timing], repeats: int) -> None:
    """Print both sides' best of some runs taken in turn, and how many tokens agree."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    best = [min((pair[side] for pair in pairs), key=lambda timing: timing.seconds) for side in range(2)]
    for name, timing in zip(("mt", "transformers"), best, strict=True):
        speed, first = timing.tokens_per_second, timing.first_token_s
        print(f"{name:<13} {speed:>10,.1f} tokens/s   {timing.seconds:>8.3f} s   first token {first * 1e3:>8,.0f} ms")
    places = [
        a == b for each in zip(*(timing.tokens for timing in best), strict=True) for a, b in zip(*each, strict=True)
    ]
    ratio = best[0].tokens_per_second / best[1].tokens_per_second
    print(f"ratio {ratio:.2f}, equal tokens {sum(places) / len(places):.1%}")


def make_engine(model: GPT, load: Load, chunk_tokens: int, *, graphs: bool = True) -> Engine:
    """An engine whose cache has room for all requests, and which reuses nothing of earlier ones."""
    count = len(load.prompts)
    sizes = {"blocks": load.most_blocks, "max_running": count, "chunk_tokens": max(chunk_tokens, count)}
    return Engine(model, EngineOptions(**sizes, graphs=graphs, prefix_reuse=False))
