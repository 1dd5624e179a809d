"""`PUT /api` keeps Megatron-LM's protocol (docs/specs/evaluation.md §4.2), with 400 for every wrong request."""

import pytest

from eval.serving.running_server import ScriptedEngine
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import BeamOptions, Request
from mt_eval.generation.sampling import SamplingOptions


def test_prompts_come_back_with_their_continuations(server):
    answer = server.post("/api", prompts=["ab", "c"], tokens_to_generate=2, logprobs=True)
    assert answer == {
        "text": ["ab01", "c01"],
        "segments": [["a", "b", "0", "1"], ["c", "0", "1"]],
        "logprobs": [[-0.5, -0.5, -0.5], [-0.5, -0.5]],
    }


def test_the_defaults_are_megatron_s(server):
    answer = server.post("/api", prompts=["a"], tokens_to_generate=32)
    assert answer["logprobs"] is None
    request = server.engine.seen[-1]
    assert (request.sampling, request.log_probs) == (SamplingOptions(1.0, 0, 0.0), None)
    assert server.refuse("/api", {"prompts": ["a"]})[1] == "tokens_to_generate: 64; at most 32 are given"


def test_a_prompt_alone_is_scored(server):
    answer = server.post("/api", prompts=["abc"], tokens_to_generate=0, logprobs=True)
    assert answer == {"text": ["abc"], "segments": [["a", "b", "c"]], "logprobs": [[-0.5, -0.5]]}


def test_a_beginning_is_the_end_of_document_where_there_is_no_other(server):
    answer = server.post("/api", prompts=["", "a"], add_BOS=True, tokens_to_generate=1)
    assert [request.prompt for request in server.engine.seen[-2:]] == [(256,), (256, 97)]
    assert answer["text"] == ["0", "a0"]
    assert answer["segments"] == [["<|endoftext|>", "0"], ["<|endoftext|>", "a", "0"]]


def test_settings_reach_the_engine(server):
    server.post("/api", prompts=["a"], tokens_to_generate=1, temperature=0.5, top_k=3, random_seed=9, no_log=True)
    request = server.engine.seen[-1]
    assert (request.sampling, request.seed) == (SamplingOptions(0.5, 3), 9)
    decay = {"top_p": 0.5, "top_p_decay": 0.9, "top_p_bound": 0.2}
    server.post("/api", prompts=["a", "a"], tokens_to_generate=1, random_seed=9, **decay)
    assert server.engine.seen[-1].sampling == SamplingOptions(1.0, 0, 0.5, 0.9, 0.2)
    assert [request.sample for request in server.engine.seen[-2:]] == [0, 1]


@pytest.mark.parametrize(("field", "text"), [("stop_on_eol", "a"), ("stop_on_double_eol", "a\nb")])
def test_an_answer_ends_before_line_feeds(start, field, text):
    server = start(ScriptedEngine(lambda request: b"a\nb\n\nc"))
    answer = server.post("/api", prompts=["p"], tokens_to_generate=6, **{field: True})
    assert answer["text"] == ["p" + text]
    assert answer["segments"] == [["p", *text]]


def test_beams_are_the_likeliest_texts_with_their_scores(start, model, tokenizer):
    """Of one prompt, the best first; they end at the stop token, which is no part of the text."""
    server = start(Engine(model))
    settings = {"prompts": ["ab"], "tokens_to_generate": 5, "beam_width": 3, "random_seed": 4}
    for fields, ends, penalty in (({}, {256}, 1.0), ({"stop_token": 100, "length_penalty": 0.5}, {100}, 0.5)):
        answer = server.post("/api", **settings, **fields)
        engine = Engine(model)
        engine.add(Request((97, 98), 5, ends=frozenset(ends), beams=BeamOptions(3, penalty)))
        outputs = []
        while not outputs:
            outputs = engine.step()
        assert answer.keys() == {"text", "segments", "scores"}
        assert answer["scores"] == [beam.score for beam in outputs[0].beams]
        assert answer["text"] == [tokenizer.decode([97, 98, *beam.tokens]) for beam in outputs[0].beams]
        assert [segments[:2] for segments in answer["segments"]] == [["a", "b"]] * 3
        assert [len(segments) for segments in answer["segments"]] == [2 + len(beam.tokens) for beam in outputs[0].beams]


