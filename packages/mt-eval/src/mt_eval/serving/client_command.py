"""`mt serve-client`: type prompts at a server and watch the answers; only `mt` imports this module."""

import http.client
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer import Argument, Option

from mt_core.cli.options import expand_options
from mt_core.errors import MtError

TIMEOUT_S = 600
"""For a connection, and between two pieces of an answer."""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the server continues the prompts; what is not given is the server's default."""

    max_tokens: Annotated[int, Option(min=1, help="Most new tokens for each prompt.")] = 64
    temperature: Annotated[float | None, "Logits are divided by this; 0 always takes the likeliest token."] = None
    top_k: Annotated[int | None, "Draw from this many likeliest tokens."] = None
    top_p: Annotated[float | None, "Draw from the likeliest tokens that reach this probability."] = None
    seed: Annotated[int | None, "Seed of the draws; equal seeds give equal texts."] = None

    def fields(self) -> dict[str, Any]:
        """Fields of a request."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None}


@expand_options
def serve_client(
    address: Annotated[str, Argument(metavar="HOST:PORT", help="Where `mt serve` listens.")],
    answer: AnswerOptions,
    api_key: Annotated[str, Option(envvar="MT_API_KEY", help="Key of the server.", show_default=False)] = "",
) -> None:
    """Continue each line of stdin with the model of a server, printed as it grows. Exits with 1 if one failed.

    Example:
      mt serve-client 127.0.0.1:5000 --max-tokens 100 --temperature 0.8
    """
    host, port = parse_address(address)
    failed, terminal = False, sys.stdin.isatty()
    if terminal:
        print(f"Prompts go to {address}, a line each; Ctrl-D ends.", file=sys.stderr)
    for prompt in _read_prompts(terminal):
        try:
            for piece in complete(host, port, {"prompt": prompt, **answer.fields()}, api_key):
                sys.stdout.write(piece)
                sys.stdout.flush()
            print(flush=True)
        except MtError as err:
            failed = True
            print(f"mt: {err}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; the scheme http:// may be before it."""
    host, colon, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise MtError("HOST:PORT", f"{address!r} is no host and port", "such as 127.0.0.1:5000")
    return host.strip("[]"), int(port)


def complete(host: str, port: int, body: dict[str, Any], api_key: str = "") -> Iterator[str]:
    """Pieces of a server's continuation of a prompt; an `MtError` in one line for whatever goes wrong."""
    where = f"{host}:{port}"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise MtError(where, f"status {response.status}: {_read_message(response.read())}")
        for line in response:
            event = line.strip().removeprefix(b"data: ")
            if event == b"[DONE]":
                return
            if event:
                yield _read_piece(where, json.loads(event))
        raise MtError(where, "the answer broke off", "look at the server, and ask again")
    except (OSError, http.client.HTTPException) as err:
        raise MtError(where, f"no answer ({err or type(err).__name__})", "is `mt serve` running there?") from err
    finally:
        connection.close()


def _read_piece(where: str, event: dict[str, Any]) -> str:
    if "error" in event:
        raise MtError(where, event["error"]["message"])
    return "".join(choice["text"] for choice in event["choices"])


def _read_message(raw: bytes) -> str:
    try:
        return " ".join(json.loads(raw)["error"]["message"].split())
    except (ValueError, KeyError, TypeError):
        return raw[:200].decode(errors="replace")


def _read_prompts(terminal: bool) -> Iterator[str]:
    """Lines of stdin that are not blank."""
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.removesuffix("\n")
