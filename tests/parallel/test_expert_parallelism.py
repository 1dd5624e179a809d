"""Experts cut over ranks: what one rank computes, in fp64, gradient by gradient; from and to any checkpoint."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor

from layouts import (
    BALANCED,
    EXPERT_LAYOUTS,
    LAYOUTS,
    LONG,
    SAMPLES,
    STEADY,
    STEPS,
    data_ranks,
    run_config,
    runtime_config,
)
from mt_cli.verify.record import record, records
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.config.sections import TokenDispatcherName
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.expert.dispatcher import (
    DISPATCHERS,
    AllGatherDispatcher,
    AllToAllDispatcher,
    Capacity,
    Choices,
    TensorDispatcher,
    dispatch,
)
from mt_core.parallel.expert.exchange import Exchange
from mt_core.parallel.tensor.placement import Placement, apply_plan
from mt_core.parallel.tensor.plan import Expert, Replicate
from mt_core.verification.compare import compare_records, tensor_differences
from mt_core.verification.measure import Record, measure
from mt_core.verification.ranks import run_ranks
from mt_models.config import MoE
from mt_models.layers.expert_products import multiply_grouped, multiply_looped
from mt_models.layers.mlp import make_mlp
from mt_models.layers.mlp import plan as make_plan
from parallel.test_layout_fuzzer import layouts
from parallel.test_parity_matrix import RTOL, VARIANTS, disagreements

EXPERT_2 = Axis("expert", 1, 2)
"""The second of two ranks."""


def cases(layout: str) -> list[tuple[str, str, int]]:
    """Model, variant and steps; they change from layout to layout, of some of which one model runs long."""
    first = list(EXPERT_LAYOUTS).index(layout)
    models = ("experts", *BALANCED)
    steps = [STEPS if layout in LONG and n == first % 3 else 3 for n in range(3)]
    return [(model, list(VARIANTS)[(first + n) % 4], steps[n]) for n, model in enumerate(models)]


def config_of(layout: str, model: str, variant: str, steps: int) -> Any:
    ranks, parallel = EXPERT_LAYOUTS[layout]
    accumulation, recompute, sums = VARIANTS[variant]
    micro = max(1, SAMPLES // data_ranks(ranks, parallel) // accumulation)
    sections = {"batch": {"micro_batch": micro, "global_batch": SAMPLES}, "runtime": runtime_config(sums, parallel)}
    sections |= {"optim": STEADY} if steps == STEPS else {}
    return run_config(model, parallel=parallel, recompute=recompute, **sections)


@pytest.fixture(scope="session")
def recorded(compute_once) -> Callable[[int, int], dict[tuple[str, str], Record]]:
    """All runs of so many ranks and steps, on the same ranks."""

    def run(ranks: int, steps: int) -> dict[tuple[str, str], Record]:
        layouts = [layout for layout, (size, _) in EXPERT_LAYOUTS.items() if size == ranks]
        chosen = [(layout, *case) for layout in layouts for case in cases(layout) if case[-1] == steps]
        options = {"steps": steps, "gradient_steps": 3, "timeout_s": 600.0}
        found = records([config_of(*case) for case in chosen], ranks, **options)
        return {case[:2]: record for case, record in zip(chosen, found, strict=True)}

    return lambda ranks, steps: compute_once(f"experts, {ranks} ranks, {steps} steps", lambda: run(ranks, steps))


@pytest.fixture(scope="session")
def one_rank(compute_once, reference) -> Callable[[str, int], Record]:
    """The same steps of a model on one rank."""

    def run(model: str) -> Record:
        config = run_config(model, batch={"micro_batch": SAMPLES, "global_batch": SAMPLES}, optim=STEADY)
        return measure(config, 1, steps=STEPS, gradient_steps=3)

    def get(model: str, steps: int) -> Record:
        if steps == STEPS:
            return compute_once(f"two layers of {model}, {steps} steps on one rank", lambda: run(model))
        return reference[model, False]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model", "variant", "steps"), [(each, *case) for each in EXPERT_LAYOUTS for case in cases(each)]
)
def test_losses_norms_gradients_and_weights_of_all_steps_are_those_of_one_rank(
    layout, model, variant, steps, recorded, one_rank
):
    found = recorded(EXPERT_LAYOUTS[layout][0], steps)[layout, model]
    assert disagreements(found, one_rank(model, steps)) == []


def test_mixtures_that_drop_tokens_and_that_do_not_run_twenty_steps():
    assert {model for layout in EXPERT_LAYOUTS for model, _, steps in cases(layout) if steps == STEPS} == {
        "experts",
        *BALANCED,
    }


def test_every_variant_is_somewhere_in_it():
    assert {variant for layout in EXPERT_LAYOUTS for _, variant, _ in cases(layout)} == {*VARIANTS}


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layouts(experts=True))
def test_a_random_layout_with_an_expert_axis_agrees_with_one_rank(reference, drawn):
    ranks, model, sections = drawn
    note(f"{ranks} ranks, {sections}")
    found = record(run_config(model, **sections), ranks)
    assert [d for d in compare_records(found, reference[model, False]) if not d.relative <= RTOL] == []


EXPERTS, WIDTH = 4, 6
MIXED = [[0, 1], [2, 0], [3, 2], [1, 3], [0, 3]]
CASES: dict[str, Callable[[int], tuple[list[list[int]], list[list[bool]] | None]]] = {
    "as they come": lambda rank: (
        [[0, 1], [2, 0], [3, 2], [1, 3], [0, 3]] if rank else [[3, 1]] * 2 + [[0, 2]] * 3,
        None,
    ),
    "everything to one expert": lambda _: ([[2]] * 5, None),
    "nobody goes to the first rank": lambda _: ([[2, 3], [3, 2], [2, 3], [3, 2], [2, 3]], None),
    "nobody stays": lambda rank: ([[0, 1] if rank else [2, 3]] * 5, None),
    "some are dropped": lambda rank: (
        [[0, 1], [2, 0], [3, 2], [1, 3], [0, 3]],
        [[True, n % 2 == rank] for n in range(5)],
    ),
    "one rank drops all": lambda rank: ([[0, 3]] * 5, [[rank == 1] * 2] * 5),
    "all are dropped": lambda _: ([[0, 3]] * 5, [[False] * 2] * 5),
}
"""What the five tokens of each of two ranks choose among four experts, and what is kept."""
DISPATCHED = [AllToAllDispatcher, AllGatherDispatcher]
PADDED = {None: None, 5: 5, 9: 5}
"""What an expert takes at most, and the rows that it then has of each rank: no more than there are tokens."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def choices_of(case: str, rank: int, capacity: int | None = None) -> tuple[Tensor, Choices]:
    """A rank's tokens, all of one sequence, and where they go."""
    chosen, kept = CASES[case](rank)
    chosen_NC, kept_NC = torch.tensor(chosen), None if kept is None else torch.tensor(kept)
    weights_NC = draw(*chosen_NC.shape, seed=5 + rank)
    padding = None if capacity is None else Capacity(1, capacity)
    return draw(len(chosen), WIDTH, seed=rank), Choices(weights_NC, chosen_NC, kept_NC, EXPERTS, padding)


