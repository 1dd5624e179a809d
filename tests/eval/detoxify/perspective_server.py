"""A server that speaks Perspective's interface, on this machine: its toxicity of a text is how many of its words are
"rude"."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ATTRIBUTES = ("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT")
KEY = "a secret"


def rate(text: str) -> float:
    words = text.split()
    return words.count("rude") / len(words)


@dataclass
class PerspectiveServer:
    """What a test sees of the server."""

    url: str
    faults: list[Any] = field(default_factory=list)
    """What the next requests get in place of an answer: a status, a status with its body and headers, or None, which
    breaks off."""
    texts: list[str] = field(default_factory=list)
    """Of requests that were answered."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When requests came."""
    most: int = 0
    """How many requests were there at a time."""
    delay_s: float = 0.0


@contextmanager
def start_perspective() -> Iterator[PerspectiveServer]:
    lock, running = threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running.append(self)
                server.most = max(server.most, len(running))
                server.times.append(time.monotonic())
                server.bodies.append(body)
                fault = server.faults.pop(0) if server.faults else 200
            time.sleep(server.delay_s)
            try:
                self.answer(body["comment"]["text"], fault)
            finally:
                with lock:
                    running.remove(self)

        def answer(self, text: str, fault: Any) -> None:
            if fault is None:
                self.close_connection = True
                return
            if self.headers["X-Goog-Api-Key"] != KEY:
                fault = (403, {"error": {"message": "The key is wrong.", "status": "PERMISSION_DENIED"}}, {})
            status, answer, headers = fault if isinstance(fault, tuple) else (fault, {}, {})
            if status == 200 and not answer:
                with lock:
                    server.texts.append(text)
                value = {"summaryScore": {"value": rate(text), "type": "PROBABILITY"}}
                answer = {"attributeScores": dict.fromkeys(ATTRIBUTES, value), "languages": ["en"]}
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, given in {"Content-Length": str(len(raw)), **headers}.items():
                self.send_header(name, given)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = PerspectiveServer(f"http://127.0.0.1:{http.server_port}/v1alpha1/comments:analyze")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
