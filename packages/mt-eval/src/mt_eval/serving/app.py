"""The routes of the server, and what guards them."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mt_core.errors import MtError
from mt_eval.serving.answers import Answer, EventStream, answer_error, name_outcome
from mt_eval.serving.engine_thread import EngineThread
from mt_eval.serving.interfaces.bodies import ApiError, parse_body
from mt_eval.serving.interfaces.calls import Call, ServedModel
from mt_eval.serving.interfaces.chat import parse_chat
from mt_eval.serving.interfaces.completions import parse_completion
from mt_eval.serving.interfaces.megatron import parse_megatron
from mt_eval.serving.metrics import CONTENT_TYPE, Metrics

CALLS: dict[str, tuple[str, Callable[[dict[str, Any], ServedModel], Call]]] = {
    "/api": ("PUT", parse_megatron),
    "/completions": ("POST", parse_completion),
    "/v1/completions": ("POST", parse_completion),
    "/v1/chat/completions": ("POST", parse_chat),
}
"""Method of each route that generates, and what reads its bodies. Megatron-LM has `/completions` without a version."""
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
"""What the page may load: nothing from anywhere else."""


@dataclass
class Server:
    """What the routes share."""

    served: ServedModel
    engine: EngineThread
    api_key: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))

    def build_app(self) -> Starlette:
        """The application, whose start and end are those of the engine's thread."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            del app
            self.engine.start()
            yield
            self.engine.close()

        routes = [Route(path, self._guard(path, self._make_handler(path)), methods=[CALLS[path][0]]) for path in CALLS]
        routes += [
            Route("/", self._show_page),
            Route("/health", self._report_health),
            Route("/metrics", self._report_metrics),
            Route("/v1/models", self._guard("/v1/models", self._list_models)),
            Route("/v1/models/{name:path}", self._guard("/v1/models", self._show_model)),
        ]
        handlers: dict[Any, Any] = {HTTPException: _answer_http_error, Exception: _answer_defect}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _guard(self, path: str, handler: Callable[[Request], Awaitable[Response]]) -> Any:
        """A handler behind the key, whose errors are answers and whose ends are counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except (ApiError, MtError) as err:
                error = err if isinstance(err, ApiError) else ApiError.from_problems(err.problems)
                self.metrics.requests.add(route=path, outcome=name_outcome(error.status))
                return answer_error(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.api_key.encode()):
            message = "a valid key is needed: send the header `Authorization: Bearer KEY`"
            raise ApiError(message, status=401, kind="authentication_error", code="invalid_api_key")

    def _make_handler(self, path: str) -> Callable[[Request], Awaitable[Response]]:
        _, parse = CALLS[path]

        async def handle(request: Request) -> Response:
            begin = time.monotonic()
            body = await self._read_body(request)
            call = await asyncio.to_thread(lambda: parse(parse_body(body), self.served))
            answer = Answer(self.metrics, path, call, self.engine.submit(call.requests), begin)
            return EventStream(answer) if call.stream else await answer.wait(request)

        return handle

    async def _read_body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("the body has to be JSON: send the header `Content-Type: application/json`", status=415)
        limit, body = self.served.limits.body, bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise ApiError(f"the body has more than {limit:,} bytes, the most that is taken", status=413)
        except ClientDisconnect:
            raise ApiError("the client went away", status=499) from None
        return bytes(body)

    async def _show_page(self, request: Request) -> Response:
        del request
        text = (files("mt_eval.serving") / "page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-store"})

    async def _report_health(self, request: Request) -> Response:
        del request
        return PlainTextResponse("ok\n") if self.engine.accepting else PlainTextResponse("ending\n", status_code=503)

    async def _report_metrics(self, request: Request) -> Response:
        del request
        stats = self.engine.stats
        blocks = {"free": stats.free_blocks, "used": stats.total_blocks - stats.free_blocks}
        gauges = {
            "mt_requests": ("Requests now.", {"running": stats.running, "waiting": self.engine.num_waiting}),
            "mt_cache_blocks": ("Blocks of the key/value cache.", blocks),
            "mt_prefix_tokens": ("Tokens of prompts that were in the cache so far.", {"": stats.prefix_hits}),
        }
        return Response(self.metrics.render(gauges), media_type=CONTENT_TYPE)

    async def _list_models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def _show_model(self, request: Request) -> Response:
        self.served.check_name(request.path_params["name"])
        return JSONResponse(self._describe_model())

    def _describe_model(self) -> dict[str, Any]:
        model = {"id": self.served.name, "object": "model", "created": self.started, "owned_by": "mt"}
        return {**model, "max_model_len": self.served.limits.context}


async def _answer_http_error(request: Request, err: HTTPException) -> Response:
    """The answer to a path or method that there is not."""
    routes = f"PUT /api, POST {', '.join(path for path, (method, _) in CALLS.items() if method == 'POST')}"
    message = f"{request.method} {request.url.path}: {err.detail.lower()}; allowed: {routes}, GET /v1/models, /health"
    return JSONResponse(ApiError(message).document(), status_code=err.status_code, headers=err.headers)


async def _answer_defect(request: Request, err: Exception) -> Response:
    """The answer to a request that met a defect of mt; uvicorn writes the traceback to stderr."""
    message = f"{type(err).__name__} in {request.url.path}: a defect of mt; the server's stderr says where"
    return JSONResponse(ApiError(message, kind="server_error").document(), status_code=500)
