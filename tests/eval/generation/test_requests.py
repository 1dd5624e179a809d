"""Requests that mean nothing are refused, all mistakes at once."""

import pytest

from mt_core.errors import MtError
from mt_eval.generation.requests import Request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt: has no tokens; at least one token"),
        ({"prompt": (1, -1)}, "prompt: -1 is no token id; whole numbers from 0 on"),
        ({"prompt": (1, True)}, "prompt: True is no token id"),
        ({"ends": frozenset({"a"})}, "ends: 'a' is no token id"),
        ({"max_new_tokens": -1}, "max_new_tokens: -1; 0 or more"),
        ({"log_probs": -1}, "log_probs: -1; 0 to 1000, or None"),
        ({"log_probs": 1001}, "log_probs: 1001; 0 to 1000, or None"),
        ({"sample": -1}, "sample: -1; 0 or more"),
        ({"prompt": (), "max_new_tokens": -1}, r"prompt: has no tokens(.|\n)*max_new_tokens: -1"),
    ],
)
def test_values_without_meaning_are_refused(fields, message):
    with pytest.raises(MtError, match=message):
        Request(**{"prompt": (1,), "max_new_tokens": 1} | fields)


def test_requests_are_values():
    assert Request((1, 2), 3) == Request((1, 2), 3)
    assert len({Request((1, 2), 3), Request((1, 2), 3), Request((1, 2), 3, seed=1)}) == 2
