"""A headless Chromium, driven through the pipe of its DevTools protocol."""

import json
import os
import shlex
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

LIMIT_S = 120
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page."""

    def __init__(self, program: str, profile: Path) -> None:
        command_read, self._command_write = os.pipe()
        self._answer_read, answer_write = os.pipe()
        words = [program, *FLAGS, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        script = f"exec {shlex.join(words)} 3<&{command_read} 4>&{answer_write}"
        self._process = subprocess.Popen(
            ["bash", "-c", script], pass_fds=(command_read, answer_write), stderr=subprocess.DEVNULL
        )
        os.close(command_read), os.close(answer_write)
        self._count, self._unread = 0, b""
        self.events: list[dict[str, Any]] = []
        """What the page reported: exceptions, log entries, requests."""
        self._session = ""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._count += 1
        body = {"id": self._count, "method": method, "params": params}
        body |= {"sessionId": self._session} if self._session else {}
        os.write(self._command_write, json.dumps(body).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            part = os.read(self._answer_read, 65536)
            assert part, "Chromium has ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Load a page."""
        self.command("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + LIMIT_S
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def type(self, field: str, text: str) -> None:
        """Replace a field's text by typing."""
        self.run(f"document.getElementById({field!r}).select()")
        self.command("Input.insertText", text=text)

    def click(self, button: str) -> None:
        """Click in the middle of a button."""
        box = self.run(f"JSON.stringify(document.getElementById({button!r}).getBoundingClientRect())")
        place = json.loads(box)
        x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def get_text(self, element: str) -> str:
        """The text of an element."""
        return self.run(f"document.getElementById({element!r}).textContent")

    def take_screenshot(self, path: Path) -> None:
        """Write a PNG of the page."""
        path.write_bytes(b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._command_write)
        self._process.terminate()
        self._process.wait(LIMIT_S)
        os.close(self._answer_read)
