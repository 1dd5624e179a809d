"""A server in this process with an engine whose outputs a test chooses, and requests to it over a real socket."""

import http.client
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from mt_core.errors import MtError
from mt_eval.generation.requests import Output, Request, Stats, TokenLogProb
from mt_eval.serving.app import Server
from mt_eval.serving.engine_thread import EngineThread
from mt_eval.serving.interfaces.calls import Limits, ServedModel

LIMIT_S = 120
"""For anything that a test waits for."""
LIMITS = Limits(context=64, prompt=40, new=32, prompts=4, body=4_000)


@dataclass
class ScriptedEngine:
    """Answers each request with the tokens of a function, one a step; `gate` holds steps back."""

    reply: Callable[[Request], Sequence[int]] = lambda request: list(b"0123456789abcdefghijklmnopqrstuvwxyz")
    max_running: int = 2
    gate: threading.Event = field(default_factory=threading.Event)
    pause: float = 0.0
    """Seconds of a step."""
    failure: BaseException | None = None
    """Raised by the next step."""
    requests: dict[int, Request] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self._count = 0
        self._left: dict[int, deque[int]] = {}

    @property
    def idle(self) -> bool:
        return not self.requests

    @property
    def stats(self) -> Stats:
        running = min(len(self.requests), self.max_running)
        waiting = len(self.requests) - running
        return Stats(running=running, waiting=waiting, free_blocks=8 - running, total_blocks=8, prefix_hits=0)

    def add(self, request: Request) -> int:
        if len(request.prompt) == 39:
            raise MtError("prompt", "39 tokens do not fit the cache", "another number")
        self._count += 1
        self.seen.append(request)
        self.requests[self._count] = request
        self._left[self._count] = deque([*self.reply(request)][: request.max_new_tokens])
        return self._count

    def remove(self, request: int) -> None:
        del self.requests[request]
        self.removed.append(request)

    def step(self) -> list[Output]:
        assert self.gate.wait(LIMIT_S)
        time.sleep(self.pause)
        if self.failure:
            raise self.failure
        return [self._advance(number) for number in list(self.requests)[: self.max_running]]

    def _advance(self, number: int) -> Output:
        request, left = self.requests[number], self._left[number]
        prompt = None
        if request.prompt_log_probs and len(left) == min(request.max_new_tokens, len(self.reply(request))):
            prompt = (None, *(self._score(request, token) for token in request.prompt[1:]))
        if not left:
            del self.requests[number]
            return Output(number, None, prompt_log_probs=prompt, finish="length")
        token = left.popleft()
        finish = "stop" if token in request.ends else "error" if token == 255 else None if left else "length"
        if finish:
            del self.requests[number]
        if finish == "error":
            return Output(number, None, finish=finish, error="the model computes NaN after token 3")
        scored = self._score(request, token)
        if request.log_probs is None:
            return Output(number, token, prompt_log_probs=prompt, finish=finish)
        return Output(number, token, scored.log_prob, scored.alternatives, prompt, finish)

    def _score(self, request: Request, token: int) -> TokenLogProb:
        """A token is as likely as a half; the next ids are a half as likely each."""
        count = request.log_probs or 0
        return TokenLogProb(-0.5, tuple(((token + k) % 257, -0.5 * (k + 1)) for k in range(count)))


class RunningServer:
    """A server on a free port, in a thread of this process."""

    def __init__(self, engine: Any, served: ServedModel, *, max_waiting: int = 4, api_key: str | None = None) -> None:
        self.engine = engine
        self.thread = EngineThread(engine, max_waiting=max_waiting)
        self.server = Server(served, self.thread, api_key)
        config = uvicorn.Config(self.server.build_app(), log_config=None, log_level="error", ws="none", lifespan="on")
        self._uvicorn = uvicorn.Server(config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._runner = threading.Thread(target=self._uvicorn.run, args=([self._listener],))
        self._runner.start()

    def stop(self) -> None:
        if isinstance(self.engine, ScriptedEngine):
            self.engine.gate.set()
        self._uvicorn.should_exit = True
        self._runner.join(LIMIT_S)
        assert not self._runner.is_alive()

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of the answer; a body that is not bytes goes as JSON, and comes as JSON if it is."""
        connection = self.connect()
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        usual = {"content-type": "application/json"} if raw is not None else {}
        connection.request(method, path, raw, {**usual, **{name.replace("_", "-"): v for name, v in headers.items()}})
        response = connection.getresponse()
        text = response.read().decode()
        given = {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        return response.status, given, json.loads(text) if "json" in given["content-type"] else text

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request that is expected to be right."""
        status, _, answer = self.ask("PUT" if path == "/api" else "POST", path, body)
        assert status == 200, answer
        return answer

    def refuse(self, path: str, body: object, **headers: str) -> tuple[int, str]:
        """Status and message of the answer to a request that is expected to be wrong."""
        status, _, answer = self.ask("PUT" if path == "/api" else "POST", path, body, **headers)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]["message"]

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream."""
        text = self.post(path, stream=True, **body)
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} has not come"
        time.sleep(0.005)