def feed(w_EDD: Tensor, seen: list[list[int]], x_RD: Tensor, counts_E: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Experts that make something of padding too; `seen` gets their numbers of rows."""
    seen.append(counts_E.tolist())
    assert rows is None or [*rows] == seen[-1]
    return (multiply_looped(x_RD, w_EDD, counts_E) + 1).sin()


def dispatched(axis: Axis) -> dict[Any, tuple[Tensor, ...]]:
    """Results, gradients of tokens, of weights and of local experts, and rows, by dispatcher, case and padding."""
    found = {}
    for make, case, capacity in itertools.product(DISPATCHED, CASES, PADDED):
        x_ND, choices = choices_of(case, axis.rank, capacity)
        w_EDD, seen = draw(EXPERTS, WIDTH, WIDTH, seed=9), []
        dispatcher = make(axis)
        y_ND = dispatcher.run(dispatcher.send(x_ND, choices), partial(feed, w_EDD.chunk(axis.size)[axis.rank], seen))
        y_ND.square().sum().backward()
        gradients = (t.grad for t in (x_ND, choices.weights_NC, w_EDD))
        found[make.__name__, case, capacity] = (*(t.detach() for t in (y_ND, *gradients)), torch.tensor(seen[0]))
    return found


def defined(case: str, ranks: int) -> list[tuple[Tensor, ...]]:
    """The same of every rank by a loop over tokens and their choices; gradients of experts are each rank's part."""
    w_EDD, found = draw(EXPERTS, WIDTH, WIDTH, seed=9), []
    for rank in range(ranks):
        x_ND, (weights_NC, chosen_NC, kept_NC, *_) = choices_of(case, rank)
        rows = [torch.zeros(WIDTH, dtype=torch.float64)] * len(x_ND)
        for n, c in itertools.product(*map(range, chosen_NC.shape)):
            if kept_NC is None or kept_NC[n, c]:
                rows[n] = rows[n] + weights_NC[n, c] * (w_EDD[chosen_NC[n, c]] @ x_ND[n] + 1).sin()
        y_ND = torch.stack(rows)
        if y_ND.requires_grad:
            y_ND.square().sum().backward()
        found.append((y_ND.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x_ND, weights_NC))))
    g_EDD = torch.zeros_like(w_EDD) if w_EDD.grad is None else w_EDD.grad
    return [(*row, g_EDD) for row in found]


