"""What a pipeline is made of: stages of a model, postponed gradients, messages, tied weights, steps left out."""

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from layouts import DEEP, PIPELINES, pipeline_config, run_config
from mt_cli.run_config import run_config_type
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.pipeline.runtime import order_forward
from mt_core.parallel.tensor.summed_linear import SummedLinear
from mt_core.parallel.tensor.weight_gradients import PostponedProducts, WeightSum
from mt_core.parallel.weight_sums import list_weights
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.layout_string import parse_layout
from mt_core.pipeline.transfers import list_routes
from mt_core.training.step import evaluate, reduce, update
from mt_core.verification.ranks import run_ranks
from mt_models.config import Learned
from rank_states import CPU, batches_of, gradients, state_of
from tiny import built, llama, t5

TIED = "mha-tied"


@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_every_weight_once_and_a_tied_one_at_both_ends(tied):
    config = llama(layers=3, tied=tied)
    counts: Counter[str] = Counter()
    for stage in parse_layout("Et|t|tL"):
        with torch.device("meta"):
            part = config.build()
        part.keep_stages([stage])
        counts.update(name for name, _ in part.named_parameters())
    assert {*counts} == {name for name, _ in config.build().named_parameters()}
    assert {name for name, count in counts.items() if count > 1} == ({"embed.weight"} if tied else set())


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (llama(layers=3), "Et||ttL"),
        *[(t5(), layout) for layout in ("E|t|t||t|t|L", "Ettt|tL", "Ett|ttL", "Et|ttt|L", "EttttL")],
        (t5(tied=True, position=Learned(), head_bias=True), "Et|tt|t|L"),
    ],
)
def test_stages_one_after_the_other_are_the_whole_model(config, layout):
    """Those of T5 with sequences of two lengths, each stage with its own parts of the model alone."""
    model = built(config)
    tokens_BT = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))
    arguments = {"tokens_BT": tokens_BT, "labels_BT": tokens_BT.roll(-1, 1)}
    if config.kind == "t5":
        arguments["encoder_tokens_BS"] = tokens_BT.flip(1).repeat(1, 2)[:, :15]
    edge: Any = {}
    for stage in parse_layout(layout):
        part = deepcopy(model)
        part.keep_stages([stage])
        output = part.run_stage(stage, edge, **arguments)
        edge = output.edge
        tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in edge.items()}
        assert stage.loss or tensors == {
            name: each[:2] for name, each in part.edge_tensors(stage, arguments, torch.float64).items()
        }
    assert torch.equal(output.losses.tokens, model.losses(**arguments).tokens)


def test_stages_of_an_encoder_and_a_decoder_have_what_they_use():
    config = t5(tied=True, position=Learned(), head_bias=True)
    with torch.device("meta"):
        parts = [config.build() for _ in range(4)]
    for stage, part in zip(parse_layout("Et|t|t|tL"), parts, strict=True):
        part.keep_stages([stage])
    ends = [{name for name, _ in part.named_parameters() if ".layers." not in name} for part in parts]
    embedding = {"embed.weight", "position.weight"}
    assert ends[0] == ends[2] == embedding
    assert ends[1] == {"encoder.norm.weight"}
    assert ends[3] == {"embed.weight", "decoder.norm.weight", "head.bias"}
    assert [[*part.layers] for part in parts] == [["encoder.0"], ["encoder.1"], ["decoder.0"], ["decoder.1"]]


class Sums:
    """Sums of gradients in the parameters' data type, and which parameters a pass has ended for."""

    def __init__(self, model: Any) -> None:
        self.sums = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
        self.fresh, self.finished = {*self.sums}, []

    def open_sum(self, name: str) -> tuple[Tensor, bool]:
        fresh = name in self.fresh
        self.fresh.discard(name)
        return self.sums[name], fresh

    def add_to(self, total: Tensor, gradient: Tensor, *, overwrite: bool = False) -> None:
        (total.copy_ if overwrite else total.add_)(gradient.view_as(total))

    def finish_gradient(self, name: str) -> None:
        self.finished.append(name)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_weights_that_waited_are_those_computed_at_once(fused):
    tokens_BT = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    postponed = PostponedProducts()
    whole, split, plain = built(llama()), built(llama()), built(llama())
    sums, names = (
        [Sums(whole), Sums(split)],
        {id(p): n for model in (whole, split) for n, p in model.named_parameters()},
    )
    for model, each in zip((whole, split), sums, strict=True):
        for module, weight in list_weights(model):
            module.op = SummedLinear(module.op, WeightSum(names[id(weight)], weight, each, postponed, lambda *_: fused))
    whole.token_losses(tokens_BT, tokens_BT).mean().backward()
    with postponed.postpone((0, 0)):
        split.token_losses(tokens_BT, tokens_BT).mean().backward()
    linear = {
        f"layers.{n}.{part}.weight" for n in (0, 1) for part in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
    }
    assert sums[1].fresh == {*sums[1].sums}
    assert not sums[1].finished
    postponed.compute((0, 0))
    plain.token_losses(tokens_BT, tokens_BT).mean().backward()
    for name, parameter in plain.named_parameters():
        for each, model in zip(sums, (whole, split), strict=True):
            found = each.sums[name] if name in linear else model.get_parameter(name).grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-12, atol=1e-15, msg=name)
            assert (each.finished.count(name), model.get_parameter(name).grad is None) == (
                (1, True) if name in linear else (0, False)
            )


