"""The process around the application: its socket, what signals do, and how it ends."""

import asyncio
import signal
import socket
import sys

import uvicorn

from mt_core.errors import MtError
from mt_eval.serving.app import Server
from mt_eval.serving.interfaces.bodies import ApiError

BACKSTOP_S = 10
"""After this long beyond the drain, uvicorn cuts what has not ended: a client that does not read its answer."""


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, which does not listen yet; an `MtError` where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        hint = "another --port (0 takes a free one), or a --host that is this machine's"
        raise MtError("--host, --port", f"{host}:{port} cannot be listened at ({reason})", hint) from err
    return opened


def run_server(server: Server, listener: socket.socket, *, drain_s: float) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are being answered then have `drain_s` seconds left.

    Returns after SIGTERM; Ctrl-C goes on as `KeyboardInterrupt`. An engine that fails ends the server, and its error is
    raised.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal once more when all is done
    config = uvicorn.Config(
        server.build_app(),
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=int(drain_s) + BACKSTOP_S,
    )
    _UvicornServer(config, server, drain_s).run(sockets=[listener])
    if server.engine.engine_error:
        raise server.engine.engine_error


class _UvicornServer(uvicorn.Server):
    """Says when it is ready, and has the engine drain before it ends."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_s: float) -> None:
        super().__init__(config)
        self._server, self._drain_s = server, drain_s
        server.engine.on_failure = self._exit

    def _exit(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and print the address."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            key = "with the key" if self._server.api_key else "no key needed"
            print(f"serve: {self._server.served.name} at http://{host}:{port} ({key})", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and give those that run a limited time."""
        engine = self._server.engine
        reason = ApiError("the server ends; send it again later", status=503, kind="server_error", code="shutting_down")
        engine.refuse_new(reason)
        if num := engine.num_open:
            print(f"serve: ending, with {num} requests to answer in {self._drain_s:g} s at most", file=sys.stderr)
        asyncio.get_running_loop().call_later(self._drain_s, engine.fail_all, reason)
        await super().shutdown(sockets)
