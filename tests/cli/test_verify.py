"""`mt verify`: a user's configuration, shrunk, under its layouts and on one rank."""

import json
from itertools import product

import pytest

from mt_cli.run_config import load_run_config
from mt_cli.verify.check import check, is_comparable, limit
from mt_cli.verify.layouts import cases, with_parallel
from mt_cli.verify.record import record
from mt_cli.verify.shrink import recompute_layers, shrink
from mt_core.errors import MtError
from mt_core.parallel.layout import build_layout, problems
from mt_core.verification.compare import compare_records
from mt_models.config import MLA

SETS = ("batch.micro_batch=4", "batch.global_batch=1024")


def make_config(preset="llama3-8b", *overrides):
    return load_run_config([], [*SETS, *overrides], preset, rules=False)


def shrink_for(config, *layouts):
    chosen = cases(config, layouts, None)
    return shrink(config, [build_layout(with_parallel(config, case.parallel)) for case in chosen]), chosen


class TestCases:
    """Which layouts, on how many ranks."""

    def test_a_layout_begins_from_one_rank_and_not_from_the_configuration_s(self):
        config = make_config("llama3-8b", "parallel.tensor=8", "parallel.data=64", "parallel.bucket_size=7")
        (case,) = cases(config, ["context=2,cp_comm_type=all_gather"], None)
        assert case.ranks == 2
        assert case.parallel.model_dump(exclude_defaults=True) == {
            "data": 1,
            "context": 2,
            "cp_comm_type": "all_gather",
            "bucket_size": 7,
        }

    def test_a_pipeline_is_compared_with_two_ranks_and_its_schedule(self):
        config = make_config("llama3-8b", "parallel.pipeline=4", "pipeline.schedule=zbv")
        (own,), (other,) = cases(config, [], None), cases(config, ["pipeline=2,tensor=2"], None)
        assert (own.parallel.pipeline, own.ranks, other.ranks) == (2, 2, 4)
        keys = with_parallel(config, own.parallel).pipeline
        assert (keys.schedule, keys.virtual_stages, keys.layout) == ("zbv", 2, "Et*8|t*8|t*8|t*8L")
        (case,) = cases(config, ["tensor=2"], None)
        assert case.parallel.pipeline == 1

    def test_a_pipeline_shrinks_to_the_layers_that_its_stages_need(self):
        small, _ = shrink_for(make_config("llama3-8b", "pipeline.schedule=interleaved", "parallel.pipeline=8"))
        assert (small.model.layers, small.batch.global_batch) == (8, 2 * 2 * 2)
        small, _ = shrink_for(make_config("llama3-8b"), "pipeline=4,data=2")
        assert (small.model.layers, small.batch.global_batch) == (8, 2 * 2 * 2 * 4)

    def test_a_pipeline_of_an_encoder_and_a_decoder_has_the_layers_of_both(self):
        small, (case,) = shrink_for(make_config("t5-220m"), "pipeline=4")
        assert (small.model.layers, small.model.decoder_layers) == (8, 8)
        assert with_parallel(make_config("t5-220m"), case.parallel).pipeline.layout == "Et*6|t*6|t*6|t*6L"

    @pytest.mark.parametrize(
        ("layout", "ranks", "data"),
        [
            ("tensor=2", 2, 1),
            ("tensor=2,data=3", 6, 3),
            ("sharding=zero1", 2, 2),
            ("sharding=fsdp,shard_size=2", 4, 4),
            ("sharding=fsdp,shard_size=2,context=2,tensor=2", 8, 2),
        ],
    )
    def test_there_are_as_many_data_ranks_as_show_what_is_shared(self, layout, ranks, data):
        (case,) = cases(make_config(), [layout], None)
        assert (case.ranks, case.parallel.data) == (ranks, data)

    @pytest.mark.parametrize(
        ("layout", "ranks"),
        [("expert=4", 4), ("expert=4,tensor=2", 8), ("expert=2,context=2", 2), ("expert=4,sharding=zero1", 4)],
    )
    def test_there_are_enough_data_ranks_for_an_expert_axis(self, layout, ranks):
        (case,) = cases(make_config("mixtral-8x7b", "model.mlp.aux_loss_coeff=0"), [layout], None)
        assert (case.ranks, case.parallel.data) == (ranks, ranks // case.parallel.tensor // case.parallel.context)

    @pytest.mark.parametrize(
        ("parallel", "name"),
        [
            (["data=8", "expert=8"], "data=2,expert=2"),
            (["data=64", "expert=8"], "data=4,expert=2"),
            (["data=64", "expert=8", "context=2", "sharding=zero1"], "data=2,context=2,expert=2,sharding=zero1"),
        ],
    )
    def test_the_configuration_s_own_expert_axis_is_cut_as_it_is_over_fewer_ranks(self, parallel, name):
        overrides = ["model.mlp.aux_loss_coeff=0", *(f"parallel.{each}" for each in parallel)]
        (case,) = cases(make_config("mixtral-8x7b", *overrides), [], None)
        assert case.name == name

    def test_ranks_that_the_axes_leave_are_data_ranks(self):
        (case,) = cases(make_config(), ["tensor=2"], 8)
        assert (case.ranks, case.parallel.data) == (8, 4)

    @pytest.mark.parametrize(
        ("overrides", "name", "ranks"),
        [
            (["parallel.tensor=4", "parallel.sequence=true"], "data=1,tensor=4,sequence=true", 4),
            (["parallel.data=512"], "data=2", 2),
            (["parallel.data=512", "parallel.sharding=fsdp", "parallel.shard_size=8"], None, 4),
            (["recompute.granularity=selective"], "data=1", 1),
        ],
    )
    def test_the_configuration_s_own_layout_has_few_data_ranks(self, overrides, name, ranks):
        (case,) = cases(make_config("llama3-8b", *overrides), [], None)
        assert (case.name, case.ranks) == (name or "data=4,sharding=fsdp,shard_size=2", ranks)
        (wider,) = cases(make_config("llama3-8b", *overrides), [], 2 * ranks)
        assert wider.parallel.data == 2 * case.parallel.data

    @pytest.mark.parametrize(
        ("layouts", "ranks", "message"),
        [
            ([], None, "parallel: one rank that recomputes nothing: nothing to compare; give --layout "),
            (["data=1"], None, "data=1: one rank that recomputes nothing"),
            (["tensor"], None, "--layout tensor: 'tensor' is not of the form field=value; for example --layout "),
            (["tensr=2"], None, "--layout tensr=2: tensr: unknown key; did you mean 'tensor'?"),
            (["tensor=x"], None, "--layout tensor=x: tensor: 'x'; input should be a valid integer"),
            (["tensor=3"], None, r"parallel.tensor: 3 does not divide model.attention.heads 32; allowed: 1, 2, 4"),
            (["tensor=2"], 3, "parallel: tensor 2 × context 1 does not divide 3 ranks; start 4 ranks"),
            (["data=128"], None, "data=128: 128 ranks; allowed: at most 64; give a smaller --layout"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, layouts, ranks, message):
        with pytest.raises(MtError) as caught:
            cases(make_config(), layouts, ranks)
        assert str(caught.value).startswith(message)


class TestShrink:
    """Small, and every feature kept."""

    def test_it_is_small_and_its_vocabulary_does_not_fit_the_padding(self):
        config = make_config()
        small, _ = shrink_for(config, "tensor=2,sequence=true", "context=2,data=2")
        model = small.model
        assert model.parameter_count < 200_000 < config.model.parameter_count
        assert (model.layers, model.vocab_size % (model.vocab_divisor * 2) != 0) == (2, True)
        assert (small.data.seq_length, small.batch.micro_batch, small.batch.global_batch) == (32, 2, 8)
        assert model.max_seq_len == small.data.seq_length
        assert (model.norm, model.position, model.tied) == (config.model.norm, config.model.position, False)
        assert small.optim == config.optim.model_copy(update={"eps": 1e-4})

    @pytest.mark.slow
    @pytest.mark.parametrize("preset", ["llama3-8b", "gpt2-124m", "smollm2-135m", "mistral-7b", "gpt3-175b"])
    @pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
    def test_what_can_be_cut_stays_so(self, preset, exchange):
        for tensor, context, data, sequence in product((1, 2, 3, 4, 8, 16), (1, 2, 3, 4), (1, 2, 3), (True, False)):
            words = f"tensor={tensor},context={context},data={data},cp_comm_type={exchange}"
            words += ",sequence=true" if sequence and tensor > 1 else ""
            config = make_config(preset)
            try:
                small, (case,) = shrink_for(config, words)
            except MtError:
                continue
            assert list(problems(small.model_copy(update={"parallel": case.parallel}), case.ranks)) == []
            assert small.batch.global_batch // small.batch.micro_batch // data >= 2

    def test_latent_attention_stays_so(self):
        sizes = {"q_lora_rank": 24, "kv_lora_rank": 16, "nope_head_size": 16, "rope_head_size": 8, "v_head_size": 12}
        config = make_config("llama3-8b")
        attention = MLA(heads=32, scale=0.1, **sizes)
        config = config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})
        part = shrink_for(config, "tensor=2")[0].model.attention
        assert (part.kind, part.heads, part.scale, part.q_lora_rank, part.kv_lora_rank) == ("mla", 4, 0.1, 12, 12)
        assert (part.nope_head_size, part.rope_head_size, part.v_head_size) == (8, 8, 8)

    @pytest.mark.parametrize(
        ("heads", "groups", "layout", "small"),
        [
            (32, 8, "tensor=2", (8, 4)),  # several groups a rank, several queries a group
            (32, 8, "tensor=8", (16, 8)),  # one group a rank
            (32, 4, "tensor=8", (16, 2)),  # repeated groups, of which a rank has several queries
            (32, 1, "tensor=4", (8, 1)),
            (32, 32, "tensor=2", (4, 4)),
            (32, 32, "tensor=2,context=2,cp_comm_type=all_to_all", (4, 4)),
            (32, 32, "tensor=2,context=3", None),
        ],
    )
    def test_groups_stay_shared_repeated_or_several(self, heads, groups, layout, small):
        attention = [f"model.attention.heads={heads}", f"model.attention.num_kv_heads={groups}", "data.seq_length=6144"]
        shrunk, _ = shrink_for(make_config("llama3-8b", *attention), layout)
        part = shrunk.model.attention
        assert (part.heads, part.num_kv_heads) == (small or (4, 4))

    @pytest.mark.parametrize(
        ("layers", "recompute", "small"),
        [
            (32, {"granularity": "none"}, (2, 1)),
            (1, {"granularity": "selective"}, (1, 1)),
            (32, {"granularity": "full", "layers": 1}, (2, 1)),
            (32, {"granularity": "full", "layers": 8}, (4, 2)),
            (32, {"granularity": "full", "layers": 5}, (3, 2)),
            (32, {"granularity": "full", "layers": 32}, (2, 2)),
            (32, {"granularity": "full", "layers": 5, "method": "block"}, (3, 2)),
            (32, {"granularity": "full", "layers": 1, "method": "block"}, (2, 1)),
        ],
    )
    def test_as_many_layers_as_groups_of_recomputation_need(self, layers, recompute, small):
        sets = [f"recompute.{key}={value}" for key, value in recompute.items()]
        assert recompute_layers(make_config("llama3-8b", f"model.layers={layers}", *sets)) == small

    def test_widths_that_differ_stay_different(self):
        small, _ = shrink_for(make_config("llama3-8b", "model.attention.head_size=64"), "tensor=2")
        assert small.model.hidden_size != small.model.attention.heads * small.model.attention.head_size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_the_limit_of_a_dtype_is_passed_by_layouts_and_not_by_another_computation(dtype):
    small, chosen = shrink_for(make_config("gpt2-124m"), "tensor=2,sequence=true", "context=2", "sharding=fsdp")
    small = small.model_copy(update={"precision": small.precision.model_copy(update={"dtype": dtype})})
    outcomes = list(check(small, chosen, steps=3, documents=False))
    assert [outcome.case.name for outcome in outcomes if outcome.agrees] == [case.name for case in chosen]
    assert [row.quantity for outcome in outcomes for row in outcome.rows][:2] == ["loss", "grad norm"]
    mistaken = record(small, 1, documents=True), record(small, 1)
    wrong = [
        d
        for d in compare_records(*mistaken)
        if is_comparable(small, d.quantity) and d.relative > limit(small, d.quantity)
    ]
    assert len(wrong) > len(outcomes[0].rows) / 2


def test_the_limits_are_those_of_the_docs():
    small, _ = shrink_for(make_config(), "tensor=2")
    limits = {}
    for dtype in ("fp64", "fp32", "bf16"):
        config = small.model_copy(update={"precision": small.precision.model_copy(update={"dtype": dtype})})
        limits[dtype] = [float(f"{limit(config, name):.1e}") for name in ("loss", "gradient of norm.weight")]
        assert is_comparable(config, "norm.weight") == (dtype != "bf16")
    assert limits == {"fp64": [1e-12, 1e-12], "fp32": [1.3e-6, 1.6e-5], "bf16": [8.3e-3, 9.4e-2]}


@pytest.mark.usefixtures("real_processes")
def test_a_layout_that_agrees(mt):
    ran = mt("verify", "--preset", "llama3-8b", "--layout", "tensor=2,sequence=true", "--steps", 1)
    first, *table, last = ran.stdout.splitlines()
    assert first.startswith("shrunk to  2 of 32 layers, 64 of 4096 features, 8 of 32 heads, 4 of 8 groups, 32 of 8192")
    assert table[1].startswith("tensor=2,sequence=true: 2 ranks, ")
    assert "  agrees: none of 44 quantities beyond the limit" in table
    assert last.startswith("agree with one rank (widest limit 1.0e-12); ")
    assert (ran.stderr, ran.returncode) == ("", 0)


def test_every_parameter_as_json(mt):
    ran = mt("verify", "--preset", "gpt2-124m", "--layout", "data=2", "--documents", "--dtype", "bf16", "--json")
    report = json.loads(ran.stdout)
    assert (report["agrees"], ran.returncode) == (True, 0)
    (layout,) = report["layouts"]
    assert (layout["ranks"], layout["layout"]["data"]) == (2, 2)
    quantities = [row["quantity"] for row in layout["quantities"]]
    assert quantities[:2] == ["loss", "grad norm"]
    assert "gradient of layers.1.attn.k.bias" in quantities
    assert report["config"]["precision"]["dtype"] == "bf16"


PLUGIN = """
from mt_core.errors import MtError
from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components():
    return [Component("attention", "theirs", "mt_theirs:core", "a core that a layout changes")]


def refuse():
    raise MtError("core 'theirs'", "no such heads", "others")


def attend(q, k, v, documents=None):
    from mt_models.layers.attention_cores import attend_sdpa

    return attend_sdpa(q, k, v, documents) * {factor}


def __getattr__(name):
    if name != "core":
        raise AttributeError(name)
    from mt_models.layers.attention_cores import Core

    return Core(attend, preference=-1)
"""
THEIRS = ("--preset", "llama3-8b", "--set", "model.attention.core=theirs", "--layout", "tensor=2", "--steps", 1)


def test_what_differs_is_marked_and_the_exit_code_is_1(mt, plugin):
    site = plugin("mt-theirs", PLUGIN.format(factor="q.shape[2]"))  # heads of a rank, not of the model
    ran = mt("verify", *THEIRS, "--all", PYTHONPATH=site)
    assert ran.returncode == 1, ran.stderr
    assert sum(line.endswith("  <-") for line in ran.stdout.splitlines()) > 20
    assert "  DISAGREES: " in ran.stdout
    assert "\ndisagree with one rank: tensor=2 (widest limit 1.0e-12); " in ran.stdout


def test_a_mistake_that_only_a_rank_finds_is_one_line(mt, plugin):
    site = plugin("mt-theirs", PLUGIN.format(factor="refuse()"))
    ran = mt("verify", *THEIRS, PYTHONPATH=site)
    assert (ran.stderr, ran.returncode) == ("mt: core 'theirs': no such heads; others\n", 2)


def test_nothing_to_compare_is_told(mt):
    ran = mt("verify", "--preset", "gpt2-124m")
    assert ran.stderr.startswith("mt: parallel: one rank that recomputes nothing: nothing to compare; give --layout ")
    assert ran.returncode == 2
