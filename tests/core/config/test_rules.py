"""Rules between fields of different sections: everything that does not fit is told at once, with values that would."""

from types import SimpleNamespace

import pytest

from mt_cli.run_config import load_run_config
from mt_core.config.rules import DETERMINISTIC_CORES, problems
from mt_core.config.sections import PrecisionConfig
from mt_core.errors import MtError
from mt_core.parallel.layout import pipeline_problems
from mt_core.plugins import components

IDS = "model.vocab_size=4096"
"""The preset takes it from the tokenizer; these have none."""


def refused(*overrides: str, preset: str = "gpt-tiny") -> list[str]:
    """What is said of a preset with these values."""
    with pytest.raises(MtError) as caught:
        load_run_config([], (IDS, *overrides), preset)
    return [str(problem) for problem in caught.value.problems]


def test_a_layout_that_cannot_be_is_told_before_there_are_ranks():
    assert refused(
        "parallel.tensor=3",
        "parallel.context=3",
        "parallel.shard_size=2",
        "parallel.data=3",
        "recompute.granularity=full",
        "recompute.layers=9",
        "batch.global_batch=8",
        "batch.micro_batch=2",
    ) == [
        "parallel.tensor: 3 does not divide model.attention.heads 4; allowed: 1, 2 or 4",
        "parallel.tensor: 3 does not divide model.attention.num_kv_heads 4; allowed: 1, 2 or 4",
        "parallel.tensor: 3 does not divide model.mlp.ffn_hidden_size 352; allowed: 1, 2 or 4",
        "data.seq_length: 128 is no multiple of 2 × parallel.context 3; allowed: 126 or 132",
        "batch.global_batch: 8 is no multiple of micro_batch 2 × data 3; allowed: 6 or 12",
        'parallel.shard_size: 2, but parallel.sharding = "replicate" shares nothing; '
        'leave it unset, or parallel.sharding = "zero1" or "fsdp"',
        "recompute.layers: 9 of 4 layers; allowed: 1 to 4",
    ]


def test_stages_that_cannot_be_are_told_before_there_are_ranks():
    assert refused("parallel.pipeline=3") == [
        "model.layers: 4 layers do not divide evenly over 3 ranks; allowed: model.layers = 3 or 6; "
        'or pipeline.layout = "Et|t*2|tL" alone'
    ]
    assert refused("parallel.pipeline=2", "pipeline.layout=Et|x") == [
        "pipeline.layout: 'Et|>x<': 'x' at position 4 is no letter of a layout; allowed: E, t, L, |, *, \"(\" and \")\""
    ]
    assert refused("parallel.pipeline=3", "pipeline.layout=E|t*4L|") == [
        "pipeline.layout: stage 1 of 'E|t*4L|' is 'ttttL'; allowed: one L (loss), as the last letter of the last stage",
    ]
    assert refused("parallel.pipeline=3", "pipeline.layout=Et*4||L") == [
        'pipeline.layout: leaves rank 1 of the pipeline nothing of the model; give it a layer, as "Et|t*2|tL" does'
    ]
    assert refused("parallel.pipeline=2", "pipeline.schedule=zbv", "pipeline.virtual_stages=3") == [
        "pipeline.virtual_stages: 3, but a rank of zbv has 2; allowed: 2"
    ]


def test_counts_that_a_schedule_does_not_take_are_told_before_there_are_ranks():
    dualpipev = ("parallel.pipeline=2", "pipeline.schedule=dualpipev", "parallel.data=2")
    said = "dualpipev needs at least 2 × 2 ranks; allowed: 4 microbatches, batch.global_batch = 8"
    assert refused(*dualpipev, "batch.global_batch=6") == [f"batch.global_batch: 3 microbatches, but {said}"]
    assert refused(*dualpipev, "batch.global_batch=8", 'batch.sizes="0:8 16:6 32:8"') == [
        f"batch.sizes: 3 microbatches, but {said}"
    ]
    growing = ("batch.global_batch=10", "batch.rampup=[6, 2, 32]")
    assert refused(*dualpipev, *growing) == [f"batch.rampup: 3 microbatches, but {said}"]


def test_models_that_cannot_be_cut_into_stages_are_refused():
    config = load_run_config([], (IDS, "parallel.pipeline=2"), "gpt-tiny", rules=False)
    whole = config.model_copy(update={"model": SimpleNamespace(kind="maze")})
    said = "parallel.pipeline: 2, but a model of kind 'maze' cannot be cut into stages; allowed: 1"
    assert [str(problem) for problem in pipeline_problems(whole)] == [said]


