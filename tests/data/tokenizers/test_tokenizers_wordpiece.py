"""BERT's WordPiece: ids over real and odd text against the specification's algorithm, written out once more here."""

import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

from data.conftest import shared
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer, fingerprint, load_tokenizer
from mt_data.tokenizers.word_piece import BertWordPiece

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LOWER, CASE = "BertWordPieceLowerCase", "BertWordPieceCase"
ODD = [
    "naïve Café ÀÉÎ ß ẞ ŉ İstanbul ΟΔΟΣ ΣΑΣ ὈΔΥΣΣΕΎΣ'",
    "日本語の文章、東京。한국어 𠀀𫝀 豈",
    "a\x00b\ufffdc\x07d\u200be\u00adf\x85g\u2028h\u2029i\u3000j\u00a0k\tl\r\nm\x0bn\x1co",
    "[CLS] [MASK] <extra_id_0> ##ing un##der",
    "don't! (what?) $5.00 ~`^ «guillemets» …—† ⁂ 𐩐 ؝ ܀ ᙮",
    "private \ue000\U000f0001 unassigned \u0378 marks a\u0898b \U0001d165\U0001d16d x\u0301\u0327",
    "x" * 200 + " " + "x" * 201 + " " + "é" * 101,
    "",
    "   ",
]


def words(text: str, lower: bool) -> list[str]:
    """Words as docs/specs/data.md §3.3 describes them, in its order of steps."""
    cleaned = ""
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            cleaned += " "
        elif c not in "\0\ufffd" and category not in ("Cc", "Cf"):
            cleaned += f" {c} " if ideograph(ord(c)) else c
    words: list[str] = []
    for word in cleaned.split():
        if lower:
            word = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        spaced = "".join(f" {c} " if punctuation(c) else c for c in word)
        words += spaced.split()
    return words


def ideograph(code: int) -> bool:
    blocks = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
    blocks += ((0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return any(first <= code <= last for first, last in blocks)


def punctuation(c: str) -> bool:
    return c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(c).startswith("P")


def pieces(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Longest match first; `[UNK]` for a word that cannot be covered or has more than 200 characters."""
    covered, start = [], 0
    while start < len(word) and len(word) <= 200:
        ends = range(len(word), start, -1)
        piece = next((p for end in ends if (p := ("##" if start else "") + word[start:end]) in vocabulary), None)
        if piece is None:
            return ["[UNK]"]
        covered.append(piece)
        start += len(piece) - (2 if start else 0)
    return covered if len(word) <= 200 else ["[UNK]"]


def reference(text: str, tokenizer: BertWordPiece, lower: bool) -> list[int]:
    vocabulary = tokenizer.vocabulary()
    return [vocabulary[piece] for word in words(text, lower) for piece in pieces(word, vocabulary)]


@pytest.fixture(scope="session")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary trained on Shakespeare, Wikipedia and the odd texts, in both cases."""
    trainable = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    trainable.normalizer = normalizers.BertNormalizer(lowercase=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainable.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    text = shared("wikitext103_test.txt").read_text("utf-8")[:200_000]
    corpus = [text, text.lower(), *ODD[:4], *map(str.lower, ODD[:4])]
    trainable.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=list(SPECIAL)))
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    ids = sorted(trainable.get_vocab().items(), key=lambda pair: pair[1])
    path.write_text("".join(f"{token}\n" for token, _ in ids), "utf-8")
    return path


@pytest.fixture(scope="session")
def bert(vocab: Path) -> Callable[..., BertWordPiece]:
    built: dict[object, BertWordPiece] = {}

    def tokenizer(type: str = LOWER, extra: int = 0) -> BertWordPiece:
        config = TokenizerConfig(type=type, vocab_file=str(vocab), vocab_extra_ids=extra)
        return built.setdefault((type, extra), build_tokenizer(config))  # pyright: ignore[reportArgumentType]

    return tokenizer


@pytest.mark.parametrize("type", [LOWER, CASE])
def test_ids_over_real_text_are_the_specifications(bert: Callable[..., BertWordPiece], type: str):
    tokenizer = bert(type)
    paragraphs = shared("wikitext103_test.txt").read_text("utf-8")[150_000:400_000].split("\n")
    texts = [*paragraphs, *ODD]
    expected = [reference(text, tokenizer, type == LOWER) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in ODD] == expected[-len(ODD) :]
    assert sum(map(len, expected)) > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("lower", [True, False])
def test_every_character_is_split_as_the_specification_says(bert: Callable[..., BertWordPiece], lower: bool):
    tokenizer = bert(LOWER if lower else CASE)
    every = map(chr, [*range(0xD800), *range(0xE000, 0xE100), *range(0xF900, 0x11000), 0x20000, 0x2B820, 0xE0100])
    texts = ["".join(f"a{c}b " for c in batch) for batch in batches([*every], 64)]
    assert tokenizer.encode_batch(texts) == [reference(text, tokenizer, lower) for text in texts]


def batches(items: list[str], size: int) -> list[list[str]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), lower=st.booleans())
@example(text="ΑΣ Σ ΑΣ.Σ ΑΣ\u00adΑ", lower=True)
@example(text="a\U0001d165\u0301\U0001d16d", lower=True)
def test_ids_of_any_text(bert: Callable[..., BertWordPiece], text: str, lower: bool):
    tokenizer = bert(LOWER if lower else CASE)
    assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == reference(text, tokenizer, lower)


def test_the_specifications_example_of_ids(tmp_path: Path):
    lines = [*SPECIAL, *"abcdefghijklmno"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    config = TokenizerConfig(type=CASE, vocab_file=str(tmp_path / "vocab.txt"), vocab_extra_ids=3)
    tokenizer = build_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.eod) == (25, 20, 21, 21)
    assert tokenizer.additional_special_tokens_ids == (22, 23, 24)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    assert [tokenizer.token_text(i) for i in (5, 20, 24)] == ["a", "[BOS]", "<extra_id_2>"]
    assert list(tokenizer.vocabulary().values()) == list(range(25))


def test_tokens_that_the_vocabulary_has_keep_their_ids(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*SPECIAL, "[EOS]", "<extra_id_1>", "a"]).encode())
    config = TokenizerConfig(type=CASE, vocab_file=str(tmp_path / "vocab.txt"), vocab_extra_ids=2)
    tokenizer = build_tokenizer(config)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.additional_special_tokens_ids) == (5, 8, (9, 6))
    assert tokenizer.vocab_size == 10


