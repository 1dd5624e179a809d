"""Pieces of text, joined, are the text; stop strings never show, wherever tokens cut them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from mt_data.config import TokenizerConfig
from mt_data.tokenizers.file_free import BytesTokenizer
from mt_eval.generation.text import Detokenizer, StopFinder, spell_token

BYTES = BytesTokenizer(TokenizerConfig(type="bytes"))


class Pieces:
    """A tokenizer like SentencePiece's: the space before a word belongs to its token, and none begins a text."""

    type = "pieces"
    eod = 0
    vocab_size = 6

    def __init__(self) -> None:
        vocabulary = {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4, "é": 5}
        self._tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
        self._tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts):
        raise NotImplementedError

    def decode(self, ids) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def read(detokenizer, tokens) -> str:
    return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()


@given(st.lists(st.integers(0, 256)), st.lists(st.integers(0, 256)))
def test_pieces_of_any_bytes_are_the_text_beyond_the_prompt(prompt, new):
    whole = BYTES.decode(prompt + new)
    before = BYTES.decode(prompt).rstrip("\ufffd")
    assert before + read(Detokenizer(BYTES, prompt, whole=False), new) == whole


@given(st.text(max_size=20), st.text(max_size=20))
def test_pieces_behind_a_text_are_the_text(prompt, new):
    pieces = [Detokenizer(BYTES, list(prompt.encode()))]
    assert read(pieces[0], new.encode()) == new


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5)))
def test_words_keep_their_spaces(prompt, new):
    tokenizer = Pieces()
    whole, before = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    assert before + read(Detokenizer(tokenizer, prompt), new) == whole


def test_a_character_waits_for_its_last_byte():
    detokenizer = Detokenizer(BYTES, b"a")
    assert [detokenizer.push(byte) for byte in "é€b".encode()] == ["", "é", "", "", "€", "b"]


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=12),
)
def test_the_text_ends_before_the_first_complete_stop_string(text, stops, sizes):
    finder, shown, at = StopFinder(stops), "", 0
    for size in [*sizes, len(text)]:
        shown += finder.push(text[at : at + size])
        at += size
        complete = [(place + len(stop), place) for stop in stops if (place := text[:at].find(stop)) >= 0]
        expected = text[: min(complete)[1]] if complete else text
        assert expected.startswith(shown)
        assert finder.stopped == bool(complete)
    assert shown + ("" if finder.stopped else finder.flush()) == expected


def test_only_what_may_begin_a_stop_string_waits():
    finder = StopFinder(["</s>"])
    assert [finder.push(piece) for piece in ("a<", "b", "<", "/", "s", "x</s", ">y")] == [
        "a",
        "<b",
        "",
        "",
        "",
        "</sx",
        "",
    ]
    assert finder.stopped


@pytest.mark.parametrize(("token", "before", "text"), [(2, None, "cat"), (2, 1, " cat"), (3, 2, "s")])
def test_a_token_is_spelled_with_the_space_that_it_has_in_a_text(token, before, text):
    assert spell_token(Pieces(), token, before) == text


def test_a_part_of_a_character_is_spelled_as_the_vocabulary_does():
    assert [spell_token(BYTES, byte, 97) for byte in "é".encode()] == ["<0xC3>", "<0xA9>"]
