"""Presets describe the published models."""

import math
import tomllib

import pytest

from mt_core.plugins import component, components
from mt_models.config import GPTConfig

PUBLISHED = {
    "gpt-tiny": 1_328_256,
    "gpt2-124m": 124_439_808,
    "gpt-345m": 354_823_168,
    "gpt3-175b": 174_604_259_328,  # "175B": 174.59 B without biases and norms
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,
}


def preset(name):
    return tomllib.loads(component("preset", name).read_text(encoding="utf-8"))


def test_the_presets_of_mt_models_are_listed():
    assert PUBLISHED.keys() <= components("preset").keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    config = GPTConfig.model_validate(preset(name)["model"])
    assert sum(math.prod(shape) for shape in config.canonical_shapes().values()) == PUBLISHED[name]
    assert config.parameter_count == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_sequences_fit_the_positions(name):
    values = preset(name)
    assert values["data"]["seq_length"] <= values["model"]["max_positions"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_module_has_the_parameters_of_the_preset_and_padding(name):
    import torch

    config = GPTConfig.model_validate(preset(name)["model"])
    with torch.device("meta"):
        model = config.build()
    padding = (config.vocab_rows() - config.vocab_size) * config.model_size * (1 if config.tied else 2)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name] + padding


def test_flops_of_gpt2_are_six_a_matrix_parameter_and_half_of_full_attention():
    config = GPTConfig.model_validate(preset("gpt2-124m")["model"])
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert config.flops_per_token(1024) == 6 * matrices + 6 * 12 * 768 * 1024
