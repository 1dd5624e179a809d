"""Rows in the order of their experts and back: the plain form is the definition, and the kernels are the plain form."""

import importlib
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mt_core.parallel.expert import permutation
from mt_core.parallel.expert.permutation import Operations, permute, sort_choices, unpermute

TOKENS, CHOICES, EXPERTS, WIDTH = 5, 2, 4, 7
KEPT = {
    "all": None,
    "some": torch.tensor([[True, False], [True, True], [False, False], [False, True], [True, True]]),
    "none": torch.zeros(TOKENS, CHOICES, dtype=torch.bool),
}
CASES = [*itertools.product(KEPT, (None, 3))]
"""What is kept, and to how many rows those of each expert are padded; no expert has more than 3."""
DTYPES = {torch.float64: (1e-12, 1e-13), torch.bfloat16: (2**-6, 2**-5)}
"""Bounds of equality; the plain form rounds products in bf16, of which a token has two, and features are near 1."""


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).requires_grad_()


def results(
    case: tuple[str, int | None], dtype: torch.dtype, device: str = "cpu", *, define: bool = False
) -> list[Tensor]:
    """Permuted tokens, the weighted sums of what came of them, and the gradients of tokens, rows and weights."""
    kept, padded = case
    kept_NC = None if (mask := KEPT[kept]) is None else mask.to(device)
    scores_NE = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).to(device)
    order, counts_E = sort_choices(scores_NE.topk(CHOICES).indices, kept_NC, EXPERTS, padded)
    rows = int(counts_E.sum())
    x_ND = draw(TOKENS, WIDTH, seed=2, dtype=dtype, device=device)
    y_RD = draw(rows, WIDTH, seed=3, dtype=dtype, device=device)
    weights_NC = draw(TOKENS, CHOICES, seed=4, dtype=torch.promote_types(dtype, torch.float32), device=device)
    if define:
        choice_R = order.order_M[:rows]
        real_R = choice_R < TOKENS * CHOICES
        choice_R = choice_R.where(real_R, 0)
        x_RD = x_ND[choice_R // CHOICES] * real_R[:, None]
        weighted_RD = y_RD * weights_NC.flatten()[choice_R, None] * real_R[:, None]
        sum_ND = torch.zeros_like(x_ND).index_add(0, choice_R // CHOICES, weighted_RD)
    else:
        x_RD, sum_ND = permute(x_ND, order, rows), unpermute(y_RD, order, weights_NC)
    loss = (x_RD * y_RD.detach()).sum() + sum_ND.square().sum()
    loss.backward()
    return [t.detach() for t in (x_RD, sum_ND, x_ND.grad, y_RD.grad, weights_NC.grad)]


@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_is_its_definition(case):
    for ours, theirs in zip(results(case, torch.float64), results(case, torch.float64, define=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kept", KEPT)
def test_padding_fills_up_the_rows_of_each_expert_with_zeros(kept):
    (plain_RD, *plain), (padded_RD, *padded) = (results((kept, rows), torch.float64) for rows in (None, 3))
    real_R = padded_RD.any(1)
    assert torch.equal(padded_RD[real_R], plain_RD)
    assert len(padded_RD) == 3 * EXPERTS
    assert not padded[2][~real_R].any()
    assert torch.equal(results((kept, 3), torch.float64)[1].any(1), plain[0].any(1))


def check_that_kernels_are_the_plain_form(monkeypatch: Any, kernels: Any, device: str) -> None:
    for case, (dtype, (rtol, atol)) in itertools.product(CASES, DTYPES.items()):
        monkeypatch.setattr(permutation, "choose_operations", lambda _: permutation.PLAIN)
        plain = results(case, dtype, device)
        fused = Operations(kernels.gather_tokens, kernels.add_choices, kernels.multiply_choices)
        monkeypatch.setattr(permutation, "choose_operations", lambda _, fused=fused: fused)
        for ours, theirs in zip(results(case, dtype, device), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_the_kernels_are_the_plain_form_in_triton_s_interpreter(monkeypatch):
    pytest.importorskip("triton")
    name = "mt_core.parallel.expert.fused_permutation"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    check_that_kernels_are_the_plain_form(monkeypatch, kernels, "cpu")


@pytest.mark.gpu
def test_the_kernels_are_the_plain_form_on_a_gpu(monkeypatch):
    from mt_core.parallel.expert import fused_permutation

    assert permutation.choose_operations(torch.empty(1, device="cuda")) != permutation.PLAIN
    check_that_kernels_are_the_plain_form(monkeypatch, fused_permutation, "cuda")