def test_special_tokens_in_a_text_are_words(bert: Callable[..., BertWordPiece]):
    tokenizer = bert(CASE, extra=1)
    specials = {*tokenizer.special.values(), *tokenizer.additional_special_tokens_ids}
    assert specials.isdisjoint(tokenizer.encode("[CLS] [SEP][MASK] [EOS] <extra_id_0>"))


def test_words_of_more_than_200_characters_are_unknown(bert: Callable[..., BertWordPiece]):
    tokenizer = bert(LOWER)
    assert tokenizer.encode("x" * 201) == [1]
    assert 1 not in tokenizer.encode("x" * 200)
    assert tokenizer.decode(tokenizer.encode("the unknown " + "x" * 201)) == "the unknown [UNK]"


def test_pieces_are_joined_again(bert: Callable[..., BertWordPiece]):
    tokenizer = bert(LOWER)
    ids = tokenizer.encode("Unquestionably, the Parliamentarians")
    assert any(tokenizer.token_text(i).startswith("##") for i in ids)
    assert tokenizer.decode(ids) == "unquestionably , the parliamentarians"


@pytest.mark.parametrize("type", [LOWER, CASE])
def test_saved_and_pickled_it_stays_the_same(bert: Callable[..., BertWordPiece], tmp_path: Path, type: str):
    tokenizer = bert(type, extra=7)
    tokenizer.save(tmp_path)
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert [other.encode(text) for text in ODD] == [tokenizer.encode(text) for text in ODD]
        assert fingerprint(other) == fingerprint(tokenizer)
        assert other.additional_special_tokens_ids == tokenizer.additional_special_tokens_ids


def test_ids_equal_transformers_but_for_its_cls_and_sep(bert: Callable[..., BertWordPiece], vocab: Path):
    reference = BertTokenizer(vocab=str(vocab), do_lower_case=False)
    text = shared("wikitext103_test.txt").read_text("utf-8")[400_000:450_000]
    words_within_its_limit = " ".join(word for word in text.split() if len(word) <= 100)
    assert reference(words_within_its_limit)["input_ids"][1:-1] == bert(CASE).encode(words_within_its_limit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\na\n", r"vocab\.txt: lacks \[CLS\], \[SEP\], \[MASK\]; a vocab\.txt of BERT"),
        ("\n".join([*SPECIAL, "a", "b", "a"]).encode(), r"vocab\.txt:8: 'a' stands on line 6 already; each token once"),
        (b"\xff\xfe", r"vocab\.txt: is not UTF-8 text"),
    ],
)
def test_a_wrong_vocabulary(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(MtError, match=message):
        build_tokenizer(TokenizerConfig(type=LOWER, vocab_file=str(tmp_path / "vocab.txt")))


def test_a_missing_vocabulary(tmp_path: Path):
    with pytest.raises(MtError, match=f"{LOWER}: needs vocab_file; give --vocab-file"):
        build_tokenizer(TokenizerConfig(type=LOWER))
    with pytest.raises(MtError, match=r"tokenizer\.vocab_file: no file"):
        build_tokenizer(TokenizerConfig(type=LOWER, vocab_file=str(tmp_path / "vocab.txt")))
    with pytest.raises(MtError, match="does not exist; a vocab.txt"):
        build_tokenizer(TokenizerConfig(type=LOWER, vocab_file=str(tmp_path)))
