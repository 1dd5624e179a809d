"""A preprocessing job: inputs and options, what can be wrong with them, and the key that tells it from others."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mt_core.errors import Problem
from mt_data.config import TokenizerConfig
from mt_data.preprocess.chunking import CuttingOptions
from mt_data.preprocess.encoding import EncodingOptions, get_tokenizer
from mt_data.text_io.inputs import InputFile, InputFormat
from mt_data.text_io.json_documents import find_surrogate
from mt_data.tokenizers import fingerprint

OnError = Literal["stop", "skip"]
Engine = Literal["local", "ray"]
LARGEST_TOKENIZER_FILE = 64 << 20
LONGEST_NAME = 230
"""Bytes of a file's name: file systems take 255, and a temporary file has a longer name than the finished one."""


@dataclass(frozen=True, slots=True)
class PreprocessJob:
    """What to preprocess, from where to where."""

    inputs: tuple[Path, ...]
    output_prefix: str
    encoding: EncodingOptions
    workers: int = 1
    on_error: OnError = "stop"
    """At a line that is not a document: stop and write nothing, or leave the line out and count it."""
    input_format: InputFormat = "auto"
    text_documents: Literal["file", "line"] = "file"
    max_line_mb: float = 32
    """Longest line, or text file, in MiB."""
    partitions: int = 1
    """Deal the documents out to so many partitions in turn, and join these in order, as Megatron does."""
    shard: tuple[int, int] = (0, 1)
    """Only this part of the input, of so many."""
    engine: Engine = "local"
    log_interval: int | None = None
    """Documents between lines of progress; None: a bar on a terminal, else a line every ten seconds."""
    shard_bytes: int = 64 << 20
    """Text between two marks in the journal: what a killed job has to do again."""

    @property
    def shard_prefix(self) -> str:
        """The output prefix, with the part of the input if it is only one."""
        part, parts = self.shard
        return f"{self.output_prefix}_{part:0{len(str(parts))}}-of-{parts}" if parts > 1 else self.output_prefix

    def prefix(self, key: str) -> str:
        """Prefix of the pair that holds a key."""
        return f"{self.shard_prefix}_{key}_{'sentence' if self.encoding.splitting else 'document'}"

    @property
    def cut(self) -> CuttingOptions:
        """How the inputs are cut into pieces."""
        return CuttingOptions(self.text_documents, self.shard, int(self.max_line_mb * 2**20), self.encoding.keys)


def find_option_conflicts(job: PreprocessJob) -> Iterator[Problem]:
    """Options that contradict each other."""
    keys, (part, parts) = job.encoding.keys, job.shard
    if len(set(keys)) < len(keys):
        yield Problem("--json-keys", f"names a key twice: {' '.join(keys)}", "each key once")
    for key in keys:
        longest = len(os.fsencode(Path(f"{job.prefix('')}.idx").name)) + len(key.encode(errors="replace"))
        if {"/", "\0"} & set(key) or find_surrogate(key) is not None or longest > LONGEST_NAME:
            shown = repr(key if len(key) < 60 else f"{key[:60]}…")
            hint = f"rename it in the data: no slash, at most {LONGEST_NAME} bytes with what stands around it"
            yield Problem("--json-keys", f"{shown} cannot be part of a file's name", hint)
    if job.partitions < 1:
        yield Problem("--partitions", f"{job.partitions}", "1 or more")
    if not 0 <= part < parts:
        yield Problem("--shard", f"{part}/{parts}", f"0/{parts} to {parts - 1}/{parts}" if parts > 0 else "such as 0/4")
    if parts > 1 and job.partitions > 1:
        yield Problem("--partitions", "deals out documents of the whole input, --shard takes a part of it", "only one")


def make_job_key(job: PreprocessJob, files: list[InputFile]) -> dict[str, Any]:
    """Everything that the output depends on; `on_error` is not in it, as finished shards are the same."""
    encoding, config = job.encoding, job.encoding.tokenizer
    return {
        "version": version("mt-data"),
        "inputs": hashlib.sha256(json.dumps([asdict(file) for file in files]).encode()).hexdigest(),
        "tokenizer": [
            config.model_dump(mode="json"),
            fingerprint(get_tokenizer(encoding)),
            *_hash_tokenizer_files(config),
        ],
        "splitting": asdict(encoding.splitting) if encoding.splitting else None,
        "options": [encoding.keys, encoding.append_eod, job.partitions, asdict(job.cut)],
    }


def _hash_tokenizer_files(config: TokenizerConfig) -> Iterator[str]:
    """Hash of every file that a tokenizer is built from; larger ones in its directory are a model's weights."""
    for value in config.model_dump(mode="json").values():
        path = Path(value) if isinstance(value, str) else None
        for file in sorted(path.iterdir()) if path and path.is_dir() else [path]:
            if file and file.is_file() and file.stat().st_size < LARGEST_TOKENIZER_FILE:
                yield hashlib.sha256(file.read_bytes()).hexdigest()
