"""What `mt serve-client` makes of a stream that fails."""

import socket
import threading

import pytest

from eval.serving.running_server import LIMIT_S, ScriptedEngine
from mt_core.errors import MtError
from mt_eval.serving.client_command import complete, parse_address


def test_an_error_in_a_stream_ends_it(start):
    server = start(ScriptedEngine(lambda request: [65, 255]))
    pieces = complete("127.0.0.1", server.port, {"prompt": "a"})
    assert next(pieces) == "A"
    with pytest.raises(MtError, match=f"^127.0.0.1:{server.port}: the model computes NaN after token 3$"):
        next(pieces)


def test_a_stream_that_breaks_off_is_no_answer():
    event = b'data: {"choices": [{"text": "A"}]}\n\n'
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event)

        thread = threading.Thread(target=answer)
        thread.start()
        pieces = complete("127.0.0.1", listener.getsockname()[1], {"prompt": "a"})
        assert next(pieces) == "A"
        with pytest.raises(MtError, match="the answer broke off; look at the server, and ask again"):
            next(pieces)
        thread.join(LIMIT_S)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("a.b:80", ("a.b", 80)), ("http://a:1/", ("a", 1)), ("[::1]:5000", ("::1", 5000))],
)
def test_an_address_is_a_host_and_a_port(address, parts):
    assert parse_address(address) == parts
