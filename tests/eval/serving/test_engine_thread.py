"""Requests that wait, go away or are cut off, an engine that fails, and what the metrics say of them."""

import asyncio
import json
import re

import pytest

from eval.serving.running_server import ScriptedEngine, wait_until
from mt_eval.serving.interfaces.bodies import ApiError

PATH = "/v1/completions"


def read_metrics(server) -> dict[str, float]:
    text = server.ask("GET", "/metrics")[2]
    assert all(re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^}]+\})? \S+", line) for line in text.splitlines())
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def begin(server, **body):
    """A connection on which a request was sent."""
    connection = server.connect()
    connection.request("POST", PATH, json.dumps({"prompt": "a", **body}), {"Content-Type": "application/json"})
    return connection


@pytest.fixture
def halted(start):
    """A server whose engine does not step until its gate is opened."""
    engine = ScriptedEngine()
    engine.gate.clear()
    return start(engine)


def test_a_full_queue_is_a_429_that_says_when_to_come_again(halted):
    """At most four wait; what would be more is turned away."""
    running = begin(halted, prompt=["a", "b"])
    wait_until(lambda: len(halted.engine.requests) == 2, "the start")
    halted.engine.gate.set()
    running.getresponse().read()
    halted.engine.gate.clear()
    connections = [begin(halted, prompt=["a", "b"])]
    wait_until(lambda: halted.thread.num_open == 2, "the start")
    connections += [begin(halted, prompt=["a", "b"])]
    wait_until(lambda: halted.thread.num_open == 4, "the queue")
    status, headers, answer = halted.ask("POST", PATH, {"prompt": ["a"]})
    assert (status, headers["retry-after"]) == (429, "1")
    assert answer["error"]["message"] == "4 requests wait, of at most 4; send it again later"
    halted.engine.gate.set()
    assert [connection.getresponse().status for connection in connections] == [200, 200]
    assert read_metrics(halted)['mt_requests_total{route="/v1/completions",outcome="rejected"}'] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_is_taken_out_of_the_engine(halted, stream):
    connection = begin(halted, max_tokens=32, stream=stream)
    wait_until(lambda: halted.engine.requests, "the request")
    connection.close()
    wait_until(lambda: halted.thread.num_open == 0, "the disconnect")
    halted.engine.gate.set()
    wait_until(lambda: halted.engine.removed == [1], "the removal")
    counted = 'mt_requests_total{route="/v1/completions",outcome="cancelled"}'
    wait_until(lambda: read_metrics(halted).get(counted) == 1, "the count")


def test_an_engine_that_fails_answers_all_and_takes_no_more(start):
    server = start(ScriptedEngine(failure=RuntimeError("out of memory")))
    assert server.refuse(PATH, {"prompt": ["a", "b"]}) == (500, "the engine has failed; the server ends")
    assert server.refuse(PATH, {"prompt": "a"}) == (500, "the engine has failed; the server ends")
    assert server.ask("GET", "/health")[0] == 503
    assert str(server.thread.engine_error) == "out of memory"


def test_answers_that_take_longer_than_the_drain_are_cut_off(halted):
    waiting, streaming = begin(halted), begin(halted, stream=True)
    wait_until(lambda: halted.thread.num_open == 2, "the requests")
    reason = ApiError("the server ends; send it again later", status=503)

    async def end() -> None:
        halted.thread.refuse_new(reason)
        halted.thread.fail_all(reason)

    asyncio.run_coroutine_threadsafe(end(), halted.thread._loop).result(60)
    response = waiting.getresponse()
    assert (response.status, response.getheader("retry-after")) == (503, "1")
    assert b"the server ends" in response.read()
    text = streaming.getresponse().read().decode()
    assert "the server ends" in text
    assert text.endswith("data: [DONE]\n\n")
    assert halted.refuse(PATH, {"prompt": "a"})[0] == 503


def test_metrics_count_tokens_requests_and_times(start):
    server = start()
    server.post(PATH, prompt=["ab", "c"], max_tokens=4)
    server.refuse(PATH, {"prompt": ""})
    wait_until(lambda: read_metrics(server)['mt_requests{state="running"}'] == 0, "the end")
    metrics = read_metrics(server)
    expected = {
        'mt_requests_total{route="/v1/completions",outcome="ok"}': 1,
        'mt_requests_total{route="/v1/completions",outcome="bad_request"}': 1,
        "mt_prompt_tokens_total": 3,
        "mt_generated_tokens_total": 8,
        'mt_requests{state="waiting"}': 0,
        'mt_cache_blocks{state="free"}': 8,
        'mt_cache_blocks{state="used"}': 0,
        'mt_time_to_first_token_seconds_bucket{le="+Inf"}': 1,
        "mt_time_to_first_token_seconds_count": 1,
        "mt_request_seconds_count": 1,
    }
    assert {name: metrics.get(name) for name in expected} == expected
    buckets = [value for name, value in metrics.items() if name.startswith("mt_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert metrics["mt_request_seconds_sum"] > 0
