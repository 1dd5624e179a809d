"""Frequencies for longer sequences are those of transformers, whose functions are checked against the papers."""

import pytest
import torch
from pydantic import ValidationError

from models.parts import tiny
from mt_models import config
from mt_models.layers.rope import get_attention_factor, make_rotation, scale_frequencies

utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")

CASES = {
    "linear": (config.Linear(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        config.Llama3(factor=8.0, original_positions=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        config.YaRN(factor=4.0, original_positions=32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn with its own numbers": (
        config.YaRN(factor=40.0, original_positions=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.2,
        },
    ),
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)
def test_frequencies_and_the_growth_of_heads_are_those_of_transformers(ours, theirs, theta):
    from transformers import LlamaConfig

    llama = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_theta": theta, **theirs})
    expected_L, factor = utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](llama, torch.device("cpu"))
    plain_L = 1.0 / theta ** (torch.arange(0, 128, 2).float() / 128)
    torch.testing.assert_close(scale_frequencies(plain_L, ours, theta), expected_L, rtol=1e-6, atol=0)
    assert get_attention_factor(ours) == pytest.approx(factor, rel=1e-12)


def test_linear_scaling_turns_a_position_as_its_share_was_turned():
    scaling = config.Linear(factor=4.0)
    stretched = make_rotation(torch.arange(0, 40, 4), 8, theta=100.0, dtype=torch.float64, scaling=scaling)
    torch.testing.assert_close(stretched, make_rotation(torch.arange(10), 8, theta=100.0, dtype=torch.float64))


def test_yarn_sharpens_attention_by_longer_heads():
    scaling = config.YaRN(factor=4.0, original_positions=16)
    cos_T1L, sin_T1L = make_rotation(torch.arange(5), 8, theta=100.0, dtype=torch.float64, scaling=scaling)
    lengths = (cos_T1L.square() + sin_T1L.square()).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1.138629436111989), rtol=1e-14, atol=0)


def test_a_model_uses_the_scaling_of_its_configuration(make_model, tokens_BT):
    rope = {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}
    plain, stretched = (make_model(tiny(position=position)) for position in ({"kind": "rope"}, rope))
    positions = torch.arange(12)
    assert not torch.allclose(plain(tokens_BT), stretched(tokens_BT))
    halves = make_rotation(positions.double() / 2, 6, theta=1e4, dtype=torch.float64)
    torch.testing.assert_close(stretched.rotation(positions, torch.float64), halves)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "llama3", "factor": 8, "original_positions": 9, "low_frequency": 4}, "4.0 is not below high_freq"),
        ({"kind": "yarn", "factor": 8, "original_positions": 9, "beta_slow": 32}, "beta_slow 32.0 is not below beta_f"),
        ({"kind": "yarn", "factor": 0.5, "original_positions": 9}, "greater than or equal to 1"),
        ({"kind": "dynamic", "factor": 2}, "'linear', 'llama3', 'yarn'"),
    ],
)
def test_impossible_scalings_are_refused(scaling, message):
    with pytest.raises(ValidationError, match=message):
        tiny(position={"kind": "rope", "scaling": scaling})
