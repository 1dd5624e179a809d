"""Plans: which modules are cut and how, and what is refused, all at once."""

from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F

from layouts import run_config
from models.encoders import MODELS as ENCODERS
from models.parts import COMBINATIONS
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, linear_cross_entropy
from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear, VocabEmbedding
from mt_core.parallel.tensor.plan import Column, Placement, Replicate, Row, Sequence, apply_plan, cut_axis, cut_dim
from mt_core.planning.parameters import rank_elements
from mt_core.verification.ranks import run_ranks

MODELS = COMBINATIONS | ENCODERS
TENSOR_2 = Axis("tensor", 1, 2)
"""The second of two ranks. Cutting needs no connection between them."""


def built(model: str = "gqa", tensor: int = 2):
    config = run_config(model).model
    with torch.device("meta"):
        return config.build(tensor)


def test_each_rank_keeps_its_part_of_what_is_cut_and_all_of_the_rest():
    model = built()
    whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
    placements = apply_plan(model, model.plan(2), TENSOR_2)
    for name, parameter in model.named_parameters():
        dim = placements[name].dim
        expected = tuple(n // 2 if d == dim else n for d, n in enumerate(whole[name]))
        assert tuple(parameter.shape) == expected, name
    assert {name for name, place in placements.items() if place.dim is None} == {
        *("layers.0.attn_norm.weight", "layers.0.mlp_norm.weight"),
        *("layers.1.attn_norm.weight", "layers.1.mlp_norm.weight"),
        "norm.weight",
    }


def test_plain_functions_are_swapped_for_their_twins_only_where_there_is_more_than_one_rank():
    model = built()
    apply_plan(model, model.plan(1), Axis("tensor"))
    assert model.layers["0"].attn.qkv.op is F.linear
    assert model.loss.op is linear_cross_entropy
    model = built()
    apply_plan(model, model.plan(2), TENSOR_2, sequence=True)
    assert model.layers["0"].attn.qkv.op == ColumnLinear(TENSOR_2, True)
    assert model.layers["0"].attn.out.op == RowLinear(TENSOR_2, True)
    assert model.embed.op == VocabEmbedding(TENSOR_2, True)
    assert model.loss.op == VocabCrossEntropy(TENSOR_2, True)


def test_only_sequence_parallelism_makes_gradients_of_replicated_weights_partial():
    for sequence in (False, True):
        model = built("learned-biased")
        placements = apply_plan(model, model.plan(2), TENSOR_2, sequence=sequence)
        partial = {name for name, place in placements.items() if place.partial}
        replicated = {name for name, place in placements.items() if place.dim is None}
        assert partial == (replicated if sequence else set())
        assert {"position.weight", "norm.bias", "layers.0.attn.out.bias", "layers.0.mlp.down.bias"} <= replicated


def test_a_replicated_module_is_never_partial():
    model = torch.nn.Sequential()
    model.add_module("gate", torch.nn.LayerNorm(4))
    for rule, partial in ((Replicate(), False), (Sequence(), True)):
        placements = apply_plan(model, {"gate": rule}, TENSOR_2, sequence=True)
        assert placements["gate.weight"] == Placement(copies=TENSOR_2, partial=partial)


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_used_on_a_ranks_heads_are_always_partial(sequence):
    model = built("qk-norm")
    placements = apply_plan(model, model.plan(2), TENSOR_2, sequence=sequence)
    assert placements["layers.0.attn.q_norm.weight"] == Placement(copies=TENSOR_2, partial=True)
    assert placements["layers.1.attn.k_norm.weight"] == Placement(copies=TENSOR_2, partial=True)
    assert placements["norm.weight"].partial == sequence


def test_everything_that_does_not_fit_is_one_error():
    model = built()
    plan = dict(model.plan(2)) | {"layers.*.mlp.gate": Column(dim=0), "layers.0.attn.qkv": Column(dim=0)}
    del plan["norm"]
    with pytest.raises(MtError) as caught:
        apply_plan(model, plan, Axis("tensor", 0, 3))
    told = str(caught.value)
    assert "plan of 'norm': 0 rules match" in told
    assert "plan of 'layers.0.attn.qkv': 2 rules match" in told
    assert "plan rule 'layers.*.mlp.gate': matches no module" in told
    assert "layers.0.attn.out.weight: dim 1 is 8; multiples of parallel.tensor = 3" in told
    assert "embed.weight: dim 0 is 64; multiples of parallel.tensor = 3" in told


@pytest.mark.parametrize(
    ("rule", "leaf", "dim"),
    [(Column(1), "weight", 1), (Column(1), "bias", 1), (Row(2), "weight", 2), (Row(2), "bias", None)],
)
def test_a_bias_is_cut_with_the_outputs_and_whole_with_the_inputs(rule, leaf, dim):
    assert cut_dim(rule, leaf) == dim


def copies(axis: Axis) -> tuple[int, int, int]:
    model = built("repeated-groups", 4)
    place = apply_plan(model, model.plan(4), axis)["layers.0.attn.qkv.weight"]
    return place.copies.rank, place.copies.size, place.copied_from


def test_more_ranks_than_groups_share_each_group_s_key_and_value():
    queries = 8 // 4 * 4 * 32  # queries of a rank × head size × model size come before key and value
    assert run_ranks(4, copies) == [(0, 2, queries), (1, 2, queries), (0, 2, queries), (1, 2, queries)]


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_plan_of_modules_cuts_what_the_configuration_says_of_canonical_tensors(config, tensor):
    with torch.device("meta"):
        model = config.build(tensor)
    rules = model.plan(tensor)
    cuts = config.canonical_cuts()
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        (rule,) = (rule for pattern, rule in rules.items() if fnmatchcase(module, pattern))
        expected = {cut_axis(rule)} if cut_dim(rule, leaf) is not None else {None}
        parts = model.canonical_regions(name)
        assert {cuts[part].axis if part in cuts else None for part in parts} == expected, name
        elements = sum(rank_elements(config.canonical_shapes()[part], cuts.get(part), tensor) for part in parts)
        assert elements == parameter.numel() // (tensor if expected == {"tensor"} else 1), name
