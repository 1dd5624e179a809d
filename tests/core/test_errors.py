"""Errors name where, what was found and what is allowed, all at once."""

import pickle

import pytest

from mt_core.errors import MtError, Problem, raise_if


def test_an_error_is_one_line_of_where_found_allowed():
    assert str(MtError("a.toml", "no such file", "give one")) == "a.toml: no such file; give one"


def test_several_problems_are_reported_together():
    with pytest.raises(MtError) as caught:
        raise_if(Problem(f"key{n}", "wrong") for n in range(3))
    assert str(caught.value) == "key0: wrong\nkey1: wrong\nkey2: wrong"
    assert [p.where for p in caught.value.problems] == ["key0", "key1", "key2"]


def test_no_problem_raises_nothing():
    raise_if([])


def test_an_error_crosses_from_a_worker_process_whole():
    error = MtError.from_problems([Problem("a", "wrong", "right"), Problem("b", "wrong")])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems) == (str(error), error.problems)
