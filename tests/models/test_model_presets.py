"""Presets describe the published models."""

import math
import tomllib

import pytest

from mt_cli.run_config import load_run_config
from mt_core.errors import MtError
from mt_core.plugins import component, components
from mt_models.config import BertConfig, GPTConfig, T5Config

PUBLISHED = {
    "gpt-tiny": 803_968 + 128 * 257,  # with the bytes tokenizer
    "gpt2-124m": 124_439_808,
    "gpt-345m": 354_823_168,
    "gpt3-175b": 174_604_259_328,  # "175B": 174.59 B without biases and norms
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-v2-lite": 15_706_484_224,
    "gemma-2-2b": 2_614_341_888,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
    "bert-345m": 336_228_158,  # "345M": with Megatron's padded vocabulary 336,297,858
    "t5-220m": 221_248_426,
}
KINDS = {"gpt": GPTConfig, "bert": BertConfig, "t5": T5Config}


def load_preset(name):
    values = preset(name)["model"]
    if values["vocab_size"] == "tokenizer":
        values["vocab_size"] = 257
    return KINDS[values["kind"]].model_validate(values)


def preset(name):
    return tomllib.loads(component("preset", name).read_text(encoding="utf-8"))


def test_the_presets_of_mt_models_are_listed():
    assert PUBLISHED.keys() <= components("preset").keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    config = load_preset(name)
    assert sum(math.prod(shape) for shape in config.canonical_shapes().values()) == PUBLISHED[name]
    assert config.parameter_count == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_sequences_fit_the_positions(name):
    values = preset(name)
    assert values["data"]["seq_length"] <= values["model"]["max_seq_len"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_module_has_the_parameters_of_the_preset_and_padding(name):
    import torch

    config = load_preset(name)
    with torch.device("meta"):
        model = config.build()
    rows = [math.prod(s[1:]) for n, s in config.canonical_shapes().items() if n.startswith(("embed.", "head."))]
    padding = (config.vocab_rows() - config.vocab_size) * sum(rows)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name] + padding


def test_flops_of_gpt2_are_six_a_matrix_parameter_and_half_of_full_attention():
    config = GPTConfig.model_validate(preset("gpt2-124m")["model"])
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert config.flops_per_token(1024) == 6 * matrices + 6 * 12 * 768 * 1024


def test_flops_of_mixtral_are_those_of_the_experts_that_a_token_passes_through():
    config = GPTConfig.model_validate(preset("mixtral-8x7b")["model"])
    attention, expert, router = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336, 8 * 4096
    matrices = 32 * (attention + 2 * expert + router) + 32000 * 4096
    assert config.flops_per_token(4096) == 6 * matrices + 6 * 32 * 4096 * 4096


def test_flops_of_deepseek_v2_lite_are_those_of_its_first_layer_and_of_the_others():
    config = GPTConfig.model_validate(preset("deepseek-v2-lite")["model"])
    attention = 2048 * (16 * 192 + 576 + 16 * 128) + 512 * 16 * 256
    dense, mixture = 3 * 2048 * 10944, 3 * 2048 * (6 * 1408 + 2816) + 64 * 2048
    matrices = 27 * attention + dense + 26 * mixture + 102400 * 2048
    assert config.flops_per_token(4096) == 6 * matrices + 27 * 6 * 16 * (192 + 128) * 2048


def test_flops_of_gemma_2_count_the_keys_in_a_window():
    config = GPTConfig.model_validate(preset("gemma-2-2b")["model"])
    windowless = config.model_copy(
        update={"attention": config.attention.model_copy(update={"window": None, "window_layers": None})}
    )
    assert config.flops_per_token(4096) == windowless.flops_per_token(4096)
    saved = 8192 / 2 - (4096 - 4096 / 4)  # keys a token: half of 8192, and half of the triangle before the window's end
    assert windowless.flops_per_token(8192) - config.flops_per_token(8192) == 12 * 13 * 8 * 256 * saved


def test_flops_without_a_sequence_are_those_of_the_matrices():
    config = GPTConfig.model_validate(preset("gpt2-124m")["model"])
    assert config.flops_per_token(0) == 6 * (12 * 12 * 768**2 + 50257 * 768)


@pytest.mark.parametrize(
    ("overrides", "stacks"),
    [([], (12, 12)), (["model.layers=2"], (2, 2)), (["model.layers=2", "model.decoder_layers=3"], (2, 3))],
)
def test_layers_of_a_t5_preset_are_those_of_both_stacks_unless_the_decoder_has_its_own(overrides, stacks):
    model = load_run_config([], overrides, "t5-220m", rules=False).model
    assert (model.layers, model.decoder_layers) == stacks
    names = {name.split(".layers.")[0]: name for name in model.canonical_tensors() if ".layers." in name}
    assert {stack: int(name.split(".")[2]) + 1 for stack, name in names.items()} == dict(
        zip(("encoder", "decoder"), stacks, strict=True)
    )


def test_impossible_layers_of_a_t5_are_one_error():
    with pytest.raises(MtError) as error:
        load_run_config([], ["model.layers=0"], "t5-220m", rules=False)
    assert [line.split(":")[1].strip() for line in str(error.value).splitlines()] == ["model.layers"]
