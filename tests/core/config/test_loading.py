"""Configuration: precedence, provenance, and every problem told at once."""

import pytest

from mt_cli.run_config import load_run_config, to_toml
from mt_core.config.rules import problems as core_problems
from mt_core.errors import MtError
from mt_core.plugins import components

IDS = "model.vocab_size=4096"
"""The preset gpt-tiny takes it from the tokenizer; these runs have none."""


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_precedence_is_defaults_preset_files_set(file):
    first = file('preset = "gpt-tiny"\n[model]\nvocab_size = 9\nlayers = 5\nhidden_size = 64\n')
    second = file("[model]\nhidden_size = 96\n", "second.toml")
    config = load_run_config([first, second], ["model.vocab_size=99"])
    model = config.model
    assert (model.layers, model.hidden_size, model.vocab_size, model.init_std) == (5, 96, 99, 0.02)


def test_a_part_of_another_kind_replaces_the_preset_s_part_as_a_whole(file):
    config = load_run_config(
        [file('preset = "gpt-tiny"\n[model]\nvocab_size = 9\n[model.mlp]\nkind = "dense"\nffn_hidden_size = 64\n')]
    )
    assert (config.model.mlp.kind, config.model.mlp.activation) == ("dense", "gelu_tanh")


def test_the_printed_configuration_loads_to_the_same_tree(file):
    config = load_run_config(
        [], [IDS, "log.sinks=['tensorboard']", "checkpoint.keep=2", "train.steps=5000"], "smollm2-135m"
    )
    assert load_run_config([file(to_toml(config))]) == config


def test_everything_wrong_is_told_at_once_with_its_source_and_the_nearest_name(file):
    path = file(
        'preset = "gpt-tiny"\n[model]\nvocab_size = 9\nlayrs = 3\n[model.mlp]\nffn_hidden_sizee = 2\n'
        "[batch]\nmicro_batch = 0\n"
    )
    with pytest.raises(MtError) as caught:
        load_run_config([path], ["optm.lr=1"])
    text = str(caught.value)
    for expected in (
        f"{path}: model.layrs: unknown key; did you mean 'layers'?",
        f"{path}: model.mlp.ffn_hidden_sizee: unknown key; did you mean 'ffn_hidden_size'?",
        f"{path}: batch.micro_batch: 0; input should be greater than 0",
        "--set: optm: unknown key; did you mean 'optim'?",
    ):
        assert expected in text
    assert len(caught.value.problems) == 4


def test_what_is_required_is_named():
    with pytest.raises(MtError, match="model.layers: required, but not given; set it in a file"):
        load_run_config([], [IDS, "model.kind=gpt", "data.seq_length=8"])


def test_a_wrong_choice_names_the_allowed_ones():
    with pytest.raises(MtError, match="lr_schedule.decay: 'cosin'; input should be 'cosine', 'linear'"):
        load_run_config([], [IDS, "lr_schedule.decay=cosin"], "gpt-tiny")


def test_a_rule_inside_a_section_names_the_values():
    with pytest.raises(MtError, match="model.attention: num_kv_heads 3 does not divide heads 4"):
        load_run_config([], [IDS, "model.attention.num_kv_heads=3"], "gpt-tiny")


