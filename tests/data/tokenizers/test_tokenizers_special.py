"""Special tokens by their role, and options that a tokenizer does not read."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from data.conftest import shared
from mt_core.errors import MtError
from mt_core.plugins import components
from mt_data.config import TokenizerConfig
from mt_data.options import make_tokenizer_config
from mt_data.tokenizers import build_tokenizer, load_tokenizer
from mt_data.tokenizers.base import NoSuchToken
from mt_data.tokenizers.train import train_tokenizer

MEGATRONS = {
    *("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "SentencePieceTokenizer"),
    *("GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer", "bytes"),
}


def test_every_tokenizer_is_a_component():
    assert components("tokenizer").keys() >= MEGATRONS


def test_a_role_that_a_tokenizer_lacks():
    tokenizer = build_tokenizer(TokenizerConfig(type="bytes"))
    with pytest.raises(
        MtError, match="bytes: has no cls token; choose another tokenizer: this one has no special tokens"
    ):
        tokenizer.cls  # noqa: B018
    assert getattr(tokenizer, "pad", -1) == -1
    assert tokenizer.additional_special_tokens_ids == ()
    with pytest.raises(NoSuchToken, match="has no mask token"):
        pickle.loads(pickle.dumps(tokenizer)).mask  # noqa: B018


def test_the_text_of_a_token():
    tokenizer = build_tokenizer(TokenizerConfig(type="bytes"))
    assert tokenizer.token_text(65) == "<0x41>"
    assert {tokenizer.token_text(number): number for number in range(257)} == tokenizer.vocabulary()
    with pytest.raises(MtError, match="bytes: has no token 257; ids below 257"):
        tokenizer.token_text(257)


def test_null_reads_numbers():
    tokenizer = build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=300))
    assert (tokenizer.vocab_size, tokenizer.eod) == (301, 300)
    assert tokenizer.encode("17 4\n300  0") == [17, 4, 300, 0]
    assert tokenizer.encode_batch(["", "5"]) == [[], [5]]
    assert tokenizer.decode([17, 4]) == "17 4"
    assert tokenizer.vocabulary()["300"] == 300


@pytest.mark.parametrize("word", ["four", "-1", "301", "1.5", "٣", "²"])
def test_null_refuses_what_is_no_id(word: str):
    with pytest.raises(MtError, match=f"NullTokenizer: '{word}' is not a token id; whole numbers from 0 to 300"):
        build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=300)).encode(f"1 {word}")


def test_null_needs_its_size():
    with pytest.raises(MtError, match="NullTokenizer: needs vocab_size; give --vocab-size"):
        build_tokenizer(TokenizerConfig(type="NullTokenizer"))


def test_null_is_saved_and_loaded(tmp_path: Path):
    build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=300)).save(tmp_path)
    assert (load_tokenizer(tmp_path).vocab_size, load_tokenizer(tmp_path).eod) == (301, 300)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "bytes", "vocab_size": 5},
            "tokenizer.vocab_size: bytes has no such option; leave it out; it is for Tik",
        ),
        (
            {"type": "NullTokenizer", "vocab_size": 5, "vocab_extra_ids": 1},
            "vocab_extra_ids: NullTokenizer has no such",
        ),
        ({"type": "bytes", "tiktoken_pattern": "v1"}, "tiktoken_pattern: bytes has no such option"),
        ({"type": "bytes", "tiktoken_num_special_tokens": 9}, "it is for TikTokenizer"),
        ({"type": "bytes", "tiktoken_special_tokens": ("<a>",)}, "tiktoken_special_tokens: bytes has no such option"),
    ],
)
def test_an_option_that_would_change_nothing(config: dict[str, object], message: str):
    with pytest.raises(MtError, match=message):
        build_tokenizer(TokenizerConfig(**config))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "options", ['{"model": 3}', '{"vocab_size": "many"}', '{"colour": 1}', '["vocab_size"]'], ids=lambda text: text
)
def test_damaged_options_of_a_saved_tokenizer(tmp_path: Path, options: str):
    text = f'{{"type": "NullTokenizer", "eod": 1, "vocab_size": 2, "fingerprint": "", "options": {options}}}'
    (tmp_path / "mt_tokenizer.json").write_text(text)
    with pytest.raises(MtError, match=r"mt_tokenizer\.json: is damaged"):
        load_tokenizer(tmp_path)


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    train_tokenizer([shared("tinyshakespeare.txt")], tmp_path / "trained", vocab_size=400)
    (tmp_path / "trained" / "mt_tokenizer.json").unlink()
    return tmp_path / "trained"


def test_hugging_face_roles_come_from_its_files(hugging_face: Path, tmp_path: Path):
    config = (
        '{"eos_token": "e", "pad_token": null, "mask_token": {"content": "m"}, "additional_special_tokens": ["x", "y"]}'
    )
    (hugging_face / "tokenizer_config.json").write_text(config)
    (hugging_face / "special_tokens_map.json").write_text('{"eos_token": "o", "pad_token": "p", "cls_token": "c"}')
    tokenizer = load_tokenizer(hugging_face)
    vocabulary = tokenizer.vocabulary()
    roles = {"eos": "o", "sep": "o", "pad": "p", "mask": "m", "cls": "c", "bos": "c"}
    assert {role: getattr(tokenizer, role) for role in roles} == {
        role: vocabulary[text] for role, text in roles.items()
    }
    assert tokenizer.additional_special_tokens_ids == (vocabulary["x"], vocabulary["y"])
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.special, saved.additional_special_tokens_ids) == (
        tokenizer.special,
        (vocabulary["x"], vocabulary["y"]),
    )


def test_hugging_face_berts_sep_ends_documents(hugging_face: Path):
    text = (hugging_face / "tokenizer.json").read_text("utf-8").replace("<|endoftext|>", "<|nothing|>")
    (hugging_face / "tokenizer.json").write_text(text, "utf-8")
    (hugging_face / "tokenizer_config.json").write_text('{"cls_token": "c", "sep_token": "s"}')
    tokenizer = load_tokenizer(hugging_face)
    assert tokenizer.eod == tokenizer.sep == tokenizer.eos == tokenizer.vocabulary()["s"]


def test_hugging_face_without_names_has_no_roles(hugging_face: Path):
    (hugging_face / "tokenizer_config.json").unlink()
    with pytest.raises(MtError, match="HuggingFaceTokenizer: has no pad token"):
        load_tokenizer(hugging_face).pad  # noqa: B018


def mt(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mt_cli", "data", *args], capture_output=True, text=True)


def test_megatrons_options_reach_the_tokenizer(tmp_path: Path):
    (tmp_path / "ids.jsonl").write_text('{"text": "1 2 3"}\n{"text": "299"}\n')
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "300")
    made = mt(
        "preprocess", "--input", tmp_path / "ids.jsonl", "--output-prefix", tmp_path / "out", "--append-eod", *null
    )
    assert made.returncode == 0, made.stderr
    shown = mt("inspect", f"{tmp_path / 'out'}_text_document", "--document", "0", *null)
    assert shown.stdout.endswith("1 2 3 300\n"), shown.stderr


def test_a_model_that_several_types_read_needs_a_type(tmp_path: Path):
    with pytest.raises(
        MtError, match="--tokenizer-type: not given, and x.model fits several; SentencePieceTokenizer, GPTS"
    ):
        make_tokenizer_config({"tokenizer_model": Path("x.model")})


def test_options_by_megatrons_names():
    given = {
        "tokenizer_type": "TikTokenizer",
        "tokenizer_model": Path("v.json"),
        "vocab_size": 500,
        "tiktoken_pattern": "v1",
        "tiktoken_num_special_tokens": 20,
        "tiktoken_special_tokens": ["<unk>", "<s>", "</s>", "<x>"],
    }
    assert make_tokenizer_config(given) == TokenizerConfig(
        type="TikTokenizer",
        model="v.json",
        vocab_size=500,
        tiktoken_pattern="v1",
        tiktoken_num_special_tokens=20,
        tiktoken_special_tokens=("<unk>", "<s>", "</s>", "<x>"),
    )
    bert = {"tokenizer_type": "BertWordPieceCase", "vocab_file": Path("vocab.txt"), "vocab_extra_ids": 100}
    assert make_tokenizer_config(bert).vocab_extra_ids == 100


def test_a_saved_directory_tells_all_by_itself(tmp_path: Path):
    build_tokenizer(TokenizerConfig(type="NullTokenizer", vocab_size=300)).save(tmp_path)
    assert make_tokenizer_config({"tokenizer_model": tmp_path}) == TokenizerConfig(type="NullTokenizer", vocab_size=300)


def test_every_option_is_offered():
    shown = mt("preprocess", "--help").stdout
    tik = ("--tiktoken-pattern", "--tiktoken-num-special-tokens", "--tiktoken-special-tokens")
    for name in ("--tokenizer-type", "--tokenizer-model", "--vocab-size", "--vocab-extra-ids", *tik):
        assert f" {name} " in shown
    assert "--tiktoken-pattern" in mt("inspect", "--help").stdout
