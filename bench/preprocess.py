"""Compare `mt data preprocess` with the bare tokenizer library and with one encode a document, all in one run.

usage: preprocess.py [--mb 200] [--memory-mb 50 500] [--workers N] [--rounds 2]
                     [--vocab-file vocab.json --merge-file merges.txt]

The text is what is installed on this machine: Python sources and documents, each file once. Where there is less of it
than asked for, that is said; memory is then measured on the same files again. Without GPT-2's files, 50,257 ids
are trained on the first megabytes. The same tokenizer is measured as `GPT2BPETokenizer`, which tiktoken may do the work
of, and as `HuggingFaceTokenizer`, which always runs on the `tokenizers` library.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".html", ".c", ".h", ".cpp", ".hpp", ".cuh", ".cu", ".js", ""}
TRAIN_MB = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[50, 500])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2, help="of all measurements; the best of each counts")
    parser.add_argument("--vocab-file", type=Path)
    parser.add_argument("--merge-file", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        size, documents = gather(corpus, args.mb * 10**6)
        say("text", f"{size / 1e6:.0f} MB in {documents:,} files, each once; {args.workers} workers")
        gpt2, hugging_face = tokenizers(args.vocab_file, args.merge_file, corpus)
        speed(corpus, gpt2, hugging_face, workers=args.workers, rounds=args.rounds)
        for mb in args.memory_mb:
            again, have = Path(folder, "memory.jsonl"), corpus.stat().st_size
            fill(corpus, again, mb * 10**6)
            note = f" (the {have / 1e6:.0f} MB again and again)" if have < mb * 10**6 else ""
            say(
                f"peak memory, {mb} MB",
                f"{peak(again, gpt2, args.workers) / 2**20:.0f} MiB of all processes{note}",
            )


def gather(corpus: Path, limit: int) -> tuple[int, int]:
    """Write the texts as JSON lines; their bytes and how many they are."""
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc", "/usr/include"]
    size, seen = 0, set()
    with corpus.open("w") as file:
        for path in (path for root in roots for path in sorted(Path(root).rglob("*"))):
            if path.suffix not in SUFFIXES or not path.is_file() or path.stat().st_size > 4 << 20:
                continue
            try:
                text = path.read_text("utf-8")
            except (UnicodeDecodeError, PermissionError):
                continue
            if text and "\0" not in text and (mark := hashlib.md5(text.encode()).digest()) not in seen:
                seen.add(mark)
                size += len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= limit:
                break
    return size, len(seen)


def fill(source: Path, target: Path, size: int) -> None:
    """Lines of the source, from the beginning again when they are used up, until there are `size` bytes."""
    with target.open("wb") as file:
        while file.tell() < size:
            for line in source.open("rb"):
                file.write(line)
                if file.tell() >= size:
                    break


Options = dict[str, str]
"""Fields of `TokenizerConfig`."""


def tokenizers(vocab_file: Path | None, merge_file: Path | None, corpus: Path) -> tuple[Options, Options]:
    """GPT-2's files, or ones trained on the corpus, as `GPT2BPETokenizer` and as `HuggingFaceTokenizer`."""
    from mt_data.config import TokenizerConfig
    from mt_data.tokenizers import build_tokenizer
    from mt_data.tokenizers.train import train_tokenizer

    folder = corpus.with_name("tokenizer")
    if vocab_file and merge_file:
        build_tokenizer(TokenizerConfig(vocab_file=str(vocab_file), merge_file=str(merge_file))).save(folder)
    else:
        fill(corpus, corpus.with_name("train.jsonl"), TRAIN_MB * 10**6)
        train_tokenizer([corpus.with_name("train.jsonl")], folder, vocab_size=50257)
    gpt2 = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    return {"type": "GPT2BPETokenizer", **gpt2}, {"type": "HuggingFaceTokenizer", "model": str(folder)}