def test_rules_between_sections_are_told_together_with_values_that_pass():
    overrides = [
        "batch.global_batch=5",
        "batch.micro_batch=2",
        "lr_schedule.warmup_steps=2000",
        "lr_schedule.min_lr=1",
        "lr_schedule.decay=wsd",
        "data.seq_length=4096",
        "optim.name=adamv",
        "checkpoint.init=hf",
    ]
    with pytest.raises(MtError) as caught:
        load_run_config([], [IDS, *overrides], "gpt-tiny")
    text = str(caught.value)
    for expected in (
        "batch.global_batch: 5 is no multiple of micro_batch 2 × data 1; allowed: 4 or 6",
        "lr_schedule.warmup_steps: 2000; allowed: less than the decay's end",
        "lr_schedule.min_lr: 1.0; allowed: at most optim.lr",
        'lr_schedule.anneal_steps: required by decay = "wsd"',
        "data.seq_length",
        "optim.name: unknown optimizer 'adamv'; did you mean 'adamw'?",
        "checkpoint.init: 'hf'; allowed: LOADER:PATH",
    ):
        assert expected in text
    with pytest.raises(MtError, match="checkpoint.init: unknown loader 'nativ'; did you mean 'native'"):
        load_run_config([], [IDS, "checkpoint.init=nativ:x"], "gpt-tiny")
    with pytest.raises(MtError, match="lr_schedule.anneal_steps: 5000; allowed: at most the decay's end"):
        load_run_config([], [IDS, "lr_schedule.decay=wsd", "lr_schedule.anneal_steps=5000"], "gpt-tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nlayers 3", "not TOML: .*line 2"),
        ('preset = "gpt-tinny"', "preset: unknown name 'gpt-tinny'; did you mean 'gpt-tiny'"),
    ],
)
def test_a_bad_file_is_one_line(file, text, message):
    with pytest.raises(MtError, match=message):
        load_run_config([file(text)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MtError, match=r"none.toml: no such file"):
        load_run_config([tmp_path / "none.toml"])


def test_an_override_without_a_value_is_refused():
    with pytest.raises(MtError, match="--set model.layers: not of the form section.field=value"):
        load_run_config([], [IDS, "model.layers"], "gpt-tiny")


PUBLISHED = {
    "gpt-tiny": (20, 3e-4),
    "gpt2-124m": (700, 6e-5),
    "gpt-345m": (3000, 1e-5),
    "gpt3-175b": (375, 0.6e-5),
    "llama2-7b": (2000, 3e-5),
    "llama3-8b": (8000, 3e-6),
    "mistral-7b": (2000, 3e-5),
    "mixtral-8x7b": (2000, 3e-5),
    "mixtral-8x22b": (2000, 3e-5),
    "qwen3-30b-a3b": (2000, 3e-5),
    "deepseek-v2-lite": (2000, 4.2e-5),
    "gemma-2-2b": (2000, 3e-5),
    "qwen3-8b": (2000, 3e-5),
    "smollm2-135m": (2000, 0.0),
    "bert-345m": (10000, 1e-5),
    "t5-220m": (10000, 1e-5),
}
"""Steps of warm-up and lowest learning rate of each preset's whole recipe."""


@pytest.mark.parametrize("preset", components("preset"))
def test_a_preset_s_schedule_scales_with_the_steps_and_the_rate_that_a_user_sets(preset):
    whole = load_run_config(
        [],
        [
            IDS,
        ],
        preset,
        rules=False,
    )
    schedule = whole.lr_schedule
    assert (schedule.warmup_steps, schedule.min_lr) == PUBLISHED[preset]
    assert (schedule.warmup_fraction, schedule.min_lr_fraction) == (None, None)
    short = load_run_config([], [IDS, "train.steps=50", "optim.lr=1e-6"], preset, rules=False)
    assert list(core_problems(short)) == []
    assert short.lr_schedule.warmup_steps == round(schedule.warmup_steps / whole.train.steps * 50)
    assert short.lr_schedule.min_lr == pytest.approx(schedule.min_lr / whole.optim.lr * 1e-6, rel=1e-11)
    assert list(core_problems(load_run_config([], [IDS, "train.steps=1"], preset, rules=False))) == []


def test_a_count_and_a_fraction_replace_each_other_from_layer_to_layer(tmp_path):
    counts = tmp_path / "counts.toml"
    counts.write_text("[lr_schedule]\nwarmup_steps = 7\nmin_lr = 1e-4\n")
    assert load_run_config([counts], [IDS], "gpt-tiny").lr_schedule.warmup_steps == 7
    assert load_run_config([counts], [IDS], "gpt-tiny").lr_schedule.min_lr == 1e-4
    overrides = ["lr_schedule.warmup_fraction=0.5", "lr_schedule.min_lr_fraction=0.5", "train.steps=11"]
    schedule = load_run_config([counts], [IDS, *overrides], "gpt-tiny").lr_schedule
    assert (schedule.warmup_steps, schedule.min_lr) == (6, 1.5e-3)
    ends = load_run_config([], [IDS, "lr_schedule.decay_steps=10", "lr_schedule.warmup_fraction=0.99"], "gpt-tiny")
    assert ends.lr_schedule.warmup_steps == 9


def test_samples_and_steps_replace_each_other_from_layer_to_layer(tmp_path):
    samples = ["lr_schedule.decay_samples=1000", "lr_schedule.warmup_fraction=0.25", "lr_schedule.decay_steps=8"]
    schedule = load_run_config([], [IDS, *samples[:2]], "gpt-tiny").lr_schedule
    assert (schedule.unit, schedule.warmup_samples, schedule.warmup_steps, schedule.get_end(5)) == (
        "samples",
        250,
        0,
        1000,
    )
    assert load_run_config([], [IDS, *samples], "gpt-tiny").lr_schedule.warmup_steps == 2
    counts = tmp_path / "counts.toml"
    counts.write_text("[lr_schedule]\nwarmup_steps = 7\ndecay_steps = 9\n")
    words = ["lr_schedule.warmup_samples=5", "lr_schedule.decay_samples=64"]
    assert load_run_config([counts], [IDS, *words], "gpt-tiny").lr_schedule.warmup == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["warmup_samples=64"], r"lr_schedule.warmup_samples: 64; allowed: less than the decay's end, 64"),
        (["decay=wsd"], r"lr_schedule.anneal_samples: required by decay = \"wsd\", but not given; allowed: 1 to 64"),
        (["decay=wsd", "anneal_samples=65"], "lr_schedule.anneal_samples: 65; allowed: at most the decay's end, 64"),
    ],
)
def test_a_schedule_in_samples_has_the_rules_of_one_in_steps(words, message):
    words = [f"lr_schedule.{word}" for word in ("decay_samples=64", "warmup_samples=5", *words)]
    with pytest.raises(MtError, match=message):
        load_run_config([], [IDS, *words], "gpt-tiny")


def test_a_count_and_a_fraction_in_one_place_are_refused(tmp_path):
    both = tmp_path / "both.toml"
    both.write_text("[lr_schedule]\nwarmup_steps = 7\nwarmup_fraction = 0.1\n")
    with pytest.raises(MtError, match="lr_schedule: warmup_steps and warmup_fraction are both given; leave"):
        load_run_config([both], [IDS], "gpt-tiny")


def test_a_warm_up_that_the_user_typed_is_refused_where_it_cannot_be():
    with pytest.raises(MtError, match="lr_schedule.warmup_steps: 60; allowed: less than the decay's end, 50"):
        load_run_config([], [IDS, "train.steps=50", "lr_schedule.warmup_steps=60"], "gpt-tiny")
