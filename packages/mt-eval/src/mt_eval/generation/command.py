"""`mt generate`: continue prompts with the model of a checkpoint; only `mt` imports this module."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mt_core.cli.options import expand_options
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_file
from mt_data.text_io.json_documents import find_surrogate
from mt_eval.generation.choices import Choice, Prompt
from mt_eval.generation.requests import MAX_ALTERNATIVES, BeamOptions
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.options import Beginning, ModelOptions, RankOptions, TokenizerOptions
from mt_eval.report import check_output


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """The checkpoint whose model continues the prompts."""

    load_dir: Annotated[Path | None, "Checkpoint: a run, a step or a Hugging Face directory."] = None
    checkpoint: Annotated[Path | None, Argument(metavar="CKPT", help="Checkpoint, if not given as --load-dir.")] = None

    def path(self) -> Path:
        """The directory, whichever of the two options names it."""
        given = [str(path) for path in (self.load_dir, self.checkpoint) if path]
        if len(given) != 1:
            actual = f"two checkpoints, {' and '.join(given)}" if given else "no checkpoint"
            raise MtError("--load-dir", actual, "give one: a run, a step or a Hugging Face directory")
        return Path(given[0])


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """What to continue, and how far."""

    prompt: Annotated[list[str] | None, "Text to continue; may be given several times."] = None
    prompt_file: Annotated[Path | None, "A file with a prompt on each line; .gz, .zst and .bz2 are decompressed."] = (
        None
    )
    max_new_tokens: Annotated[int, Option(min=1, help="Most new tokens for each prompt.")] = 64
    seed: Annotated[int, "Seed of the draws; equal seeds give equal texts."] = 0
    bos: Beginning = None

    def texts(self) -> list[str]:
        """All prompts, those of the file last; an empty one begins a document."""
        from mt_data.text_io.texts import read_lines

        given = self.prompt or []
        raise_if(
            Problem(f"--prompt {number}", f"{prompt!r} is not UTF-8", "a text; --prompt-file names one in a file")
            for number, prompt in enumerate(given, start=1)
            if find_surrogate(prompt) is not None
        )
        lines = read_lines(self.prompt_file) if self.prompt_file else []
        return [*given, *filter(str.strip, lines)]


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How a token is chosen."""

    temperature: Annotated[float, "Logits are divided by this; above 0."] = 1.0
    top_k: Annotated[int, "Draw from this many likeliest tokens; 1 takes the likeliest, 0 is off."] = 0
    top_p: Annotated[float, "Draw from the likeliest tokens that reach this probability; 0 is off."] = 0.0
    top_p_decay: Annotated[float, "Multiply --top-p by this after every new token; 0 is off."] = 0.0
    top_p_bound: Annotated[float, "What --top-p-decay does not take --top-p below."] = 0.0

    def sampling(self) -> SamplingOptions:
        """The engine's options; `MtError` for values without meaning."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.top_p_decay, self.top_p_bound)


@dataclass(frozen=True, slots=True)
class BeamSearchOptions:
    """A search for the likeliest texts, which draws nothing."""

    beam_width: Annotated[int, Option(min=0, help="Search for this many likeliest texts of a prompt; 0 is off.")] = 0
    length_penalty: Annotated[float, "A beam's log-probability is divided by its length to this power."] = 1.0

    def beams(self, draw: DrawOptions, text: "TextOptions") -> BeamOptions | None:
        """The engine's options, if a search is asked for; `MtError` for options that have no meaning with it."""
        if not self.beam_width:
            if self.length_penalty != 1.0:
                raise MtError("--length-penalty", "there are no beams", "give --beam-width too")
            return None
        problems = []
        if draw != DrawOptions():
            problems.append(Problem("--beam-width", "together with options of drawing", "one of the two"))
        if text.stop or text.logprobs:
            actual = "together with --stop or --logprobs"
            problems.append(Problem("--beam-width", actual, "leave those out: beams end at the model's ends"))
        raise_if(problems)
        return BeamOptions(self.beam_width, self.length_penalty)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where texts end, and what is written of them."""

    stop: Annotated[list[str] | None, "End a text before this one; may be given several times."] = None
    output: Annotated[Path | None, "JSON Lines file of the new texts, one object for each prompt."] = None
    logprobs: Annotated[bool, "Write the log-probability of each new token, before temperature and filters."] = False
    top_logprobs: Annotated[
        int, Option(min=0, max=MAX_ALTERNATIVES, help="With --logprobs: how many of the likeliest tokens to write too.")
    ] = 0

    def check(self) -> None:
        """Refuse what has no meaning, before anything is computed."""
        problems = [
            Problem("--stop", f"{stop!r}", "a text in UTF-8, not empty")
            for stop in self.stop or []
            if not stop or find_surrogate(stop) is not None
        ]
        if self.logprobs and self.output is None:
            problems.append(Problem("--logprobs", "they are written to --output only", "--output FILE"))
        if self.top_logprobs and not self.logprobs:
            problems.append(Problem("--top-logprobs", "there are no log-probabilities", "give --logprobs too"))
        raise_if(problems)
        check_output(self.output)

    @property
    def log_probs(self) -> int | None:
        """What a request asks of the engine."""
        return self.top_logprobs if self.logprobs else None

    def write(self, choices: Sequence[Choice]) -> None:
        """Write the file, whole or not at all."""
        if self.output is None:
            return
        with atomic_file(self.output, "w") as file:
            for choice in choices:
                line: dict[str, object] = {"prompt": choice.prompt.text}
                if choice.beams:
                    line["beams"] = [
                        {
                            "text": answer.text,
                            "finish_reason": beam.finish,
                            "score": beam.score,
                            "logprob": beam.log_prob,
                        }
                        for answer, beam in zip(choice.write_beams(), choice.beams, strict=True)
                    ]
                else:
                    line |= {"text": choice.text, "finish_reason": choice.finish}
                if self.logprobs:
                    line["logprobs"] = [entry.document() for entry in choice.entries]
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


@expand_options
def generate(
    checkpoint: CheckpointOptions,
    prompts: PromptOptions,
    draw: DrawOptions,
    search: BeamSearchOptions,
    text: TextOptions,
    model: ModelOptions,
    ranks: RankOptions,
    tokenizer: TokenizerOptions,
) -> None:
    """Continue prompts. A single one is printed as it grows, several when all of them are done.

    Example:
      mt generate run --prompt "Once upon a time" --max-new-tokens 100 --seed 1
    """
    from mt_eval.encoding import TextEncoder
    from mt_eval.generation.engine import Engine
    from mt_eval.generation.generate import check_prompts, stream_texts
    from mt_eval.generation.ranks.processes import open_model
    from mt_eval.generation.requests import Request
    from mt_eval.load import Checkpoint, choose_ends, load_tokenizer

    sampling = draw.sampling()
    text.check()
    beams = search.beams(draw, text)
    opened = Checkpoint.open(checkpoint.path(), model.loader, model.loader_options)
    encoder = TextEncoder.create(load_tokenizer(opened, tokenizer.config()), bos=prompts.bos)
    texts = prompts.texts()
    tokens = [encoder.encode(prompt) for prompt in texts]
    check_prompts(tokens, max_new_tokens=prompts.max_new_tokens, max_seq_len=opened.loader.config().max_seq_len)
    if encoder.prefix:
        print(f"generate: every prompt begins with {encoder.describe_prefix()}", file=sys.stderr)
    ends = choose_ends(opened, encoder.tokenizer)
    requests = [
        Request(
            tuple(ids), prompts.max_new_tokens, sampling, prompts.seed, ends, text.log_probs, sample=number, beams=beams
        )
        for number, ids in enumerate(tokens)
    ]
    whole = [Prompt(tuple(ids), len(encoder.prefix), prompt) for ids, prompt in zip(tokens, texts, strict=True)]
    choices = [Choice(encoder.tokenizer, prompt, text.stop or (), spell=text.logprobs) for prompt in whole]
    with open_model(opened, model, ranks) as network:
        deltas = stream_texts(Engine(network), requests, choices)
        if len(texts) == 1 and beams is None:
            _print_growing(texts[0], (delta.text for _, delta in deltas))
        else:
            _print_all(choices, deltas)
    text.write(choices)


def _print_growing(prompt: str, grown: Iterable[str]) -> None:
    sys.stdout.write(prompt)
    for piece in grown:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _print_all(choices: Sequence[Choice], deltas: Iterable[object]) -> None:
    from mt_core.progress import progress

    with progress("generating", unit="tokens") as advance:
        for _ in deltas:
            advance(1)
    for number, choice in enumerate(choices, start=1):
        if not choice.beams:
            print(f"--- prompt {number}\n{choice.prompt.text}{choice.text}")
        for place, (answer, beam) in enumerate(zip(choice.write_beams(), choice.beams, strict=True), start=1):
            print(f"--- prompt {number}, beam {place}, score {beam.score:.4f}\n{choice.prompt.text}{answer.text}")
