"""Training a byte-level BPE, the kind that GPT-2 uses, on the `tokenizers` library."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mt_core.errors import MtError
from mt_core.files import atomic_directory
from mt_core.progress import progress
from mt_data.config import TokenizerConfig
from mt_data.text_io.json_documents import parse_chunk
from mt_data.text_io.lines import COMPRESSED, check_inputs, read_chunks
from mt_data.tokenizers.gpt2_bpe import END_OF_TEXT, GPT2BPETokenizer
from mt_data.tokenizers.saved import write_text

SMALLEST = 257
"""Every byte and the end of document."""


def train_tokenizer(
    inputs: Sequence[Path], output_dir: Path, *, vocab_size: int, key: str = "text"
) -> GPT2BPETokenizer:
    """Train on the texts of the inputs and write a folder that mt, Megatron and transformers read.

    The end of document has the last id, as in GPT-2. The same input gives the same files.
    """
    if vocab_size < SMALLEST:
        raise MtError("--vocab-size", f"{vocab_size}", f"at least {SMALLEST}: all bytes and {END_OF_TEXT}")
    check_inputs(inputs)
    with atomic_directory(output_dir) as directory:
        vocabulary, merges = _train(inputs, key, vocab_size - 1)
        vocabulary[END_OF_TEXT] = len(vocabulary)
        write_text(directory / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
        write_text(directory / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        _open_tokenizer(directory).save(directory)
    if len(vocabulary) < vocab_size:
        note = f"the text has {len(vocabulary)} distinct tokens to offer, {vocab_size} were asked for"
        print(f"train-tokenizer: {note}", file=sys.stderr)
    return _open_tokenizer(output_dir)


def _open_tokenizer(directory: Path) -> GPT2BPETokenizer:
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    return GPT2BPETokenizer(TokenizerConfig(vocab_file=str(vocab), merge_file=str(merges)))


def _train(inputs: Sequence[Path], key: str, vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_read_texts(inputs, key), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return dict(sorted(model["vocab"].items(), key=lambda pair: pair[1])), merges


def _read_texts(inputs: Sequence[Path], key: str) -> Iterator[str]:
    """Texts under `key` of .jsonl and .json files, and the lines of all others; .gz and .zst are seen through."""
    with progress("read", unit="texts") as advance:
        for path in inputs:
            inner = Path(path.stem) if path.suffix in COMPRESSED else path
            for chunk in read_chunks(path):
                if inner.suffix in (".jsonl", ".json"):
                    documents, problems = parse_chunk(chunk, (key,))
                    if problems:
                        raise MtError.from_problems(problems[:1])
                    yield from (text for (text,) in documents)
                else:
                    yield from (line.decode(errors="replace") + "\n" for line in chunk.lines)
                advance(len(chunk.lines))
