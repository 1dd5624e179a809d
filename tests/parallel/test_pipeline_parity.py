"""Every schedule computes what one rank computes, in fp64, gradient by gradient, alone and with every other axis."""

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from layouts import BALANCED, DEEP, EXPERT_PIPELINES, MODELS, PIPELINES, pipeline_config, run_config
from mt_cli.verify.record import record, records
from mt_core.checkpoint.native import resolve
from mt_core.checkpoint.shard_files import open_part
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record, measure

pytestmark = pytest.mark.slow

RTOL = 1e-12
TIMEOUT_S = 600.0
RECOMPUTE = [{}, {"granularity": "full", "method": "block", "layers": 1}, {"granularity": "selective"}]
WORLDS = sorted({ranks for ranks, _, _ in (PIPELINES | EXPERT_PIPELINES).values()})


def cases(ranks: int) -> list[tuple[str, str]]:
    """Layouts of so many ranks, each with some models in turn: between them tied embeddings, dropout, experts. Layouts
    of four ranks and more, which take longest, have one model each, and all models between them."""
    names = list(PIPELINES)
    rows = [
        (layout, list(MODELS)[(names.index(layout) + shift) % len(MODELS)])
        for layout in names
        if PIPELINES[layout][0] == ranks
        for shift in ((0, 1, 3) if ranks < 4 else (0,))
    ]
    balanced = zip(EXPERT_PIPELINES, cycle(BALANCED))
    return rows + (list(balanced) if ranks == 4 else [])


def test_every_model_is_cut_into_stages_of_two_and_of_more_ranks():
    assert {model for _, model in cases(2)} >= {*MODELS}
    assert {model for _, model in cases(4)} == {*MODELS, *BALANCED}


def disagreements(record: Record, reference: Record) -> list[str]:
    return [f"{d.quantity}: {d.relative:.1e}" for d in compare_records(record, reference) if not d.relative <= RTOL]


@pytest.fixture(scope="session")
def recorded(compute_once):
    """All runs of so many ranks, on the same ranks."""

    def run(ranks: int) -> dict[tuple[str, str], Record]:
        configs = [
            pipeline_config(model, layout, recompute=RECOMPUTE[number % len(RECOMPUTE)])
            for number, (layout, model) in enumerate(cases(ranks))
        ]
        return dict(zip(cases(ranks), records(configs, ranks, timeout_s=TIMEOUT_S), strict=True))

    return lambda ranks: compute_once(f"pipelines of {ranks} ranks", lambda: run(ranks))


@pytest.mark.parametrize(("ranks", "layout", "model"), [(n, *case) for n in WORLDS for case in cases(n)])
def test_losses_norms_gradients_and_weights_of_three_steps_are_those_of_one_rank(
    ranks, layout, model, recorded, deep_reference
):
    assert disagreements(recorded(ranks)[layout, model], deep_reference[model, False]) == []


def test_documents_that_do_not_see_each_other_are_honoured_by_every_schedule(deep_reference):
    layouts = [layout for layout, (ranks, _, _) in PIPELINES.items() if ranks == 2]
    assert {pipeline_config("gqa", layout).pipeline.schedule for layout in layouts} == {*SCHEDULES}
    models = {layout: ("gqa", "learned-biased")[number % 2] for number, layout in enumerate(layouts)}
    configs = [pipeline_config(model, layout) for layout, model in models.items()]
    for model, found in zip(models.values(), records(configs, 2, documents=True, timeout_s=TIMEOUT_S), strict=True):
        assert disagreements(found, deep_reference[model, True]) == []
        assert disagreements(found, deep_reference[model, False]) != []


def test_twenty_steps_of_a_tied_model_end_with_the_weights_of_one_rank():
    config = pipeline_config("repeated-groups", "zbv 4")
    one = measure(run_config("repeated-groups", config.model.layers), 1, steps=20)
    assert disagreements(record(config, 4, steps=20), one) == []


def test_compiled_blocks_compute_the_same_under_every_schedule():
    layouts = [layout for layout, (ranks, _, _) in PIPELINES.items() if ranks == 2]
    plain = run_config("gqa", DEEP)
    # compiled on a CPU, torch's own attention takes no mask in fp64
    attention = plain.model.attention.model_copy(update={"core": "eager"})
    model = plain.model.model_copy(update={"attention": attention})
    compiled = plain.runtime.model_copy(update={"compile": True})
    changes = {"model": model, "runtime": compiled}
    configs = [pipeline_config("gqa", each).model_copy(update=changes) for each in layouts]
    one = measure(plain.model_copy(update={"model": model}), 1, steps=1, documents=True)
    for found in records(configs, 2, steps=1, documents=True, timeout_s=TIMEOUT_S):
        assert disagreements(found, one) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two steps of two ranks with several stages each."""
    run = tmp_path_factory.mktemp("stages")
    record(pipeline_config("mha-tied", "interleaved 2 of 3 stages"), 2, steps=2, save=run)
    return resolve(run)


@pytest.fixture(scope="module")
def last_step() -> Record:
    """The third step of an unbroken run on one rank."""
    whole = measure(run_config("mha-tied", DEEP), 1)
    return Record(whole.losses[2:], whole.norms[2:], whole.gradients[2:], whole.weights, whole.metrics[2:])


class TestCheckpoints:
    """They know no stages: each layout loads what any other saved, and saves the same bytes."""

    def others(self) -> list[tuple[int, Any]]:
        """Ranks and configurations of other layouts."""
        tensor = run_config("mha-tied", DEEP, parallel={"tensor": 2})
        names = ["1f1b 4, ends alone", "zbv 2", "interleaved 2 × zero1 2", "1f1b 2 × fsdp 2"]
        pipelines = [(PIPELINES[name][0], pipeline_config("mha-tied", name)) for name in names]
        return [(1, run_config("mha-tied", DEEP)), (2, tensor), *pipelines]

    def test_a_checkpoint_moves_between_layouts_without_a_changed_bit(self, saved, tmp_path):
        for number, (ranks, config) in enumerate(self.others()):
            record(config, ranks, steps=0, start=saved, save=tmp_path / str(number))
            for part in ("model", "optim"):
                moved, original = open_part(resolve(tmp_path / str(number)) / part), open_part(saved / part)
                assert moved.keys() == original.keys()
                assert all((moved[name][...] == original[name][...]).all() for name in original)

    def test_every_layout_goes_on_as_one_rank(self, saved, last_step):
        for ranks, config in self.others():
            assert disagreements(record(config, ranks, steps=1, start=saved), last_step) == []

    def test_the_same_layout_goes_on_bit_for_bit(self, saved):
        config = pipeline_config("mha-tied", "interleaved 2 of 3 stages")
        whole, resumed = record(config, 2), record(config, 2, steps=1, start=saved)
        assert resumed.losses == whole.losses[2:]
        assert all((resumed.weights[name] == whole.weights[name]).all() for name in whole.weights)
