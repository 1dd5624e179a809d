"""`mt data openwebtext blacklist-urls`."""

from pathlib import Path

import pytest

from mt_core.errors import MtError
from mt_data.corpus.urls import SiteBlacklist, classify_url, filter_urls


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://site.org/a-page", "kept"),
        ("https://192.168.7.1:80/x?y=1", "kept"),
        ("http://site.org", "kept"),
        ("http://a", "too short"),
        ("ftp://site.org/page", "malformed"),
        ("http://site.org/a page", "malformed"),
        ("http://-site-/page", "malformed"),
        ("http://www.bad.com/page", "blacklisted site"),
        ("http://bad.co.uk/page", "blacklisted site"),
        ("http://bad.example.com/page", "kept"),
        ("http://images.exact.net/page", "blacklisted site"),
        ("http://exact.org/page", "kept"),
        ("http://site.org/a.PNG?size=1", "media or file"),
        ("http://site.org/a.tar.gz", "media or file"),
        ("http://site.org/a.html?as=.pdf", "kept"),
    ],
)
def test_the_verdict_on_a_url(url: str, expected: str):
    assert classify_url(url, SiteBlacklist(frozenset(("bad", "exact.net")))) == expected


def test_urls_are_written_once_in_their_order(tmp_path: Path):
    (tmp_path / "a.txt").write_text("http://one.org/1\nhttp://two.org/1 \n\n")
    (tmp_path / "b.txt").write_text("http://two.org/1\nhttp://bad.org/1\nhttp://one.org/2\n")
    (tmp_path / "black.txt").write_text("# sites\nBad  # a comment\n")
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    counts = filter_urls(inputs, tmp_path / "black.txt", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().split() == ["http://one.org/1", "http://two.org/1", "http://one.org/2"]
    assert counts == {"urls": 6, "kept": 3, "too short": 1, "seen before": 1, "blacklisted site": 1}
    with pytest.raises(MtError, match="gone.txt: no such file; a list of sites to leave out, one name a line"):
        filter_urls(inputs, tmp_path / "gone.txt", tmp_path / "out.txt")
