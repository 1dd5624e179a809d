import shutil

import pytest
import torch
from tokenizers import Tokenizer, models

from models.encoders import bert, t5
from mt_core.checkpoint import native
from mt_core.distributed.process_group import pick_device
from mt_core.errors import MtError
from mt_core.plugins import components, manager
from mt_data.config import TokenizerConfig
from mt_eval.load import Checkpoint, load_model, load_tokenizer, pick_dtype
from mt_models.canonical import canonical_state

BYTES = TokenizerConfig(type="bytes")


@pytest.fixture
def without_tokenizer(config, model, tmp_path):
    """A checkpoint of another vocabulary size, with which no tokenizer travels."""
    small = config | {"vocab_size": 100}
    tensors = ((n, t[:100] if n in ("embed.weight", "head.weight") else t) for n, t in canonical_state(model).items())
    native.write_model(tmp_path / "run", small, tensors)
    return Checkpoint.open(tmp_path / "run")


def test_a_run_or_a_step_gives_the_model_that_was_saved(checkpoint, model):
    tokens_BT = torch.arange(20)[None]
    expected = model(tokens_BT).float()
    for path in (checkpoint, native.resolve(checkpoint)):
        loaded = load_model(Checkpoint.open(path), device="cpu")
        assert not loaded.training
        torch.testing.assert_close(loaded(tokens_BT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [bert(), t5()])
def test_a_model_that_does_not_continue_a_text_is_refused(config, tmp_path):
    model = config.build()
    model.initialize(1)
    native.write_model(tmp_path / "run", config.model_dump(mode="json"), canonical_state(model).items())
    message = f"run: holds a model of kind '{config.kind}', which does not continue a text; a model of kind gpt"
    with pytest.raises(MtError, match=message):
        load_model(Checkpoint.open(tmp_path / "run"), device="cpu")


def test_dtype_is_that_of_the_weights_and_the_default_is_left_alone(checkpoint):
    model = load_model(Checkpoint.open(checkpoint), device="cpu", dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_the_tokenizer_is_the_one_that_travels_with_the_checkpoint(checkpoint):
    assert load_tokenizer(Checkpoint.open(checkpoint)).encode("hé") == [104, 0xC3, 0xA9]


def test_a_named_tokenizer_with_the_same_vocabulary_is_taken(checkpoint):
    assert load_tokenizer(Checkpoint.open(checkpoint), BYTES).vocab_size == 257


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(without_tokenizer):
    with pytest.raises(MtError, match=r"run: the tokenizer has 257 token ids, the model knows 100; use the tokenizer"):
        load_tokenizer(without_tokenizer, BYTES)


def test_a_tokenizer_whose_ids_mean_other_tokens_is_refused(checkpoint, tmp_path):
    vocabulary = {f"t{i}": i for i in range(200)}
    other = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(vocabulary | {"</s>": 200}, unk_token="t0")).save(str(other))
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(other))
    with pytest.raises(MtError, match=r"run: the given tokenizer's vocabulary is not that of the checkpoint's own"):
        load_tokenizer(Checkpoint.open(checkpoint), config)


def test_a_checkpoint_without_a_tokenizer_needs_one(without_tokenizer):
    with pytest.raises(MtError, match=r"run: no tokenizer travels with this checkpoint; name one: --tokenizer-type"):
        load_tokenizer(without_tokenizer)


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(MtError, match="nowhere: no such directory; looked for core"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(MtError, match="holds no checkpoint of a known format; looked for core"):
        Checkpoint.open(tmp_path)


def test_an_uncommitted_step_is_refused(checkpoint, tmp_path):
    step = shutil.copytree(native.resolve(checkpoint), tmp_path / "step-00000000")
    (step / "COMMITTED").unlink()
    with pytest.raises(MtError, match="no COMMITTED mark"):
        Checkpoint.open(step)


def test_an_unknown_loader_suggests_the_nearest(checkpoint):
    with pytest.raises(MtError, match="unknown name 'natve'; did you mean 'native'"):
        Checkpoint.open(checkpoint, "natve")


def test_without_mt_ckpt_the_error_says_what_to_install(checkpoint):
    plugin = manager().unregister(name="mt-ckpt")
    try:
        assert "native" not in components("ckpt-loader")
        with pytest.raises(MtError, match="no checkpoint loader is installed; pip install mt-ckpt"):
            Checkpoint.open(checkpoint)
    finally:
        manager().register(plugin, name="mt-ckpt")


def test_an_unknown_device_or_type_is_refused():
    with pytest.raises(MtError, match="--device: unknown device 'gpu'; allowed: auto, cpu, cuda"):
        pick_device("gpu", where="--device")
    with pytest.raises(MtError, match="--dtype: unknown type 'fp16'; allowed: fp32, bf16"):
        pick_dtype("fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_is_refused_where_there_is_none_and_auto_is_the_cpu():
    with pytest.raises(MtError, match="--device: 'cuda', but no GPU is available here; allowed: auto, cpu"):
        pick_device("cuda", where="--device")
    assert pick_device("auto").type == "cpu"
