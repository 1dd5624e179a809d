"""Real weights: SmolLM2-135M-Instruct, which ../shared/data/make_smollm2.py builds."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_ckpt.tensor_streams.safetensors_directory import SafetensorsDir
from mt_core.checkpoint.detection import open_checkpoint

SOURCE = Path(os.environ.get("MT_SMOLLM2", "/work/smollm2"))
TEXT = Path(__file__).parents[3].parent / "shared" / "data" / "tinyshakespeare.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "config.json").exists(), reason=f"no SmolLM2 in {SOURCE} (set MT_SMOLLM2)"),
]


@pytest.mark.skipif(not TEXT.exists(), reason=f"{TEXT} is missing")
def test_logits_equal_transformers_at_every_position_of_512_tokens():
    ids = AutoTokenizer.from_pretrained(SOURCE)(TEXT.read_text()[:6000])["input_ids"][:512]
    tokens_BT = torch.tensor([ids])
    assert tokens_BT.shape == (1, 512)
    ours_BTV, theirs_BTV = our_logits(open_checkpoint(SOURCE), tokens_BT), transformers_logits(SOURCE, tokens_BT)
    assert (ours_BTV - theirs_BTV).abs().max() <= 1e-4


def test_hugging_face_to_native_and_back_is_bit_identical(tmp_path):
    convert("llama_mistral", SOURCE, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf", verify=True)
    before, after = dict(SafetensorsDir(SOURCE).tensors()), dict(SafetensorsDir(tmp_path / "hf").tensors())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
