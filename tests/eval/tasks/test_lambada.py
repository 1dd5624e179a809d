from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_eval.tasks.lambada import Cloze, compute_hits, count_correct, loose, make_clozes, read_passages, strict


class Bigram(nn.Module):
    """After each byte, one byte is the arg-max; `text` shows them in order. Takes at most `longest` positions."""

    def __init__(self, text: str, longest: int = 64) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(257, 257))
        self.config = SimpleNamespace(max_seq_len=longest)
        for before, after in zip(text.encode(), text.encode()[1:], strict=False):
            self.table.data[before, after] = 1.0

    def forward(self, tokens_BT):
        assert tokens_BT.shape[1] <= self.config.max_seq_len
        return self.table[tokens_BT]


def count(model, text, tokenizer, seq_length=64):
    examples = {mode: make_clozes([("f:1", text)], mode, tokenizer) for mode in ("strict", "loose")}
    return count_correct(model, examples, seq_length=seq_length, batch_size=2)


def test_strict_takes_the_whole_last_word_after_the_stripped_context(tokenizer):
    cloze = strict('He said:\n\n"Run  Shane ', tokenizer)
    assert bytes(cloze.tokens[: -cloze.target]).decode() == 'He said:\n\n"Run'
    assert bytes(cloze.tokens[-cloze.target :]).decode() == " Shane"


def test_strict_cuts_at_the_last_occurrence_of_the_word(tokenizer):
    assert bytes(strict("to be or not to be", tokenizer).tokens[:-3]).decode() == "to be or not to"


def test_a_beginning_of_text_id_does_not_stand_inside_the_text(tokenizer):
    class WithBos(type(tokenizer)):
        bos = 256

        def encode(self, text):
            return [self.bos, *super().encode(text)]

    assert strict("ab cd", WithBos(TokenizerConfig(type="bytes"))) == Cloze((256, 97, 98, 32, 99, 100), 3)


def test_loose_takes_the_last_token(tokenizer):
    assert loose("ab cd", tokenizer) == Cloze((97, 98, 32, 99, 100), 1)


def test_a_target_of_several_tokens_counts_once(tokenizer):
    assert count(Bigram("b cde"), "ab cde", tokenizer) == {"strict": 1, "loose": 1}


def test_strict_needs_the_arg_max_at_every_target_position(tokenizer):
    assert count(Bigram("de"), "ab cde", tokenizer) == {"strict": 0, "loose": 1}


def test_a_right_start_with_a_wrong_end_is_wrong(tokenizer):
    assert count(Bigram("b cd"), "ab cde", tokenizer) == {"strict": 0, "loose": 0}


def test_long_passages_lose_their_beginning(tokenizer):
    assert count(Bigram("b cd", longest=4), "x" * 50 + "b cd", tokenizer, seq_length=4) == {"strict": 1, "loose": 1}


def test_passages_of_different_lengths_share_a_batch(tokenizer):
    passages = [("f:1", "b c"), ("f:2", "some b c"), ("f:3", "b d"), ("f:4", "a very long b c")]
    examples = {"strict": make_clozes(passages, "strict", tokenizer)}
    for batch_size in (1, 2, 4):
        assert count_correct(Bigram("b c"), examples, seq_length=64, batch_size=batch_size) == {"strict": 3}


def test_two_passages_that_are_equal_both_count(tokenizer):
    examples = {"strict": make_clozes([("f:1", "b c"), ("f:2", "b c")], "strict", tokenizer)}
    assert count_correct(Bigram("b c"), examples, seq_length=64, batch_size=4) == {"strict": 2}


def test_hits_are_told_for_each_target_token():
    assert compute_hits(Bigram("abd"), {(97, 98, 99): 2}, seq_length=64, batch_size=1) == {(97, 98, 99): (1, 0)}


def test_one_word_is_refused_with_its_line(tokenizer):
    with pytest.raises(MtError, match=r"f:1: passage 'alone ' has fewer than two words; a context and a last word"):
        make_clozes([("f:1", "alone ")], "strict", tokenizer)


def test_a_sequence_shorter_than_a_target_is_refused(tokenizer):
    with pytest.raises(MtError, match="--seq-length: 2 is shorter than a target; at least 3"):
        count(Bigram("b cd"), "ab cd", tokenizer, seq_length=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a b"', r"l\.jsonl:3: not JSON \(.*column 15\); \{\"text\": \"…\"\} on every line"),
        ('{"txt": "a b"}', r"l\.jsonl:3: no text under 'text'"),
        ('["a b"]', r"l\.jsonl:3: no text under 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "l.jsonl"
    path.write_text(f'{{"text": "a b"}}\n\n{line}\n')
    with pytest.raises(MtError, match=message):
        read_passages(path)


def test_a_line_separator_inside_a_passage_does_not_end_the_line(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "a\u2028b c"}\r\n')
    assert read_passages(path) == [(f"{path}:1", "a\u2028b c")]


def test_a_file_without_passages_is_refused(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text("\n")
    with pytest.raises(MtError, match=r"l\.jsonl: holds no passages"):
        read_passages(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MtError, match=r"l\.jsonl: no such file"):
        read_passages(tmp_path / "l.jsonl")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(MtError, match=r"l\.jsonl: byte 10 is not UTF-8"):
        read_passages(tmp_path / "l.jsonl")
