"""Every schedule computes what one rank computes, in fp64, gradient by gradient, alone and with every other axis."""

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from layouts import (
    BALANCED,
    DEEP,
    EXPERT_PIPELINES,
    LONG,
    MODELS,
    PIPELINES,
    SAMPLES,
    STEADY,
    STEPS,
    data_ranks,
    get_length,
    pipeline_config,
    run_config,
    runtime_config,
)
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


def cases(ranks: int) -> list[tuple[str, str, int]]:
    """Layouts of so many ranks, each with a model and its steps, and where two ranks are quick with two models more:
    between them tied embeddings, dropout, experts that drop tokens and that do not."""
    names = list(PIPELINES)
    rows = [
        (layout, list(MODELS)[(names.index(layout) + shift) % len(MODELS)], 3 if shift or layout not in LONG else STEPS)
        for layout in names
        if PIPELINES[layout][0] == ranks
        for shift in ((0, 1, 3) if ranks == 2 else (0,))
    ]
    balanced = zip(EXPERT_PIPELINES, cycle((*BALANCED, "experts")))
    return rows + [
        (layout, model, STEPS if layout in LONG else 3)
        for layout, model in balanced
        if EXPERT_PIPELINES[layout][0] == ranks
    ]


def config_of(layout: str, model: str, steps: int) -> Any:
    """With one sample in a micro-batch, or two where the schedule takes half as many micro-batches in a long run."""
    ranks, parallel, pipeline = (PIPELINES | EXPERT_PIPELINES)[layout]
    length = get_length(layout)
    takes_half = "microbatch_group_size" not in pipeline and (pipeline.get("schedule") != "dualpipev" or length == 2)
    halved = steps == STEPS and takes_half and data_ranks(ranks, parallel | {"pipeline": length}) == 1
    number = [*PIPELINES, *EXPERT_PIPELINES].index(layout)
    recompute, sums = RECOMPUTE[number % len(RECOMPUTE)], ("fused", "separate")[number % 2]
    batch = {"micro_batch": 1 + halved, "global_batch": SAMPLES}
    optim = {"optim": STEADY} if steps == STEPS else {}
    runtime = runtime_config(sums, parallel)
    return pipeline_config(model, layout, recompute=recompute, batch=batch, runtime=runtime, **optim)


def test_every_model_is_cut_into_stages_of_two_and_of_more_ranks():
    assert {model for _, model, _ in cases(2)} >= {*MODELS}
    assert {model for _, model, _ in cases(4)} == {*MODELS, *BALANCED}


def test_every_schedule_runs_twenty_steps_on_two_ranks_and_on_four_also_with_tied_models():
    rows = [(layout, model) for n in WORLDS for layout, model, steps in cases(n) if steps == STEPS]
    lengths = {(layout.split()[0], get_length(layout)) for layout, _ in rows if " × " not in layout}
    assert lengths >= {(schedule, length) for schedule in SCHEDULES for length in (2, 4)}
    assert {model for _, model in rows} >= {*MODELS}


def disagreements(record: Record, reference: Record) -> list[str]:
    return [f"{d.quantity}: {d.relative:.1e}" for d in compare_records(record, reference) if not d.relative <= RTOL]


@pytest.fixture(scope="session")
def recorded(compute_once):
    """All runs of so many ranks and steps, on the same ranks."""

    def run(ranks: int, steps: int) -> dict[tuple[str, str], Record]:
        chosen = [(layout, model) for layout, model, count in cases(ranks) if count == steps]
        configs = [config_of(*case, steps) for case in chosen]
        options = {"steps": steps, "gradient_steps": 3, "timeout_s": TIMEOUT_S}
        return dict(zip(chosen, records(configs, ranks, **options), strict=True))

    return lambda ranks, steps: compute_once(f"pipelines of {ranks} ranks, {steps} steps", lambda: run(ranks, steps))


@pytest.fixture(scope="session")
def one_rank(compute_once, deep_reference):
    """The same steps of a model on one rank."""

    def run(model: str, steps: int) -> Record:
        config = run_config(model, DEEP, batch={"micro_batch": SAMPLES, "global_batch": SAMPLES}, optim=STEADY)
        return measure(config, 1, steps=steps, gradient_steps=3)

    def get(model: str, steps: int) -> Record:
        if steps == 3:
            return deep_reference[model, False]
        return compute_once(f"{model}, {steps} steps on one rank", lambda: run(model, steps))

    return get


@pytest.mark.parametrize(("ranks", "layout", "model", "steps"), [(n, *case) for n in WORLDS for case in cases(n)])
def test_losses_norms_gradients_and_weights_of_all_steps_are_those_of_one_rank(
    ranks, layout, model, steps, recorded, one_rank
):
    assert disagreements(recorded(ranks, steps)[layout, model], one_rank(model, steps)) == []


def layouts_by_schedule() -> list[str]:
    """A layout of two ranks for every schedule."""
    layouts = {pipeline.get("schedule", "1f1b"): name for name, (n, _, pipeline) in PIPELINES.items() if n == 2}
    assert layouts.keys() == SCHEDULES.keys()
    return [*layouts.values()]


def test_documents_that_do_not_see_each_other_are_honoured_by_every_schedule(deep_reference):
    layouts = layouts_by_schedule()
    models = {layout: ("gqa", "learned-biased")[number % 2] for number, layout in enumerate(layouts)}
    configs = [pipeline_config(model, layout) for layout, model in models.items()]
    for model, found in zip(models.values(), records(configs, 2, documents=True, timeout_s=TIMEOUT_S), strict=True):
        assert disagreements(found, deep_reference[model, True]) == []
        assert disagreements(found, deep_reference[model, False]) != []


def test_compiled_blocks_compute_the_same_under_every_schedule():
    plain = run_config("gqa", DEEP)
    # compiled on a CPU, torch's own attention takes no mask in fp64
    attention = plain.model.attention.model_copy(update={"core": "eager"})
    model = plain.model.model_copy(update={"attention": attention})
    compiled = plain.runtime.model_copy(update={"compile": True})
    changes = {"model": model, "runtime": compiled}
    configs = [pipeline_config("gqa", each).model_copy(update=changes) for each in layouts_by_schedule()]
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
