import math
from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer
from mt_eval.tasks import perplexity, wikitext103
from mt_eval.tasks.scoring import sum_loss

DATA = Path(__file__).parents[3].parent / "shared" / "data"


@pytest.mark.skipif(not (DATA / "wikitext103_test.txt").exists(), reason=f"no {DATA}/wikitext103_test.txt")
def test_wikitext103_has_the_published_counts_with_gpt2s_vocabulary():
    files = {"vocab_file": str(DATA / "gpt2/vocab.json"), "merge_file": str(DATA / "gpt2/merges.txt")}
    gpt2 = build_tokenizer(TokenizerConfig(type="GPT2BPETokenizer", **files))
    tokens, words = wikitext103.prepare((DATA / "wikitext103_test.txt").read_bytes().decode(), gpt2)
    assert (len(tokens), words) == (270_329, 245_566)
    assert wikitext103.compute_metrics(0.0, tokens, words)["token_ratio"] == pytest.approx(1.1008, abs=5e-5)


def test_words_are_pieces_between_single_spaces(tokenizer):
    tokens, words = wikitext103.prepare(" \n = A = \n \n b @-@ c \n", tokenizer)
    assert bytes(tokens).decode() == "= A =\n\nb-c"
    assert words == len(["=", "A", "=", "\n", "\n", "b", "@-@", "c"])


def test_adjusted_perplexity_spreads_the_loss_over_the_original_words(uniform):
    tokens = list(range(41))
    metrics = wikitext103.compute_metrics(sum_loss(uniform, tokens, seq_length=16, stride=4, batch_size=3), tokens, 21)
    assert metrics["token_perplexity"] == pytest.approx(257, rel=1e-12)
    assert metrics["token_ratio"] == 2
    assert metrics["adjusted_perplexity"] == pytest.approx(257**2, rel=1e-12)


def test_a_uniform_model_needs_the_same_bits_for_every_byte(uniform, tokenizer):
    tokens, size = perplexity.prepare(["held-out text"], tokenizer)
    metrics = perplexity.compute_metrics(sum_loss(uniform, tokens, seq_length=8, stride=8, batch_size=3), tokens, size)
    assert metrics["perplexity"] == pytest.approx(257, rel=1e-12)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-12)


def test_every_document_follows_an_end_of_document(tokenizer):
    tokens, size = perplexity.prepare(["ab", "é"], tokenizer)
    assert tokens == [256, 97, 98, 256, 0xC3, 0xA9]
    assert size == 4


def test_a_jsonl_file_holds_a_document_a_line_and_any_other_file_is_one(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    (tmp_path / "d.txt").write_bytes(b"a\r\nb\n")
    assert perplexity.read_documents(tmp_path / "d.jsonl") == ["a", "b"]
    assert perplexity.read_documents(tmp_path / "d.txt") == ["a\r\nb\n"]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(MtError, match=r"d\.txt: holds no text"):
        perplexity.read_documents(tmp_path / "d.txt")
