"""BERT of Megatron's old classes: read from every version and age, written back, and what transformers makes of it."""

import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertForPreTraining

from ckpt.megatron.legacy.legacy_checkpoints import arguments, random_weights, write_legacy
from ckpt.megatron.legacy.test_legacy_loader import same
from ckpt.megatron.legacy.test_legacy_saver import contents, flat
from ckpt.megatron.test_round_trip import read_tensors, sizes
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.legacy.loader import MegatronLegacyLoader
from mt_ckpt.megatron.legacy.saver import save
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.checkpoint.native import write_model
from mt_core.errors import MtError
from mt_models.canonical import load_stream
from mt_models.config import BertConfig
from tiny import gpt2

SHARED = gpt2(layers=4, vocab_size=61).model_dump(
    exclude={"kind", "position", "tied", "post_norms", "scaled_embedding"}
)
SHARED |= {"head_activation": "gelu"}
BERT = BertConfig.model_validate(
    {name: value for name, value in SHARED.items() if name not in ("logit_softcap", "lora")}
)
"""With Megatron's defaults: fused, the blocks' GELU is the tanh approximation and the head's the exact function."""


@pytest.mark.parametrize(
    ("version", "style", "ranks"),
    [(None, "2019", (1, 1, 1)), (1.0, "2021", (2, 2, 1)), (3.0, "2023", (2, 2, 2))],
    ids=str,
)
def test_every_version_and_layout_gives_the_weights(version, style, ranks, tmp_path):
    weights = random_weights(BERT, torch.bfloat16)
    root = write_legacy(tmp_path, BERT, weights, version=version, style=style, ranks=ranks)
    loader = MegatronLegacyLoader(root, true_vocab_size=61)
    assert loader.config() == BERT
    assert same(loader.tensors(), weights)


def test_files_of_ngc_need_the_number_of_heads_alone(tmp_path):
    weights = random_weights(BERT, torch.float16)
    root = write_legacy(tmp_path, BERT, weights, version=None, style="2019", args=None)
    loader = MegatronLegacyLoader(root, num_attention_heads=4, true_vocab_size=61)
    assert loader.config() == BERT
    assert same(loader.tensors(), weights)


@pytest.mark.parametrize(
    ("head", "module"),
    [
        ({"kind": "classification", "classes": 3}, "classification_head"),
        ({"kind": "multiple_choice"}, "multichoice_head"),
    ],
)
def test_heads_of_tasks_have_the_names_of_the_old_classes(head, module, tmp_path):
    task = {"lm_head": False, "binary_head": False, "head_activation": None, "task_head": head, "vocab_size": 128}
    config = BertConfig.model_validate(BERT.model_dump() | task)
    weights = random_weights(config)
    save(tmp_path / "old", config, weights.items(), **sizes(2, 2))
    stages = [contents(tmp_path / "old" / "release" / f"mp_rank_00_00{n}" / "model_optim_rng.pt") for n in (0, 1)]
    assert module not in stages[0]["model"]
    assert {name for name, _ in flat(stages[1]["model"]) if "head" in name} == {f"{module}|weight", f"{module}|bias"}
    assert torch.equal(stages[1]["model"][module]["weight"], weights["task_head.weight"])
    loader = MegatronLegacyLoader(tmp_path / "old")
    assert loader.config() == config
    assert same(loader.tensors(), weights)
    with pytest.raises(MtError, match="saver core: cannot carry task_head; Megatron's old classes have one: --saver l"):
        convert("legacy", tmp_path / "old", "core", tmp_path / "core")
    number = BertConfig.model_validate(BERT.model_dump() | task | {"task_head": {"kind": "regression"}})
    with pytest.raises(
        MtError, match="cannot carry a task_head of kind 'regression'; Megatron has none: --saver hf or n"
    ):
        save(tmp_path / "number", number, random_weights(number).items(), **sizes(1, 1))


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_saver_writes_what_the_specification_gives_and_the_same_bits_come_back(layout, tmp_path):
    config = BERT.model_copy(update={"vocab_size": 128 * layout[0]})
    weights = random_weights(config)
    write_model(tmp_path / "native", config.model_dump(mode="json"), weights.items())
    convert("native", tmp_path / "native", "legacy", tmp_path / "old", options=sizes(*layout), verify=True)
    convert("legacy", tmp_path / "old", "native", tmp_path / "back", verify=True)
    assert read_tensors(tmp_path / "back") == read_tensors(tmp_path / "native")
    assert open_checkpoint(tmp_path / "back").config() == config
    expected = write_legacy(tmp_path / "expected", config, weights, ranks=layout, rows=config.vocab_size)
    for path in sorted((expected / "release").glob("*/*")):
        written, right = contents(tmp_path / "old" / path.relative_to(expected)), contents(path)
        for chunk in [name for name in right if name.startswith("model")]:
            assert same(flat(written[chunk]), dict(flat(right[chunk])))
    assert written["args"].bert_binary_head is True


