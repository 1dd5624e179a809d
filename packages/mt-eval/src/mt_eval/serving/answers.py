"""How an answer gets to its client, whole or as a stream of events.

An answer that nobody waits for any more is taken out of the engine: both kinds watch the connection.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mt_eval.generation.choices import FailedRequest
from mt_eval.serving.engine_thread import RETRY_AFTER_S, Stream
from mt_eval.serving.interfaces.bodies import ApiError
from mt_eval.serving.interfaces.calls import Call
from mt_eval.serving.metrics import Metrics

OUTCOMES = {401: "unauthorized", 429: "rejected", 499: "cancelled", 500: "error", 503: "rejected"}
"""What metrics call the end of a request; everything else is a bad request."""


@dataclass
class Answer:
    """One call on its way: the engine's outputs become choices, and are counted."""

    metrics: Metrics
    route: str
    call: Call
    stream: Stream
    begin: float
    _ended: bool = False

    async def grow(self) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """The chunks of each output; the call's choices have ended after the last."""
        first, outcome = True, "cancelled"
        try:
            async for index, output in self.stream:
                if first and output.token is not None:
                    self.metrics.first_token.observe(time.monotonic() - self.begin)
                    first = False
                choice = self.call.choices[index]
                delta = choice.add(output)
                if choice.finish:
                    self.stream.stop(index)
                yield self.call.write_chunks(index, delta)
            outcome = "ok"
        except FailedRequest as err:
            outcome = "error"
            raise ApiError(str(err), status=500, kind="server_error") from None
        except ApiError as err:
            outcome = name_outcome(err.status)
            raise
        finally:
            self.end(outcome)

    async def wait(self, request: Request) -> Response:
        """The whole answer; nothing if the client has gone."""
        growing = asyncio.ensure_future(self._exhaust())
        leaving = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait((growing, leaving), return_when=asyncio.FIRST_COMPLETED)
            return growing.result() if growing.done() else Response(status_code=499)
        finally:
            for task in (growing, leaving):
                task.cancel()
            await asyncio.gather(growing, leaving, return_exceptions=True)
            self.end("cancelled")

    async def _exhaust(self) -> Response:
        try:
            async for _ in self.grow():
                pass
        except ApiError as err:
            return answer_error(err)
        return JSONResponse(self.call.respond())

    def end(self, outcome: str) -> None:
        """Free what the engine still holds for it, and count how it ended; a second end is none."""
        self.stream.close()
        if self._ended:
            return
        self._ended, metrics = True, self.metrics
        metrics.requests.add(route=self.route, outcome=outcome)
        metrics.duration.observe(time.monotonic() - self.begin)
        metrics.prompt_tokens.add(sum(len(request.prompt) for request in self.call.requests))
        metrics.new_tokens.add(sum(choice.num_tokens for choice in self.call.choices))


class EventStream(StreamingResponse):
    """An answer as server-sent events, the last of which is `[DONE]`; an error is an event too."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(self._write(answer), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; the engine's part ends with the connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end("cancelled")

    @staticmethod
    async def _write(answer: Answer) -> AsyncIterator[str]:
        try:
            async for chunks in answer.grow():
                for chunk in chunks:
                    yield _write_event(chunk)
            for chunk in answer.call.write_last_chunks():
                yield _write_event(chunk)
        except ApiError as err:
            yield _write_event(err.document())
        yield "data: [DONE]\n\n"


def _write_event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, allow_nan=False)}\n\n"


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def name_outcome(status: int) -> str:
    """What metrics call a request that ended with this status."""
    return OUTCOMES.get(status, "bad_request")


def answer_error(err: ApiError) -> Response:
    """The answer that says what is wrong, and when to come again where that helps."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if err.status in (429, 503) else None
    return JSONResponse(err.document(), status_code=err.status, headers=headers)