@pytest.fixture(scope="session")
def exchanged(compute_once) -> list[dict[Any, tuple[Tensor, ...]]]:
    """What each of two ranks found, of one launch."""
    return compute_once("dispatchers on two ranks", lambda: run_ranks(2, dispatched))


@pytest.mark.parametrize("capacity", PADDED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", [make.__name__ for make in DISPATCHED])
def test_a_dispatcher_is_a_dense_loop_forward_and_backward(dispatcher, case, capacity, exchanged):
    found, expected = [rank[dispatcher, case, capacity] for rank in exchanged], defined(case, 2)
    for (*ours, _, _), (*theirs, _) in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sum(g_EDD for *_, g_EDD, _ in found), expected[0][-1], rtol=1e-12, atol=1e-13)
    if capacity is not None:
        assert [rows.tolist() for *_, rows in found] == [[2 * PADDED[capacity]] * 2] * 2


@pytest.mark.parametrize("capacity", PADDED)
@pytest.mark.parametrize("case", CASES)
def test_on_one_rank_it_is_the_same_loop(case, capacity):
    x_ND, choices = choices_of(case, 1, capacity)
    w_EDD, seen = draw(EXPERTS, WIDTH, WIDTH, seed=9), []
    y_ND = dispatch.run(dispatch.send(x_ND, choices), partial(feed, w_EDD, seen))
    y_ND.square().sum().backward()
    assert capacity is None or seen == [[PADDED[capacity]] * EXPERTS]
    for ours, theirs in zip((y_ND, x_ND.grad, choices.weights_NC.grad), defined(case, 2)[1], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def make_layer(axis: Axis, name: TokenDispatcherName) -> Any:
    """A mixture with a shared expert, whose router sends every token to the last expert first."""
    part = MoE(ffn_hidden_size=5, experts=4, top_k=2, shared_ffn_hidden_size=7, shared_gate=True)
    layer = make_mlp(part, WIDTH).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed).detach()
    layer.router.weight.data[-1] = 100.0
    plan = {name: rule if isinstance(rule, Expert) else Replicate() for name, rule in make_plan(part).items()}
    apply_plan(layer, plan, Axis("tensor"), expert=axis, token_dispatcher=name)
    return layer


def run_layer(axis: Axis, name: TokenDispatcherName, beside: bool) -> list[Tensor]:
    """Result and gradients, the shared expert computed while tokens travel or after."""
    layer = make_layer(axis, name)
    x_BTD = draw(2, 5, WIDTH, seed=20 + axis.rank).abs().detach().requires_grad_()
    if beside:
        y_BTD = layer(x_BTD)
    else:
        choices = layer.list_choices(layer.router(x_BTD))
        assert (choices.chosen_NC == 3).any(1).all()
        y_BTD = layer.experts(layer.experts.op.send(x_BTD.flatten(0, 1), choices)).view_as(x_BTD)
        y_BTD = y_BTD + layer.run_shared(layer.shared, x_BTD)
    y_BTD.square().sum().backward()
    return [y_BTD.detach(), x_BTD.grad, *(p.grad for p in layer.parameters())]


def list_events(axis: Axis, name: TokenDispatcherName) -> list[str]:
    """What a layer does in turn: exchanges begun and ended, and its shared expert."""
    layer, events = make_layer(axis, name), []
    start, wait = Exchange.start, Exchange.wait
    x_BTD = draw(2, 5, WIDTH, seed=20 + axis.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "start", lambda *args, **keys: (events.append("begin"), start(*args, **keys))[1])
        patch.setattr(Exchange, "wait", lambda *args: (events.append("end"), wait(*args))[1])
        layer.shared.down.register_forward_hook(lambda *_: events.append("shared"))
        layer.shared.down.register_full_backward_hook(lambda *_: events.append("shared"))
        layer(x_BTD).sum().backward()
    return events


def run_layers(axis: Axis) -> tuple[dict[Any, list[Tensor]], dict[Any, list[str]]]:
    found = {case: run_layer(axis, *case) for case in itertools.product(DISPATCHERS, (True, False))}
    return found, {name: list_events(axis, name) for name in DISPATCHERS}


@pytest.fixture(scope="session")
def layers_on_ranks(compute_once):
    return compute_once("mixtures on one and two ranks", lambda: [run_ranks(size, run_layers) for size in (1, 2)])