def speed(corpus: Path, gpt2: Options, hugging_face: Options, *, workers: int, rounds: int) -> None:
    jobs = {
        "mt data preprocess": lambda: ours(corpus, gpt2, workers),
        "mt, HuggingFaceTokenizer": lambda: ours(corpus, hugging_face, workers),
        "bare encode_batch_fast": lambda: bare(corpus, gpt2, workers),
        "one encode a document": lambda: loop(corpus, gpt2, workers),
    }
    rates = dict.fromkeys(jobs, 0.0)
    for _ in range(rounds):  # in turn, so that what else the machine does falls on all of them
        for name, job in jobs.items():
            start = time.perf_counter()
            seconds = job()
            rates[name] = max(rates[name], corpus.stat().st_size / 1e6 / (seconds or time.perf_counter() - start))
    for name, rate in rates.items():
        say(name, f"{rate:.2f} MB/s")
    for mine in list(jobs)[:2]:
        for other in list(jobs)[2:]:
            say(f"{mine} / {other}", f"{rates[mine] / rates[other]:.2f}")


def command(corpus: Path, tokenizer: Options, workers: int) -> list[str]:
    names = {"type": "tokenizer-type", "model": "tokenizer-model"}
    options = [
        part for key, value in tokenizer.items() for part in (f"--{names.get(key, key)}".replace("_", "-"), value)
    ]
    output = ["--output-prefix", str(corpus.with_name("out")), "--workers", str(workers), "--append-eod"]
    return [sys.executable, "-m", "mt_cli", "data", "preprocess", "--input", str(corpus), *options, *output]


def ours(corpus: Path, tokenizer: Options, workers: int) -> None:
    """The whole command, its start and its files included."""
    subprocess.run(command(corpus, tokenizer, workers), check=True, stdout=sys.stderr)


BARE = """
import json, sys, time
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer
tokenizer = build_tokenizer(TokenizerConfig(**json.loads(sys.argv[2])))
seconds, batch = 0.0, []
with open(sys.argv[1], "rb") as file:
    for line in file:
        batch.append(json.loads(line)["text"])
        if len(batch) == 1000:
            start = time.perf_counter(); tokenizer._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start; batch = []
start = time.perf_counter(); tokenizer._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
print(seconds + time.perf_counter() - start)
"""


def bare(corpus: Path, tokenizer: Options, workers: int) -> float:
    """Seconds in the library alone, over its own threads: nothing is read, written or turned into numbers in them."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    ran = [sys.executable, "-c", BARE, str(corpus), json.dumps(tokenizer)]
    return float(subprocess.run(ran, check=True, env=environment, capture_output=True, text=True).stdout)


@cache
def _tokenizer(options: str):
    from mt_data.config import TokenizerConfig
    from mt_data.tokenizers import build_tokenizer

    return build_tokenizer(TokenizerConfig(**json.loads(options)))


def _encode_one(work: tuple[str, str]) -> tuple[list[int], int]:
    line, options = work
    tokenizer = _tokenizer(options)
    ids = tokenizer.encode(json.loads(line)["text"])
    return [*ids, tokenizer.eod], len(line)


def loop(corpus: Path, tokenizer: Options, workers: int) -> None:
    """What Megatron's script does: a pool, lines in chunks of 32, each encoded alone, ids sent back as lists."""

    def lines() -> Iterator[tuple[str, str]]:
        with corpus.open(encoding="utf-8") as file:
            yield from ((line, json.dumps(tokenizer)) for line in file)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(workers) as pool, corpus.with_name("loop.bin").open("wb") as file:
        for ids, _ in pool.imap(_encode_one, lines(), 32):
            file.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))


def peak(corpus: Path, tokenizer: Options, workers: int) -> int:
    """Most bytes that the command and its workers had at a time, pages that they share counted once each."""
    process = subprocess.Popen(command(corpus, tokenizer, workers), stdout=subprocess.DEVNULL)
    most = 0

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            most = max(most, sum(map(proportional, [process.pid, *children(process.pid)])))
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    process.wait()
    thread.join()
    return most


def children(pid: int) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in children(child)]


def proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def say(name: str, value: str) -> None:
    print(f"{name:<36} {value}", flush=True)


if __name__ == "__main__":
    main()
