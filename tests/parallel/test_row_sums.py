"""Sums over rows in Triton are torch's, for any number of rows and columns."""

import importlib
import sys

import pytest
import torch

from mt_core.parallel.tensor.row_sums import sum_rows

SHAPES = [(0, 8), (1, 3), (600, 130), (1025, 256)]


def check_against_torch(sum_parts, device):
    draw = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        whole = torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)
        for x in (whole, whole.T.contiguous().T, whole.float(), whole.bfloat16()):
            unit = 1e-12 if x.dtype == torch.float64 else 1e-4
            found = sum_parts(x).sum(0)
            assert found.dtype == torch.promote_types(x.dtype, torch.float32)
            torch.testing.assert_close(found.double(), x.double().sum(0), rtol=unit, atol=unit)


def test_sums_in_triton_s_interpreter_are_torch_s(monkeypatch):
    pytest.importorskip("triton")
    name = "mt_core.parallel.tensor.row_sum_kernels"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    check_against_torch(kernels.sum_parts, "cpu")


def test_on_a_cpu_they_are_torch_s_own():
    x = torch.randn(2, 5, 3)
    assert torch.equal(sum_rows(x), x.flatten(0, 1).sum(0))


@pytest.mark.gpu
def test_sums_on_a_gpu_are_torch_s():
    from mt_core.parallel.tensor.row_sum_kernels import sum_parts

    check_against_torch(sum_parts, "cuda")
    x = torch.randn(3, 700, 40, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(sum_rows(x), x.double().sum((0, 1)).bfloat16(), rtol=2**-7, atol=1e-2)
