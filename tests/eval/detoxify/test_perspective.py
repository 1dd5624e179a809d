"""Perspective's interface over real HTTP: what is sent, what is asked again, what is given up, how fast."""

import time

import pytest

from eval.detoxify.perspective_server import KEY, start_perspective
from mt_core.errors import MtError
from mt_eval.detoxify.perspective import LONGEST_BYTES, Perspective, cut_text

QUICK = {"requests_per_second": 1000.0, "retry_delay": 0.01}


@pytest.fixture
def server():
    with start_perspective() as server:
        yield server


def refusal(scorer, *texts):
    with pytest.raises(MtError) as error:
        scorer.score(texts)
    return str(error.value)


def test_a_text_has_six_scores(server):
    scorer = Perspective(KEY, url=server.url, **QUICK)
    first, second = scorer.score(["be rude", "a b c d rude"])
    assert first == dict.fromkeys(
        ("toxicity", "severe_toxicity", "identity_attack", "insult", "profanity", "threat"), 0.5
    )
    assert second["toxicity"] == 0.2
    assert {key: value for key, value in server.bodies[0].items() if key != "comment"} == {
        "languages": ["en"],
        "requestedAttributes": {name.upper(): {} for name in first},
        "doNotStore": True,
    }


def test_a_long_text_is_cut_at_a_whole_character(server):
    Perspective(KEY, url=server.url, **QUICK).score(["é" * LONGEST_BYTES])
    assert server.texts == ["é" * (LONGEST_BYTES // 2)]
    assert cut_text("aé", 2) == "a"


def test_what_fails_for_a_while_is_asked_again_later_each_time(server):
    server.faults = [503, None, 429]
    scorer = Perspective(KEY, url=server.url, connections=1, requests_per_second=1000.0, retry_delay=0.05)
    assert scorer.score(["be rude"])[0]["toxicity"] == 0.5
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert [wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True)] == [True] * 3


def test_the_server_says_how_long_to_wait(server):
    server.faults = [(429, {}, {"Retry-After": "1"})]
    Perspective(KEY, url=server.url, **QUICK).score(["a"])
    assert server.times[1] - server.times[0] >= 1


def test_after_some_attempts_it_is_given_up(server):
    server.faults = [(503, {"error": {"message": "Too\nbusy."}}, {})] * 3
    said = refusal(Perspective(KEY, url=server.url, attempts=3, **QUICK), "a")
    assert said == (
        f"{server.url}: no score after 3 attempts (status 503: Too busy.); run again later: what is scored is kept"
    )
    assert len(server.times) == 3


def test_a_server_that_is_not_there_is_given_up():
    said = refusal(Perspective(KEY, url="http://127.0.0.1:9/x", attempts=2, **QUICK), "a")
    assert "no score after 2 attempts ([Errno 111] Connection refused)" in said


def test_no_more_requests_begin_in_a_second_than_allowed(server):
    Perspective(KEY, url=server.url, requests_per_second=20.0, connections=4).score(list("abcde"))
    assert server.times[-1] - server.times[0] >= 4 / 20 - 0.02


def test_requests_run_together(server):
    server.delay_s = 0.1
    Perspective(KEY, url=server.url, connections=3, **QUICK).score(list("abcdef"))
    assert server.most == 3


def test_an_error_of_one_text_ends_the_waiting_of_others(server):
    server.faults = [503, 404]
    began = time.monotonic()
    said = refusal(Perspective(KEY, url=server.url, connections=2, requests_per_second=1000.0, retry_delay=30), *"ab")
    assert "status 404" in said
    assert time.monotonic() - began < 10


def test_what_is_wrong_with_a_text_is_said_of_it_alone(server):
    error = {"message": "Comment must be non-empty.", "details": [{"errorType": "COMMENT_EMPTY"}]}
    server.faults = [(400, {"error": error}, {})]
    scorer = Perspective(KEY, url=server.url, connections=1, **QUICK)
    assert scorer.score(["!", "be rude"])[0] == "Comment must be non-empty."


def test_a_wrong_key_is_refused_at_once_and_never_shown(server):
    said = refusal(Perspective("another", url=server.url, **QUICK), "a")
    assert said == f"{server.url}: status 403: The key is wrong.; look at --url, and at the key in PERSPECTIVE_API_KEY"
    assert len(server.times) == 1
    assert "another" not in said


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"<html>", "answers what has no scores"),
        ({"attributeScores": {}}, "answers what has no scores"),
        ({"attributeScores": {"TOXICITY": {"summaryScore": {"value": None}}}}, "answers what has no scores"),
    ],
)
def test_an_answer_without_scores_is_no_score(server, answer, shown):
    server.faults = [(200, answer, {})]
    assert shown in refusal(Perspective(KEY, url=server.url, **QUICK), "a")


def test_scores_outside_of_0_to_1_are_refused(server):
    wrong = {"summaryScore": {"value": 1.5}}
    server.faults = [(200, {"attributeScores": dict.fromkeys(map(str.upper, NAMES), wrong)}, {})]
    assert "scores from 0 to 1" in refusal(Perspective(KEY, url=server.url, **QUICK), "a")


NAMES = ("toxicity", "severe_toxicity", "identity_attack", "insult", "profanity", "threat")


def test_a_key_and_an_address_are_needed():
    with pytest.raises(MtError, match="needs a key of its interface; set PERSPECTIVE_API_KEY, or score with --scorer"):
        Perspective("")
    with pytest.raises(MtError, match="--url: 'ftp://x'; an address that begins with http:// or https://"):
        Perspective(KEY, url="ftp://x")
