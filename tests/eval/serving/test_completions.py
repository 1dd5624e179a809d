"""`POST /v1/completions` in the shapes of OpenAI's interface, and as lm-evaluation-harness asks it."""

import pytest

from eval.serving.running_server import ScriptedEngine, wait_until
from mt_eval.generation.sampling import SamplingOptions

PATH = "/v1/completions"


def get_choice(answer, index=0):
    return answer["choices"][index]


def test_a_text_is_continued(server):
    answer = server.post(PATH, prompt="ab", max_tokens=3)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "012", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_the_default_is_sixteen_tokens_drawn_from_all(server):
    assert get_choice(server.post(PATH, prompt="default"))["text"] == "0123456789abcdef"
    request = server.engine.seen[-1]
    assert (request.sampling, request.ends, request.log_probs) == (SamplingOptions(), frozenset({256}), None)


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_a_prompt_has_four_forms(server, prompt):
    server.post(PATH, prompt=prompt, max_tokens=1)
    assert server.engine.seen[-1].prompt == (97, 98)


def test_several_prompts_have_an_answer_each_in_their_order(start):
    server = start(ScriptedEngine(lambda request: [*request.prompt, *request.prompt]))
    answer = server.post(PATH, prompt=["abc", "de", "fgh"], max_tokens=4)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "abca"),
        (1, "dede"),
        (2, "fghf"),
    ]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"temperature": 0}, SamplingOptions(top_k=1)),
        ({"temperature": 0, "top_p": 0.5}, SamplingOptions(top_k=1)),
        ({"temperature": 0.7, "top_k": 5}, SamplingOptions(0.7, 5)),
        ({"top_p": 0.9}, SamplingOptions(1.0, 0, 0.9)),
        ({"top_p": 1.0, "top_k": 3}, SamplingOptions(1.0, 3)),
    ],
)
def test_sampling_fields_reach_the_engine(server, fields, sampling):
    server.post(PATH, prompt="a", max_tokens=1, seed=7, **fields)
    assert (server.engine.seen[-1].sampling, server.engine.seen[-1].seed) == (sampling, 7)


def test_requests_without_a_seed_have_different_ones(server):
    for _ in range(2):
        server.post(PATH, prompt="a", max_tokens=1)
    first, second = server.engine.seen[-2:]
    assert first.seed != second.seed


def test_the_text_ends_before_a_stop_string_and_the_engine_is_freed(start):
    server = start(ScriptedEngine(pause=0.01))
    choice = get_choice(server.post(PATH, prompt="a", max_tokens=32, stop=["zzz", "34"]))
    assert (choice["text"], choice["finish_reason"]) == ("012", "stop")
    wait_until(lambda: server.engine.removed == [1], "the removal")


def test_an_end_is_no_text_unless_it_is_ignored(start):
    server = start(ScriptedEngine(lambda request: [*b"hi", 256, *b"there"]))
    choice = get_choice(answer := server.post(PATH, prompt="a", max_tokens=9))
    assert (choice["text"], choice["finish_reason"]) == ("hi", "stop")
    assert answer["usage"]["completion_tokens"] == 3
    ignored = get_choice(server.post(PATH, prompt="a", max_tokens=4, ignore_eos=True))
    assert (ignored["text"], ignored["finish_reason"]) == ("hi<|endoftext|>t", "length")


def test_log_probs_are_four_lists_of_one_length(server):
    log_probs = get_choice(server.post(PATH, prompt="a", max_tokens=2, logprobs=2))["logprobs"]
    assert log_probs == {
        "tokens": ["0", "1"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"0": -0.5, "1": -1.0}, {"1": -0.5, "2": -1.0}],
        "text_offset": [0, 1],
    }
    assert get_choice(server.post(PATH, prompt="a", max_tokens=1, logprobs=0))["logprobs"]["top_logprobs"] is None


def test_an_echo_begins_with_the_prompt_and_a_null(server):
    choice = get_choice(server.post(PATH, prompt="é!", max_tokens=1, logprobs=1, echo=True))
    assert choice["text"] == "é!0"
    assert choice["logprobs"] == {
        "tokens": ["<0xC3>", "<0xA9>", "!", "0"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"<0xA9>": -0.5}, {"!": -0.5}, {"0": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }


def test_a_prompt_is_scored_as_lm_evaluation_harness_asks(server):
    """Token ids in a batch, one new token, log-probabilities of all: what it sums is [context:-1]."""
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, "model": "tiny"}
    answer = server.post(PATH, prompt=[[10, 11, 12], [20, 21]], **body)
    for choice, prompt in zip(answer["choices"], ([10, 11, 12], [20, 21]), strict=True):
        log_probs = choice["logprobs"]
        assert len(log_probs["token_logprobs"]) == len(prompt) + 1
        assert log_probs["token_logprobs"][1:] == [max(top.values()) for top in log_probs["top_logprobs"][1:]]


def test_a_prompt_alone_is_scored_with_no_new_token(server):
    answer = server.post(PATH, prompt="ab", max_tokens=0, logprobs=0, echo=True)
    assert get_choice(answer)["text"] == "ab"
    assert get_choice(answer)["logprobs"]["token_logprobs"] == [None, -0.5]
    assert answer["usage"]["completion_tokens"] == 0


def test_tokens_of_a_stop_string_have_no_log_probs(server):
    choice = get_choice(server.post(PATH, prompt="a", max_tokens=9, logprobs=0, stop="23"))
    assert choice["text"] == "01"
    assert choice["logprobs"]["tokens"] == ["0", "1"]


def test_a_stream_is_the_answer_in_pieces(server):
    body = {"prompt": ["ab", "c"], "max_tokens": 9, "stop": "45", "logprobs": 1, "seed": 1, "echo": True}
    whole, events = server.post(PATH, **body), server.stream(PATH, **body, stream_options={"include_usage": True})
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []
    for index, choice in enumerate(whole["choices"]):
        parts = [part for event in events for part in event["choices"] if part["index"] == index]
        assert len(parts) > 3
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == "stop"
        for key, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][key]] == values


def test_a_stream_has_no_usage_unless_it_is_asked_for(server):
    assert all("usage" not in event for event in server.stream(PATH, prompt="a", max_tokens=2))


def test_what_is_not_a_number_is_an_error_and_no_text(start):
    server = start(ScriptedEngine(lambda request: [65, 255, 66]))
    status, message = server.refuse(PATH, {"prompt": "a"})
    assert (status, message) == (500, "the model computes NaN after token 3")
    events = server.stream(PATH, prompt="a")
    assert events[0]["choices"][0]["text"] == "A"
    assert events[1]["error"]["message"] == "the model computes NaN after token 3"


def test_harmless_fields_of_clients_are_taken(server):
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "best_of": 1, "presence_penalty": 0}
    more = {"frequency_penalty": 0.0, "logit_bias": {}, "suffix": None, "stop": None, "logprobs": None, "seed": None}
    assert get_choice(server.post(PATH, prompt="a", max_tokens=1, **fields, **more))["text"] == "0"


def test_the_path_without_a_version_is_megatron_s(server):
    assert get_choice(server.post("/completions", prompt="a", max_tokens=2))["text"] == "01"
