"""`mt train --data TEXT`: everything that a run needs, decided from a text, in a configuration that can be run again.

RUN/data gets the tokens and `run.toml`, whose values lie below the user's own; each decision is printed as a line.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from mt_cli.run_config import get_table
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.loading import merge_layers, read_layers
from mt_core.errors import MtError, suggest_file
from mt_core.files import atomic_directory

if TYPE_CHECKING:
    from mt_data.indexed.reader import IndexedReader

OPTION = "--data"
PRESET = "gpt-tiny"
HELD_OUT = 0.1
"""Share of the text that is validated on."""
DOCUMENTS_TO_SPLIT = 10
"""Fewer documents are not divided; the stream of their tokens is cut in two."""
NAMES_OF_DATA = ("paths", "paths_file", "train_paths", "valid_paths", "test_paths", "split_paths_file")
RUN_FILE, SOURCE_FILE = "run.toml", "source.json"


@dataclass(frozen=True, slots=True)
class TextRun:
    """What the user said of a run from a text."""

    text: Path
    files: Sequence[Path]
    overrides: Sequence[str]
    preset: str | None

    def read_values(self) -> dict[str, Any]:
        """Everything that the user says, by a preset too."""
        return merge_layers(read_layers(self.files, self.overrides, self.preset))

    def has_model(self) -> bool:
        """Whether a preset or a file says which model; single values of --set change that of the default preset."""
        return any("model" in layer.values for layer in read_layers(self.files, (), self.preset))


def prepare_text_run(run: TextRun, tell: Callable[[str], None]) -> Path:
    """Tokenize the text into RUN/data, unless that is done, and return the configuration; `tell` prints a decision."""
    if not run.text.is_file():
        hint = "a directory" if run.text.is_dir() else "no such file"
        raise MtError(f"{OPTION} {run.text}", hint, "a text file" if run.text.is_dir() else suggest_file(run.text))
    values = run.read_values()
    _check_data(get_table(values, "data"))
    run_dir = Path(str(get_table(values, "runtime").get("run_dir", f"{run.text.name.partition('.')[0]}-run")))
    folder, checkpoint = run_dir / "data", get_table(values, "checkpoint")
    init = checkpoint.get("init")
    tokenizer = get_table(values, "data").get("tokenizer") or _find_tokenizer(init, checkpoint)
    source = {"text": _hash_file(run.text), "tokenizer": tokenizer}
    if folder.exists():
        _check_source(folder, source)
        tell(f"data        {folder}, made before from the same text")
        return folder / RUN_FILE
    with atomic_directory(folder) as temporary:
        data = _tokenize(run.text, folder, temporary, tokenizer, tell)
        settings = _decide({**data, "tokenizer": tokenizer}, run_dir, init=init, has_model=run.has_model())
        (temporary / RUN_FILE).write_text(tomli_w.dumps(settings), "utf-8")
        (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", "utf-8")
    if "preset" in settings:
        tell(f"model       preset {PRESET}, which trains on a CPU; --preset NAME takes another")
    tell(f"batch       {settings['batch']['global_batch']} sequences a step")
    tell(f"written to  {folder / RUN_FILE}; --set section.field=value changes any of it")
    return folder / RUN_FILE


def _check_data(data: Mapping[str, Any]) -> None:
    """The text is all data of the run."""
    if given := [name for name in NAMES_OF_DATA if data.get(name)]:
        raise MtError(f"data.{given[0]}", f"is given beside {OPTION}", "leave one of them out")
    if (kind := data.get("kind", "gpt")) not in ("gpt", "fim"):
        raise MtError(OPTION, f"a text, but data.kind is {kind!r}", "name prepared data in data.paths")


def _find_tokenizer(init: str | None, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's tokenizer if there is one to start from; else bytes, which need no training and no files."""
    if not init:
        return {"type": "bytes"}
    from mt_data.tokenizers.build import detect_tokenizer

    loader, _, path = init.partition(":")
    options = get_table(checkpoint, "init_options")
    files = list(open_checkpoint(Path(path), loader, options).tokenizer_files())
    if not files:
        raise MtError("checkpoint.init", f"{init} has no tokenizer", "name one: --set data.tokenizer.type=…")
    config = detect_tokenizer(files[0].parent)
    return {"type": config.type} | config.model_dump(exclude_defaults=True)


