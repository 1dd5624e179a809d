"""Steps of fixed shapes give what plain steps give, and are given up where they do not."""

import copy
import math

import pytest
import torch

from eval.generation.families import make_family
from eval.generation.test_engine import GREEDY, SMALL, finish, make_requests
from mt_eval.generation.decode_step import DecodeStep, choose_size
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import BeamOptions, Request


def make_engine(model):
    """An engine whose steps have fixed shapes, though it runs on the CPU."""
    engine = Engine(model, SMALL)
    engine.cached.decoder = DecodeStep(model, engine.cached.part.cache, scratch=SMALL.blocks + 1)
    return engine


def list_tokens(outputs):
    return [[(output.token, output.finish) for output in each] for each in outputs]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mla"])
def test_requests_get_what_plain_steps_give_them(name):
    model = make_family(name, torch.float64)
    requests = [*make_requests(10, name), Request((5, 6, 7), 6, beams=BeamOptions(3))]
    engine = make_engine(model)
    outputs, expected = finish(engine, *requests), finish(Engine(model, SMALL), *requests)
    assert list_tokens(outputs) == list_tokens(expected)
    assert [[o.beams and [b.tokens for b in o.beams] for o in each] for each in outputs] == [
        [o.beams and [b.tokens for b in o.beams] for o in each] for each in expected
    ]
    assert not engine.cached.decoder.failed
    assert engine.stats.free_blocks == engine.stats.total_blocks


def test_a_step_that_gives_other_logits_is_given_up(capsys, monkeypatch):
    model, request = make_family("llama"), Request((5, 6, 7), 6, GREEDY)
    engine, compute = make_engine(model), DecodeStep._compute
    monkeypatch.setattr(DecodeStep, "_compute", lambda *inputs: tuple(x + 1 for x in compute(*inputs)))
    assert list_tokens(finish(engine, request)) == list_tokens(finish(Engine(model, SMALL), request))
    assert engine.cached.decoder.failed
    assert "mt: the recorded step of generation gives other logits than the plain one, by" in capsys.readouterr().err


def test_a_step_that_cannot_be_recorded_is_given_up(capsys, monkeypatch):
    model, request = make_family("llama"), Request((5, 6, 7), 6, GREEDY)
    engine = make_engine(model)

    def fail(*_):
        engine.cached.decoder.graphs = True
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(DecodeStep, "_compute", fail)
    assert list_tokens(finish(engine, request)) == list_tokens(finish(Engine(model, SMALL), request))
    assert "cannot be recorded (RuntimeError: no such kernel); steps stay slower" in capsys.readouterr().err


def test_nan_ends_only_the_request_that_has_it():
    broken, requests = copy.deepcopy(make_family("llama")), [Request((1, 2), 3, GREEDY), Request((96, 5), 3, GREEDY)]
    with torch.no_grad():
        broken.embed.weight[96] = math.nan
    good, bad = finish(make_engine(broken), *requests)
    assert list_tokens([good]) == list_tokens(finish(Engine(make_family("llama"), SMALL), requests[0]))
    assert [output.finish for output in bad] == ["error"]


def test_sizes_have_room_for_the_rows():
    assert [choose_size(rows) for rows in (1, 2, 3, 16, 17, 32, 33, 48, 64, 65)] == [
        *(1, 2, 4, 16, 32, 32, 48, 48, 64, 80)
    ]


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_what_plain_steps_give(capsys):
    from dataclasses import replace

    from eval.conftest import CONFIG
    from mt_models.config import GPTConfig

    wide = {"heads": 8, "num_kv_heads": 2, "head_size": 16}
    model = GPTConfig.model_validate(CONFIG | {"vocab_size": 97, "hidden_size": 64, "attention": wide}).build()
    model.initialize(3)
    model = model.cuda().eval().requires_grad_(False)
    requests = make_requests(10, "gpu")
    engine = Engine(model, SMALL)
    outputs, expected = finish(engine, *requests), finish(Engine(model, replace(SMALL, graphs=False)), *requests)
    assert engine.cached.decoder is not None
    assert not engine.cached.decoder.failed, capsys.readouterr().err
    assert list_tokens(outputs) == list_tokens(expected)
