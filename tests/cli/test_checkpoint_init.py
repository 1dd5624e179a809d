"""`checkpoint.init` alone: model, tokenizer and length come from the checkpoint, here one that transformers wrote."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mt_cli.checkpoint_init import HARMLESS
from mt_cli.run_config import load_run_config, run_config_type
from mt_cli.train.compose import run
from mt_cli.train.from_text import TextRun, prepare_text_run
from mt_core.checkpoint import native
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.fields import iterate_settings
from mt_core.errors import MtError
from mt_models.canonical import canonical_state
from mt_models.config.lora import Lora
from tiny import byte_corpus, metrics

TURNS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama with a byte-level tokenizer that knows ChatML's tokens, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": [*TURNS]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=len(fast), max_position_embeddings=64, bos_token_id=None
    )
    config.eos_token_id = fast.eos_token_id
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return byte_corpus(tmp_path_factory.mktemp("corpus") / "bytes_text_document", files=4)


def load(source: Path, *overrides: str, preset: str | None = None):
    return load_run_config([], [f"checkpoint.init=hf:{source}", *overrides], preset, rules=False)


def refusal(source: Path, *overrides: str, preset: str | None = None) -> list[str]:
    with pytest.raises(MtError) as raised:
        load(source, *overrides, preset=preset)
    return list(map(str, raised.value.problems))


def test_the_checkpoint_alone_decides_the_model_and_the_run_begins_with_its_weights(source, corpus, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [f"checkpoint.init=hf:{source}", f"data.paths=['{corpus}']", f"runtime.run_dir={run_dir}"]
    config = load_run_config([], [*overrides, "train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0"])
    assert config.model == open_checkpoint(source, "hf").config()
    assert config.data.seq_length == 64
    assert run(config) == 0
    expected = dict(open_checkpoint(source, "hf").tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_checkpoint(run_dir).tensors())
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (run_dir / "tokenizer").iterdir()}
    again = load_run_config([run_dir / "config.toml"], ["train.steps=2"])
    assert again.model == config.model
    assert run(again) == 0


def test_conversations_are_written_with_the_checkpoint_s_tokenizer(source, tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    overrides = ["data.kind=sft", f"data.paths=['{tmp_path / 'chat.jsonl'}']", "data.split=90,10,0", "train.steps=2"]
    config = load(source, *overrides, f"runtime.run_dir={tmp_path / 'run'}")
    assert config.data.tokenizer is not None
    assert Path(str(config.data.tokenizer.model)) == source
    assert run(config) == 0
    assert metrics(tmp_path / "run")[0]["tokens"] > 0


def test_every_key_that_contradicts_the_checkpoint_is_refused_by_name(source, tmp_path):
    overrides = ["model.layers=3", "model.mlp.kind=dense", "model.position.theta=5e5", "model.attention.window=8"]
    overrides += ["model.hidden_size=32"]  # the same is no contradiction
    tail = "leave it out: the checkpoint decides it"
    assert refusal(source, *overrides) == [
        f"--set: model.layers: 3, but hf:{source} has 2; {tail}",
        f"--set: model.mlp.kind: 'dense', but hf:{source} has 'gated'; {tail}",
        f"--set: model.position.theta: 500000.0, but hf:{source} has 10000.0; {tail}",
        f"--set: model.attention.window: 8, but hf:{source} has None; {tail}",
    ]
    (tmp_path / "run.toml").write_text("[model]\nnorm.eps = 1e-3\n")
    with pytest.raises(MtError, match=rf"^{tmp_path / 'run.toml'}: model.norm.eps: 0.001, but"):
        load_run_config([tmp_path / "run.toml"], [f"checkpoint.init=hf:{source}"], rules=False)


def test_adapters_may_be_added_but_those_of_a_checkpoint_keep_their_size(source, tmp_path):
    adapters = ["model.lora.rank=2", "model.lora.alpha=4"]
    config = load(source, *adapters)
    assert config.model == open_checkpoint(source).config().model_copy(update={"lora": Lora(rank=2, alpha=4)})
    model = config.model.build()
    model.initialize(0)
    native.write_model(tmp_path / "adapted", config.model.model_dump(mode="json"), canonical_state(model).items(), [])
    overrides = [f"checkpoint.init=native:{tmp_path / 'adapted'}", *adapters]
    assert load_run_config([], overrides, rules=False).model == config.model
    with pytest.raises(MtError, match=r"model.lora.rank: 3, but .* has 2; leave it out"):
        load_run_config([], [*overrides, "model.lora.rank=3"], rules=False)


def test_a_table_that_the_checkpoint_has_not_got_is_a_contradiction_and_an_unknown_key_is_unknown(source):
    assert refusal(source, "model.position.scaling.factor=2") == [
        f"--set: model.position.scaling.factor: 2, but hf:{source} has None; leave it out: the checkpoint decides it"
    ]
    assert refusal(source, "model.layrs=2")[0].startswith("--set: model.layrs: unknown key; did you mean 'layers'?")


def test_a_preset_of_another_model_is_one_line_and_the_rest_of_it_needs_none(source):
    (problem,) = refusal(source, preset="gpt-tiny")
    assert problem.startswith(f"preset gpt-tiny: hf:{source} is another model, in layers, hidden_size, ")
    assert problem.endswith("; leave the preset out")


def test_what_a_higher_layer_puts_right_is_no_contradiction(source, tmp_path):
    (tmp_path / "run.toml").write_text("[model]\nlayers = 5\n")
    overrides = [f"checkpoint.init=hf:{source}", "model.layers=2"]
    assert load_run_config([tmp_path / "run.toml"], overrides, rules=False).model.layers == 2


def test_what_changes_no_weight_and_no_logit_may_differ(source):
    changes = ["attention.core=eager", "init_std=0.5", "vocab_divisor=1", "max_seq_len=48", "vocab_size=tokenizer"]
    config = load(source, *(f"model.{change}" for change in changes), "recompute.granularity=full")
    model = open_checkpoint(source, "hf").config()
    attention = model.attention.model_copy(update={"core": "eager"})
    update = {"attention": attention, "init_std": 0.5, "vocab_divisor": 1, "max_seq_len": 48}
    assert config.model == model.model_copy(update=update)


def test_patterns_of_harmless_keys_match_fields():
    keys = {key.removeprefix("model.") for key, _ in iterate_settings(run_config_type()) if key.startswith("model.")}
    assert {pattern for pattern in HARMLESS if "*" not in pattern} <= keys


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("hf:HuggingFaceTB/SmolLM2-135M", "to fetch it from the Hugging Face hub: 'hub:HuggingFaceTB/SmolLM2-135M'"),
        ("hf:llamma", "did you mean llama?"),
        ("hf:no/such/place", "its folder no/such does not exist either"),
        ("llama", "did you mean 'hf:llama'? allowed: LOADER:PATH with a loader of core, hf"),
        ("HF:llama", "unknown loader 'HF'; did you mean 'hf'?"),
    ],
)
def test_a_checkpoint_that_is_not_there_says_what_may_be_meant(init, message, source, monkeypatch):
    monkeypatch.chdir(source.parent)
    with pytest.raises(MtError) as raised:
        load_run_config([], [f"checkpoint.init={init}"])
    assert message in str(raised.value)


def test_a_text_is_tokenized_as_the_checkpoint_does_and_trained_on(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verse.txt").write_text("From fairest creatures we desire increase,\n" * 40)
    overrides = [f"checkpoint.init=hf:{source}", "batch.micro_batch=2", "batch.global_batch=2", "train.steps=1"]
    told: list[str] = []
    file = prepare_text_run(TextRun(Path("verse.txt"), [], overrides, None), told.append)
    config = load_run_config([file], overrides)
    assert config.model == open_checkpoint(source, "hf").config()
    assert Path(str(config.data.tokenizer and config.data.tokenizer.model)) == source
    assert told[0].startswith("tokenizer   HuggingFaceTokenizer: ")
    assert not [line for line in told if "preset" in line]
    assert run(config) == 0
