"""Answers to lm-evaluation-harness equal those of its own `hf` model on the same small checkpoints."""

import random
from collections import namedtuple

import pytest
import torch

from eval.tiny_hugging_face import WORDS, write_gpt2, write_llama
from mt_ckpt.conversion.convert import convert
from mt_core.errors import MtError

pytestmark = pytest.mark.slow

Request = namedtuple("Request", ["args", "arguments"])
POSITIONS = 64


def ask(*args):
    return Request(args, args)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directories of both models."""
    root = tmp_path_factory.mktemp("hf")
    (root / "llama").mkdir()
    (root / "gpt2").mkdir()
    return {"llama": write_llama(root / "llama"), "gpt2": write_gpt2(root / "gpt2")}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request, checkpoints):
    """lm-eval's own model and ours, of the same directory.

    Without its cache of logits, which of two continuations of one input reads the shorter one's tokens too early.
    """
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    directory = checkpoints[request.param]
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=3, logits_cache=False)
    return theirs, open_ours(directory)


def open_ours(directory, **options):
    from lm_eval.api.registry import get_model

    from mt_eval.harness import model  # noqa: F401  # its import registers the name

    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    return get_model("mt").create_from_arg_string(
        f"load_dir={directory},{arguments}".rstrip(","), {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    )


def make_texts(count, words):
    draw = random.Random(5)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


PAIRS = [
    ("", "it was"),
    ("it ", "was"),
    *((text, f" {word}") for text in make_texts(2, 4) for word in ("the", "to be", "was")),
    ("he was to be", " with it and his"),
    *((text, " of the") for text in make_texts(2, 80)),  # longer than the model: tokens are lost on the left
]


def test_log_likelihoods_and_greedy_flags(both):
    theirs, ours = both
    pairs = [ask(*pair) for pair in PAIRS]
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    answers = ours.loglikelihood(pairs, disable_tqdm=True)
    for pair, answer, (log_prob, greedy) in zip(PAIRS, answers, expected, strict=True):
        assert answer == (pytest.approx(log_prob, abs=1e-4), greedy), pair


def test_rolling_log_likelihoods_without_scoring_a_beginning(both, monkeypatch):
    """lm-eval's model puts a beginning of sequence twice and scores it, unless it is told to add none."""
    theirs, ours = both
    monkeypatch.setattr(theirs, "add_bos_token", False)
    texts = [ask(text) for text in ("", "it was", "the of and a", *make_texts(2, 90))]
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert expected[0] == 0 > expected[1]


def test_greedy_texts_up_to_stop_strings(both):
    theirs, ours = both
    first = theirs.generate_until([ask("it was", {"until": [], "max_gen_toks": 12})], disable_tqdm=True)[0]
    stop = first[4:6]
    requests = [
        *(ask(text, {"until": [stop], "max_gen_toks": 12, "do_sample": False}) for text in ("it was", "he")),
        *(
            ask(text, {"until": [], "max_gen_toks": 9, "temperature": 0.0})
            for text in ("a", "they", *make_texts(1, 80))
        ),
        ask("it was", {"until": stop, "max_gen_toks": 12}),
    ]
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected
    assert expected[0] == first.partition(stop)[0]
    assert len(set(expected)) > 3


def test_native_and_megatron_checkpoints_answer_as_their_source(checkpoints, tmp_path):
    convert("hf", checkpoints["llama"], "native", tmp_path / "native")
    convert("native", tmp_path / "native", "core", tmp_path / "megatron")
    requests = [ask(*pair) for pair in PAIRS]
    directories = (checkpoints["llama"], tmp_path / "native", tmp_path / "megatron")
    answers = [open_ours(path).loglikelihood(requests, disable_tqdm=True) for path in directories]
    assert answers[0] == answers[1] == answers[2]


def test_batches_of_any_size_give_equal_answers(checkpoints):
    requests = [ask(*pair) for pair in PAIRS]
    ours = open_ours(checkpoints["llama"])
    single = ours.loglikelihood(requests, disable_tqdm=True)
    ours.rows = None
    for (log_prob, greedy), answer in zip(single, ours.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert answer == (pytest.approx(log_prob, abs=1e-4), greedy)


def test_no_bos_begins_texts_without_one(checkpoints):
    plain, begun = (open_ours(checkpoints["llama"], bos=bos) for bos in (False, True))
    assert begun.tok_encode("it was") == [1, *plain.tok_encode("it was")]
    assert begun.tok_encode("<s>it was")[:1] == plain.tok_encode("<s>it was")[:1]
    assert (begun.prefix_token_id, plain.prefix_token_id, plain.eot_token_id) == (1, 2, 2)


def test_the_entry_point_names_the_registered_class(checkpoints):
    from importlib.metadata import entry_points

    (point,) = entry_points(group="lm_eval.models", name="mt")
    assert type(open_ours(checkpoints["llama"])) is point.load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lod_dir": 1}, "model_args.lod_dir: unknown argument; did you mean 'load_dir'?"),
        ({"max_length": 65}, "--seq-length: 65 tokens; 1 to 64, the model's positions"),
    ],
)
def test_wrong_arguments_are_named(checkpoints, options, message):
    with pytest.raises(MtError) as error:
        open_ours(checkpoints["llama"], **options)
    assert str(error.value).startswith(message)
