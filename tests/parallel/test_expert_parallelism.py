"""Experts cut over ranks: what one rank computes, in fp64, gradient by gradient; from and to any checkpoint."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor

from layouts import BALANCED, EXPERT_LAYOUTS, LAYOUTS, SAMPLES, data_ranks, run_config
from mt_cli.verify.record import record, records
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.parallel.expert.dispatcher import ExpertDispatch, dispatch
from mt_core.parallel.tensor.plan import Placement, apply_plan
from mt_core.verification.compare import compare_records, tensor_differences
from mt_core.verification.measure import Record, measure
from mt_core.verification.ranks import run_ranks
from mt_models.layers.moe import multiply_grouped, multiply_looped
from parallel.test_layout_fuzzer import layouts
from parallel.test_parity_matrix import RTOL, VARIANTS, disagreements

EXPERT_2 = Axis("expert", 1, 2)
"""The second of two ranks."""


def cases(layout: str) -> list[tuple[str, str]]:
    """Model and variant; those of a model change from layout to layout."""
    first = list(EXPERT_LAYOUTS).index(layout)
    return [(model, list(VARIANTS)[(first + n) % 4]) for n, model in enumerate(("experts", *BALANCED))]


def config_of(layout: str, model: str, variant: str) -> Any:
    ranks, parallel = EXPERT_LAYOUTS[layout]
    accumulation, recompute = VARIANTS[variant]
    micro = max(1, SAMPLES // data_ranks(ranks, parallel) // accumulation)
    return run_config(
        model, parallel=parallel, recompute=recompute, batch={"micro_batch": micro, "global_batch": SAMPLES}
    )


@pytest.fixture(scope="session")
def recorded(compute_once) -> Callable[[str], dict[tuple[str, str], Record]]:
    """All runs of a layout, on the same ranks."""

    def run(layout: str) -> dict[tuple[str, str], Record]:
        configs = [config_of(layout, *case) for case in cases(layout)]
        return dict(zip(cases(layout), records(configs, EXPERT_LAYOUTS[layout][0]), strict=True))

    return lambda layout: compute_once(f"expert parity, {layout}", lambda: run(layout))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model", "variant"), [(each, *case) for each in EXPERT_LAYOUTS for case in cases(each)]
)
def test_losses_norms_gradients_and_weights_of_three_steps_are_those_of_one_rank(
    layout, model, variant, recorded, reference
):
    assert disagreements(recorded(layout)[model, variant], reference[model, False]) == []


def test_every_variant_is_somewhere_in_it():
    assert {variant for layout in EXPERT_LAYOUTS for _, variant in cases(layout)} == {*VARIANTS}


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layouts(experts=True))
def test_a_random_layout_with_an_expert_axis_agrees_with_one_rank(reference, drawn):
    ranks, model, sections = drawn
    note(f"{ranks} ranks, {sections}")
    found = record(run_config(model, **sections), ranks)
    assert [d for d in compare_records(found, reference[model, False]) if not d.relative <= RTOL] == []


ROWS = {
    "uneven": [[5, 0, 3, 4], [1, 2, 9, 2]],
    "nobody goes to the first rank": [[0, 0, 3, 4], [0, 0, 1, 2]],
    "nobody stays": [[0, 0, 2, 1], [3, 2, 0, 0]],
    "one rank has no tokens": [[0, 0, 0, 0], [1, 2, 3, 2]],
    "no rows at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
}
"""Rows that each of two ranks has for each of four experts."""


def drawn_rows(counts: list[int], rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(counts), 6, generator=generator, dtype=torch.float64)


def weights() -> Tensor:
    return torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def dispatched(axis: Axis, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Results, gradients of the rows and of this rank's experts."""
    counts = rows[axis.rank]
    x_MD = drawn_rows(counts, axis.rank).requires_grad_()
    mine_EDD = weights().chunk(axis.size)[axis.rank].clone().requires_grad_()
    y_MD = ExpertDispatch(axis)(x_MD, torch.tensor(counts), lambda x, n: multiply_looped(x, mine_EDD, n).sin())
    y_MD.square().sum().backward()
    return y_MD.detach(), x_MD.grad, mine_EDD.grad


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_reach_their_experts_and_come_back_in_their_order(rows):
    found = run_ranks(2, dispatched, rows)
    w_EDD = weights().requires_grad_()
    for rank, (y_MD, g_MD, _) in enumerate(found):
        x_MD = drawn_rows(rows[rank], rank).requires_grad_()
        expected_MD = dispatch(x_MD, torch.tensor(rows[rank]), lambda x, n: multiply_looped(x, w_EDD, n).sin())
        expected_MD.square().sum().backward()
        torch.testing.assert_close(y_MD, expected_MD, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(g_MD, x_MD.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([g for *_, g in found]), w_EDD.grad, rtol=1e-12, atol=1e-12)


def built(experts: str = "experts"):
    with torch.device("meta"):
        return run_config(experts).model.build()


def test_the_rule_cuts_stacks_by_expert_and_swaps_the_dispatcher():
    model = built()
    placements = apply_plan(model, model.plan(1), Axis("tensor"), expert=EXPERT_2)
    experts = model.layers["1"].mlp.experts
    assert experts.gate_up.weight.shape == (2, 2, 24, 32)
    assert experts.down.weight.shape == (2, 32, 24)
    assert experts.op == ExpertDispatch(EXPERT_2)
    cut = {name: place for name, place in placements.items() if place.axis == EXPERT_2}
    assert set(cut) == {f"layers.{n}.mlp.experts.{part}.weight" for n in (0, 1) for part in ("gate_up", "down")}
    assert set(cut.values()) == {Placement(0, EXPERT_2)}
    assert model.layers["1"].mlp.router.weight.shape == (4, 32)


def test_without_an_expert_axis_the_dispatcher_stays():
    model = built()
    apply_plan(model, model.plan(2), Axis("tensor", 0, 2), sequence=True)
    assert model.layers["0"].mlp.experts.op is dispatch


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_have_whole_experts_whose_gradients_are_parts_under_sequence_parallelism(sequence):
    model, tensor = built(), Axis("tensor", 1, 2)
    placements = apply_plan(model, model.plan(2), tensor, sequence=sequence, expert=EXPERT_2)
    expected = Placement(0, EXPERT_2, replicas=tensor, partial=sequence)
    assert placements["layers.0.mlp.experts.down.weight"] == expected


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
    found = []
    for multiply in (multiply_looped, multiply_grouped):
        x, into, out = (
            t.bfloat16().to(device).requires_grad_()
            for t in (x_MD, *(w.chunk(axis.size)[axis.rank] for w in (into_EFD, out_EDF)))
        )
        feed = partial(two_products, multiply, into, out)
        y = ExpertDispatch(axis)(x, counts_E, feed)
        y.float().sin().sum().backward()
        found.append(tuple(t.cpu() for t in (y.detach(), x.grad, into.grad, out.grad)))
    return found


def two_products(multiply: Any, into_EFD: Tensor, out_EDF: Tensor, x_MD: Tensor, counts_E: Tensor) -> Tensor:
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
