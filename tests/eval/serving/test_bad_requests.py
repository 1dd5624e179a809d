"""Wrong requests get a 4xx that says what is wrong, in OpenAI's shape, and never reach the engine."""

import pytest

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt: missing; required"),
        ({"prompt": ""}, "prompt: is empty; at least one character"),
        ({"prompt": []}, "prompt: is empty; at least one token"),
        ({"prompt": ["a", ""]}, "prompt.1: is empty; at least one character"),
        ({"prompt": [[97], []]}, "prompt.1: is empty; at least one token"),
        ({"prompt": 3}, "prompt: 3; a text, a list of texts, a list of token ids, or a list of such lists"),
        ({"prompt": [1, "a"]}, "prompt: [1, 'a']; a text, a list of texts"),
        ({"prompt": [True]}, "prompt: [True]; a text, a list of texts"),
        ({"prompt": [1, 257]}, "prompt: 257 is no token; ids from 0 to 256"),
        ({"prompt": [[1], [-1]]}, "prompt.1: -1 is no token"),
        ({"prompt": ["a"] * 5}, "prompt: 5 prompts; at most 4 in one request"),
        ({"prompt": "a" * 41}, "prompt: has 41 tokens; at most 40 are taken"),
        ({"prompt": "a" * 40, "max_tokens": 30}, "prompt: 40 tokens and 30 new ones exceed the model's 64 positions; "),
        ({"prompt": "a" * 40, "max_tokens": 30}, "max_tokens of 24 or less"),
        ({"max_tokens": 33}, "max_tokens: 33; at most 32 are given"),
        ({"max_tokens": 0}, 'max_tokens: 0 without echo leaves nothing to answer; 1 or more, or "echo": true'),
        ({"max_tokens": -1}, "max_tokens: -1; input should be greater than or equal to 0"),
        ({"max_tokens": "5"}, "max_tokens: '5'; input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: True; input should be a valid integer"),
        ({"temperature": -1}, "temperature: -1; input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: 'hot'; input should be a valid number"),
        ({"temperature": 1e999}, "NaN or Infinity, which are no JSON; send finite numbers"),
        ({"top_p": 0}, "top_p: 0; input should be greater than 0"),
        ({"top_k": 2, "top_p": 0.5}, "top_k: 2; not together with a top_p below 1: give one of the two"),
        ({"n": 2}, "n: 2; only 1 is served: each answer is a request of its own; send several, with other seeds"),
        ({"best_of": 3}, "best_of: 3; only 1 is served"),
        ({"stop": 3}, "stop: 3; a text, or a list of texts"),
        ({"stop": ["a", 3]}, "stop: ['a', 3]; a text, or a list of texts"),
        ({"stop": [""]}, "stop: ['']; at most 16 texts, none empty"),
        ({"stop": ["a"] * 17}, "at most 16 texts, none empty"),
        ({"logprobs": True}, "logprobs: True; input should be a valid integer"),
        ({"logprobs": 21}, "logprobs: 21; input should be less than or equal to 20"),
        ({"echo": "yes"}, "echo: 'yes'; input should be a valid boolean"),
        ({"seed": 1.5}, "seed: 1.5; input should be a valid integer"),
        ({"stream_options": {"include_usage": True}}, 'only with "stream": true'),
        ({"stream": True, "stream_options": {"usage": True}}, "usage: unknown field"),
        ({"presence_penalty": 0.5}, "presence_penalty: 0.5; is not served: leave it out, or 0 or empty"),
        ({"logit_bias": {"5": 1}}, "logit_bias: is not served: leave it out"),
        ({"suffix": "x"}, "suffix: 'x'; is not served: leave it out"),
        ({"max_token": 3}, "max_token: unknown field; did you mean 'max_tokens'? allowed: model, temperature"),
        ({"a": 1, "b": None, "max_tokens": "x"}, "a: unknown field"),
        ({"a": 1, "b": None, "max_tokens": "x"}, "b: unknown field"),
        ({"a": 1, "b": None, "max_tokens": "x"}, "max_tokens: 'x'; input should be a valid integer"),
    ],
)
def test_a_wrong_field_is_named(server, fields, message):
    before = len(server.engine.seen)
    status, text = server.refuse(PATH, {"prompt": "a", **fields})
    assert status == 400
    assert message in text
    assert len(server.engine.seen) == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is blank; send a JSON object in UTF-8"),
        (b"{", "the body is not JSON: "),
        (b"[]", "the body is a list, not an object"),
        (b'{"prompt": "\xff"}', "the body is not UTF-8 at byte 13"),
        (b'{"prompt": "ab\\ud800"}', "the body holds half a surrogate pair, at character 3 of a text"),
        (b'{"prompt": "a", "stop": ["\\udc00"]}', "the body holds half a surrogate pair, at character 1 of a text"),
        (b'{"prompt": "a", "temperature": NaN}', "the body holds NaN or Infinity"),
        (b'{"prompt": ' + b"[" * 1900 + b"1" + b"]" * 1900 + b"}", "the body is nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 3900 + b"}", ""),
    ],
)
def test_a_body_that_is_no_object_of_texts_is_refused(server, body, message):
    if not message:
        assert server.ask("POST", PATH, body)[0] == 200
        return
    status, text = server.refuse(PATH, body)
    assert status == 400
    assert message in text


