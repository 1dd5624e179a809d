import pytest
import torch

from mt_core.checkpoint import native
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.file_free import BytesTokenizer
from mt_eval.encoding import TextEncoder
from mt_models.canonical import canonical_state
from mt_models.config import GPTConfig

CONFIG = {
    "kind": "gpt",
    "layers": 2,
    "hidden_size": 32,
    "vocab_size": 257,
    "max_seq_len": 64,
    "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 8},
    "mlp": {"kind": "gated", "ffn_hidden_size": 48},
    "norm": {"kind": "rms"},
    "position": {"kind": "rope"},
    "init_std": 0.5,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config():
    """The model section of the checkpoint, as plain values."""
    return CONFIG


@pytest.fixture(scope="session")
def tokenizer():
    return BytesTokenizer(TokenizerConfig(type="bytes"))


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return TextEncoder.create(tokenizer)


@pytest.fixture(scope="session")
def model():
    """A GPT with random weights in fp64, peaked enough that greedy texts vary."""
    gpt = GPTConfig.model_validate(CONFIG).build()
    gpt.initialize(7)
    return gpt.double().eval()


@pytest.fixture(scope="session")
def uniform():
    """A GPT that finds every token equally likely: all its weights are zero."""
    gpt = GPTConfig.model_validate(CONFIG).build().double().eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()
    return gpt


@pytest.fixture(scope="session")
def checkpoint(model, tokenizer, tmp_path_factory):
    """A native run directory of `model`, with the bytes tokenizer that it was made for."""
    run = tmp_path_factory.mktemp("native") / "run"
    tokenizer.save(run / "tokenizer")
    tensors = ((name, tensor.float()) for name, tensor in canonical_state(model).items())
    native.write_model(run, CONFIG, tensors, sorted((run / "tokenizer").iterdir()))
    return run
