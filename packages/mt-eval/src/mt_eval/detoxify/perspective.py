"""Perspective's interface over HTTP, or another server's that speaks it, as a toxicity scorer.

A text is a request; several are under way at a time, at most so many begin in a second, and what fails for a reason
that passes is asked again. Source: docs/specs/evaluation.md §5.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Annotated, Any, ClassVar

from pydantic import PositiveFloat, PositiveInt

from mt_core.errors import MtError

URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
KEY_VARIABLE = "PERSPECTIVE_API_KEY"
ATTRIBUTES = ("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT")
LONGEST_BYTES = 20_480
"""Bytes of a text that are sent; the rest is cut off."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that another attempt may not have."""
LONGEST_WAIT_S = 120.0
"""Between two attempts, whatever the server asks for."""
TIMEOUT_S = 60.0


class _Passing(Exception):
    """An attempt that failed for a reason that may pass, and how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass
class RateLimit:
    """Lets at most so many requests begin in a second, of all threads together, evenly spaced."""

    per_second: float
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self) -> float:
        """Seconds until the next request may begin, which is the caller's."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + 1 / self.per_second
        return begin - now


class Perspective:
    """A `ToxicityScorer` that asks a server; without a key it is refused."""

    name: ClassVar[str] = "perspective"

    def __init__(
        self,
        api_key: str,
        *,
        url: Annotated[str, "Address that texts are posted to."] = URL,
        language: Annotated[str, "Language of the texts."] = "en",
        requests_per_second: Annotated[PositiveFloat, "Most requests that begin in a second."] = 1.0,
        connections: Annotated[PositiveInt, "Requests that are under way at a time."] = 4,
        attempts: Annotated[PositiveInt, "How often to ask before giving up."] = 8,
        retry_delay: Annotated[PositiveFloat, "Seconds before the second attempt; they double each time."] = 1.0,
    ) -> None:
        if not api_key:
            allowed = f"set {KEY_VARIABLE}, or score with --scorer local"
            raise MtError("--scorer perspective", "needs a key of its interface", allowed)
        if not url.startswith(("http://", "https://")):
            raise MtError("--url", f"{url!r}", "an address that begins with http:// or https://")
        self._key, self._url, self._language = api_key, url, language
        self._attempts, self._delay_s = attempts, retry_delay
        self._limit, self._ending = RateLimit(requests_per_second), threading.Event()
        self.identity = f"perspective {url} {language} {','.join(ATTRIBUTES)}"
        self.batch_size = connections

    def score(self, texts: Sequence[str]) -> list[Mapping[str, float] | str]:
        """The six attributes' scores of each text, or what the server finds wrong with it."""
        self._ending.clear()
        pool = ThreadPoolExecutor(self.batch_size)
        try:
            asked = [pool.submit(self._ask, text) for text in texts]
            for ended in wait(asked, return_when=FIRST_EXCEPTION).done:
                ended.result()
            return [each.result() for each in asked]
        finally:  # after Ctrl-C, or an error of one text, no other waits for its next attempt
            self._ending.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, text: str) -> Mapping[str, float] | str:
        """A text's scores, from as many attempts as it takes."""
        delay_s = self._delay_s
        for attempt in range(1, self._attempts + 1):
            self._sleep(self._limit.reserve())
            try:
                return self._post(text)
            except _Passing as err:
                if attempt == self._attempts:
                    actual = f"no score after {attempt} attempts ({err})"
                    raise MtError(self._url, actual, "run again later: what is scored is kept") from err
                self._sleep(min(max(delay_s, err.wait_s), LONGEST_WAIT_S))
                delay_s *= 2
        raise AssertionError("there is one attempt at least")

    def _sleep(self, seconds: float) -> None:
        if self._ending.wait(seconds):
            raise _Passing("the others are ended too")

    def _post(self, text: str) -> Mapping[str, float] | str:
        body = {
            "comment": {"text": cut_text(text), "type": "PLAIN_TEXT"},
            "languages": [self._language],
            "requestedAttributes": {name: {} for name in ATTRIBUTES},
            "doNotStore": True,
        }
        headers = {"Content-Type": "application/json", "X-Goog-Api-Key": self._key}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return self._read_scores(response.read())
        except urllib.error.HTTPError as err:
            with err:
                return self._explain(err.code, err.headers.get("Retry-After", ""), _read_error(err))
        except (OSError, HTTPException) as err:  # no connection, or one that broke off
            raise _Passing(str(getattr(err, "reason", err)) or type(err).__name__) from err

    def _read_scores(self, raw: bytes) -> Mapping[str, float]:
        try:
            given = json.loads(raw)["attributeScores"]
            scores = {name.lower(): float(given[name]["summaryScore"]["value"]) for name in ATTRIBUTES}
        except (ValueError, KeyError, TypeError) as err:
            actual = f"answers what has no scores ({err!r}): {raw[:200].decode(errors='replace')}"
            raise MtError(self._url, actual, "the address of an interface like Perspective's") from err
        if wrong := {name: score for name, score in scores.items() if not 0 <= score <= 1}:
            raise MtError(self._url, f"answers {wrong}", "scores from 0 to 1")
        return scores

    def _explain(self, status: int, retry_after: str, error: Mapping[str, Any]) -> str:
        """What is wrong with the text, if it is the text; else an exception for what is wrong."""
        message = error["message"] or "no reason given"
        if status in PASSING:
            raise _Passing(f"status {status}: {message}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if status == 400 and error["type"].startswith(("COMMENT", "LANGUAGE")):
            return message
        allowed = f"look at --url, and at the key in {KEY_VARIABLE}"
        raise MtError(self._url, f"status {status}: {message}", allowed)


def cut_text(text: str, longest_bytes: int = LONGEST_BYTES) -> str:
    """The beginning of a text that has so many bytes in UTF-8, in whole characters."""
    return text.encode()[:longest_bytes].decode(errors="ignore")


def _read_error(err: urllib.error.HTTPError) -> dict[str, str]:
    """Message and kind of what a server finds wrong, empty where it does not say."""
    try:
        error = json.loads(err.read())["error"]
        details = [each["errorType"] for each in error.get("details", []) if "errorType" in each]
        return {"message": " ".join(str(error.get("message", "")).split()), "type": (details or [""])[0]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, HTTPException):
        return {"message": str(err.reason), "type": ""}