def test_the_logits_are_those_of_megatron_bert_in_transformers(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    model = MegatronBertForPreTraining(MegatronBertConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = BERT.model_copy(
        update={"mlp": BERT.mlp.model_copy(update={"activation": "gelu"}), "head_activation": None}
    )
    root = write_legacy(tmp_path, config, dict(as_canonical(model)), version=1.0, style="2019", ranks=(2, 1, 1))
    loader = MegatronLegacyLoader(root, true_vocab_size=61)
    ours = loader.config().build()
    load_stream(ours, loader.tensors())
    tokens_BT, types_BT = torch.arange(48).view(2, 24) % 61, (torch.arange(48).view(2, 24) % 24 > 9).long()
    with torch.no_grad():
        theirs = model(tokens_BT, token_type_ids=types_BT)
        x_BTD = ours.hidden(tokens_BT, types_BT)
        torch.testing.assert_close(ours.logits(x_BTD), theirs.prediction_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.nsp_logits(x_BTD), theirs.seq_relationship_logits, rtol=0, atol=1e-5)


THEIRS = {
    "bert.embeddings.word_embeddings.": "embed.",
    "bert.embeddings.position_embeddings.": "position.",
    "bert.embeddings.token_type_embeddings.": "token_type.",
    "bert.encoder.layer.": "layers.",
    ".attention.ln.": ".attn_norm.",
    ".attention.self.query.": ".attn.q.",
    ".attention.self.key.": ".attn.k.",
    ".attention.self.value.": ".attn.v.",
    ".attention.output.dense.": ".attn.out.",
    ".ln.": ".mlp_norm.",
    ".intermediate.dense.": ".mlp.up.",
    ".output.dense.": ".mlp.down.",
    "bert.encoder.mlp_norm.": "norm.",
    "bert.pooler.dense.": "pooler.",
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.norm.",
    "cls.predictions.bias": "head.bias",
    "cls.seq_relationship.": "binary_head.",
}


def as_canonical(model):
    for name, tensor in model.state_dict().items():
        for theirs, ours in THEIRS.items():
            name = name.replace(theirs, ours)
        if not name.startswith("cls."):
            yield name, tensor


def test_one_gelu_for_blocks_and_head_is_openais(tmp_path):
    config = BERT.model_copy(update={"head_activation": None})
    args = arguments(BERT, 3.0, (1, 1, 1), 64)
    args.openai_gelu, args.bias_gelu_fusion = True, False
    loader = MegatronLegacyLoader(write_legacy(tmp_path, BERT, random_weights(BERT), args=args), true_vocab_size=61)
    assert loader.config() == config
    save(tmp_path / "old", config, loader.tensors())
    assert MegatronLegacyLoader(tmp_path / "old").config() == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_place": "after"}, "cannot carry norm_place = 'after'; Megatron's has 'before'"),
        ({"binary_head": False, "token_types": 0}, "cannot carry pooler = True; Megatron's has False"),
        ({"token_types": 3}, "cannot carry token_types = 3; Megatron's has 2"),
        ({"lm_head": False}, "cannot carry lm_head = False; Megatron's has True"),
        (
            {"mlp": {"kind": "dense", "ffn_hidden_size": 64, "bias": True, "activation": "relu"}},
            "cannot carry mlp.activation",
        ),
        ({"head_activation": "silu"}, "cannot carry head_activation = 'silu', with 'gelu_tanh' in blocks"),
    ],
)
def test_what_megatrons_bert_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(MtError, match=message):
        save(tmp_path / "old", BertConfig.model_validate(BERT.model_dump() | changes), ())
