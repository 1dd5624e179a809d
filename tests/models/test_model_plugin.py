"""What mt-models registers, what configuration refuses, and that neither needs torch."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from models.parts import MOE, attention, tiny
from mt_core.config.sections import OptimConfig
from mt_core.plugins import component, components
from mt_models.config import GPTConfig
from mt_models.plugin import mt_config_rules


def test_the_model_and_the_cores_are_listed():
    assert component("model", "gpt") is GPTConfig
    assert {"eager", "sdpa"} <= components("attention").keys()


def test_plugin_config_and_presets_work_without_torch():
    script = """
import sys, tomllib
sys.modules["torch"] = None
import mt_models.plugin
from mt_core.config.sections import OptimConfig
from mt_core.plugins import component, components
for name in components("preset"):
    model = tomllib.loads(component("preset", name).read_text())["model"]
    model["vocab_size"] = 257 if model["vocab_size"] == "tokenizer" else model["vocab_size"]
    component("model", model["kind"]).model_validate(model).canonical_shapes()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": attention(3)}, "num_kv_heads 3 does not divide heads 4"),
        (
            {"attention": attention(window_layers=[True])},
            "window_layers says which layers have a window, but window is",
        ),
        (
            {"attention": attention(window=3, window_layers=[])},
            "window 3 is used nowhere: window_layers names no layer",
        ),
        ({"attention": attention(head_size=5)}, r"rotary positions need an even attention\.head_size, got 5"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny(**changes)


def test_an_odd_head_size_is_fine_without_rotary_positions():
    assert tiny(attention=attention(head_size=5), position={"kind": "learned"}).attention.head_size == 5


def test_a_misspelt_core_is_a_configuration_problem():
    (problem,) = mt_config_rules(SimpleNamespace(model=tiny(attention=attention(core="eagr"))))
    assert str(problem).startswith("model.attention.core: unknown attention core 'eagr'; did you mean 'eager'?")


@pytest.mark.parametrize("core", ["auto", "sdpa", "eager"])
def test_known_cores_are_no_problem(core):
    assert mt_config_rules(SimpleNamespace(model=tiny(attention=attention(core=core)))) == []


def test_models_of_others_are_left_alone():
    assert mt_config_rules(SimpleNamespace(model=SimpleNamespace(kind="other"))) == []


def with_parallel(model, **values):
    parallel = {"context": 1, "cp_comm_type": "ring", "sequence": False} | values
    return SimpleNamespace(model=model, parallel=SimpleNamespace(**parallel), optim=OptimConfig())


def test_a_ring_cannot_change_scores_but_the_other_exchanges_can():
    model = tiny(attention=attention(window=3, softcap=5.0))
    (problem,) = mt_config_rules(with_parallel(model, context=2))
    assert str(problem) == (
        "parallel.cp_comm_type: 'ring' cannot apply model.attention.softcap, window; allowed: all_gather, all_to_all"
    )
    for fine in ({"context": 1}, {"context": 2, "cp_comm_type": "all_gather"}):
        assert mt_config_rules(with_parallel(model, **fine)) == []
    assert mt_config_rules(with_parallel(tiny(), context=2)) == []


@pytest.mark.parametrize("shared", [{"context": 2}, {"sequence": True}])
def test_losses_of_a_router_may_be_of_sequences_that_ranks_share(shared):
    losses = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.1}
    assert mt_config_rules(with_parallel(tiny(mlp=MOE | losses), **shared)) == []


def test_a_named_core_that_cannot_cap_is_a_configuration_problem():
    (problem,) = mt_config_rules(SimpleNamespace(model=tiny(attention=attention(core="sdpa", softcap=5.0))))
    assert str(problem) == "model.attention.core: 'sdpa' cannot apply model.attention.softcap; allowed: auto, eager"
