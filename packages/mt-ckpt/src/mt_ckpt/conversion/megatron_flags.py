"""Flags of Megatron's own converter, typed as in its README: dropped where the files say it, or answered with ours.

Torch-free, since `mt ckpt convert` reads a command line with it.
"""

import itertools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mt_core.checkpoint.detection import recognising_loaders
from mt_core.errors import Problem

NOT_NEEDED = (
    *("--model-size", "--checkpoint-type", "--megatron-path", "--max-queue-size", "--no-checking"),
    *("--loader-transformer-impl", "--tokenizer-model", "--make-vocab-size-divisible-by"),
)
"""Flags that say what the files say, or how Megatron's program runs."""
SWITCHES = ("--no-checking", "--bf16", "--fp16")
DTYPES = {"--bf16": "bf16", "--fp16": "fp16"}
DIVISOR = "128"
"""Rows of the embedding are padded to a multiple of it, for each tensor rank, as Megatron does by default."""
ANSWERS: Mapping[str, tuple[str, str]] = {
    "--vocab-file": ("its length was Megatron's vocabulary", "give that number: --true-vocab-size N"),
    "--position-embedding-type": ("args say it", "where the files have none: --megatron-args FILE.json"),
}
NAMES = {"--loader": {"mcore": "core", "llama2": "llama_mistral", "llama2_hf": "hf"}, "--saver": {"mcore": "core"}}
"""Megatron's names of loaders and savers to ours, where they are others."""
ALIAS = "megatron"
"""Megatron's name of its own format: in its old converter, that of the old classes."""


@dataclass
class Translation:
    """A command line in our words."""

    words: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Flags that are not needed."""
    problems: list[Problem] = field(default_factory=list)


def translate_flags(args: Sequence[str], declared: Collection[str] = ()) -> Translation:
    """A command line without Megatron's flags; `declared` are flags that an installed plugin has, which stay."""
    made, rest, given = Translation(), deque(args), _read_values(args)
    while rest:
        word, equals, value = rest.popleft().partition("=")
        foreign = word in (*NOT_NEEDED, *ANSWERS, *DTYPES) and word not in declared
        if not foreign and word not in NAMES:
            made.words.append(word + equals + value)
            continue
        if not equals and word not in SWITCHES:
            value = rest.popleft() if rest else ""
        if word in NAMES:
            made.words += [word, _name(word, value, given.get("--load-dir"), made)]
        elif word in DTYPES:
            _choose_dtype(word, given, made)
        elif word in ANSWERS:
            made.problems.append(Problem(f"{word} {value}", *ANSWERS[word]))
        else:
            made.dropped.append(word)
            made.problems += _contradictions(word, value, given.get("--load-dir"))
    return made


def _read_values(args: Sequence[str]) -> dict[str, str]:
    """Each flag with the word after it."""
    pairs = ((word.partition("="), after) for word, after in itertools.zip_longest(args, args[1:], fillvalue=""))
    return {flag: value if equals else after for (flag, equals, value), after in pairs if flag.startswith("--")}


def _name(flag: str, name: str, load_dir: str | None, made: Translation) -> str:
    """Our name of a loader or saver; which of the two `megatron` means, its files say."""
    if name != ALIAS:
        return NAMES[flag].get(name, name)
    if flag == "--saver":
        return "legacy"
    known = recognising_loaders(Path(load_dir)) if load_dir else []
    if known and known[0] not in ("core", "legacy"):
        made.problems.append(Problem(f"{flag} {name}", f"{load_dir} is in {known[0]} format", f"--loader {known[0]}"))
    return known[0] if known else "core"


def _choose_dtype(flag: str, given: Mapping[str, str], made: Translation) -> None:
    others = [other for other in DTYPES if other in given and other != flag]
    asked = given.get("--dtype", DTYPES[flag])
    if others or asked != DTYPES[flag]:
        actual = f"with {', '.join(others) or f'--dtype {asked}'}"
        made.problems.append(Problem(flag, actual, f"one of them; here it is --dtype {DTYPES[flag]}"))
    elif "--dtype" not in given:
        made.words += ["--dtype", DTYPES[flag]]


def _contradictions(flag: str, value: str, load_dir: str | None) -> list[Problem]:
    """What a flag asks for that we would not do."""
    where = f"{flag} {value}"
    if flag == "--checkpoint-type" and value not in ("meta", "hf"):
        return [Problem(where, "no type of checkpoint", "leave it out: the files say whether they are meta's or hf's")]
    if flag == "--make-vocab-size-divisible-by" and value != DIVISOR:
        return [Problem(where, f"rows are padded to multiples of {DIVISOR} for each tensor rank", "leave it out")]
    if flag == "--tokenizer-model" and load_dir and not _is_inside(Path(value), Path(load_dir)):
        return [Problem(where, "the tokenizer travels with the files of --load-dir", f"copy it into {load_dir}")]
    return []


def _is_inside(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())
