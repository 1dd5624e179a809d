"""Native → Megatron's files → native: the same bits, whatever the layout; and the files are what Megatron expects."""

import pytest
import torch

from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import write_model
from mt_models.config import GPTConfig

LAYERS = 4
LLAMA = {
    "layers": LAYERS,
    "hidden_size": 16,
    "vocab_size": 61,
    "max_seq_len": 12,
    "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 6},
    "mlp": {"kind": "gated", "ffn_hidden_size": 20},
    "norm": {"kind": "rms", "eps": 1e-6},
    "position": {"kind": "rope", "theta": 500.0},
    "vocab_divisor": 8,
}
GPT2 = {
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 4, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 24, "activation": "gelu_tanh", "bias": True},
    "norm": {"kind": "layer"},
    "position": {"kind": "learned"},
    "tied": True,
}
MODELS = {
    "llama": {},
    "llama tied": {"tied": True},
    "qwen2": {"attention": LLAMA["attention"] | {"qkv_bias": True}},
    "gpt2": GPT2,
    "squared relu, no position": {"mlp": {"kind": "dense", "ffn_hidden_size": 8, "activation": "squared_relu"}}
    | {"position": {"kind": "none"}},
}
LAYOUTS = {"tensor": 2, "pipeline": 2}


def build_config(model="llama", **changes):
    return GPTConfig.model_validate(LLAMA | MODELS[model] | changes)


@pytest.fixture
def native(tmp_path):
    """`native("gpt2")` → a native checkpoint of random weights."""

    def make(model="llama", dtype=torch.float32, **changes):
        config, random = build_config(model, **changes), torch.Generator().manual_seed(0)
        tensors = {n: torch.randn(s, generator=random).to(dtype) for n, s in config.canonical_shapes().items()}
        write_model(tmp_path / "native", config.model_dump(mode="json"), tensors.items())
        return tmp_path / "native"

    return make


def sizes(tensor=1, pipeline=1, virtual=1):
    return {
        "target_tensor_parallel_size": tensor,
        "target_pipeline_parallel_size": pipeline,
        "target_virtual_pipeline_parallel_size": virtual,
    }


def read_tensors(path):
    return {
        n: (t.dtype, t.shape, t.contiguous().view(torch.uint8).tolist()) for n, t in open_checkpoint(path).tensors()
    }


def convert_there_and_back(source, tmp_path, **options):
    convert("native", source, "core", tmp_path / "core", options=options)
    convert("core", tmp_path / "core", "native", tmp_path / "back")
    return tmp_path / "core", tmp_path / "back"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_same_bits_back(model, layout, native, tmp_path):
    source = native(model)
    core, back = convert_there_and_back(source, tmp_path, **sizes(*layout))
    assert read_tensors(core) == read_tensors(back) == read_tensors(source)
    assert open_checkpoint(back).config() == open_checkpoint(source).config()


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_bf16_and_names_of_either_implementation_survive(implementation, native, tmp_path):
    source = native("gpt2", torch.bfloat16)
    core, back = convert_there_and_back(source, tmp_path, saver_transformer_impl=implementation, **sizes(2, 2))
    assert read_tensors(back) == read_tensors(source)
    state = safe_unpickle.read(core / "release" / "mp_rank_00_000" / "model_optim_rng.pt")
    assert state["args"].params_dtype == torch.bfloat16
    assert ("decoder.layers.0.input_layernorm.weight" in state["model"]) == (implementation == "local")


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_torch_dist_gives_the_same_bits_back(model, tensor, native, tmp_path):
    source = native(model)
    core, back = convert_there_and_back(source, tmp_path, target_ckpt_format="torch_dist", **sizes(tensor))
    assert read_tensors(core) == read_tensors(back) == read_tensors(source)


@pytest.mark.parametrize("saver", ["core", "legacy"])
def test_the_length_of_the_samples_in_training_is_that_of_args(saver, native, tmp_path):
    convert("native", native(), saver, tmp_path / saver)
    assert open_checkpoint(tmp_path / saver).trained_seq_length() == 12
    (file,) = (tmp_path / saver).rglob("model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    state["args"].seq_length = 7
    torch.save(state, file)
    loader = open_checkpoint(tmp_path / saver)
    assert (loader.trained_seq_length(), loader.config().max_seq_len) == (7, 12)
