"""Plans: which modules are cut and how, and what is refused, all at once."""

import tomllib
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layouts import run_config
from models.encoders import MODELS as ENCODERS
from models.parts import COMBINATIONS
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.tensor.collectives import all_gather_async
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, linear_cross_entropy
from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear, VocabEmbedding
from mt_core.parallel.tensor.placement import Placement, apply_plan
from mt_core.parallel.tensor.plan import (
    Column,
    Expert,
    Replicate,
    Row,
    Rule,
    Sequence,
    Vocab,
    get_cut_axis,
    get_cut_dim,
)
from mt_core.planning.parameters import count_rank_elements
from mt_core.plugins import component, components
from mt_core.verification.ranks import run_ranks
from mt_models.config import BertConfig, GPTConfig, T5Config
from mt_models.layers.basic import Embedding, Linear

MODELS = COMBINATIONS | ENCODERS
TENSOR_2 = Axis("tensor", 1, 2)
"""The second of two ranks. Cutting needs no connection between them."""


MODEL_CONFIGS = {"gpt": GPTConfig, "bert": BertConfig, "t5": T5Config}


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


def test_plain_functions_get_their_parallel_implementation_only_where_there_is_more_than_one_rank():
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
        assert placements["gate.weight"] == Placement(replicas=TENSOR_2, partial=partial)


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_used_on_a_ranks_heads_are_always_partial(sequence):
    model = built("qk-norm")
    placements = apply_plan(model, model.plan(2), TENSOR_2, sequence=sequence)
    assert placements["layers.0.attn.q_norm.weight"] == Placement(replicas=TENSOR_2, partial=True)
    assert placements["layers.1.attn.k_norm.weight"] == Placement(replicas=TENSOR_2, partial=True)
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


def refusal(module: nn.Module, rule: Rule, axis: Axis = TENSOR_2, expert: Axis = Axis("expert")) -> str:
    model = nn.Sequential()
    model.add_module("fc", module)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(MtError) as caught:
        apply_plan(model, {"fc": rule}, axis, expert=expert)
    assert {name: p.shape for name, p in model.named_parameters()} == before
    return str(caught.value)


def test_a_cut_of_a_module_without_an_op_is_refused():
    assert refusal(nn.Linear(8, 4), Row(dim=1)) == (
        "plan of 'fc': Row cuts the module, but the module has no op; "
        "ops allowed under Row: linear; or leave the module whole with Replicate"
    )
    assert "Expert cuts the module, but the module has no op" in refusal(
        nn.Linear(8, 4), Expert(), expert=Axis("expert", 1, 2)
    )


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(torch.float16).to(x.dtype), weight, bias)


@pytest.mark.parametrize("rule", [Column(dim=0), Row(dim=1), Vocab(), Expert()], ids=str)
def test_a_cut_of_an_op_without_a_parallel_implementation_is_refused(rule):
    module = Linear(8, 4)
    module.op = quantized_linear
    kind = type(rule).__name__
    assert refusal(module, rule, expert=Axis("expert", 1, 2)).startswith(
        f"plan of 'fc': {kind} cuts the module, but its op quantized_linear has no parallel implementation; "
        f"ops allowed under {kind}: "
    )


def test_on_one_rank_nothing_is_cut_and_any_op_is_allowed():
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 4))
    apply_plan(model, {"fc": Row(dim=1)}, Axis("tensor"))
    assert model.fc.weight.shape == (4, 8)


@pytest.mark.parametrize("name", components("preset"))
def test_every_preset_s_plan_cuts_only_what_has_a_parallel_implementation(name):
    values = tomllib.loads(component("preset", name).read_text(encoding="utf-8"))["model"] | {
        "layers": 2,
        "vocab_size": 257,
    }
    size = 2 if values["attention"]["heads"] % 2 == 0 else 3
    config = MODEL_CONFIGS[values["kind"]].model_validate(values)
    with torch.device("meta"):
        model = config.build(size)
    experts = Axis("expert", 1, 2) if values["mlp"]["kind"] == "moe" else Axis("expert")
    placements = apply_plan(model, model.plan(size), Axis("tensor", 1, size), sequence=True, expert=experts)
    assert {*placements} == {name for name, _ in model.named_parameters()}


class Doubler(nn.Module):
    """A user's own feed-forward layer, of the modules that take part in tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_table = Embedding(3, 8)
        self.up, self.down = Linear(4, 8), Linear(8, 4)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + self.bias_table(kinds)))


def doubled(axis: Axis) -> tuple[Tensor, dict[str, Tensor]]:
    model, generator = Doubler().double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    plan = {"bias_table": Column(dim=1), "up": Column(dim=0), "down": Row(dim=1)}
    placements = apply_plan(model, plan, axis)
    y = model(torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4), torch.tensor([[0, 1, 2], [2, 2, 0]]))
    y.square().sum().backward()
    dims = {name: placements[name].dim for name, _ in model.named_parameters()}
    gathered = {}
    for name, parameter in model.named_parameters():
        gathered[name] = all_gather_async(parameter.grad, axis, dims[name])()
    return y.detach(), gathered


def test_a_user_s_own_module_gives_the_same_result_and_gradients_when_cut():
    y, gradients = doubled(Axis("tensor"))
    for rank_y, rank_gradients in run_ranks(2, doubled):
        torch.testing.assert_close(rank_y, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "leaf", "dim"),
    [(Column(1), "weight", 1), (Column(1), "bias", 1), (Row(2), "weight", 2), (Row(2), "bias", None)],
)
def test_a_bias_is_cut_with_the_outputs_and_whole_with_the_inputs(rule, leaf, dim):
    assert get_cut_dim(rule, leaf) == dim


def locate_replicas(axis: Axis) -> tuple[int, int, int]:
    model = built("repeated-groups", 4)
    place = apply_plan(model, model.plan(4), axis)["layers.0.attn.qkv.weight"]
    return place.replicas.rank, place.replicas.size, place.replicated_from


def test_more_ranks_than_groups_share_each_group_s_key_and_value():
    queries = 8 // 4 * 4 * 32  # queries of a rank × head size × model size come before key and value
    assert run_ranks(4, locate_replicas) == [(0, 2, queries), (1, 2, queries), (0, 2, queries), (1, 2, queries)]


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
        expected = {get_cut_axis(rule)} if get_cut_dim(rule, leaf) is not None else {None}
        parts = model.canonical_regions(name)
        assert {cuts[part].axis if part in cuts else None for part in parts} == expected, name
        elements = sum(count_rank_elements(config.canonical_shapes()[part], cuts.get(part), tensor) for part in parts)
        assert elements == parameter.numel() // (tensor if expected == {"tensor"} else 1), name
