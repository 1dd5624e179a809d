"""The page at `/` in a real browser: tokens arrive one by one, Stop frees the engine, errors are shown."""

import pytest

from eval.serving.chromium import Browser, find_chromium
from eval.serving.running_server import ScriptedEngine, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def get_problems(browser):
    """Exceptions and entries of the log that are errors, and requests to another server."""
    kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
    entries = [event["params"] for event in browser.events if event.get("method") in kinds]
    urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    return entries, [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "about:"))]


def test_tokens_arrive_one_by_one_until_stop(browser, start):
    engine = ScriptedEngine(lambda request: list("0123 é€ <b>9</b>".encode()) * 9)
    server = start(engine)
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.wait("document.getElementById('model').textContent == 'tiny'")
    browser.type("prompt", "Once ")
    for field, value in (("max_tokens", "20"), ("temperature", "0.5"), ("top_k", "4"), ("seed", "3")):
        browser.type(field, value)
    engine.gate.clear()
    browser.click("go")
    wait_until(lambda: engine.requests, "the request")
    assert browser.run("document.getElementById('go').disabled && !document.getElementById('halt').disabled")
    assert browser.get_text("status") == "waiting …"
    (request,) = engine.seen
    assert (request.max_new_tokens, request.seed, request.sampling.temperature, request.sampling.top_k) == (
        20,
        3,
        0.5,
        4,
    )
    engine.gate.set()
    browser.wait("document.getElementById('answer').textContent == 'Once 0123 é€ <b>9</b>0'")
    browser.wait("document.getElementById('status').textContent.startsWith('length: 20 tokens in ')")

    engine.pause = 0.05
    browser.type("seed", "")
    browser.click("go")
    browser.wait("/^Once 0123 é/.test(document.getElementById('answer').textContent)")
    assert len(browser.get_text("answer")) < 20
    browser.click("halt")
    browser.wait("document.getElementById('status').textContent == 'stopped'")
    wait_until(lambda: engine.removed == [2], "the removal")
    assert get_problems(browser) == ([], [])


def test_errors_are_shown_and_the_key_is_asked_for(browser, start):
    server = start(ScriptedEngine(lambda request: [65, 255]), api_key="secret")
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.wait("document.getElementById('error').textContent.startsWith('a valid key is needed')")
    browser.type("key", "secret")
    browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
    browser.wait("document.getElementById('model').textContent == 'tiny'")
    browser.wait("document.getElementById('error').hidden")
    browser.type("prompt", "a")
    browser.type("max_tokens", "33")
    browser.click("go")
    browser.wait("document.getElementById('error').textContent == 'max_tokens: 33; at most 32 are given'")
    browser.type("max_tokens", "9")
    browser.click("go")
    browser.wait("document.getElementById('error').textContent == 'the model computes NaN after token 3'")
    assert browser.get_text("answer") == "aA"
    assert not browser.run("document.getElementById('go').disabled")
    _, foreign = get_problems(browser)
    assert foreign == []