def test_channels_carry_one_kind_of_message_one_way():
    loop = [("features", 0, 1), ("features", 1, 0), ("gradients", 0, 1), ("gradients", 1, 0)]
    assert list_routes(Placement(2, 2)) == loop
    assert list_routes(Placement(2)) == [("features", 0, 1), ("gradients", 1, 0)]
    assert list_routes(Placement(2, 2, "v")) == loop
    turn = [(route.source, route.target) for route in list_routes(Placement(3, 2, "v"))]
    assert {*turn} == {(0, 1), (1, 0), (1, 2), (2, 1)}


def test_an_evaluation_needs_no_number_of_microbatches():
    for count in range(1, 8):
        order = order_forward(Placement(3, 2), count)
        assert {(action.microbatch, action.chunk) for action in order} == {(m, c) for m in range(count) for c in (0, 1)}
        assert len(order) == 2 * count


def run_on_ranks(axis: Axis, config: dict[str, Any]) -> dict[str, Any]:
    return run_steps(run_config_type().model_validate(config), axis.size)


def run_steps(config: Any, ranks: int = 1) -> dict[str, Any]:
    """On each rank: an evaluation of odd size, a step of sequences of two lengths, a step that is left out, and what a
    save says of ends that differ."""
    state = state_of(config, ranks)
    mesh, seen = state.data_parallel.mesh, {}
    batches = batches_of(config, mesh)
    seen["evaluated"] = evaluate(state.model, batches[:3], mesh, CPU, pipeline=state.pipeline)
    shorter = [{name: t[:, :8] if t.dim() > 1 else t for name, t in batch.items()} for batch in batches]
    mixed = [one if number % 3 else other for number, (one, other) in enumerate(zip(batches, shorter, strict=True))]
    seen["loss"] = float(mesh.sum_over_losses_(gradients(config, state, mixed).double()))
    before = {name: p.detach().clone() for name, p in state.data_parallel.main_params.items()}
    if mesh.pipeline.rank == mesh.pipeline.size - 1:
        next(reversed(state.data_parallel.main_params.values())).grad[..., 0] = torch.nan
    norm = update(state.data_parallel, state.optimizer, lr=1.0, clip_norm=1.0).norm
    state.data_parallel.wait()
    seen["skipped"] = not norm.isfinite() and all(
        torch.equal(before[name], p) for name, p in state.data_parallel.main_params.items()
    )
    gradients(config, state, batches)
    reduce(state.data_parallel)
    state.parts()
    if mesh.pipeline.rank and "embed.weight" in state.data_parallel.main_params:
        state.data_parallel.main_params["embed.weight"].data[0] += 0.25
    try:
        state.parts()
    except MtError as error:
        seen["refused"] = str(error)
    return seen


@pytest.mark.slow
def test_steps_of_stages_are_those_of_one_rank_and_faults_are_seen_by_all():
    one = run_steps(run_config(TIED, DEEP))
    for layout in ("1f1b 2", "interleaved 2 of 3 stages", "zbv 2"):
        assert PIPELINES[layout][0] == 2
        for seen in run_ranks(2, run_on_ranks, pipeline_config(TIED, layout).model_dump()):
            assert seen["evaluated"] == {"loss": pytest.approx(one["evaluated"]["loss"], rel=1e-12)}
            assert seen["loss"] == pytest.approx(one["loss"], rel=1e-12)
            assert seen["skipped"]
            if layout != "zbv 2":  # both ends are on one rank there
                assert "embed.weight: differs between stages by up to 0.25" in seen["refused"]
