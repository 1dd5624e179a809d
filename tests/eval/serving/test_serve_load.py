"""A thousand requests of 32 clients, some malformed and some given up: right answers, and nothing left behind."""

import asyncio
import json
import random

import pytest

from eval.serving.serve_process import LIMIT_S, start_server
from mt_eval.generation.choices import Choice, Prompt
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import Request
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.load import Checkpoint, load_model

REQUESTS, CLIENTS = 1000, 32
ENDS = frozenset({256})
MALFORMED = (
    (b'{"prompt": "a"', 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": "a", "max_tokens": "many"}', 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "a", "stop": 3, "n": 2, "colour": "red"}', 400),
    (b'{"prompt": "' + b"a" * 60 + b'", "max_tokens": 60}', 400),
    (b'{"prompt": "a", "model": "other"}', 404),
)
PROMPTS = ("a", "the server", "the service", "abcdefghijklmnopqrstuvwxyz", "é")
FORMS = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.3, "top_k": 9, "seed": 6},
    {"top_p": 0.7, "seed": 7, "stop": ["e", "\x19"]},
)
BODIES = [{"prompt": prompt, "max_tokens": 3 + 2 * n, **form} for prompt in PROMPTS for n, form in enumerate(FORMS)]


def compute_answers(model, tokenizer) -> list[tuple[str, str]]:
    """Text and finish reason of each body, by an engine of its own."""
    engine, choices = Engine(model), {}
    for body in BODIES:
        prompt = Prompt(tuple(body["prompt"].encode()), 0, body["prompt"])
        greedy = body.get("temperature") == 0
        values = (body.get("temperature", 1.0), body.get("top_k", 0), body.get("top_p", 0.0))
        sampling = SamplingOptions(top_k=1) if greedy else SamplingOptions(*values)
        number = engine.add(Request(prompt.tokens, body["max_tokens"], sampling, body.get("seed", 0), ENDS))
        choices[number] = Choice(tokenizer, prompt, body.get("stop", ()))
    while not engine.idle:
        for output in engine.step():
            choices[output.request].add(output)
    return [(choice.text, choice.finish) for choice in choices.values()]


async def ask(port: int, body: bytes, *, give_up: bool = False) -> tuple[int, bytes]:
    """Status and body of an answer; with `give_up`, nothing after its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
    try:
        if give_up:
            await reader.readuntil(b"data: ")
            return 0, b""
        answer = await reader.read()
    finally:
        writer.close()
    status, _, rest = answer.partition(b"\r\n")
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]


def read_stream(raw: bytes) -> tuple[str, str]:
    """Text and finish reason of events, the lengths of chunks left out."""
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\r\n") if line.startswith(b"data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


async def send_all(port: int, answers: list[tuple[str, str]], count: int) -> dict[str, int]:
    """Send `count` requests from all clients; how many there were of each kind, all as they have to be."""
    numbers, kinds = iter(range(count)), {"right": 0, "given up": 0, "malformed": 0}

    async def send_one(number: int) -> str:
        draw = random.Random(number)
        part, which = draw.random(), draw.randrange(len(BODIES))
        if part < 0.05:
            body = {"prompt": "wait", "max_tokens": 50, "stream": True, "ignore_eos": True}
            await ask(port, json.dumps(body).encode(), give_up=True)
            return "given up"
        if part < 0.1:
            raw, expected = MALFORMED[draw.randrange(len(MALFORMED))]
            status, answer = await ask(port, raw)
            assert (status, set(json.loads(answer))) == (expected, {"error"}), (raw, answer)
            return "malformed"
        stream = draw.random() < 0.5
        status, answer = await ask(port, json.dumps({**BODIES[which], "stream": stream}).encode())
        assert status == 200, answer
        choice = None if stream else json.loads(answer)["choices"][0]
        read = read_stream(answer) if choice is None else (choice["text"], choice["finish_reason"])
        assert read == answers[which], BODIES[which]
        return "right"

    async def run_client() -> None:
        for number in numbers:
            kinds[await asyncio.wait_for(send_one(number), LIMIT_S)] += 1

    await asyncio.gather(*(run_client() for _ in range(CLIENTS)))
    return kinds


async def read_metrics(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return text


def wait_until_idle(port: int) -> str:
    async def wait() -> str:
        for _ in range(LIMIT_S * 10):
            text = await read_metrics(port)
            if 'mt_requests{state="running"} 0\n' in text and 'mt_requests{state="waiting"} 0\n' in text:
                return text
            await asyncio.sleep(0.1)
        raise AssertionError(text)

    return asyncio.run(wait())


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(checkpoint, tokenizer):
    answers = compute_answers(load_model(Checkpoint.open(checkpoint), device="cpu"), tokenizer)
    assert len(set(answers)) > 10
    assert {finish for _, finish in answers} == {"stop", "length"}
    with start_server(checkpoint, "--device", "cpu") as server:
        asyncio.run(send_all(server.port, answers, 200))
        wait_until_idle(server.port)
        before = server.read_memory()
        kinds = asyncio.run(send_all(server.port, answers, REQUESTS))
        text = wait_until_idle(server.port)
        grown = server.read_memory() - before
        code, errors = server.end()
    assert min(kinds["given up"], kinds["malformed"]) > 30
    assert sum(kinds.values()) == REQUESTS
    assert 'mt_cache_blocks{state="used"} 0\n' in text
    assert 'outcome="error"' not in text
    assert grown < 4 * 2**20, f"{grown:,} bytes more after {REQUESTS} requests"
    assert (code, errors) == (0, "")