def test_more_beams_than_run_at_a_time_are_refused(start, model):
    status, text = start(Engine(model)).refuse("/api", {"prompts": ["a"], "tokens_to_generate": 2, "beam_width": 33})
    assert (status, text) == (400, "beam_width: 33; at most 32 (max_running)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": None}, "prompts: missing; required"),
        ({"max_len": 5}, "max_len: is no field any more; it is called tokens_to_generate now"),
        ({"sentences": ["a"]}, "sentences: is no field any more; it is called prompts now"),
        ({"prompts": "a"}, "prompts: 'a'; input should be a valid list"),
        ({"prompts": []}, "prompts: []; list should have at least 1 item"),
        ({"prompts": ["a"] * 129}, "list should have at most 128 items after validation, not 129"),
        ({"prompts": ["a"] * 5}, "prompts: 5 prompts; at most 4 in one request"),
        ({"prompts": ["a", 3]}, "prompts.1: 3; input should be a valid string"),
        ({"prompts": [""]}, "prompts.0: is empty; at least one character, or add_BOS true"),
        ({"tokens_to_generate": -1}, "tokens_to_generate: -1; input should be greater than or equal to 0"),
        ({"tokens_to_generate": 2.0}, "tokens_to_generate: 2.0; input should be a valid integer"),
        ({"tokens_to_generate": 0}, "tokens_to_generate: 0 leaves nothing to answer; 1 or more, or logprobs true"),
        ({"logprobs": 1}, "logprobs: 1; input should be a valid boolean"),
        ({"temperature": 0}, "temperature: 0; input should be greater than 0"),
        ({"temperature": 100.5}, "temperature: 100.5; input should be less than or equal to 100"),
        ({"top_k": 1001}, "top_k: 1001; input should be less than or equal to 1000"),
        ({"top_p": 1}, "top_p: 1; a number with a decimal point, such as 0.9 or 1.0"),
        ({"top_p": 1.5}, "top_p: 1.5; input should be less than or equal to 1"),
        ({"top_k": 2, "top_p": 0.5}, "top_k, top_p: both are set; give one of the two"),
        ({"top_p_decay": 0.5}, "top_p_decay, top_p_bound: only with top_p"),
        ({"top_p": 0.5, "top_p_bound": 0.2}, "top_p_bound: only with top_p_decay"),
        ({"top_p": 0.5, "top_p_decay": 0.9, "top_p_bound": 0.6}, "top_p_bound: 0.6; at most top_p, which is 0.5"),
        ({"beam_width": 0}, "beam_width: 0; input should be greater than or equal to 1"),
        ({"beam_width": 2.0}, "beam_width: 2.0; input should be a valid integer"),
        ({"beam_width": 2, "prompts": ["a", "b"]}, "beam_width: 2 prompts; one, in each request"),
        ({"beam_width": 2, "length_penalty": 1}, "length_penalty: 1; a number with a decimal point"),
        ({"beam_width": 2, "length_penalty": 10.5}, "length_penalty: 10.5; input should be less than or equal to 10"),
        ({"beam_width": 2, "stop_token": 257}, "stop_token: 257 is no token; ids from 0 to 256"),
        ({"beam_width": 2, "top_k": 3, "logprobs": True}, "beam_width: together with logprobs, top_k; a beam search"),
        ({"stop_token": 3}, "stop_token, length_penalty: only with beam_width"),
        ({"length_penalty": 1.0}, "stop_token, length_penalty: only with beam_width"),
        ({"prevent_newline_after_colon": True}, "prevent_newline_after_colon: True; is not served: leave it out"),
        ({"add_BOS": "yes"}, "add_BOS: 'yes'; input should be a valid boolean"),
        ({"random_seed": -2}, "random_seed: -2; input should be greater than or equal to -1"),
        ({"no_log": 0}, "no_log: 0; input should be a valid boolean"),
        ({"token_count": 3}, "token_count: unknown field"),
    ],
)
def test_what_is_wrong_is_a_400_and_said(server, fields, message):
    status, text = server.refuse("/api", {"prompts": ["a"], "tokens_to_generate": 2, **fields})
    assert status == 400
    assert message in text


def test_the_method_is_put(server):
    status, headers, answer = server.ask("POST", "/api", {"prompts": ["a"]})
    assert (status, headers["allow"]) == (405, "PUT")
    assert answer["error"]["message"].startswith("POST /api: method not allowed; allowed: PUT /api, POST /completions")
