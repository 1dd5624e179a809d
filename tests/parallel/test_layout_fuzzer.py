"""Random legal layouts of up to eight ranks compute what one rank computes."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from layouts import BALANCED, DEEP, MODELS, SAMPLES, run_config
from mt_cli.verify.record import record
from mt_core.parallel.layout import problems
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.verification.compare import compare_records

pytestmark = pytest.mark.slow

RTOL = 1e-12


@st.composite
def layouts(draw: st.DrawFn, experts: bool = False, most: int = 8) -> tuple[int, str, dict[str, Any]]:
    """Ranks, a model, and the sections `parallel`, `recompute` and `batch`; with `experts`, an expert axis."""
    tensor = draw(st.sampled_from([size for size in (1, 2, 4) if size <= most]))
    context = draw(st.sampled_from([size for size in (1, 2, 4) if tensor * size <= most]))
    data = draw(st.sampled_from([size for size in (1, 2, 4, 8) if tensor * context * size <= most]))
    exchanges = ["ring", "all_gather"] + (["all_to_all"] if tensor * context <= 2 else [])
    parallel = {
        "tensor": tensor,
        "context": context,
        "data": data,
        "sequence": tensor > 1 and draw(st.booleans()),
        "cp_comm_type": draw(st.sampled_from(exchanges)),
        "sharding": draw(st.sampled_from(["replicate", "zero1", "fsdp"])),
        "overlap_grad_reduce": draw(st.booleans()),
        "overlap_param_gather": draw(st.booleans()),
        "bucket_size": draw(st.sampled_from([1, 2000, 100_000])),
    }
    if parallel["sharding"] != "replicate":
        sizes = [size for size in range(1, data * context + 1) if data * context % size == 0]
        parallel["shard_size"] = draw(st.sampled_from([None, *sizes]))
    if experts:
        assume(data * context > 1)
        parallel["expert"] = draw(st.sampled_from([size for size in (2, 4) if data * context % size == 0]))
        parallel["token_dispatcher"] = draw(st.sampled_from(["all_to_all", "all_gather"]))
        parallel["expert_tensor"] = draw(st.sampled_from([1, None]))
    granularity = draw(st.sampled_from(["none", "selective", "full"]))
    recompute = {
        "granularity": granularity,
        "method": draw(st.sampled_from(["uniform", "block"])),
        "layers": draw(st.sampled_from([1, 2])),
    }
    micro = draw(st.sampled_from([size for size in (1, 2, 4, 8) if size * data <= SAMPLES]))
    sections = {"parallel": parallel, "recompute": recompute}
    sections["batch"] = {"micro_batch": micro, "global_batch": SAMPLES}
    models = ["experts", *BALANCED] if experts else list(MODELS)
    return tensor * context * data, draw(st.sampled_from(models)), sections


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, str, dict[str, Any]]:
    """The same with stages: every schedule, layers cut anywhere, and every other axis, the experts' too."""
    length = draw(st.sampled_from([2, 3, 4]))
    ranks, model, sections = draw(layouts(experts=draw(st.booleans()), most=8 // length))
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    fewest, most = SCHEDULES[schedule].chunks
    chunks = draw(st.integers(fewest, most or 3))
    count = length * chunks
    cuts = sorted(draw(st.lists(st.integers(0, DEEP), min_size=count - 1, max_size=count - 1)))
    layout = "E" + "|".join("t" * (end - start) for start, end in pairwise([0, *cuts, DEEP])) + "L"
    sections["parallel"] |= {"pipeline": length}
    sections["pipeline"] = {"schedule": schedule, "virtual_stages": chunks, "layout": layout}
    if SCHEDULES[schedule].generated:
        lengths = st.lists(st.sampled_from([0.5, 1, 2]), min_size=3, max_size=3)
        sections["pipeline"]["pass_times"] = draw(st.none() | st.lists(lengths, min_size=count, max_size=count))
    config = run_config(model, DEEP, **sections)
    assume(not list(problems(config, ranks * length)))
    return ranks * length, model, sections


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layouts(), st.booleans())
def test_a_random_layout_agrees_with_one_rank(reference, drawn, documents):
    ranks, model, sections = drawn
    note(f"{ranks} ranks, {model}, {sections}, documents {documents}")
    found = record(run_config(model, **sections), ranks, documents=documents)
    wrong = [d for d in compare_records(found, reference[model, documents]) if not d.relative <= RTOL]
    assert wrong == []


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pipelines(), st.booleans())
def test_random_stages_agree_with_one_rank(deep_reference, drawn, documents):
    ranks, model, sections = drawn
    note(f"{ranks} ranks, {model}, {sections}, documents {documents}")
    found = record(run_config(model, DEEP, **sections), ranks, documents=documents)
    wrong = [d for d in compare_records(found, deep_reference[model, documents]) if not d.relative <= RTOL]
    assert wrong == []