def test_a_shared_expert_computes_while_tokens_travel_forward_and_backward(layers_on_ranks):
    _, [(_, events), _] = layers_on_ranks
    beside = ["begin", "shared", "end"]
    assert events["all_to_all"] == [*beside, "begin", "end", "begin", "end", *beside]
    assert events["all_gather"] == [*beside, *beside]


def test_a_shared_expert_beside_the_exchange_changes_no_bit_also_if_all_tokens_choose_one_expert(layers_on_ranks):
    [(one, _)], found = layers_on_ranks[0], [rank for rank, _ in layers_on_ranks[1]]
    for rank, name in itertools.product(range(2), DISPATCHERS):
        for ours, theirs in zip(found[rank][name, True], found[rank][name, False], strict=True):
            assert torch.equal(ours, theirs)
    for name in DISPATCHERS:
        for ours, theirs in zip(found[0][name, True][:2], one[name, True][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def built(experts: str = "experts"):
    with torch.device("meta"):
        return run_config(experts).model.build()


def test_the_rule_cuts_stacks_by_expert_and_swaps_the_dispatcher():
    model = built()
    placements = apply_plan(model, model.plan(1), Axis("tensor"), expert=EXPERT_2)
    experts = model.layers["1"].mlp.experts
    assert experts.gate_up.weight.shape == (2, 2, 24, 32)
    assert experts.down.weight.shape == (2, 32, 24)
    assert experts.op == AllToAllDispatcher(EXPERT_2)
    cut = {name: place for name, place in placements.items() if place.axis == EXPERT_2}
    assert set(cut) == {f"layers.{n}.mlp.experts.{part}.weight" for n in (0, 1) for part in ("gate_up", "down")}
    assert set(cut.values()) == {Placement(0, EXPERT_2)}
    assert model.layers["1"].mlp.router.weight.shape == (4, 32)


def test_the_dispatcher_is_the_one_of_the_configuration():
    model = built()
    apply_plan(model, model.plan(1), Axis("tensor"), expert=EXPERT_2, token_dispatcher="all_gather")
    assert model.layers["1"].mlp.experts.op == AllGatherDispatcher(EXPERT_2)


def test_without_an_expert_axis_the_dispatcher_stays():
    model = built()
    apply_plan(model, model.plan(2), Axis("tensor", 0, 2), sequence=True)
    assert model.layers["0"].mlp.experts.op == dispatch


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_have_whole_experts_whose_gradients_are_parts_under_sequence_parallelism(sequence):
    model, tensor = built(), Axis("tensor", 1, 2)
    placements = apply_plan(model, model.plan(2), tensor, sequence=sequence, expert=EXPERT_2)
    expected = Placement(0, EXPERT_2, replicas=tensor, partial=sequence)
    assert placements["layers.0.mlp.experts.down.weight"] == expected


def share_experts(model: Any, tensor: Axis, parts: Axis, **changes: Any) -> dict[str, Placement]:
    return apply_plan(model, model.plan(tensor.size), tensor, expert=EXPERT_2, expert_parts=parts, **changes)


def test_tensor_ranks_that_share_experts_have_part_of_their_features_whose_gradients_are_whole():
    model, tensor, parts = built(), Axis("tensor", 0, 2), Axis("expert_parts", 2, 4)
    placements = share_experts(model, tensor, parts, sequence=True)
    experts = model.layers["0"].mlp.experts
    assert (experts.gate_up.weight.shape, experts.down.weight.shape) == ((2, 2, 12, 32), (2, 32, 12))
    assert experts.op == TensorDispatcher(tensor, True, AllToAllDispatcher(EXPERT_2))
    assert placements["layers.0.mlp.experts.down.weight"] == Placement(0, parts, inner=2)
    regions = model.canonical_regions("layers.0.mlp.experts.down.weight", 2, 4, 2)
    assert regions == {"layers.0.mlp.experts.down.weight": (slice(2, 4), slice(None), slice(0, 12))}


def test_features_that_tensor_ranks_do_not_divide_or_no_rule_names_are_refused():
    model = built("latent")
    message = "experts.down.weight: dim 2 is 12; multiples of parallel.expert_tensor = 8, or parallel.expert_tensor = 1"
    with pytest.raises(MtError, match=re.escape(message)):
        share_experts(model, Axis("tensor", 0, 8), Axis("expert_parts", 8, 16))
    model = built()
    plan = {name: Expert() if isinstance(rule, Expert) else rule for name, rule in model.plan(2).items()}
    message = "its Expert has no inner_dim for the 2 tensor ranks that share each expert; give it one, or set parallel."
    with pytest.raises(MtError, match=re.escape(message)):
        apply_plan(model, plan, Axis("tensor", 0, 2), expert=EXPERT_2, expert_parts=Axis("expert_parts", 2, 4))


def test_a_number_of_experts_that_the_axis_does_not_divide_is_refused():
    model = built()
    with pytest.raises(MtError, match=re.escape("experts.down.weight: dim 0 is 4; multiples of parallel.expert = 3")):
        apply_plan(model, model.plan(1), Axis("tensor"), expert=Axis("expert", 0, 3))


SAVED = "expert 2 × zero1 2"


@pytest.fixture(scope="module")
def one_rank_s(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one")
    measure(run_config("shared-expert"), 1, steps=2, save=run)
    return resolve(run)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SAVED, "expert 2 × tensor 2, sequence"])
def test_whole_stacks_are_saved_and_loaded_under_another_layout(layout, one_rank_s, reference, tmp_path):
    record(run_config("shared-expert", parallel=EXPERT_LAYOUTS[layout][1]), 4, steps=2, save=tmp_path)
    for part in ("model", "optim"):
        ours, theirs = open_part(resolve(tmp_path) / part), open_part(one_rank_s / part)
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
        a, b = ({name: t[...] for name, t in stored.items() if t.shape} for stored in (ours, theirs))
        assert max(value for _, value in tensor_differences(a, b)) <= RTOL
    whole = reference["shared-expert", False]
    last = Record(whole.losses[2:], whole.norms[2:], whole.gradients[2:], whole.weights)
    for other, (ranks, parallel) in {"expert 4": EXPERT_LAYOUTS["expert 4"], "fsdp": LAYOUTS["fsdp 2"]}.items():
        resumed = record(run_config("shared-expert", parallel=parallel), ranks, steps=1, start=resolve(tmp_path))
        assert disagreements(resumed, last) == [], other
    again = record(run_config("shared-expert", parallel=EXPERT_LAYOUTS[layout][1]), 4, steps=1, start=one_rank_s)
    assert disagreements(again, last) == []


def in_bf16(axis: Axis, device: str) -> list[tuple[Tensor, ...]]:
    """Results, gradients of rows and of weights, by the loop over experts and by the grouped product."""
    from torch import distributed as dist

    if device == "cuda":
        torch.cuda.set_device(axis.rank)
        axis = Axis("expert", axis.rank, axis.size, dist.new_group(backend="nccl"))
    generator = torch.Generator().manual_seed(axis.rank)
    counts_E = torch.tensor([[30, 0, 17, 41], [3, 0, 2, 9]][axis.rank], device=device)
    x_MD = torch.randn(int(counts_E.sum()), 32, generator=generator)
    into_EFD, out_EDF = torch.randn(4, 48, 32, generator=generator), torch.randn(4, 32, 48, generator=generator)
    chosen_NC = torch.arange(4, device=device).repeat_interleave(counts_E)[:, None]
    choices = Choices(torch.ones(chosen_NC.shape, device=device), chosen_NC, None, 4)
    found = []
    for multiply in (multiply_looped, multiply_grouped):
        x, into, out = (
            t.bfloat16().to(device).requires_grad_()
            for t in (x_MD, *(w.chunk(axis.size)[axis.rank] for w in (into_EFD, out_EDF)))
        )
        feed = partial(two_products, multiply, into, out)
        dispatcher = AllToAllDispatcher(axis)
        y = dispatcher.run(dispatcher.send(x, choices), feed)
        y.float().sin().sum().backward()
        found.append(tuple(t.cpu() for t in (y.detach(), x.grad, into.grad, out.grad)))
    return found


def two_products(multiply: Any, into_EFD: Tensor, out_EDF: Tensor, x_MD: Tensor, counts_E: Tensor, _: Any) -> Tensor:
    return multiply(multiply(x_MD, into_EFD, counts_E) / 32, out_EDF, counts_E) / 32


def check_that_grouped_equals_looped(ranks: int, device: str) -> None:
    for by_loop, by_group in run_ranks(ranks, in_bf16, device):
        for ours, reference in zip(by_group, by_loop, strict=True):
            torch.testing.assert_close(ours, reference, rtol=2**-6, atol=2**-6 * reference.abs().max().item())


def test_the_grouped_product_equals_the_loop_behind_the_dispatcher():
    check_that_grouped_equals_looped(2, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_grouped_product_equals_the_loop_behind_the_dispatcher_on_gpus():
    check_that_grouped_equals_looped(min(torch.cuda.device_count(), 2), "cuda")
