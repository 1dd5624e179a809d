"""`mt serve` as people run it: the `openai` client, `mt serve-client`, a key, signals."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from eval.serving.serve_process import LIMIT_S, run_client, start_server
from mt_cli.main import app
from mt_core.errors import MtError
from mt_eval.generation.engine import Engine
from mt_eval.generation.generate import generate
from mt_eval.generation.requests import Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.load import Checkpoint, load_model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
GREEDY = SamplingOptions(top_k=1)


@pytest.fixture(scope="module")
def small(checkpoint):
    """The model as the server has it."""
    return load_model(Checkpoint.open(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    options = ["--name", "tiny", "--chat-template", str(file), "--device", "cpu"]
    with start_server(checkpoint, *options, env=os.environ | {"MT_API_KEY": "secret"}) as running:
        yield running
        assert running.end() == (0, "")


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"http://{server.address}/v1", api_key="secret", max_retries=0, timeout=LIMIT_S) as client:
        yield client


def continue_greedily(model, tokenizer, prompt: str, new: int) -> str:
    (tokens,) = generate(model, [list(prompt.encode())], max_new_tokens=new, options=GREEDY, ends=[256])
    return tokenizer.decode(tokens)


def test_it_says_where_it_listens(server):
    assert server.ready == f"serve: tiny at http://{server.address} (with the key)\n"


def test_the_openai_client_gets_what_the_model_says(client, small, tokenizer):
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0)
    assert answer.choices[0].text == continue_greedily(small, tokenizer, "hello", 12)
    assert answer.usage.prompt_tokens == 5


def test_the_openai_client_reads_a_stream_of_a_chat(client, small, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    fields = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == continue_greedily(small, tokenizer, "<user>hi<bot>", 9)
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in whole.choices[0].logprobs.content)
    chunks = [*client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_scores_are_the_engine_s(client, small):
    """As lm-evaluation-harness asks for them."""
    prompt = tuple(b"a few words")
    answer = client.completions.create(
        model="tiny", prompt=list(prompt), max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1
    )
    engine = Engine(small)
    engine.add(Request(prompt, 1, GREEDY, log_probs=1, prompt_log_probs=True))
    (output,) = engine.step()
    expected = [None, *(score.log_prob for score in output.prompt_log_probs[1:]), output.log_prob]
    assert answer.choices[0].logprobs.token_logprobs == expected
    best = [max(top.values()) for top in answer.choices[0].logprobs.top_logprobs[1:]]
    assert best == [*(score.alternatives[0][1] for score in output.prompt_log_probs[1:]), output.log_prob]


def test_the_openai_client_sees_its_own_errors(client, server):
    import openai

    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.BadRequestError, match="exceed the model's 64 positions"):
        client.completions.create(model="tiny", prompt="a" * 60, max_tokens=16)
    with pytest.raises(openai.BadRequestError, match="a prompt of at most 63 tokens"):
        client.completions.create(model="tiny", prompt="a" * 64, max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; ask for 'tiny'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
        client.with_options(api_key="wrong").completions.create(model="tiny", prompt="a")


def test_the_client_command_continues_each_line(server, small, tokenizer):
    key = os.environ | {"MT_API_KEY": "secret"}
    ran = run_client(server.address, "hello\n\nyou\n", "--max-tokens", "12", "--temperature", "0", env=key)
    texts = [continue_greedily(small, tokenizer, prompt, 12) for prompt in ("hello", "you")]
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "".join(f"{text}\n" for text in texts), "")


def test_the_client_command_tells_errors_in_a_line_and_goes_on(server, small, tokenizer):
    key = os.environ | {"MT_API_KEY": "secret"}
    ran = run_client(server.address, f"{'a' * 60}\nyou\n", "--max-tokens", "12", "--temperature", "0", env=key)
    assert (ran.returncode, ran.stdout) == (1, continue_greedily(small, tokenizer, "you", 12) + "\n")
    assert ran.stderr.startswith(f"mt: {server.address}: status 400: prompt: 60 tokens and 12 new ones exceed")
    assert ran.stderr.count("\n") == 1
    ran = run_client(server.address, "a\n", "--api-key", "wrong")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "status 401: a valid key is needed" in ran.stderr


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("localhost", 2, "mt: HOST:PORT: 'localhost' is no host and port; such as 127.0.0.1:5000\n"),
        ("127.0.0.1:70000", 2, "mt: HOST:PORT: '127.0.0.1:70000' is no host and port; such as 127.0.0.1:5000\n"),
        (
            "127.0.0.1:1",
            1,
            "mt: 127.0.0.1:1: no answer ([Errno 111] Connection refused); is `mt serve` running there?\n",
        ),
    ],
)
def test_the_client_command_says_when_there_is_no_server(address, code, message):
    ran = run_client(address, "a\n")
    assert (ran.returncode, ran.stderr) == (code, message)


def test_sigterm_lets_an_answer_end_and_takes_no_other(checkpoint):
    with start_server(checkpoint, "--device", "cpu") as server:
        connection = http.client.HTTPConnection(server.address, timeout=LIMIT_S)
        body = {"prompt": "a", "max_tokens": 60, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        events = [
            json.loads(line.removeprefix("data: ")) for line in (first.decode() + rest).split("\n") if "{" in line
        ]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        server.process.wait(LIMIT_S)
        assert server.process.returncode == 0
        with pytest.raises(OSError, match="refused"):
            http.client.HTTPConnection(server.address, timeout=LIMIT_S).request("GET", "/health")


def test_ctrl_c_ends_it_without_a_traceback(checkpoint):
    with start_server(checkpoint, "--device", "cpu") as server:
        code, errors = server.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "1", "--host", "203.0.113.1"], "mt: --host, --port: 203.0.113.1:1 cannot be listened at (Cannot"),
        (["--max-waiting", "3"], "mt: --max-prompts: 128 do not fit --max-waiting 3; raise it\n"),
        (["--chat-template", "none.jinja"], "mt: none.jinja: cannot be read"),
        (["--block-size", "3"], "mt: block_size: 3; a power of 2 from 1 to 128\n"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(checkpoint, options, message):
    words = [sys.executable, "-m", "mt_cli", "serve", str(checkpoint), "--port", "0", *options]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(message)


def test_a_server_without_its_libraries_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    message = "mt serve: needs 'starlette', which is not installed; pip install 'mt-eval[serve]'"
    with pytest.raises(MtError, match=f"^{re.escape(message)}$"):
        CliRunner().invoke(app, ["serve", "run"], catch_exceptions=False)


def test_an_open_server_without_a_key_is_warned_of(checkpoint):
    with start_server(checkpoint, "--device", "cpu", "--host", "0.0.0.0") as server:
        warning = "serve: anyone who reaches 0.0.0.0 may use the model: give --api-key\n"
        assert server.ready.startswith(warning)
        assert server.end()[0] == 0
