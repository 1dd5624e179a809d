"""Fixtures of tests of the server."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eval.serving.running_server import LIMITS, RunningServer, ScriptedEngine
from mt_eval.encoding import TextEncoder
from mt_eval.serving.interfaces.calls import ServedModel


@pytest.fixture(scope="session")
def served(encoder: TextEncoder) -> ServedModel:
    return ServedModel("tiny", encoder, vocab_size=257, ends=frozenset({256}), limits=LIMITS)


@pytest.fixture
def start(served: ServedModel) -> Iterator[Callable[..., RunningServer]]:
    """`start(engine)` → a server that ends with the test."""
    running = []

    def begin(engine: Any = None, model: ServedModel = served, **options: Any) -> RunningServer:
        running.append(RunningServer(engine or ScriptedEngine(), model, **options))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(served: ServedModel) -> Iterator[RunningServer]:
    """A server for all tests of a module that change nothing about it."""
    running = RunningServer(ScriptedEngine(), served)
    yield running
    running.stop()
