"""AdamW in one pass takes torch's steps, and leaves weights in the model's data type behind."""

import importlib
import sys

import pytest
import torch

from mt_core.config.sections import OptimConfig
from mt_core.training.optimizer import adamw
from mt_core.training.optimizer_step import step_optimizer, takes_one_pass

SHAPES = [(3, 5), (1100,), (2048,)]
FACTORS = [(0.5, False), (2.0, False), (1.0, True), (0.25, False)]
"""Of four steps, the third of which is left out."""


def make_optimizer(device):
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return parameters, adamw(groups, OptimConfig(lr=1e-2))


def take_steps(step, device):
    """Parameters and their state after each step."""
    parameters, optimizer = make_optimizer(device)
    draw, found = torch.Generator().manual_seed(1), []
    for factor, bad in FACTORS:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
        step(parameters, optimizer, torch.tensor(factor, device=device), torch.tensor(bad, device=device))
        states = [optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
        found.append([t.detach().clone() for t in (*parameters, *states)])
    return found


def check_against_torch(step_and_round, device, unit):
    """`unit` is the largest relative error of rounding to bf16: the interpreter cuts bits off."""

    def in_one_pass(parameters, optimizer, factor, bad):
        before = {p: p.detach().bfloat16().flatten() for p in parameters}
        rounded = {p: each.clone() for p, each in before.items()}
        step_and_round(optimizer, rounded, factor, bad)
        for parameter in parameters:
            exact = parameter.detach().flatten()
            torch.testing.assert_close(rounded[parameter].float(), exact, rtol=unit, atol=0)
            assert torch.equal(rounded[parameter], before[parameter]) == bool(bad)

    expected = take_steps(lambda _, *rest: step_optimizer(rest[0], {}, *rest[1:]), device)
    for ours, theirs in zip(take_steps(in_one_pass, device), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_a_step_in_triton_s_interpreter_is_torch_s(monkeypatch):
    pytest.importorskip("triton")
    name = "mt_core.training.one_pass_adamw"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    check_against_torch(module.step_and_round, "cpu", 2**-7)


def test_one_pass_is_for_parameters_on_a_gpu_that_are_rounded():
    parameters, optimizer = make_optimizer("cpu")
    assert not takes_one_pass(optimizer, {})
    assert not takes_one_pass(optimizer, {p: p.detach().bfloat16() for p in parameters})


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_torch_s():
    from mt_core.training.one_pass_adamw import step_and_round

    parameters, optimizer = make_optimizer("cuda")
    rounded = {p: p.detach().bfloat16().flatten() for p in parameters}
    assert takes_one_pass(optimizer, rounded)
    assert not takes_one_pass(optimizer, dict([*rounded.items()][:2]))
    check_against_torch(step_and_round, "cuda", 2**-8)
