"""How many rows an embedding has for a vocabulary (docs/specs/data.md §3.1)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_core.parallel.cuts import TensorCut


def padded_rows(vocab: int, divisor: int, tensor: int) -> int:
    return TensorCut(0, divisor=divisor).local_length(vocab, tensor) * tensor


@pytest.mark.parametrize(
    ("vocab", "padded"), [(50257, 51200), (1024, 1024), (1025, 2048), (30524, 30720)], ids=lambda number: str(number)
)
def test_padding_of_the_specification(vocab: int, padded: int):
    assert padded_rows(vocab, 128, 8) == padded
    assert padded_rows(vocab, 1024, 1) == padded


@given(vocab=st.integers(1, 10**7), divisor=st.integers(1, 4096), tensor=st.integers(1, 64))
def test_padding_is_the_least_that_divides(vocab: int, divisor: int, tensor: int):
    padded = padded_rows(vocab, divisor, tensor)
    assert padded % tensor == (padded // tensor) % divisor == 0
    assert 0 <= padded - vocab < divisor * tensor
