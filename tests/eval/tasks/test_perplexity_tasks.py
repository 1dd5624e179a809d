import gzip
import math
from pathlib import Path

import pytest
import zstandard

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer
from mt_eval.encoding import TextEncoder
from mt_eval.tasks import perplexity, wikitext103
from mt_eval.tasks.scoring import TokenizedText, sum_losses

DATA = Path(__file__).parents[3].parent / "shared" / "data"


@pytest.mark.skipif(not (DATA / "wikitext103_test.txt").exists(), reason=f"no {DATA}/wikitext103_test.txt")
def test_wikitext103_has_the_published_counts_with_gpt2s_vocabulary():
    files = {"vocab_file": str(DATA / "gpt2/vocab.json"), "merge_file": str(DATA / "gpt2/merges.txt")}
    gpt2 = build_tokenizer(TokenizerConfig(type="GPT2BPETokenizer", **files))
    raw = (DATA / "wikitext103_test.txt").read_bytes().decode()
    text, words = wikitext103.prepare(raw, TextEncoder.create(gpt2))
    assert (len(text.tokens), sum(words)) == (270_329, 245_566)
    metrics = wikitext103.compute_metrics([0.0] * len(words), text, words)
    assert metrics["token_ratio"] == pytest.approx(1.1008, abs=5e-5)
    assert len(words) == 59  # of 60: a quotation mark before one title takes its line break away
    for place, where in text.documents:
        beginning = gpt2.decode(text.tokens[place : place + 60]).lstrip("\n")
        assert beginning.startswith(where.removeprefix("text, ") + "\n")
        assert not gpt2.decode(text.tokens[:place][-1:]).endswith("\n")


def test_words_are_pieces_between_single_spaces(encoder):
    text, words = wikitext103.prepare(" \n = A = \n \n b @-@ c \n", encoder)
    assert bytes(text.tokens).decode() == "= A =\n\nb-c"
    assert words == [len(["=", "A", "=", "\n", "\n", "b", "@-@", "c"])]


def test_an_article_begins_at_its_title(encoder):
    raw = " \n = A = \n \n = = B = = \n \n x = = A = . \n \n = B = \n \n b @-@ c \n \n = C ( D ) = \n \n d"
    text, words = wikitext103.prepare(raw, encoder, "w")
    parts = ["= A =\n\n== B ==\n\nx == A =.", "\n\n= B =\n\nb-c", "\n\n= C (D) =\n\nd"]
    assert bytes(text.tokens).decode() == "".join(parts)
    assert text.documents == [(0, "w, = A ="), (len(parts[0]), "w, = B ="), (len(parts[0] + parts[1]), "w, = C (D) =")]
    assert words == [20, 10, 9]
    assert sum(words) == len(raw.strip().split(" "))


def test_the_treebank_has_a_detokenizer_of_its_own_by_name(encoder):
    raw = "the company 's profit did n't reach N shares of $ 1 , # 1 N times"
    text, words = wikitext103.prepare(raw, encoder, detokenizer="ptb")
    assert bytes(text.tokens).decode() == "the company's profit didn't reach1 shares of $1 , #1 N times".replace(
        " N ", "1 "
    )
    assert words == [17]
    plain, _ = wikitext103.prepare(raw, encoder, "wikitext/wiki.txt", "none")
    assert bytes(plain.tokens).decode() == raw
    with pytest.raises(MtError, match="^--detokenizer: unknown detokenizer 'ptp'; did you mean 'ptb'"):
        wikitext103.prepare(raw, encoder, detokenizer="ptp")


def test_adjusted_perplexity_spreads_the_loss_over_the_original_words(uniform):
    text = TokenizedText(list(range(41)))
    metrics = wikitext103.compute_metrics(sum_losses(uniform, text, seq_length=16, stride=4, batch_size=3), text, [21])
    assert metrics["token_perplexity"] == pytest.approx(257, rel=1e-12)
    assert metrics["token_ratio"] == 2
    assert metrics["adjusted_perplexity"] == pytest.approx(257**2, rel=1e-12)


def test_a_uniform_model_needs_the_same_bits_for_every_byte(uniform, encoder):
    text, sizes = perplexity.prepare([("d", "held-out text")], encoder)
    metrics = perplexity.compute_metrics(sum_losses(uniform, text, seq_length=8, stride=8, batch_size=3), text, sizes)
    assert metrics.keys() == {"perplexity", "bits_per_byte", "loss"}  # one document has no standard error
    assert metrics["perplexity"] == pytest.approx(257, rel=1e-12)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-12)


def test_every_document_follows_an_end_of_document(encoder):
    text, sizes = perplexity.prepare([("d:1", "ab"), ("d:3", "é")], encoder)
    assert text.tokens == [256, 97, 98, 256, 0xC3, 0xA9]
    assert (text.num_scored, sizes) == (5, [2, 2])
    assert [*perplexity.list_samples([1.5, 2.5], text, sizes)] == [
        {"where": "d:1", "tokens": 3, "bytes": 2, "loss_sum": 1.5},
        {"where": "d:3", "tokens": 2, "bytes": 2, "loss_sum": 2.5},
    ]
    assert [text.locate(place) for place in (1, 2, 3, 4)] == [
        *("d:1, token 1", "d:1, token 2", "d:1, token 3", "d:3, token 1")
    ]


def test_what_the_tokenizer_puts_before_a_text_is_not_scored(tokenizer):
    documents = [("d:1", "ab"), ("d:2", "c")]
    text, _ = perplexity.prepare(documents, TextEncoder(tokenizer, (7,)))
    assert (text.tokens, text.unscored) == ([7, 97, 98, 256, 7, 99], {0, 4})
    assert text.num_scored == 4
    text, _ = perplexity.prepare(documents, TextEncoder.create(tokenizer, bos=True))
    assert (text.tokens, text.num_scored) == ([256, 97, 98, 256, 99], 4)
    text, words = wikitext103.prepare("a b", TextEncoder(tokenizer, (7, 8)))
    assert (text.tokens, text.num_scored, words) == ([7, 8, 97, 32, 98], 3, [2])


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.json", "d.jsonl.gz", "d.json.zst"])
def test_json_lines_by_any_of_their_names_hold_a_document_a_line(tmp_path, name):
    path = tmp_path / name
    content = '{"text": "a"}\n{"text": ""}\n\n{"text": "b\u2028\x85c"}\r\n'.encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    assert perplexity.read_documents(path) == [(f"{path}:1", "a"), (f"{path}:4", "b\u2028\x85c")]


@pytest.mark.parametrize("name", ["d.txt", "d", "wiki.test.tokens", "d.txt.gz"])
def test_any_other_file_is_one_document(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"a\r\nb\n") if name.endswith(".gz") else b"a\r\nb\n")
    assert perplexity.read_documents(path) == [(str(path), "a\r\nb\n")]


def test_rows_of_a_parquet_file_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "", "b"]}), path)
    assert perplexity.read_documents(path) == [(f"{path}: row 1", "a"), (f"{path}: row 3", "b")]
    parquet.write_table(pyarrow.table({"text": ["a", None], "body": ["x", "y"]}), path)
    with pytest.raises(MtError, match=r"d\.parquet: row 2: key 'text' is null, not a text; a text in every row"):
        perplexity.read_documents(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(MtError, match=r"d\.txt: holds no text"):
        perplexity.read_documents(tmp_path / "d.txt")


def test_a_file_of_one_word_is_refused(encoder):
    with pytest.raises(MtError, match=r"w\.txt: holds no two words; the word-tokenised file"):
        wikitext103.prepare("alone\n", encoder, "w.txt")
