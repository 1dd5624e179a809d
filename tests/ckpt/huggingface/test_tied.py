"""Files that hold a shared weight under another of its names, as safetensors may keep it; transformers reads them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_ckpt.tensor_streams.streams import merge_copies
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

WEIGHTS = "model.safetensors"
TOKENS_BT = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
CLOSE = 5e-6
"""Allowed difference as a part of the largest number; fp32 sums in another order."""
DECODER = ("model.embed_tokens.weight", "lm_head.weight")
WORDS, BIAS, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder"
SHARED, COPIES = "shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
TIED = {"tie_word_embeddings": True}
MASKED, ALL = {"auto_class": "AutoModelForMaskedLM"}, {"auto_class": "AutoModelForPreTraining"}
TEXT = {"auto_class": "AutoModelForSeq2SeqLM"}
TIED_TEXT = TEXT | TIED | {"scale_decoder_outputs": True}
CASES = [
    *((family, TIED, *DECODER) for family in ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3")),
    *((family, {}, *DECODER) for family in ("gemma", "gemma2")),
    ("gpt2", {}, "transformer.wte.weight", "lm_head.weight"),
    ("bert", MASKED, WORDS, f"{HEAD}.weight"),
    ("bert", MASKED, BIAS, f"{HEAD}.bias"),
    ("megatron-bert", ALL, WORDS, f"{HEAD}.weight"),
    ("megatron-bert", ALL, BIAS, f"{HEAD}.bias"),
    *(("t5", TIED_TEXT, SHARED, name) for name in ("lm_head.weight", *COPIES)),
    *(("t5", TEXT, SHARED, name) for name in COPIES),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes", "first", "second"), CASES)
def test_a_shared_weight_is_read_under_either_name(family, changes, first, second, save_model):
    path = save_model(family, **changes)
    tensors = load_file(path / WEIGHTS)
    tensors[second] = tensors.pop(first)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    theirs_BTV, ours_BTV = transformers_logits(path, TOKENS_BT), our_logits(open_checkpoint(path), TOKENS_BT)
    assert ((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max()).item() <= CLOSE


def test_copies_may_be_there_and_must_agree(save_model, tmp_path):
    path = save_model("bert", **MASKED)
    tensors = load_file(path / WEIGHTS)
    tensors[f"{HEAD}.bias"] = tensors[BIAS].clone()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    assert convert("hf", path, "native", tmp_path / "native").tensors == len(tensors) - 1
    tensors[f"{HEAD}.bias"] += 1
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(MtError, match="head.bias: is stored twice, and differently; save the model again"):
        convert("hf", path, "native", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_copies_are_compared_bit_by_bit_so_they_may_hold_nan():
    def merge(second):
        return dict(
            merge_copies("here", [("embed.weight", first), ("head.weight", second)], {"embed.weight"}, tied=True)
        )

    first = torch.tensor([1.0, torch.nan, 0.0])
    assert merge(first.clone()) == {"embed.weight": first}
    for other in (first.nan_to_num(2.0), first.half(), -first):
        with pytest.raises(MtError, match="here: the output layer's weight differs from the embedding"):
            merge(other)


def test_an_untied_model_needs_both(save_model, tmp_path):
    path = save_model("llama", tie_word_embeddings=False)
    tensors = load_file(path / WEIGHTS)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(MtError, match="embed.weight: tensor is missing"):
        convert("hf", path, "native", tmp_path / "native")
