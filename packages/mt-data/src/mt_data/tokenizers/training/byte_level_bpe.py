"""Training a byte-level BPE, the kind that GPT-2 uses, on the `tokenizers` library."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.gpt2_bpe import END_OF_TEXT
from mt_data.tokenizers.saved import write_text
from mt_data.tokenizers.training.request import TrainingRequest

SMALLEST = 257
"""Every byte and the end of document."""


def train_byte_level_bpe(request: TrainingRequest, directory: Path) -> TokenizerConfig:
    """Write vocab.json and merges.txt; the end of document has the last id, as in GPT-2."""
    if request.vocab_size < SMALLEST:
        raise MtError("--vocab-size", f"{request.vocab_size}", f"at least {SMALLEST}: all bytes and {END_OF_TEXT}")
    vocabulary, merges = _train(request)
    vocabulary[END_OF_TEXT] = len(vocabulary)
    write_text(directory / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_text(directory / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return TokenizerConfig(vocab_file=str(directory / "vocab.json"), merge_file=str(directory / "merges.txt"))


def _train(request: TrainingRequest) -> tuple[dict[str, int], list[list[str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=request.vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(request.read_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return dict(sorted(model["vocab"].items(), key=lambda pair: pair[1])), merges
