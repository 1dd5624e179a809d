"""The one thread that owns the engine, and how the server's event loop gives it requests and gets outputs back.

The engine is touched by this thread alone. Commands go to it through a list under a condition; the outputs of a step go
back in one call of the event loop, to the queue of each stream. All other state belongs to the event loop.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mt_core.errors import MtError
from mt_eval.generation.requests import Output, Request, Stats
from mt_eval.serving.interfaces.bodies import ApiError

RETRY_AFTER_S = 1
"""What a client that is turned away is asked to wait."""


class Engine(Protocol):
    """What the server needs of an engine."""

    @property
    def idle(self) -> bool:
        """Whether it has no requests."""
        ...

    @property
    def stats(self) -> Stats:
        """What it is doing."""
        ...

    def add(self, request: Request) -> int:
        """Queue a request; its number. `MtError` for one that can never run."""
        ...

    def step(self) -> list[Output]:
        """Advance, and return what came of it."""
        ...

    def remove(self, request: int) -> None:
        """Forget a request."""
        ...


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine."""

    stream: "Stream"
    index: int
    """Number of the request in its stream."""
    request: Request
    number: int | None = None
    """The engine's; only its thread reads and writes it."""


@dataclass(eq=False)
class Stream:
    """Outputs of several requests as they come: (number of the request, output), until each has ended."""

    thread: "EngineThread"
    queue: asyncio.Queue[tuple[int, Output] | Exception] = field(default_factory=asyncio.Queue)
    open: dict[int, Ticket] = field(default_factory=dict)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        while self.open:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            index, output = item
            if index in self.open:
                if output.finish:
                    del self.open[index]
                yield index, output

    def stop(self, index: int) -> None:
        """End one request early, as nobody waits for more of it."""
        if index in self.open:
            self.thread.cancel(self.open.pop(index))

    def close(self) -> None:
        """End all requests that have not ended."""
        for index in list(self.open):
            self.stop(index)


class EngineThread:
    """Runs an engine's steps as long as it has requests."""

    def __init__(self, engine: Engine, *, max_waiting: int) -> None:
        self.engine_error: BaseException | None = None
        """What ended the thread, if it did not end as asked."""
        self.max_waiting = max_waiting
        self.stats = engine.stats
        """Numbers of the last step."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called in the event loop when the engine has failed."""
        self._engine = engine
        self._tickets: set[Ticket] = set()
        self._refusal: ApiError | None = None
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._closing = False
        self._by_number: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="mt-engine", daemon=True)

    def start(self) -> None:
        """Begin, for the event loop that calls."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests, all or none; `ApiError` while the server ends, and where the queue has no room."""
        if self._refusal:
            raise self._refusal
        waiting = len(self._tickets) - self.stats.running
        if waiting + len(requests) > self.max_waiting:
            message = f"{max(waiting, 0)} requests wait, of at most {self.max_waiting}; send it again later"
            raise ApiError(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded")
        stream = Stream(self)
        for index, request in enumerate(requests):
            ticket = stream.open[index] = Ticket(stream, index, request)
            self._tickets.add(ticket)
            self._command(lambda ticket=ticket: self._add(ticket))
        return stream

    def cancel(self, ticket: Ticket) -> None:
        """Take a request out of the engine."""
        self._tickets.discard(ticket)
        self._command(lambda: self._remove(ticket))

    @property
    def num_waiting(self) -> int:
        """Requests that the engine has not begun, as of the last step."""
        return max(len(self._tickets) - self.stats.running, 0)

    @property
    def accepting(self) -> bool:
        """Whether further requests are taken."""
        return self._refusal is None

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    def refuse_new(self, reason: ApiError) -> None:
        """Answer further requests with an error."""
        self._refusal = self._refusal or reason

    def fail_all(self, reason: Exception) -> None:
        """End every request with an error."""
        for ticket in list(self._tickets):
            self.cancel(ticket)
            ticket.stream.queue.put_nowait(reason)

    def close(self) -> None:
        """End the thread after the step that it is at."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as err:
            self.engine_error = err
            self._loop.call_soon_threadsafe(self._fail)

    def _work(self) -> bool:
        """Do what was asked since the last step, then one step; False once the thread is to end."""
        with self._wake:
            while not (self._commands or self._closing) and self._engine.idle:
                self._wake.wait()
            commands, self._commands = self._commands, []
            if self._closing:
                return False
        for command in commands:
            command()
        outputs = [] if self._engine.idle else self._engine.step()
        delivered = [(self._by_number[o.request], o) for o in outputs if o.request in self._by_number]
        for output in outputs:
            if output.finish:
                self._by_number.pop(output.request, None)
        self._loop.call_soon_threadsafe(self._deliver, delivered, self._engine.stats)
        return True

    def _add(self, ticket: Ticket) -> None:
        try:
            ticket.number = self._engine.add(ticket.request)
        except MtError as err:
            reason = ApiError.from_problems(err.problems)
            self._loop.call_soon_threadsafe(self._refuse, ticket, reason)
        else:
            self._by_number[ticket.number] = ticket

    def _remove(self, ticket: Ticket) -> None:
        if ticket.number is not None and self._by_number.pop(ticket.number, None):
            self._engine.remove(ticket.number)

    def _refuse(self, ticket: Ticket, reason: ApiError) -> None:
        self._tickets.discard(ticket)
        ticket.stream.queue.put_nowait(reason)

    def _deliver(self, delivered: Sequence[tuple[Ticket, Output]], stats: Stats) -> None:
        self.stats = stats
        for ticket, output in delivered:
            if output.finish:
                self._tickets.discard(ticket)
            ticket.stream.queue.put_nowait((ticket.index, output))

    def _fail(self) -> None:
        reason = ApiError("the engine has failed; the server ends", status=500, kind="server_error")
        self.refuse_new(reason)
        self.fail_all(reason)
        self.on_failure()
