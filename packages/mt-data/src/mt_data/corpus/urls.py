"""Which URLs of a list are worth fetching: no blacklisted site, no media file, well-formed, each once."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import MtError
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.lines import LineChunk, check_inputs, read_chunks
from mt_data.text_io.texts import read_lines

SHORTEST = 9
EXTENSIONS = re.compile(
    r"\.(3gp|7z|ai|aif|apk|app|avi|bin|bmp|bz2|css|csv|dat|deb|dmg|docx?|exe|gifv?|gz|iso|jar|jpe?g|js|log|midi?|mkv|mov|"
    r"mp[34]|mpe?g|og[gv]|otf|pdf|pkg|png|pps|pptx?|psd|py|qt|ram|rar|sql|svg|swf|tar|tgz|tiff|ttf|txt|wav|webm|wm[av]|"
    r"xlsx?|xml|xz|zip)$",
    re.IGNORECASE,
)
HOST = re.compile(
    r"https?://(?P<host>(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+(?:[a-z]{2,6}|[a-z0-9-]{2,})|(?:\d{1,3}\.){3}\d{1,3})"
    r"\.?(?::\d+)?(?:[/?#]\S*)?",
    re.IGNORECASE,
)
SECOND_LEVEL = frozenset(("ac", "co", "com", "edu", "gov", "net", "org"))
"""Labels that stand below a country's domain for a kind of owner, as in co.uk."""


@dataclass(frozen=True, slots=True)
class SiteBlacklist:
    """Names of sites: `example` is example.com, example.org and the like, `example.com` only itself; subdomains too."""

    names: frozenset[str]

    def __contains__(self, host: str) -> bool:
        labels = host.lower().rstrip(".").split(".")
        if any(".".join(labels[first:]) in self.names for first in range(len(labels) - 1)):
            return True
        owner = -3 if len(labels) > 2 and labels[-2] in SECOND_LEVEL and len(labels[-1]) == 2 else -2
        return labels[owner] in self.names


def read_blacklist(path: Path) -> SiteBlacklist:
    """The names in a file, one a line; `#` begins a comment."""
    if not path.is_file():
        raise MtError(str(path), "no such file", "a list of sites to leave out, one name a line")
    names = (line.partition("#")[0].strip().lower() for line in read_lines(path))
    return SiteBlacklist(frozenset(filter(None, names)))


def classify_url(url: str, blacklist: SiteBlacklist) -> str:
    """`kept`, or the reason why a URL is dropped."""
    if len(url) < SHORTEST:
        return "too short"
    if not (match := HOST.fullmatch(url)):
        return "malformed"
    if match["host"] in blacklist:
        return "blacklisted site"
    path = url.partition("?")[0]
    return "media or file" if EXTENSIONS.search(path) else "kept"


def filter_urls(inputs: Iterable[Path], blacklist: Path, output: Path) -> dict[str, int]:
    """Write the URLs that pass, one a line, in the order in which they first occur."""
    inputs = tuple(inputs)
    check_inputs(inputs)
    chunks = (chunk for path in inputs for chunk in read_chunks(path))
    kept = _UrlFilter(read_blacklist(blacklist))
    return run_step(
        CorpusStep("blacklist-urls", output, (*inputs, blacklist)), chunks, kept.filter, recall=kept.remember
    )


class _UrlFilter:
    """The URLs that were kept: 16 bytes of each, however long it is."""

    def __init__(self, blacklist: SiteBlacklist) -> None:
        self._blacklist = blacklist
        self._seen: set[bytes] = set()

    def remember(self, url: bytes) -> bool:
        """Whether a URL is new; from now on it is not."""
        before = len(self._seen)
        self._seen.add(hashlib.blake2b(url, digest_size=16).digest())
        return len(self._seen) > before

    def filter(self, chunk: LineChunk) -> StepOutput:
        """The URLs of a chunk that pass."""
        produced, kept = StepOutput(), []
        for url in (line.decode(errors="replace").strip() for line in chunk.lines):
            outcome = classify_url(url, self._blacklist)
            if outcome == "kept" and not self.remember(url.encode()):
                outcome = "seen before"
            if outcome == "kept":
                kept.append(url)
            produced.counts.update(("urls", outcome))
        produced.data = "".join(f"{url}\n" for url in kept).encode()
        return produced
