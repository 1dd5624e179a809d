"""TikTokenizer: ids, special tokens, patterns, and what is wrong with a vocabulary file."""

import base64
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conftest import shared
from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer, fingerprint, load_tokenizer
from mt_data.tokenizers.train import train_tokenizer

PATTERNS = ["v1", "v2"]
ODD = [
    "don't STOP McDonald's HTTPServer éÉ 12345 ٣٤ ２",
    "a\r\n\r\n  b\t\n c   d \n\n   ",
    "x = f(a)//b\n/* */ --> $5.00",
    "日本語の文章、東京。\u0301e\u0301 ǅ ª",
    "<unk><s></s><SPECIAL_5><mask>",
    "🙂\u200d👍 \u00a0\u3000",
    "",
]


def entry(rank: int, token: bytes) -> dict[str, Any]:
    return {
        "rank": rank,
        "token_bytes": base64.b64encode(token).decode(),
        "token_str": token.decode(errors="replace"),
    }


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The bytes, then 700 tokens, most of them merged from Shakespeare; `</s>` is among them."""
    from mt_data.tokenizers.gpt2_bpe import get_byte_letters

    trained = train_tokenizer([shared("tinyshakespeare.txt")], tmp_path_factory.mktemp("bpe") / "t", vocab_size=950)
    byte = {letter: number for number, letter in enumerate(get_byte_letters())}
    spelled = sorted(trained.vocabulary().items(), key=lambda pair: pair[1])[256:-1]
    return (
        [bytes([i]) for i in range(256)]
        + [bytes(byte[c] for c in text) for text, _ in spelled]
        + [b"</", b"s>", b"</s>", b"qX"]
    )


@pytest.fixture
def vocabulary(tokens: list[bytes], tmp_path: Path) -> Path:
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps([entry(rank, token) for rank, token in enumerate(tokens)]))
    return path


@pytest.fixture
def tik(vocabulary: Path, tokens: list[bytes]) -> Callable[..., Any]:
    def tokenizer(special: int = 10, **options: Any) -> Any:
        options = {"vocab_size": len(tokens) + special, **options}
        config = TokenizerConfig(
            type="TikTokenizer", model=str(vocabulary), tiktoken_num_special_tokens=special, **options
        )
        return build_tokenizer(config)

    return tokenizer


def test_special_tokens_come_first_and_bytes_after_them(tik: Callable[..., Any], tokens: list[bytes]):
    tokenizer = tik(10)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod) == (1, 2, 2)
    assert [tokenizer.token_text(i) for i in (0, 1, 2, 3, 9, 10 + 97)] == [
        *("<unk>", "<s>", "</s>", "<SPECIAL_3>", "<SPECIAL_9>", "a"),
    ]
    assert tokenizer.vocab_size == len(tokens) + 10 == len(tokenizer.vocabulary())
    assert tokenizer.encode("\x00a") == [10, 107]
    assert getattr(tokenizer, "pad", -1) == -1


def test_more_special_tokens_have_roles(tik: Callable[..., Any]):
    names = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    tokenizer = tik(8, tiktoken_special_tokens=names)
    assert (tokenizer.mask, tokenizer.pad, tokenizer.cls, tokenizer.sep) == (3, 4, 5, 6)
    assert tokenizer.token_text(7) == "<SPECIAL_7>"


def test_a_larger_file_is_used_as_far_as_the_size_goes(tik: Callable[..., Any], tokens: list[bytes]):
    tokenizer = tik(10, vocab_size=300)
    assert tokenizer.vocab_size == 300
    assert max(tokenizer.encode(shared("tinyshakespeare.txt").read_text("utf-8")[:5000])) < 300


def test_special_tokens_in_a_text_are_ordinary(tik: Callable[..., Any]):
    tokenizer = tik(10)
    assert min(tokenizer.encode("<unk><s></s><SPECIAL_5>")) >= 10
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert tokenizer.decode([1, 10 + 97, 2]) == "<s>a</s>"


def test_bytes_that_spell_a_special_token_are_another_token(tik: Callable[..., Any], tokens: list[bytes]):
    tokenizer = tik(10)
    assert tokenizer.vocabulary()["</s>"] == 2
    assert tokenizer.vocabulary()["</s> "] == 10 + tokens.index(b"</s>")


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), pattern=st.sampled_from(PATTERNS))
def test_any_text_is_decoded_as_it_was(text: str, pattern: str):
    tokenizer = any_text_tokenizer(pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def any_text_tokenizer(pattern: str, built: dict[str, Any] = {}) -> Any:  # noqa: B006
    if pattern not in built:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bytes.json"
            path.write_text(json.dumps([entry(i, bytes([i])) for i in range(256)]))
            config = TokenizerConfig(
                type="TikTokenizer", model=str(path), vocab_size=266, tiktoken_num_special_tokens=10
            )
            built[pattern] = build_tokenizer(config.model_copy(update={"tiktoken_pattern": pattern}))
    return built[pattern]


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tik: Callable[..., Any]):
    assert tik(10).decode([10 + 0xFF, 10 + 97]) == "\ufffda"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_equal_megatrons(tik: Callable[..., Any], vocabulary: Path, texts: list[str], pattern: str):
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import SPECIAL_TOKENS, TikTokenTokenizer

    ours = tik(10, tiktoken_pattern=pattern, tiktoken_special_tokens=tuple(SPECIAL_TOKENS))
    reference = TikTokenTokenizer(str(vocabulary), num_special_tokens=10, pattern=pattern, vocab_size=ours.vocab_size)
    wiki = shared("wikitext103_test.txt").read_text("utf-8")[:200_000].replace("<unk>", "unk").split("\n")
    sample = [*texts, *wiki, *(text for text in ODD if "<s>" not in text)]  # in which it would find special tokens
    assert ours.encode_batch(sample) == [reference.text_to_ids(text) for text in sample]
    assert (ours.vocab_size, ours.eod, ours.bos) == (reference.vocab_size, reference.eod, reference.bos_id)
    assert (ours.pad, ours.mask, ours.cls, ours.sep) == (
        reference.pad_id,
        reference.mask_id,
        reference.cls_id,
        reference.sep_id,
    )


def test_the_patterns_differ(tik: Callable[..., Any]):
    one, two = (tik(10, tiktoken_pattern=pattern).encode("qX") for pattern in PATTERNS)
    assert one != two
    assert tik(10).encode("qX") == two


@pytest.mark.parametrize("pattern", PATTERNS)
def test_white_space_without_end(tik: Callable[..., Any], pattern: str):
    tokenizer = tik(10, tiktoken_pattern=pattern)
    short, long = ("a \n b" + " " * length + "c\t\n" for length in (20, 1_200_000))
    assert tokenizer.decode(tokenizer.encode(long)) == long
    assert tokenizer.encode_batch([short, long]) == [tokenizer.encode(short), tokenizer.encode(long)]
    assert tokenizer._encode_spaces(short) == tokenizer.encode(short)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_ways_of_splitting_are_one(tik: Callable[..., Any], texts: list[str], pattern: str):
    tokenizer = tik(10, tiktoken_pattern=pattern)
    assert [tokenizer._encode_spaces(text) for text in [*texts, *ODD]] == tokenizer.encode_batch([*texts, *ODD])


def test_offsets_cover_the_text_and_a_letter_of_several_tokens_belongs_to_each(
    tik: Callable[..., Any], texts: list[str]
):
    tokenizer = tik()
    for text in ("", "dog", "Größe 😀 ﬁ\n\n  x", *texts):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        for number, (begin, end) in zip(ids, offsets, strict=True):
            assert tokenizer.decode([number]).replace("\ufffd", "") in text[begin:end]
        assert {place for begin, end in offsets for place in range(begin, end)} == {*range(len(text))}


def test_saved_and_pickled_it_stays_the_same(tik: Callable[..., Any], tmp_path: Path):
    names = ("<unk>", "<s>", "</s>", "<fim>")
    tokenizer = tik(12, tiktoken_pattern="v1", tiktoken_special_tokens=names)
    tokenizer.save(tmp_path / "saved")
    for other in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_batch(ODD) == tokenizer.encode_batch(ODD)
        assert (fingerprint(other), other.eod, other.vocab_size) == (fingerprint(tokenizer), 2, tokenizer.vocab_size)
        assert other.token_text(3) == "<fim>"
    assert isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"special": 300, "vocab_size": 300},
            "tiktoken_num_special_tokens: 300 leaves nothing of a vocabulary of 300; less",
        ),
        ({"special": 2}, "tiktoken_num_special_tokens: 2, but 3 tokens are named; at least 3"),
        (
            {"tiktoken_special_tokens": ("<s>", "<x>")},
            r"tiktoken_special_tokens: lacks <unk> </s>; <unk> <s> </s> and any",
        ),
        (
            {"tiktoken_special_tokens": ("<unk>", "<s>", "</s>", "<s>")},
            "tiktoken_special_tokens: names a token twice: <unk> <s> </s> <s>",
        ),
        (
            {"vocab_size": 100_000},
            r"vocabulary\.json: has 953 tokens, 99,990 are needed for vocab_size less the special",
        ),
        ({"vocab_size": 200}, r"vocabulary\.json: 190 tokens are left for bytes; a --vocab-size with room for all 256"),
        ({"vocab_size": None}, r"has 953 tokens, 131,062 are needed"),
    ],
)
def test_sizes_that_do_not_fit(tik: Callable[..., Any], options: dict[str, Any], message: str):
    with pytest.raises(MtError, match=message):
        tik(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: {"a": entries}, r"vocabulary\.json: is not a list"),
        (
            lambda entries: [*entries[:300], entries[301], entries[300]],
            r"vocabulary\.json\[300\]: has rank 301; ranks that",
        ),
        (lambda entries: [entries[0] | {"extra": 1}, *entries[1:]], r"vocabulary\.json\[0\]: is \{'rank': 0"),
        (lambda entries: [*entries[:5], entry(5, b"z"), *entries[6:]], r"\[5\]: is b'z'; the 256 bytes in order"),
        (lambda entries: [*entries[:256], entry(256, b"a"), *entries[257:]], r"\[256\]: is b'a', as is entry 97; each"),
        (lambda entries: [entries[0] | {"token_bytes": "!"}, *entries[1:]], r"\[0\]: token_bytes is not base64: '!'"),
        (lambda entries: [entries[0] | {"token_bytes": 7}, *entries[1:]], r"\[0\]: token_bytes is not base64: 7"),
    ],
)
def test_a_wrong_vocabulary(vocabulary: Path, change: Callable[[list[Any]], Any], message: str):
    vocabulary.write_text(json.dumps(change(json.loads(vocabulary.read_text()))))
    config = TokenizerConfig(type="TikTokenizer", model=str(vocabulary), vocab_size=312, tiktoken_num_special_tokens=10)
    with pytest.raises(MtError, match=message):
        build_tokenizer(config)


def test_a_missing_vocabulary(tmp_path: Path):
    with pytest.raises(MtError, match="TikTokenizer: needs model; give --tokenizer-model: the vocabulary as .json"):
        build_tokenizer(TokenizerConfig(type="TikTokenizer"))
    with pytest.raises(MtError, match="does not exist; a vocabulary of TikTokenizer"):
        build_tokenizer(TokenizerConfig(type="TikTokenizer", model=str(tmp_path)))
    (tmp_path / "x.json").write_text("<html>")
    with pytest.raises(MtError, match=r"x\.json: is not JSON"):
        build_tokenizer(TokenizerConfig(type="TikTokenizer", model=str(tmp_path / "x.json")))


def test_without_the_library(tik: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        MtError, match=r"TikTokenizer: needs 'tiktoken', which is not installed; .*'mt-data\[tiktoken\]'"
    ):
        tik(10)
