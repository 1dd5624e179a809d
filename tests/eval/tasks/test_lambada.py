import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_eval.encoding import TextEncoder
from mt_eval.finite import NonFiniteOutput
from mt_eval.tasks.lambada import (
    Cloze,
    answer,
    compute_choices,
    compute_metrics,
    list_samples,
    loose,
    make_clozes,
    read_passages,
    strict,
)


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


def count_correct(model, examples, *, seq_length, batch_size):
    answers = answer(model, examples, seq_length=seq_length, batch_size=batch_size)
    return {mode: sum(each.correct for each in row) for mode, row in answers.items()}


def count(model, text, encoder, seq_length=64):
    examples = {mode: make_clozes([("f:1", text)], mode, encoder) for mode in ("strict", "loose")}
    return count_correct(model, examples, seq_length=seq_length, batch_size=2)


def test_strict_takes_the_whole_last_word_after_the_stripped_context(encoder):
    cloze = strict('He said:\n\n"Run  Shane ', encoder)
    assert bytes(cloze.tokens[: -cloze.target]).decode() == 'He said:\n\n"Run'
    assert bytes(cloze.tokens[-cloze.target :]).decode() == " Shane"


def test_strict_cuts_at_the_last_occurrence_of_the_word(encoder):
    assert bytes(strict("to be or not to be", encoder).tokens[:-3]).decode() == "to be or not to"


def test_a_beginning_of_text_id_does_not_stand_inside_the_text(tokenizer):
    class WithBos(type(tokenizer)):
        bos = 256

        def encode(self, text):
            return [self.bos, *super().encode(text)]

    encoder = TextEncoder.create(WithBos(TokenizerConfig(type="bytes")))
    assert strict("ab cd", encoder) == Cloze((256, 97, 98, 32, 99, 100), 3, 1)
    assert loose("ab cd", encoder) == Cloze((256, 97, 98, 32, 99, 100), 1, 1)


def test_a_passage_that_loses_its_beginning_keeps_the_prefix(tokenizer):
    encoder = TextEncoder(tokenizer, (250,))
    model = Bigram("b cd", longest=4)
    model.table.data[:, ord("!")] = 0.5
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].tolist()))
    examples = {"loose": make_clozes([("f:1", "x" * 50 + "b cd")], "loose", encoder)}
    assert count_correct(model, examples, seq_length=4, batch_size=1) == {"loose": 1}
    assert seen == [[[250, *b"b c"[-3:]]]]


def test_a_word_without_tokens_of_its_own_is_refused(tokenizer):
    class Joins(type(tokenizer)):
        def encode(self, text):
            return [1] if text else []

    with pytest.raises(MtError, match="f:1: the tokenizer joins the last word of 'a b' to the context, or drops it; a"):
        make_clozes([("f:1", "a b")], "strict", TextEncoder.create(Joins(TokenizerConfig(type="bytes"))))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_named(encoder, value):
    model = Bigram("b cde")
    model.table.data[ord("d"), 17] = value
    passages = [("f:1", "ab c"), ("f:7", "ab cde"), ("f:9", "d ab c")]
    examples = {"strict": make_clozes(passages, "strict", encoder)}
    message = "f:7, token 6: the model computes NaN or infinite logits here; look for NaN"
    with pytest.raises(NonFiniteOutput, match=message):
        count_correct(model, examples, seq_length=64, batch_size=2)
    model.table.data[ord("d"), 17] = -math.inf  # a token that can never follow breaks nothing
    assert count_correct(model, examples, seq_length=64, batch_size=2) == {"strict": 3}


def test_loose_takes_the_last_token(encoder):
    assert loose("ab cd", encoder) == Cloze((97, 98, 32, 99, 100), 1)


def test_a_target_of_several_tokens_counts_once(encoder):
    assert count(Bigram("b cde"), "ab cde", encoder) == {"strict": 1, "loose": 1}


def test_strict_needs_the_arg_max_at_every_target_position(encoder):
    assert count(Bigram("de"), "ab cde", encoder) == {"strict": 0, "loose": 1}


def test_a_right_start_with_a_wrong_end_is_wrong(encoder):
    assert count(Bigram("b cd"), "ab cde", encoder) == {"strict": 0, "loose": 0}


def test_long_passages_lose_their_beginning(encoder):
    assert count(Bigram("b cd", longest=4), "x" * 50 + "b cd", encoder, seq_length=4) == {"strict": 1, "loose": 1}


def test_passages_of_different_lengths_share_a_batch(encoder):
    passages = [("f:1", "b c"), ("f:2", "some b c"), ("f:3", "b d"), ("f:4", "a very long b c")]
    examples = {"strict": make_clozes(passages, "strict", encoder)}
    for batch_size in (1, 2, 4):
        assert count_correct(Bigram("b c"), examples, seq_length=64, batch_size=batch_size) == {"strict": 3}


def test_two_passages_that_are_equal_both_count(encoder):
    examples = {"strict": make_clozes([("f:1", "b c"), ("f:2", "b c")], "strict", encoder)}
    assert count_correct(Bigram("b c"), examples, seq_length=64, batch_size=4) == {"strict": 2}


def test_there_is_a_choice_for_each_target_token():
    clozes = [Cloze((97, 98, 99), 1), Cloze((97, 98, 99), 2)]
    assert compute_choices(Bigram("abd"), clozes, seq_length=64, batch_size=1) == {(97, 98, 99): (98, 100)}


def test_samples_have_what_was_asked_and_what_was_said(encoder, tokenizer):
    passages = [("f:1", "ab cde"), ("f:2", "ab cdd"), ("f:3", "b c")]
    examples = {mode: make_clozes(passages, mode, encoder) for mode in ("strict", "loose")}
    answers = answer(Bigram("b cde"), examples, seq_length=64, batch_size=2)
    first, second, third = list_samples(passages, answers, tokenizer)
    assert first == {
        "where": "f:1",
        "text": "ab cde",
        "strict": {"target": " cde", "prediction": " cde", "correct": True},
        "loose": {"target": "e", "prediction": "e", "correct": True},
    }
    assert second["strict"] == {"target": " cdd", "prediction": " cde", "correct": False}
    assert (third["strict"]["correct"], third["loose"]["correct"]) == (True, True)
    error = statistics.stdev([1, 0, 1]) / math.sqrt(3)
    assert compute_metrics(answers) == pytest.approx(
        {
            "strict_accuracy": 2 / 3,
            "strict_accuracy_stderr": error,
            "loose_accuracy": 2 / 3,
            "loose_accuracy_stderr": error,
        },
        rel=1e-12,
    )


def test_one_word_is_refused_with_its_line(encoder):
    with pytest.raises(MtError, match=r"f:1: passage 'alone ' has fewer than two words; a context and a last word"):
        make_clozes([("f:1", "alone ")], "strict", encoder)


def test_a_sequence_shorter_than_a_target_is_refused(encoder):
    with pytest.raises(MtError, match="--seq-length: 2 is shorter than a target; at least 3"):
        count(Bigram("b cd"), "ab cd", encoder, seq_length=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a b"', r"l\.jsonl:3: is not JSON: .* at column 15; \{\"text\": \"…\"\} on every line"),
        ('{"txt": "a b"}', r"l\.jsonl:3: has no key 'text', only 'txt'"),
        ('["a b"]', r"l\.jsonl:3: is a list, not an object"),
        ('{"text": "\\ud800 b"}', r"l\.jsonl:3: key 'text' holds half a surrogate pair"),
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
    with pytest.raises(MtError, match=r"l\.jsonl:1: is not UTF-8 at byte 11"):
        read_passages(tmp_path / "l.jsonl")