def test_layers_of_encoder_and_decoder_are_counted_together():
    changes = ("parallel.pipeline=4", "model.layers=3", "model.decoder_layers=2")
    assert refused(*changes, preset="t5-220m")[0] == (
        "model.layers + model.decoder_layers: 5 layers do not divide evenly over 4 ranks; "
        'allowed: model.layers + model.decoder_layers = 4 or 8; or pipeline.layout = "Et|t*2|t|tL" alone'
    )
    assert refused(*changes, "pipeline.layout=Et|t|t|tL", preset="t5-220m")[0] == (
        'pipeline.layout: 4 layers (t), but model.layers + model.decoder_layers is 5; such as "Et|t*2|t|tL"'
    )


@pytest.mark.parametrize(
    ("dtype", "gradients", "allowed"),
    [
        ("fp64", "bf16", "auto"),
        ("fp64", "fp32", "auto"),
        ("fp16", "bf16", "auto, fp32, fp16"),
        ("bf16", "fp16", "auto, fp32, bf16"),
        ("fp32", "fp16", "auto, fp32, bf16"),
    ],
)
def test_gradients_that_lose_what_the_dtype_has_are_refused(dtype, gradients, allowed):
    told = refused(f"precision.dtype={dtype}", f"precision.gradients={gradients}")
    assert told == [f"precision.gradients: {gradients} with {dtype}; allowed: {allowed}"]
    for fits in allowed.split(", "):
        load_run_config([], [IDS, f"precision.dtype={dtype}", f"precision.gradients={fits}"], "gpt-tiny")


def test_every_dtype_has_its_gradients():
    for dtype in PrecisionConfig.model_fields["dtype"].annotation.__args__:
        load_run_config([], [IDS, f"precision.dtype={dtype}"], "gpt-tiny")


def test_two_ways_to_change_the_batch_exclude_each_other():
    told = refused("batch.sizes=0:4 1K:8", "batch.rampup=[2, 2, 100]", "batch.global_batch=16")
    assert told == ["batch.sizes: is given beside batch.rampup; leave one of them out"]


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ("batch.sizes=0:4 1K:6", "batch.sizes: 6: no multiple of micro_batch 2 × data 2; allowed: multiples of 4"),
        ("batch.sizes=0:4 x", "batch.sizes: '0:4 x'; steps as"),
        ("batch.rampup=[4, 3, 9]", "batch.rampup: 7, 10, 13: no multiple of micro_batch 2 × data 2; allowed: multi"),
        ("batch.rampup=[2, 1, 9]", "batch.rampup: 2, 3, 5, …: no multiple of micro_batch 2 × data 2"),
        ("batch.rampup=[16, 3, 9]", "batch.rampup: start 16 is not below the full batch; less than 16"),
        ("batch.rampup=[4, 5, 9]", "batch.rampup: 16 − 4 is no multiple of the increment 5; an increment that"),
    ],
)
def test_every_size_of_a_changing_batch_must_fit(batch, told):
    (found,) = refused(batch, "batch.global_batch=16", "batch.micro_batch=2", "parallel.data=2")
    assert found.startswith(told)


def test_a_global_batch_that_sizes_replace_need_not_fit():
    values = ["batch.sizes=0:4", "batch.micro_batch=4", "batch.global_batch=1"]
    assert load_run_config([], [IDS, *values, "train.eval_every=0"], "gpt-tiny").batch.sizes == "0:4"
    (told,) = refused(*values, "train.eval_every=10")
    allowed = "allowed: multiples of 4, or train.eval_every = 0"
    assert told == f"batch.global_batch: 1, the batch of evaluations, is no multiple of 4; {allowed}"


def test_determinism_refuses_kernels_that_nobody_knows_about(plugin_core):
    def told(core):
        return [
            str(problem) for problem in problems(load_run_config([], [IDS, *values(core)], "gpt-tiny", rules=False))
        ]

    def values(core):
        return ["runtime.deterministic=true", f"model.attention.core={core}"]

    allowed = "allowed with runtime.deterministic: sdpa, eager"
    assert told("theirs") == [f"model.attention.core: 'theirs' is not known to be deterministic; {allowed}"]
    assert told("auto") == [f'model.attention.core: "auto" may choose theirs; {allowed}']
    assert [told(core) for core in DETERMINISTIC_CORES] == [[], []]


