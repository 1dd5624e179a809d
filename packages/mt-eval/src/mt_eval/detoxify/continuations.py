"""Texts that a model draws, as JSON lines: of nothing but the beginning of a text, or of prompts, several of each.

Text number n depends on the checkpoint, its prompt, the options, the seed and n alone. So a run that was stopped
writes, when it goes on, the file that an unbroken one writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from mt_core.errors import MtError
from mt_data.corpus.records import to_line
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_eval.encoding import TextEncoder
from mt_eval.generation.choices import Choice, Prompt
from mt_eval.generation.engine import Engine
from mt_eval.generation.generate import stream_texts
from mt_eval.generation.ranks.processes import open_model
from mt_eval.generation.requests import Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.generation.sequences import EngineOptions
from mt_eval.load import Checkpoint, choose_ends
from mt_eval.options import ModelOptions, RankOptions

Batch = Sequence[int]
"""Numbers of texts that are drawn together."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """What texts begin with, which is no part of them."""

    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What each line says of it."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How texts are drawn."""

    max_new_tokens: int
    sampling: SamplingOptions
    seed: int = 0
    batch_size: int = 32
    """Texts that are drawn together; changes the speed only."""


@dataclass(frozen=True)
class TextSource:
    """A checkpoint whose model draws texts. Its weights are read when the first text is asked for."""

    checkpoint: Checkpoint
    encoder: TextEncoder
    drawing: Drawing
    model: ModelOptions
    ranks: RankOptions
    cache_gib: float = 1.0

    def encode(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        """The prompt's tokens, and whether some had to be left out behind the prefix for want of room."""
        positions, size = self.checkpoint.loader.config().max_seq_len, len(self.encoder.prefix)
        most = positions - self.drawing.max_new_tokens
        if most <= size:
            actual = f"{self.drawing.max_new_tokens} new tokens in {positions} positions"
            raise MtError("--max-new-tokens", actual, f"1 to {positions - size - 1}")
        tokens = self.encoder.encode(prompt)
        extra = max(0, len(tokens) - most)
        return (*tokens[:size], *tokens[size + extra :]), extra > 0

    def open_engine(self, stack: ExitStack) -> Engine:
        """An engine with the weights; the stack ends the other ranks that share them."""
        rows = self.drawing.batch_size
        sizes = EngineOptions(self.cache_gib, max_running=rows)
        return Engine(stack.enter_context(open_model(self.checkpoint, self.model, self.ranks)), sizes)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return choose_ends(self.checkpoint, self.encoder.tokenizer)

    def draw(self, engine: Engine, prompts: Mapping[int, tuple[int, ...]]) -> list[Choice]:
        """A text for each number and its prompt's tokens."""
        how = self.drawing
        requests = [
            Request(tokens, how.max_new_tokens, how.sampling, how.seed, self._ends, sample=number)
            for number, tokens in prompts.items()
        ]
        size = len(self.encoder.prefix)
        choices = [Choice(self.encoder.tokenizer, Prompt(tokens, size, "")) for tokens in prompts.values()]
        for _ in stream_texts(engine, requests, choices):
            pass
        return choices

    def list_files(self, output: Path) -> tuple[Path, ...]:
        """The files of the checkpoint, by which a run that goes on knows it; none of one that is not in a directory."""
        loader = self.checkpoint.loader
        root = Path(getattr(loader, "step", None) or getattr(loader, "path", None) or self.checkpoint.path)
        return tuple(sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith(output.name)))


def write_continuations(
    source: TextSource, prompts: Sequence[TextPrompt], output: Path, *, samples: int
) -> dict[str, int]:
    """Write a line for each of `samples` texts of every prompt, and count them.

    A line has `id`, the fields of the prompt, `text`, and `finish_reason`: "stop", or "length" at `max_new_tokens`.
    """
    encoded = [source.encode(prompt.text) for prompt in prompts]
    options = {
        "drawing": asdict(source.drawing),
        "checkpoint": [str(source.checkpoint.path), source.checkpoint.loader.config().model_dump(mode="json")],
        "device": source.model.device,
        "dtype": source.model.dtype,
        "ranks": asdict(source.ranks),
        "tokens": encoded,
        "samples": samples,
    }
    step = CorpusStep("detoxify generate", output, source.list_files(output), options)

    with ExitStack() as stack:
        open_engine = cache(partial(source.open_engine, stack))  # where there is something to draw

        def produce(batch: Batch) -> StepOutput:
            produced = StepOutput()
            choices = source.draw(open_engine(), {number: encoded[number // samples][0] for number in batch})
            for number, choice in zip(batch, choices, strict=True):
                prompt, (_, cut) = prompts[number // samples], encoded[number // samples]
                line = {"id": number, **prompt.fields, "text": choice.text, "finish_reason": choice.finish}
                produced.data += to_line(line)
                produced.counts.update(
                    {"texts": 1, "tokens": choice.num_tokens} | ({"of cut prompts": 1} if cut else {})
                )
            return produced

        return run_step(step, _cut(len(prompts) * samples, source.drawing.batch_size), produce)


def _cut(count: int, size: int) -> Iterator[Batch]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
