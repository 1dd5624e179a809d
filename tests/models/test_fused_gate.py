"""The gate of experts in Triton is torch's, forward and backward, for any number of rows."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from mt_models.layers.fused_gate import FusedGate, gate

ROWS = [0, 1, 37]
WIDTHS = [8, 1500]
"""Less than a program handles at once, and more, which it does not divide."""


def run(function, rows, width, dtype, device):
    """The result and the gradient of both halves."""
    draw = torch.Generator().manual_seed(0)
    gate_up, g = (torch.randn(rows, n * width, generator=draw).to(device, dtype) for n in (2, 1))
    y = function(gate_up.requires_grad_())
    y.backward(g)
    return y.detach(), gate_up.grad


def check_against_torch(kernels, device, unit):
    """`unit` is the largest relative error of rounding to bf16: the interpreter cuts bits off."""
    for rows in ROWS:
        for width in WIDTHS:
            for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, unit)):
                exact = run(lambda t: gate(t.double(), F.silu).to(t.dtype), rows, width, dtype, device)
                ours = run(lambda t: FusedGate.apply(t, kernels), rows, width, dtype, device)
                for a, b in zip(ours, exact, strict=True):
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1)


def test_the_kernels_in_triton_s_interpreter_are_torch_s(monkeypatch):
    pytest.importorskip("triton")
    name = "mt_models.layers.fused_gate_kernels"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    check_against_torch(kernels, "cpu", 2**-7)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu_are_torch_s():
    from mt_models.layers import fused_gate_kernels

    x = torch.randn(5, 32, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(gate(x, F.silu), fused_gate_kernels.silu_gate(x))
    check_against_torch(fused_gate_kernels, "cuda", 2**-8)
