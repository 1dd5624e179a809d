"""New tokenizers of each type: the same files each time, special tokens where recipes want them, read by others too."""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bad_inputs import assert_one_clean_line, run_mt
from mt_core.errors import MtError
from mt_data.indexed.reader import IndexedReader
from mt_data.tokenizers import load_tokenizer
from mt_data.tokenizers.base import MaskingTokenizer
from mt_data.tokenizers.train import TRAINERS, train_tokenizer

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, 12 times in 1999.",
    "Naïve cafés serve Æther; the dog walks, the fox was walking.",
    "Résumé of the übermäßig lange Wörter — and the walker's walk.",
)
TEXT = "\n".join([*SENTENCES, Path(argparse.__file__).read_text("utf-8"), *SENTENCES])
SAMPLES = (*SENTENCES, "unwalkable FOXES", "the  dog\tjumps", "naïve 你好 🙂", "")
TYPES = [(name, None) for name in TRAINERS]
TYPES += [("SentencePieceTokenizer", "bpe"), ("Llama2Tokenizer", "unigram")]
SIZE = 600
EXTRA = ("BertWordPieceLowerCase", "BertWordPieceCase", "SentencePieceTokenizer")


def train(folder: Path, type: str, model_type: str | None = None, text: str = TEXT, **changes: int) -> Path:
    """A folder with a tokenizer of that type; ten extra ids where it may have any."""
    (folder / "text.txt").write_text(text, "utf-8")
    options = {"vocab_size": SIZE, "extra_ids": 10 if type in EXTRA else 0} | changes
    train_tokenizer([folder / "text.txt"], folder / "t", type=type, model_type=model_type, **options)
    return folder / "t"


def get_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("type", "model_type"), TYPES)
def test_equal_text_gives_equal_files_that_are_read_back(tmp_path: Path, type: str, model_type: str | None):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        train(folder, type, model_type)
    digests = [get_digests(folder / "t") for folder in folders]
    assert digests[0] == digests[1] == digests[2]
    tokenizer = load_tokenizer(folders[0] / "t")
    assert isinstance(tokenizer, MaskingTokenizer)
    assert tokenizer.type == type
    assert tokenizer.vocab_size == SIZE
    assert len(tokenizer.vocabulary()) == tokenizer.vocab_size
    for sentence in SENTENCES[:1]:
        decoded = tokenizer.decode(tokenizer.encode(sentence.lower()))
        assert decoded.replace(" ", "").removeprefix("<s>") == sentence.lower().replace(" ", "")
    assert max(len(tokenizer.token_text(number)) for number in tokenizer.encode("the walking dog")) > 2


