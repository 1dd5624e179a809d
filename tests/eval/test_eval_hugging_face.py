"""Texts begin and words are cut as transformers does it, on small models and tokenizers made here."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

from eval.tiny_hugging_face import NAMED, WORDS, make_llama_tokenizer, save, write_gpt2, write_llama
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import load_tokenizer
from mt_eval.encoding import TextEncoder
from mt_eval.generation.command import generate
from mt_eval.tasks.command import app

PROMPTS = ["the of and", "a", "it was", "he was to be with it"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


def run(task, directory, data, *options):
    words = [
        task,
        "--load-dir",
        directory,
        "--data",
        data,
        "--device",
        "cpu",
        "--output",
        data.with_suffix(".out"),
        *options,
    ]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(data.with_suffix(".out").read_text()) | {"table": result.stdout}


def run_generate(directory, *options):
    application = Typer()
    application.command()(generate)
    words = [str(word) for word in (directory, "--max-new-tokens", 8, "--top-k", 1, "--device", "cpu", *options)]
    return CliRunner().invoke(application, words, catch_exceptions=False)


def generate_reference(directory, prompt, *, special=True):
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)
    ids = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=8
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", [None, False])
def test_greedy_texts_equal_transformers(request, name, bos):
    directory = request.getfixturevalue(name)
    prompts = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    result = run_generate(directory, *prompts, *(() if bos is None else ("--no-bos",)))
    expected = [generate_reference(directory, prompt, special=bos is None) for prompt in PROMPTS]
    assert result.stdout == "".join(f"--- prompt {n}\n{text}\n" for n, text in enumerate(expected, start=1))
    assert run_generate(directory, *prompts[:2], *(() if bos is None else ("--no-bos",))).stdout == f"{expected[0]}\n"
    begins = "generate: every prompt begins with <s> (1)\n"
    assert (begins in result.stderr) == (name == "llama" and bos is None)


def test_add_bos_token_without_a_post_processor_equals_the_template(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    other = save(tmp_path, model, make_llama_tokenizer(template=False), **NAMED, add_bos_token=True)
    assert run_generate(other, "--prompt", "it was").stdout == f"{generate_reference(llama, 'it was')}\n"


def make_passages(directory):
    """Passages whose last word is transformers' greedy choice after the beginning of text, and not without it."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    draw, passages = random.Random(3), []

    def choose(context, *, special):
        ids = tokenizer(context, return_tensors="pt", add_special_tokens=special)["input_ids"]
        return tokenizer.convert_ids_to_tokens(model(ids).logits[0, -1].argmax().item())

    while len(passages) < 6:
        context = " ".join(draw.choices(WORDS, k=5))
        token = choose(context, special=True)
        if token in {f"▁{word}" for word in WORDS} and choose(context, special=False) != token:
            passages.append(f"{context} {token[1:]}")
    return passages


def read_accuracies(report):
    return report["metrics"]["strict_accuracy"], report["metrics"]["loose_accuracy"]


def test_lambada_predicts_the_words_that_transformers_predicts(llama, tmp_path):
    data = tmp_path / "lambada.jsonl"
    data.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in make_passages(llama)))
    report = run("lambada", llama, data)
    assert read_accuracies(report) == (1.0, 1.0)
    assert report["settings"]["before_each_text"] == "<s> (1)"
    assert "before each text  <s> (1)\n" in report["table"]
    assert read_accuracies(run("lambada", llama, data, "--no-bos")) == (0.0, 0.0)
    assert run("lambada", llama, data, "--bos")["metrics"] == report["metrics"]


def test_perplexity_is_transformers_own_loss(llama, gpt2, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("it was the of and a to be")
    for directory, options, before in (
        (llama, (), [1]),
        (llama, ("--no-bos",), [2]),  # the end of document, as for every tokenizer without a beginning
        (gpt2, (), [256]),
        (gpt2, ("--bos",), [256]),
    ):
        tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
        ids = torch.tensor([[*before, *tokenizer(data.read_text(), add_special_tokens=False)["input_ids"]]])
        expected = model(ids, labels=ids).loss.item()
        assert run("perplexity", directory, data, *options)["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert run("perplexity", gpt2, data, "--bos")["settings"]["before_each_text"] == "</s> (256)"


@pytest.fixture(scope="session")
def encoder(llama):
    return TextEncoder.create(load_tokenizer(llama))


def test_a_continuation_is_the_difference_of_the_whole_and_the_context(encoder):
    tokenizer = encoder.tokenizer
    pieces = {text: tokenizer.vocabulary()[text] for text in ("▁it", "▁was", "▁")}
    assert tokenizer.encode(" was") == [pieces["▁"], pieces["▁was"]], "alone it has one token more"
    for context, continuation in (("it", " was"), ("it ", "was")):  # a space at the end moves over
        assert encoder.encode_pair(context, continuation) == ([1, pieces["▁it"]], [pieces["▁was"]])
    assert encoder.encode_pair("", "it was") == ([1], [pieces["▁it"], pieces["▁was"]])
    plain = TextEncoder.create(tokenizer, bos=False)
    assert plain.encode_pair("it", " was") == ([pieces["▁it"]], [pieces["▁was"]])
    assert plain.encode_pair("", "it") == ([tokenizer.eod], [pieces["▁it"]])
    assert encoder.encode("") == [1]
    assert plain.encode("") == [2]


def test_where_a_token_reaches_over_the_seam_the_cut_is_at_the_number_of_the_contexts_tokens(encoder):
    ids = encoder.tokenizer.vocabulary()
    assert encoder.encode_plain("th") == [ids["▁"], ids["t"], ids["h"]]
    assert encoder.encode_plain("they") == [ids["▁they"]]
    assert encoder.encode_plain("the was") == [ids["▁the"], ids["▁was"]]
    assert encoder.encode_pair("the", "y was") == ([1, ids["▁the"]], [ids["▁was"]])
    assert encoder.encode_pair("th", "ey") == ([1, ids["▁"], ids["t"], ids["h"]], [])


def test_a_tokenizer_that_begins_whatever_it_encodes_begins_once(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    from mt_data.tokenizers import build_tokenizer

    (tmp_path / "t.txt").write_text("".join(" ".join(random.Random(n).choices(WORDS, k=8)) + "\n" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"),
        model_prefix=str(tmp_path / "t"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = build_tokenizer(TokenizerConfig(type="Llama2Tokenizer", model=str(tmp_path / "t.model")))
    whole = tokenizer.encode("it was they")
    context, target = TextEncoder.create(tokenizer).encode_pair("it was", " they")
    assert [*context, *target] == whole == TextEncoder.create(tokenizer).encode("it was they")
    assert whole.count(1) == 1
    assert TextEncoder.create(tokenizer, bos=False).encode("it was they") == whole[1:]
    assert TextEncoder.create(tokenizer).encode_batch(["it was they", ""]) == [whole[1:], []]
    assert TextEncoder.create(tokenizer).describe_prefix() == "<s> (1)"


def test_a_beginning_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    make_llama_tokenizer(template=False).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        MtError, match="--bos: HuggingFaceTokenizer has neither a beginning nor an end of sequence; leave"
    ):
        TextEncoder.create(load_tokenizer(tmp_path), bos=True)
