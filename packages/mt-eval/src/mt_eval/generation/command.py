"""`mt generate`: continue prompts with the model of a checkpoint; only `mt` imports this module."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mt_core.cli.options import expand_options
from mt_core.contracts import Tokenizer
from mt_core.errors import MtError, Problem, raise_if
from mt_eval.options import Beginning, ModelOptions, TokenizerOptions

UNFINISHED = "\ufffd"
"""What the first bytes of a character decode to before the last one arrives."""


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
        from mt_data.text_io.json_documents import find_surrogate
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


@expand_options
def generate(
    checkpoint: CheckpointOptions,
    prompts: PromptOptions,
    draw: DrawOptions,
    model: ModelOptions,
    tokenizer: TokenizerOptions,
) -> None:
    """Continue prompts. A single one is printed as it grows, several when all of them are done.

    Example:
      mt generate run --prompt "Once upon a time" --max-new-tokens 100 --seed 1
    """
    from mt_eval.encoding import TextEncoder
    from mt_eval.generation.generate import check_prompts, stream
    from mt_eval.generation.sampling import SamplingOptions
    from mt_eval.load import Checkpoint, load_model, load_tokenizer, read_ends

    options = SamplingOptions(draw.temperature, draw.top_k, draw.top_p, draw.top_p_decay, draw.top_p_bound)
    opened = Checkpoint.open(checkpoint.path(), model.loader, model.loader_options)
    encoder = TextEncoder.create(load_tokenizer(opened, tokenizer.config()), bos=prompts.bos)
    texts = prompts.texts()
    tokens = [encoder.encode(text) for text in texts]
    positions = opened.loader.config().max_seq_len
    check_prompts(tokens, max_new_tokens=prompts.max_new_tokens, max_seq_len=positions)
    network = load_model(opened, device=model.device, dtype=model.dtype)
    if encoder.prefix:
        print(f"generate: every prompt begins with {encoder.describe_prefix()}", file=sys.stderr)
    end = getattr(encoder.tokenizer, "eod", None)
    steps = stream(
        network,
        tokens,
        max_new_tokens=prompts.max_new_tokens,
        options=options,
        seed=prompts.seed,
        ends=read_ends(opened) or ({end} if end is not None else ()),
    )
    plain = [encoder.encode_plain(text) for text in texts]
    if len(texts) == 1:
        _print_growing(texts[0], decode_pieces((token for _, token in steps), encoder.tokenizer, plain[0]))
    else:
        _print_all(texts, steps, encoder.tokenizer, plain)


def decode_pieces(tokens: Iterable[int], tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Iterator[str]:
    """Pieces of text as tokens arrive; a character waits until its last byte has arrived.

    A piece is what the decoded whole has beyond the decoded prompt, as a first token decoded alone may lose its space.
    """
    ids = list(prompt)
    printed = len(tokenizer.decode(ids)) if ids else 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(UNFINISHED):
            yield text[printed:]
            printed = len(text)
    if len(text := tokenizer.decode(ids)) > printed:
        yield text[printed:]


def _print_growing(prompt: str, grown: Iterable[str]) -> None:
    sys.stdout.write(prompt)
    for piece in grown:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def _print_all(
    prompts: list[str], steps: Iterable[tuple[int, int]], tokenizer: Tokenizer, encoded: Sequence[Sequence[int]]
) -> None:
    from mt_core.progress import progress

    new: list[list[int]] = [[] for _ in prompts]
    with progress("generating", unit="tokens") as advance:
        for prompt, token in steps:
            new[prompt].append(token)
            advance(1)
    for number, (prompt, before, ids) in enumerate(zip(prompts, encoded, new, strict=True), start=1):
        print(f"--- prompt {number}\n{prompt}{''.join(decode_pieces(ids, tokenizer, before))}")