def test_a_body_over_the_limit_is_refused(server):
    assert server.refuse(PATH, {"prompt": "a" * 4000}) == (
        413,
        "the body has more than 4,000 bytes, the most that is taken",
    )


def test_a_body_has_to_say_that_it_is_json(server):
    """Else any page that a person looks at could ask a server on their machine."""
    status, message = server.refuse(PATH, {"prompt": "a"}, content_type="text/plain")
    assert (status, message) == (415, "the body has to be JSON: send the header `Content-Type: application/json`")


def test_another_model_is_a_404(server):
    status, message = server.refuse(PATH, {"prompt": "a", "model": "gpt-4"})
    assert (status, message) == (404, "model: 'gpt-4' is not served here; ask for 'tiny', or leave the field out")


def test_another_path_is_a_404_that_names_the_paths(server):
    status, _, answer = server.ask("GET", "/v2/completions")
    assert status == 404
    assert answer["error"]["message"].startswith(
        "GET /v2/completions: not found; allowed: PUT /api, POST /completions, "
    )


def test_the_error_says_which_field(server):
    _, _, answer = server.ask("POST", PATH, {"prompt": "a" * 40, "max_tokens": 30})
    assert {key: answer["error"][key] for key in ("type", "param", "code")} == {
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }


def test_a_request_that_the_engine_refuses_is_a_400(server):
    assert server.refuse(PATH, {"prompt": "a" * 39}) == (400, "prompt: 39 tokens do not fit the cache; another number")


def test_the_key_guards_what_generates_and_lists(start):
    server = start(api_key="secret")
    body = {"prompt": "a", "max_tokens": 1}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret"},
        {"authorization": "Bearer é"},
    ):
        status, _, answer = server.ask("POST", PATH, body, **headers)
        assert status == 401
        assert answer["error"]["code"] == "invalid_api_key"
        assert answer["error"]["message"] == "a valid key is needed: send the header `Authorization: Bearer KEY`"
    right = {"authorization": "Bearer secret"}
    assert server.ask("POST", PATH, body, **right)[0] == 200
    assert server.ask("PUT", "/api", {"prompts": ["a"], "tokens_to_generate": 1})[0] == 401
    assert (server.ask("GET", "/v1/models")[0], server.ask("GET", "/v1/models", **right)[0]) == (401, 200)
    assert [server.ask("GET", path)[0] for path in ("/health", "/metrics", "/")] == [200, 200, 200]
