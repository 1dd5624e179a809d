"""Beam search finds the likeliest texts, whatever else the engine does."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from ckpt.conftest import hugging_face_model
from eval.generation.families import make_family
from eval.generation.test_engine import finish, make_requests, strip
from mt_core.errors import MtError
from mt_eval.generation.engine import Engine, EngineOptions
from mt_eval.generation.requests import BeamOptions, Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.load import Checkpoint, load_model
from mt_models.config import GPTConfig

PROMPT = (5, 6, 7)


def search(model, request, options=None):
    """The beams of a request alone."""
    ((output,),) = finish(Engine(model, options or EngineOptions()), request)
    assert output.finish == output.beams[0].finish
    return output.beams


@pytest.fixture(scope="module")
def tiny(config):
    """A GPT in fp64 with four tokens."""
    gpt = GPTConfig.model_validate({**config, "vocab_size": 4, "layers": 1}).build()
    gpt.initialize(3)
    return gpt.double().eval()


def enumerate_texts(model, prompt, length, ends):
    """Every text of new tokens: its tokens without the end, its log-probability, its length and how it ends."""
    texts = []
    for tokens in itertools.product(range(4), repeat=length):
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        if end is not None and any(tokens[end + 1 :]):
            continue  # each text that ends is taken once, with zeros behind the end
        count = length if end is None else end + 1
        with torch.inference_mode():
            scores_TV = model(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(-1)[len(prompt) - 1 :]
        total = sum(scores_TV[place, token].item() for place, token in enumerate(tokens[:count]))
        texts.append(
            (tokens[:count] if end is None else tokens[:end], total, count, "length" if end is None else "stop")
        )
    return texts


@pytest.mark.parametrize(("width", "penalty"), [(200, 1.0), (200, -0.5), (200, 0.0), (16, 0.0), (1, 0.0)])
def test_beams_are_the_likeliest_of_all_texts(tiny, width, penalty):
    """Wide enough that no beginning is dropped, the search orders all texts of four tokens; a narrow one, the best.

    Without a penalty 16 beams are enough, since the 16 beginnings of two tokens all stay open.
    """
    length = {200: 4, 16: 3, 1: 1}[width]
    texts = enumerate_texts(tiny, (1, 2), length, {3})
    ranked = sorted(((total / count**penalty, tokens, end) for tokens, total, count, end in texts), reverse=True)
    options = EngineOptions(max_running=200, block_size=4)
    request = Request((1, 2), length, ends=frozenset({3}), beams=BeamOptions(width, penalty))
    beams = search(tiny, request, options)
    assert [(beam.tokens, beam.finish) for beam in beams] == [(tokens, end) for _, tokens, end in ranked[:width]]
    torch.testing.assert_close(
        torch.tensor([beam.score for beam in beams]),
        torch.tensor([score for score, _, _ in ranked[:width]]),
        rtol=0,
        atol=1e-12,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model of transformers, and ours of the same weights."""
    path = tmp_path_factory.mktemp("beams") / "hf"
    model = hugging_face_model("llama", bos_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # else all tokens are about as likely, and no short text wins
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path).double(), load_model(Checkpoint.open(path), device="cpu").double()


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (5, 1.0), (4, 0.0), (4, 2.0)])
def test_beams_are_those_of_transformers(both, width, penalty):
    theirs, ours = both
    finishes = set()
    for ends in ({60}, {8, 25, 32}, set(range(0, 61, 4))):
        answer = theirs.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=8,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=penalty,
            eos_token_id=list(ends),
            pad_token_id=60,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = []
        for row in answer.sequences[:, len(PROMPT) :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            expected.append(tuple(row[:end]))
        beams = search(ours, Request(PROMPT, 8, ends=frozenset(ends), beams=BeamOptions(width, penalty)))
        assert [beam.tokens for beam in beams] == expected
        finishes |= {beam.finish for beam in beams}
        scores = torch.tensor([beam.score for beam in beams], dtype=torch.float64)
        torch.testing.assert_close(scores, answer.sequences_scores.double(), rtol=0, atol=1e-5)  # theirs are in fp32
    assert finishes == {"stop", "length"}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_search_does_not_depend_on_others_and_others_not_on_it(name):
    """To the last bit, where blocks are just enough; all of them come back."""
    model = make_family(name)
    prompt = tuple(range(5, 26))
    searches = [Request(prompt[:n], 9, ends=frozenset({3}), beams=BeamOptions(width)) for n, width in ((21, 3), (6, 2))]
    others = make_requests(6, name)
    alone = [strip(*finish(Engine(model, EngineOptions(max_running=4)), request)) for request in others]
    expected = [search(model, request, EngineOptions(max_running=4)) for request in searches]
    engine = Engine(model, EngineOptions(blocks=24, block_size=4, chunk_tokens=9, max_running=4))
    outputs = finish(engine, *others[:3], *searches, *others[3:])
    assert [outputs[3][0].beams, outputs[4][0].beams] == expected
    assert [strip(each) for each in outputs[:3] + outputs[5:]] == alone
    assert (engine.stats.free_blocks, engine.cached.pool.available) == (24, 24)


def test_a_search_that_is_removed_gives_its_blocks_back(model):
    engine = Engine(model, EngineOptions(blocks=32, block_size=4))
    number = engine.add(Request(PROMPT, 20, beams=BeamOptions(4)))
    for _ in range(6):
        assert engine.step() == []
    assert engine.stats.free_blocks < 32
    engine.remove(number)
    assert (engine.idle, engine.stats.free_blocks, engine.cached.pool.available) == (True, 32, 32)


def test_logits_that_are_not_finite_end_the_search(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[6] = math.nan
    engine = Engine(broken)
    ((failed,), (good,)) = finish(engine, Request(PROMPT, 4, beams=BeamOptions(3)), Request((1,), 1))
    assert (failed.finish, failed.beams) == ("error", ())
    assert good.finish == "length"
    assert engine.cached.pool.available == engine.stats.total_blocks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamOptions(0, 11.0), "beam_width: 0; 1 or more(.|\n)*length_penalty: 11.0; -10.0 to 10.0"),
        (lambda: BeamOptions(1, math.nan), "length_penalty: nan"),
        (
            lambda: Request((1,), 0, SamplingOptions(top_k=1), log_probs=0, beams=BeamOptions(2)),
            "beam_width: together with options of sampling(.|\n)*log-probabilities of tokens(.|\n)*no new tokens",
        ),
    ],
)
def test_searches_without_meaning_are_refused(make, message):
    with pytest.raises(MtError, match=message):
        make()


def test_a_search_that_never_fits_is_refused(model):
    engine = Engine(model, EngineOptions(blocks=8, block_size=4, max_running=4))
    with pytest.raises(MtError, match=r"beam_width: 5; at most 4 \(max_running\)"):
        engine.add(Request((1,), 1, beams=BeamOptions(5)))
    with pytest.raises(MtError, match="prompt: needs 12 blocks of 4 tokens, the cache has 8"):
        engine.add(Request((1,), 12, beams=BeamOptions(4)))