@pytest.mark.usefixtures("real_processes")
@pytest.mark.parametrize("type", ["BertWordPieceLowerCase", "SentencePieceTokenizer"])
def test_neither_hash_seeds_nor_threads_change_the_files(tmp_path: Path, type: str):
    code = "import sys; from pathlib import Path; from mt_data.tokenizers.train import train_tokenizer as train\n"
    code += f"train([Path(sys.argv[1])], Path(sys.argv[2]), vocab_size={SIZE}, type={type!r})"
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    digests = []
    for number in ("1", "4"):
        environment = os.environ | {"PYTHONHASHSEED": number, "RAYON_NUM_THREADS": number, "OMP_NUM_THREADS": number}
        command = [sys.executable, "-c", code, str(tmp_path / "text.txt"), str(tmp_path / number)]
        subprocess.run(command, check=True, env=environment)
        digests.append(get_digests(tmp_path / number))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("type", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_word_pieces_are_those_of_bert(tmp_path: Path, type: str):
    from transformers import AutoTokenizer

    folder = train(tmp_path, type)
    pieces = (folder / "vocab.txt").read_text("utf-8").splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert pieces[-12:] == ["[BOS]", "[EOS]", *(f"<extra_id_{number}>" for number in range(10))]
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(tokenizer, MaskingTokenizer)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    assert tokenizer.eod == tokenizer.eos == pieces.index("[EOS]")
    assert tokenizer.additional_special_tokens_ids == tuple(range(SIZE - 10, SIZE))
    assert (len(reference), reference.pad_token_id, reference.cls_token_id) == (SIZE, 0, 2)
    assert (reference.sep_token_id, reference.mask_token_id, reference.unk_token_id) == (3, 4, 1)
    for sample in SAMPLES:
        assert tokenizer.encode(sample) == reference(sample, add_special_tokens=False).input_ids
    assert any(piece.startswith("##") and len(piece) > 4 for piece in pieces)
    assert ("Æ" in pieces) == (type == "BertWordPieceCase")


SPECIAL_SAMPLES = ("x <extra_id_3> y", "<MASK>", "dog</s>")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_of_t5s_recipe(tmp_path: Path, model_type: str):
    from transformers import AutoTokenizer

    folder = train(tmp_path, "SentencePieceTokenizer", model_type)
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(tokenizer, MaskingTokenizer)
    assert (tokenizer.pad, tokenizer.eos) == (reference.pad_token_id, reference.eos_token_id) == (0, 1)
    assert reference.unk_token_id == 2
    assert len(reference) == tokenizer.vocab_size == SIZE
    extra = [reference.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(10)]
    assert list(tokenizer.additional_special_tokens_ids) == extra
    assert reference("dog").input_ids == [*tokenizer.encode("dog"), tokenizer.eos]
    for role in ("cls", "sep", "mask", "bos"):
        assert getattr(tokenizer, role) == getattr(reference, f"{role}_token_id")
    for sample in (*SAMPLES, *SPECIAL_SAMPLES, *TEXT.splitlines()):  # the libraries round sums of scores otherwise
        assert tokenizer.encode(sample) == reference(sample, add_special_tokens=False).input_ids


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_of_llamas_recipe(tmp_path: Path, model_type: str):
    from transformers import AutoTokenizer

    folder = train(tmp_path, "Llama2Tokenizer", model_type)
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(tokenizer, MaskingTokenizer)
    assert (tokenizer.bos, tokenizer.eos) == (reference.bos_token_id, reference.eos_token_id) == (1, 2)
    assert len(reference) == tokenizer.vocab_size == SIZE
    for sample in filter(None, SAMPLES):
        assert tokenizer.encode(sample) == reference(sample).input_ids
        assert tokenizer.decode(tokenizer.encode(sample)) == sample  # bytes spell what the model has no piece for
        assert reference.decode(tokenizer.encode(sample), skip_special_tokens=True) == sample
    digits = [tokenizer.token_text(number) for number in tokenizer.encode("1999")]
    assert digits[-4:] == ["1", "9", "9", "9"]


@pytest.mark.parametrize(("type", "model_type"), TYPES)
def test_the_commands_fit_together(tmp_path: Path, type: str, model_type: str | None):
    text, folder = tmp_path / "text.txt", tmp_path / "t"
    text.write_text(TEXT, "utf-8")
    options = [*(["--model-type", model_type] if model_type else []), "--vocab-size", SIZE]
    trained = run_mt(
        "data", "train-tokenizer", "--input", text, "--output-dir", folder, "--tokenizer-type", type, *options
    )
    assert trained.returncode == 0, trained.stderr
    output = ["--output-prefix", tmp_path / "out", "--workers", 1, "--append-eod"]
    done = run_mt("data", "preprocess", "--input", text, "--tokenizer-model", folder, *output)
    assert done.returncode == 0, done.stderr
    tokenizer, reader = load_tokenizer(folder), IndexedReader(tmp_path / "out_text_document")
    assert np.array_equal(reader.get(0), [*tokenizer.encode(TEXT), tokenizer.eod])


@pytest.mark.parametrize(
    ("type", "changes", "message"),
    [
        (
            "BertWordPieceCase",
            {"vocab_size": 40},
            r"--vocab-size: 40; at least \d+: special tokens, and every character",
        ),
        ("SentencePieceTokenizer", {"vocab_size": 40}, r"--vocab-size: 40; at least \d+: special tokens, and the char"),
        ("SentencePieceTokenizer", {"text": "\n \n"}, "text.txt: hold no text to learn from; files with text in them"),
        ("BertWordPieceCase", {"text": "\n \n"}, "text.txt: hold no text to learn from; files with text in them"),
        ("GPT2BPETokenizer", {"extra_ids": 3}, "--vocab-extra-ids: GPT2BPETokenizer has no such option; for BertWord"),
        (
            "BertWordPieceCase",
            {"model_type": "bpe"},
            "--model-type: BertWordPieceCase has no such option; for Sentence",
        ),
        ("TikTokenizer", {}, "--tokenizer-type: unknown name 'TikTokenizer'"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, type: str, changes: dict[str, str], message: str):
    with pytest.raises(MtError, match=message):
        train(tmp_path, type, **changes)  # pyright: ignore[reportArgumentType]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("type", ["BertWordPieceCase", "SentencePieceTokenizer"])
def test_long_lines_and_bad_ones(tmp_path: Path, type: str):
    long = "ab " * 5_000 + "x" * 9_000
    folder = train(tmp_path, type, text=f"{TEXT}\n{long}")
    tokenizer = load_tokenizer(folder)
    assert "ab" in "".join(tokenizer.token_text(n) for n in tokenizer.encode("ab"))  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    options = ["--output-dir", tmp_path / "bad", "--vocab-size", 300, "--tokenizer-type", type]
    done = run_mt("data", "train-tokenizer", "--input", tmp_path / "a.jsonl", *options)
    assert_one_clean_line(done)
    assert "a.jsonl:1: key 'text' holds half a surrogate pair" in done.stderr
