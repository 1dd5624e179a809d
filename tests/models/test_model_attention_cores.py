"""Attention cores agree with each other, and are chosen by name."""

import logging

import pytest
import torch

from models.parts import attention, tiny
from mt_core import plugins
from mt_core.errors import MtError
from mt_core.plugins import Component, component, hookimpl
from mt_models.layers.attention_cores import Core, ScoreMods, attend_eager, choose_core, eager, sdpa

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


@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("window", [1, 3, 9, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_a_window_and_a_scale_are_those_of_masked_scores(T, S, window, documents):
    q_BTHK, k_BSGK, v_BSGK = heads(T, S, H=2)
    segment_ids_BS = torch.tensor([[0] * 4 + [1] * (S - 4)] * 2) if documents else None
    expected_BTHK = torch.zeros_like(q_BTHK)
    for t in range(T):
        at = S - T + t
        seen = [s for s in range(max(0, at - window + 1), at + 1) if not documents or (s < 4) == (at < 4)]
        scores_BHS = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], k_BSGK[:, seen]) * 0.4
        expected_BTHK[:, t] = torch.einsum("bhs,bshk->bhk", scores_BHS.softmax(-1), v_BSGK[:, seen])
    for core in (eager, sdpa):
        y_BTHK = core.with_scores(ScoreMods(scale=0.4, window=window))(q_BTHK, k_BSGK, v_BSGK, segment_ids_BS)
        torch.testing.assert_close(y_BTHK, expected_BTHK, rtol=1e-12, atol=1e-12)


def test_a_soft_cap_bends_scores_before_the_softmax():
    q_BTHK, k_BSGK, v_BSGK = heads(1, 9, H=2)
    scores_BHS = 0.5 * torch.tanh(torch.einsum("bthk,bshk->bhs", q_BTHK, k_BSGK) / 8**0.5 / 0.5)
    expected_BHK = torch.einsum("bhs,bshk->bhk", scores_BHS.softmax(-1), v_BSGK)
    y_BTHK = eager.with_scores(ScoreMods(softcap=0.5))(q_BTHK, k_BSGK, v_BSGK)
    torch.testing.assert_close(y_BTHK[:, 0], expected_BHK, rtol=1e-12, atol=1e-12)


def test_plain_scores_leave_a_core_as_it_is():
    assert sdpa.with_scores(ScoreMods()) is sdpa


def test_auto_takes_the_core_that_can_cap_and_says_why(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_core("auto", CPU, ScoreMods(softcap=5.0, window=3).special) is eager
    assert "attention core: eager (auto, cpu); not sdpa: has no softcap" in caplog.text


def test_a_named_core_that_cannot_cap_is_an_error():
    with pytest.raises(MtError, match="core 'sdpa': cannot run on cpu: has no softcap; use \"auto\""):
        tiny(attention=attention(core="sdpa", softcap=5.0)).build()


def test_the_pattern_of_windows_is_repeated_over_the_layers():
    part = attention(window=3, window_layers=[True, False, False])
    config = tiny(layers=5, attention=part)
    assert [config.attention.get_window(n) for n in range(5)] == [3, None, None, 3, None]
    assert [block.attn.core is sdpa for block in config.build().layers.values()] == [False, True, True, False, True]