@pytest.fixture
def plugin_core(tmp_path, monkeypatch):
    """An installed plugin with an attention core `theirs`."""
    from mt_core import plugins

    (tmp_path / "mt_theirs.py").write_text(
        "from mt_core.plugins import Component, hookimpl\n"
        "@hookimpl\ndef mt_components():\n"
        "    return [Component('attention', 'theirs', 'mt_theirs:core', 'a kernel')]\n"
    )
    metadata = tmp_path / "mt_theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mt-theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mt]\nmain = mt_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    caches = [cached for cached in vars(plugins).values() if hasattr(cached, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    assert "theirs" in components("attention")
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_determinism_is_fine_with_our_own_cores():
    assert load_run_config([], [IDS, "runtime.deterministic=true"], "gpt-tiny").runtime.deterministic


MOCK = ("data.kind=mock", "data.seq_length=32", "data.tokenizer.type=bytes")


def test_documents_are_marked_in_one_way():
    load_run_config([], [IDS, *MOCK, "data.reset_attention_mask=true", "data.reset_position_ids=true"], "gpt-tiny")
    load_run_config([], [IDS, *MOCK, "data.inter_document_masking=true"], "gpt-tiny")
    told = refused(*MOCK, *(f"data.{n}=true" for n in ("inter_document_masking", "reset_attention_mask")))
    assert told == [
        "data.reset_attention_mask: is on beside data.inter_document_masking, which says itself where positions start "
        "and who sees whom; turn one of the two off"
    ]


def test_positions_need_a_model_that_has_them():
    told = refused(*MOCK, "data.reset_position_ids=true", "model.position.kind=none")
    assert told == ['data.reset_position_ids: is on, but the model has none: model.position.kind = "none"; turn it off']


def test_samples_of_another_task_are_not_for_a_gpt():
    told = refused("data.kind=bert", "data.seq_length=32", "data.tokenizer.type=bytes")
    assert "data.kind: 'bert' samples are not for a model of kind 'gpt'; allowed: gpt, fim, sft, mock" in told


def test_a_sequence_is_no_longer_than_the_model_s_positions():
    told = refused("data.seq_length=4096")
    assert told[0].startswith("data.seq_length: 4096 is longer than the model's positions, model.max_seq_len = ")


def test_options_that_the_layout_does_not_look_at_are_refused():
    assert refused(
        "parallel.sharding=fsdp",
        "parallel.overlap_grad_reduce=false",
        "parallel.bucket_size=1000",
        "parallel.context=2",
        "model.attention.core=eager",
    ) == [
        "model.attention.core: 'eager', but the ring has its own attention; "
        'allowed: "auto", or parallel.cp_comm_type = all_gather or all_to_all',
        "parallel.overlap_grad_reduce: False, but FSDP2 overlaps and groups by blocks itself; "
        "allowed with fsdp: True, the default",
        "parallel.bucket_size: 1000, but FSDP2 overlaps and groups by blocks itself; "
        "allowed with fsdp: 40000000, the default",
    ]


def test_patterns_of_trainable_parameters_must_match_some():
    names = (
        "embed.weight, layers.*.attn_norm.weight, layers.*.mlp_norm.weight, layers.*.attn.q.weight, "
        "layers.*.attn.k.weight, layers.*.attn.v.weight, layers.*.attn.out.weight, layers.*.mlp.gate.weight, "
        "layers.*.mlp.up.weight, layers.*.mlp.down.weight, norm.weight"
    )
    assert refused('optim.trainable=["layer.*", "norms.weight", "norm.*"]') == [
        f"optim.trainable: 'layer.*' matches no parameter; allowed: {names}",
        f"optim.trainable: 'norms.weight' matches no parameter; did you mean 'norm.weight'? allowed: {names}",
    ]


def test_something_must_be_trainable():
    assert refused("optim.trainable=[]") == [
        'optim.trainable: is empty, so nothing would be trained; allowed: patterns of names, or ["*"] for all'
    ]


def test_a_fused_parameter_is_trained_whole_or_not_at_all():
    assert refused('optim.trainable=["layers.*.attn.[qv].*", "layers.0.mlp.up.*"]') == [
        "optim.trainable: layers.0.attn.q.weight and layers.0.attn.v.weight would be trained without "
        "layers.0.attn.k.weight, and 4 more like them; they are one fused parameter: name all of its parts or none"
    ]
    load_run_config([], [IDS, 'optim.trainable=["layers.*.attn.[qkv].*", "layers.0.mlp.*"]'], "gpt-tiny")
