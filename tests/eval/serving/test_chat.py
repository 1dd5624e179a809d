"""`POST /v1/chat/completions`: what the template gets, and the shapes of OpenAI's interface."""

from dataclasses import replace

import pytest

from eval.serving.running_server import ScriptedEngine
from mt_data.datasets.sft.template import ChatTemplate

PATH = "/v1/chat/completions"
TEMPLATE = """{{ bos_token }}{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]\
{{ m.content }}\
{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}\
{% if tools %}tools={{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[{{ mark or 'assistant' }}]{% endif %}\
{% if messages[0].role == 'tool' %}{{ raise_exception('begins with a tool') }}{% endif %}"""
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(served):
    limits = replace(served.limits, context=200, prompt=150)
    return replace(served, template=ChatTemplate(TEMPLATE, "chat_template.jinja", {"bos_token": "^"}), limits=limits)


@pytest.fixture
def chat(start, model):
    return start(ScriptedEngine(), model)


def get_prompt(server) -> str:
    return bytes(server.engine.seen[-1].prompt).decode()


def test_a_conversation_is_answered(chat):
    answer = chat.post(PATH, messages=ASK, max_tokens=3)
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "012"}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
    assert get_prompt(chat) == "^[user]hi[assistant]"


def test_the_template_sees_all_fields_of_a_conversation(chat):
    call = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "user", "name": "Eva", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    chat.post(PATH, messages=messages, chat_template_kwargs={"mark": "bot"}, max_tokens=1)
    assert get_prompt(chat) == "^[user Eva]a\nb[assistant]Ulm[tool]rain[bot]"


def test_tools_go_to_the_template_unless_none_may_be_used(chat):
    tools = [{"type": "function", "function": {"name": "w"}}]
    chat.post(PATH, messages=ASK, tools=tools, max_tokens=1, parallel_tool_calls=True)
    assert '{"type": "function", "function": {"name": "w"}}' in get_prompt(chat)
    chat.post(PATH, messages=ASK, tools=tools, tool_choice="none", max_tokens=1)
    assert "tools=" not in get_prompt(chat)


def test_an_answer_may_be_as_long_as_the_server_allows_unless_it_is_said(chat):
    chat.post(PATH, messages=ASK)
    assert chat.engine.seen[-1].max_new_tokens == 32
    chat.post(PATH, messages=ASK, max_completion_tokens=5)
    assert chat.engine.seen[-1].max_new_tokens == 5


def test_log_probs_have_texts_and_bytes(chat):
    answer = chat.post(PATH, messages=ASK, max_tokens=1, logprobs=True, top_logprobs=2)
    top = [{"token": "0", "logprob": -0.5, "bytes": [48]}, {"token": "1", "logprob": -1.0, "bytes": [49]}]
    content = [{"token": "0", "logprob": -0.5, "bytes": [48], "top_logprobs": top}]
    assert answer["choices"][0]["logprobs"] == {"content": content, "refusal": None}


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(chat):
    events = chat.stream(PATH, messages=ASK, max_tokens=9, stop=["4"], stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "0123"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert events[-1]["usage"] == {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}


def test_a_stream_has_the_log_probs_of_its_pieces(chat):
    events = chat.stream(PATH, messages=ASK, max_tokens=2, logprobs=True)
    parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [entry["token"] for part in parts for entry in part["content"]] == ["0", "1"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages: []; list should have at least 1 item after validation, not 0"),
        ({}, "messages: missing; required"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: 'robot'; input should be 'system', "),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content.str: 3; input should be a valid string"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "contents: unknown field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            "'image_url'; input should be 'text'",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "chat_template.jinja cannot write it: begins with a tool"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "messages: arguments of a tool call are no JSON",
        ),
        ({"messages": ASK, "tool_choice": "required"}, "tool_choice: 'required'; input should be 'auto' or 'none'"),
        ({"messages": ASK, "response_format": {"type": "json_object"}}, "response_format.type: 'json_object'"),
        ({"messages": ASK, "top_logprobs": 2}, 'top_logprobs: 2; only with "logprobs": true'),
        (
            {"messages": ASK, "max_tokens": 1, "max_completion_tokens": 2},
            "max_completion_tokens: 2; differs from max_tokens: give one",
        ),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens: 0; input should be greater than or equal to 1"),
        ({"messages": ASK, "chat_template_kwargs": {"messages": []}}, "messages cannot be set here"),
        ({"messages": [{"role": "user", "content": "a" * 140}]}, "messages: has 158 tokens; at most 150 are taken"),
    ],
)
def test_what_is_wrong_is_said(chat, body, message):
    status, text = chat.refuse(PATH, body)
    assert status == 400
    assert message in text


def test_a_model_without_a_template_takes_no_conversations(server):
    status, message = server.refuse(PATH, {"messages": ASK})
    assert status == 400
    assert message == (
        "messages: the tokenizer of this model has no chat template; "
        "start `mt serve` with --chat-template FILE, or send a prompt to /v1/completions"
    )