def _tokenize(
    text: Path, folder: Path, temporary: Path, tokenizer: Mapping[str, Any], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write the corpora; their fields of the data section, with `folder` in their names."""
    from mt_data.config import TokenizerConfig
    from mt_data.indexed.reader import IndexedReader
    from mt_data.preprocess.command import choose_worker_count
    from mt_data.preprocess.encoding import EncodingOptions
    from mt_data.preprocess.job import PreprocessJob
    from mt_data.preprocess.run import preprocess
    from mt_data.text_io.inputs import guess_format
    from mt_data.tokenizers import build_tokenizer

    config = TokenizerConfig.model_validate(tokenizer)
    size = build_tokenizer(config).vocab_size
    tell(f"tokenizer   {config.type}: {size:,} ids")
    job = PreprocessJob(
        inputs=(text,),
        output_prefix=str(temporary / "all"),
        encoding=EncodingOptions(config, ("text",), True, None),
        workers=choose_worker_count([text]),
        input_format=guess_format(text) or "text",
    )
    report = preprocess(job)
    prefix = job.prefix("text")
    reader = IndexedReader(prefix)
    if not reader.token_count:
        raise MtError(f"{OPTION} {text}", "holds no text", "a file with more of it")
    name = f"{report.documents:,} document{'s' if report.documents > 1 else ''}"
    tell(f"data        {text}: {name}, {reader.token_count:,} tokens, the last tenth to validate on; in {folder}")
    if reader.document_count >= DOCUMENTS_TO_SPLIT:
        return {"paths": [str(folder / Path(prefix).name)], "split": f"{1 - HELD_OUT:g},{HELD_OUT:g},0"}
    _cut_stream(reader, temporary)
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).unlink()
    return {"train_paths": [str(folder / "train")], "valid_paths": [str(folder / "valid")]}


def _cut_stream(reader: "IndexedReader", folder: Path) -> None:
    """Write the first tokens as the pair `train` and the others as `valid`; the document between them is cut."""
    import numpy as np

    from mt_data.indexed.writer import IndexedWriter

    boundary, begin = max(1, round((1 - HELD_OUT) * reader.token_count)), 0
    with (
        IndexedWriter(folder / "train", reader.dtype) as train,
        IndexedWriter(folder / "valid", reader.dtype) as valid,
    ):
        for number in range(len(reader)):
            tokens = reader.get(number)
            here = min(max(boundary - begin, 0), len(tokens))
            for writer, part in ((train, tokens[:here]), (valid, tokens[here:])):
                if len(part):
                    writer.add_document(part, np.array([len(part)]))
            begin += len(tokens)


def _decide(data: Mapping[str, Any], run_dir: Path, *, init: str | None, has_model: bool) -> dict[str, Any]:
    """The values of run.toml: where nothing else says so, a preset that a CPU trains and a batch that it likes."""
    settings: dict[str, Any] = {
        "data": data,
        "batch": {"micro_batch": 16, "global_batch": 16},
        "train": {"eval_every": 100, "eval_batches": 4},
        "runtime": {"run_dir": str(run_dir)},
    }
    if init:
        return settings
    if not has_model:
        settings = {"preset": PRESET, **settings}
    return {**settings, "model": {"vocab_size": "tokenizer"}}


def _check_source(folder: Path, source: Mapping[str, Any]) -> None:
    """Refuse tokens that another text, or another tokenizer, has made."""
    try:
        made = json.loads((folder / SOURCE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        made = {}
    if made != source:
        what = "tokenizer" if made.get("text") == source["text"] else "text"
        actual = f"was not made from this {what}"
        raise MtError(str(folder), actual, "choose another directory: --set runtime.run_dir=DIR, or remove it")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tell_decision(text: str) -> None:
    """Print a decision on stderr."""
    print(f"mt: {text}", file=sys.stderr, flush=True)
