"""Errors name where, what was found and what is allowed, all at once."""

import pickle

import pytest

from mt_core.errors import MtError, Problem, find_nearest, raise_if, suggest_file


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


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("LAMBADA", "lambada"), ("gpt2bpetokenizer", "GPT2BPETokenizer"), ("lambda", "lambada"), ("xyz", None)],
)
def test_the_nearest_name_is_found_whatever_the_case(typed, nearest):
    assert find_nearest(typed, ["lambada", "perplexity", "GPT2BPETokenizer"]) == nearest


def test_a_missing_file_suggests_one_of_another_case(tmp_path):
    (tmp_path / "Run.toml").touch()
    assert suggest_file(tmp_path / "RUN.TOML") == f"did you mean {tmp_path / 'Run.toml'}?"
