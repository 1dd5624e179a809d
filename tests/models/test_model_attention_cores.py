"""Attention cores agree with each other, and are chosen by name."""

import logging

import pytest
import torch

from models.parts import attention, tiny
from mt_core import plugins
from mt_core.errors import MtError
from mt_core.plugins import Component, component, hookimpl
from mt_models.layers.attention_cores import Core, attend_eager, choose_core, eager, sdpa

CPU = torch.device("cpu")


def heads(T: int, S: int, *, H: int = 6, G: int = 2) -> list[torch.Tensor]:
    shapes = ((2, T, H, 8), (2, S, G, 8), (2, S, G, 8))
    source = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=source, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9), (1, 1)])
@pytest.mark.parametrize("G", [1, 2, 6])
def test_sdpa_and_eager_agree_forward_and_backward(T, S, G):
    results = []
    for core in (eager, sdpa):
        inputs = heads(T, S, G=G)
        y_BTHK = core(*inputs)
        results.append((y_BTHK, *torch.autograd.grad((y_BTHK.sin()).sum(), inputs)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", [eager, sdpa], ids=["eager", "sdpa"])
def test_the_last_query_is_aligned_with_the_last_key(core):
    q_BTHK, k_BSGK, v_BSGK = heads(9, 9)
    late = core(q_BTHK[:, 5:], k_BSGK, v_BSGK)
    torch.testing.assert_close(late, core(q_BTHK, k_BSGK, v_BSGK)[:, 5:], rtol=1e-12, atol=1e-12)


def test_cores_are_found_by_name():
    assert component("attention", "eager") is choose_core("eager", CPU)
    assert component("attention", "sdpa") is choose_core("sdpa", CPU)


def test_auto_takes_sdpa_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO):
        model = tiny(layers=3).build()
    assert all(block.attn.core is sdpa for block in model.layers.values())
    assert [record.message for record in caplog.records] == ["attention core: sdpa (auto, cpu)"]


def test_an_unknown_core_names_the_nearest():
    with pytest.raises(MtError, match="unknown name 'spda'; did you mean 'sdpa'"):
        tiny(attention=attention(core="spda")).build()


needs_tpu = Core(attend_eager, preference=99, why_not=lambda device: f"needs a TPU, not a {device.type}")


class ThirdParty:
    """A plugin whose core never runs here."""

    @hookimpl
    def mt_components(self):
        return [Component("attention", "warp", f"{__name__}:needs_tpu", "runs on TPUs only")]


@pytest.fixture
def third_party():
    plugin = ThirdParty()
    plugins.manager().register(plugin)
    yield
    plugins.manager().unregister(plugin)


@pytest.mark.usefixtures("third_party")
def test_auto_passes_over_a_core_that_cannot_run_and_logs_why(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_core("auto", CPU) is sdpa
    assert "sdpa (auto, cpu); not warp: needs a TPU, not a cpu" in caplog.text


@pytest.mark.usefixtures("third_party")
def test_a_named_core_that_cannot_run_is_an_error_with_the_reason():
    with pytest.raises(MtError, match="core 'warp': cannot run on cpu: needs a TPU, not a cpu; use \"auto\""):
        choose_core("warp", CPU)
