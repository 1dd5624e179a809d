"""Tokenizers: their ids, their end of document, and that what is saved is what is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from data.conftest import shared
from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer, fingerprint, load_tokenizer
from mt_data.tokenizers.train import train_tokenizer

BYTES = TokenizerConfig(type="bytes")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train_tokenizer([shared("tinyshakespeare.txt")], tmp_path / "trained", vocab_size=600)
    return tmp_path / "trained"


def test_gpt2_ids_equal_transformers(gpt2: TokenizerConfig, texts: list[str]):
    ours = build_tokenizer(gpt2)
    reference = GPT2Tokenizer.from_pretrained(Path(gpt2.vocab_file or "").parent)
    sample = [*texts, "naïve  café\t\n\n 12345 don't 🙂 日本語\u00a0\u200b"]
    assert ours.encode_batch(sample) == reference(sample)["input_ids"]
    assert [ours.encode(text) for text in sample[-3:]] == ours.encode_batch(sample[-3:])
    assert (ours.vocab_size, ours.eod) == (50257, 50256)
    assert isinstance(ours, Tokenizer)


def test_known_gpt2_ids(gpt2: TokenizerConfig):
    assert build_tokenizer(gpt2).encode("Hello world") == [15496, 995]


def test_gpt2_text_cannot_forge_the_end_of_a_document(gpt2: TokenizerConfig):
    tokenizer = build_tokenizer(gpt2)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(gpt2: TokenizerConfig):
    assert build_tokenizer(gpt2).decode(build_tokenizer(gpt2).encode("🙂")[:1]) == "\ufffd"
    assert build_tokenizer(BYTES).decode([0xFF, 0x41, 256]) == "\ufffdA<|endoftext|>"


@given(text=st.text())
def test_bytes_round_trip(text: str):
    tokenizer = build_tokenizer(BYTES)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_hugging_face_ids_equal_transformers_without_added_tokens(trained: Path, texts: list[str]):
    ours = build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(trained)))
    reference = AutoTokenizer.from_pretrained(trained)
    sample = [*texts[:50], "two<|endoftext|>documents"]
    assert ours.encode_batch(sample) == reference(sample, add_special_tokens=False)["input_ids"]
    assert (ours.vocab_size, ours.eod) == (len(reference), reference.eos_token_id) == (600, 599)


def test_hugging_face_special_tokens_in_a_text_are_recognised(trained: Path):
    tokenizer = build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(trained / "tokenizer.json")))
    assert tokenizer.eod in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"eos_token": "th"}),
        ("tokenizer_config.json", {"eos_token": {"content": "th", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "th"}),
        ("config.json", {"eos_token_id": 300}),
        ("generation_config.json", {"eos_token_id": [300, 301]}),
    ],
)
def test_where_the_end_of_document_is_found(trained: Path, tmp_path: Path, name: str, value: dict[str, object]):
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (model / name).write_text(json.dumps(value))
    tokenizer = build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(model)))
    assert tokenizer.eod == (tokenizer.encode("th")[0] if "eos_token" in value else 300)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eod == tokenizer.eod


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "HuggingFaceTokenizer", "bytes"])
def test_a_saved_tokenizer_is_loaded_as_it_was(trained: Path, tmp_path: Path, kind: str):
    files = {"vocab_file": str(trained / "vocab.json"), "merge_file": str(trained / "merges.txt")}
    tokenizer = build_tokenizer(TokenizerConfig(type=kind, model=str(trained), **files))
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(tokenizer)
    assert (loaded.eod, loaded.vocab_size) == (tokenizer.eod, tokenizer.vocab_size)
    assert loaded.encode("To be, or not to be") == tokenizer.encode("To be, or not to be")
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert json.loads((tmp_path / "saved" / "mt_tokenizer.json").read_text())["type"] == kind


def test_transformers_reads_a_saved_gpt2(gpt2: TokenizerConfig, tmp_path: Path):
    build_tokenizer(gpt2).save(tmp_path / "saved")
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reference("Hello world")["input_ids"] == [15496, 995]
    assert (reference.eos_token_id, len(reference)) == (50256, 50257)


def test_saving_over_the_own_files_changes_nothing(trained: Path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    load_tokenizer(trained).save(trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_a_directory_without_our_file_is_told_by_its_names(trained: Path):
    (trained / "mt_tokenizer.json").unlink()
    assert type(load_tokenizer(trained)).__name__ == "HuggingFaceTokenizer"
    (trained / "tokenizer.json").unlink()
    assert type(load_tokenizer(trained)).__name__ == "GPT2BPETokenizer"
    (trained / "vocab.json").unlink()
    with pytest.raises(MtError, match=r"holds no tokenizer; mt_tokenizer\.json, tokenizer\.json, or vocab\.json and"):
        load_tokenizer(trained)


def test_fingerprints_are_equal_where_ids_mean_the_same(trained: Path, gpt2: TokenizerConfig):
    as_gpt2 = load_tokenizer(trained)
    as_hugging_face = build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(trained)))
    assert fingerprint(as_gpt2) == fingerprint(as_hugging_face)
    assert len({fingerprint(t) for t in (as_gpt2, build_tokenizer(gpt2), build_tokenizer(BYTES))}) == 3


def test_a_tokenizer_of_another_package_has_a_fingerprint_too():
    class Letters:
        vocab_size, eod = 3, 2

        def decode(self, ids: list[int]) -> str:
            return "".join("ab."[i] for i in ids)

    class Others(Letters):
        def decode(self, ids: list[int]) -> str:
            return "".join("ba."[i] for i in ids)

    assert fingerprint(Letters()) != fingerprint(Others())  # pyright: ignore


def test_files_changed_behind_our_back(trained: Path):
    vocabulary = json.loads((trained / "vocab.json").read_text("utf-8"))
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (trained / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(MtError, match=r"holds a tokenizer other than the one that mt_tokenizer\.json describes"):
        load_tokenizer(trained)
    (trained / "mt_tokenizer.json").write_text("{}")
    with pytest.raises(MtError, match=r"mt_tokenizer\.json: is damaged"):
        load_tokenizer(trained)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "GPT2BPETokenizer: needs vocab_file; give --vocab-file"),
        ({"type": "HuggingFaceTokenizer"}, "needs model; give --tokenizer-model"),
        ({"type": "HuggingFaceTokenize"}, "unknown name 'HuggingFaceTokenize'; did you mean 'HuggingFaceTokenizer'"),
        ({"vocab_file": "vocab.txt"}, r"tokenizer\.vocab_file: no file vocab\.txt"),
    ],
)
def test_an_incomplete_configuration(config: dict[str, str], message: str):
    with pytest.raises(MtError, match=message):
        build_tokenizer(TokenizerConfig(**config))


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("<html>", "", r"vocab\.json: is not JSON"),
        ("[1]", "", r"vocab\.json: does not map tokens to ids"),
        ('{"a": 0}', "", r"vocab\.json: lacks 256 tokens that a byte-level vocabulary has"),
        (None, "#version: 0.2\na b c\n", r"merges\.txt:2: 'a b c' is not a merge"),
        (None, "#version: 0.2\nqq zz\n", r"merges\.txt: does not fit the vocabulary"),
        (None, b"\xff\xfe", r"merges\.txt: is not UTF-8 text"),
    ],
)
def test_wrong_gpt2_files(trained: Path, vocab: str | None, merges: str | bytes, message: str):
    if vocab is not None:
        (trained / "vocab.json").write_text(vocab)
    (trained / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    files = {"vocab_file": str(trained / "vocab.json"), "merge_file": str(trained / "merges.txt")}
    with pytest.raises(MtError, match=message):
        build_tokenizer(TokenizerConfig(**files))


def test_a_last_merge_without_a_newline_counts(trained: Path):
    files = {"vocab_file": str(trained / "vocab.json"), "merge_file": str(trained / "merges.txt")}
    text, merges = "To be, or not to be", trained / "merges.txt"
    ids = build_tokenizer(TokenizerConfig(**files)).encode(text)
    merges.write_text(merges.read_text("utf-8").rstrip("\n"), "utf-8")
    assert build_tokenizer(TokenizerConfig(**files)).encode(text) == ids


def test_wrong_hugging_face_files(tmp_path: Path):
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(tmp_path))
    with pytest.raises(MtError, match=r"tokenizer\.json: does not exist; a tokenizer\.json or a directory"):
        build_tokenizer(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MtError, match=r"tokenizer\.json: is not a tokenizer\.json"):
        build_tokenizer(config)


def test_a_damaged_tokenizer_config(trained: Path):
    (trained / "tokenizer_config.json").write_text("{")
    with pytest.raises(MtError, match=r"tokenizer_config\.json: is not JSON"):
        build_tokenizer(TokenizerConfig(type="HuggingFaceTokenizer", model=str(trained)))


def test_training_twice_gives_the_same_files(trained: Path, tmp_path: Path):
    code = "import sys; from pathlib import Path; from mt_data.tokenizers.train import train_tokenizer as train\n"
    code += "train([Path(sys.argv[1])], Path(sys.argv[2]), vocab_size=600)"
    subprocess.run([sys.executable, "-c", code, shared("tinyshakespeare.txt"), tmp_path / "again"], check=True)
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }
    assert sorted(p.name for p in trained.iterdir()) == [
        "merges.txt",
        "mt_tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_training_reads_json_lines(jsonl: Path, tmp_path: Path, texts: list[str]):
    tokenizer = train_tokenizer([jsonl], tmp_path / "t", vocab_size=400)
    assert (tokenizer.vocab_size, tokenizer.eod) == (400, 399)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode())


def test_training_stops_at_a_bad_line(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(MtError, match=r"t\.jsonl:2: has no key 'text', only 'txt'"):
        train_tokenizer([tmp_path / "t.jsonl"], tmp_path / "out", vocab_size=300)
    assert not list(tmp_path.glob("out*"))


def test_training_says_when_the_text_has_too_few_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "t.txt").write_text("abab\n")
    assert train_tokenizer([tmp_path / "t.txt"], tmp_path / "out", vocab_size=900).vocab_size < 300
    assert "distinct tokens to offer, 900 were asked for" in capsys.readouterr().err


def test_training_refuses_too_small_a_vocabulary_and_an_existing_folder(tmp_path: Path):
    (tmp_path / "t.txt").write_text("abab\n")
    with pytest.raises(MtError, match="--vocab-size: 256; at least 257"):
        train_tokenizer([tmp_path / "t.txt"], tmp_path / "out", vocab_size=256)
    with pytest.raises(MtError, match="already exists"):
        train_tokenizer([tmp_path / "t.txt"], tmp_path, vocab_size=300)
