"""A model that ranks share gives every request what the whole model gives it."""

from functools import partial

import pytest
import torch

from eval.generation.families import make_family
from eval.generation.test_engine import GREEDY, SMALL, finish, make_requests, strip
from mt_core.distributed.mesh import Axis, make_mesh
from mt_core.distributed.topology import ParallelDims
from mt_core.errors import MtError
from mt_core.verification.ranks import run_ranks
from mt_eval.generation.engine import Engine
from mt_eval.generation.ranks.cut import make_part
from mt_eval.generation.ranks.shared_model import Calls, SharedModel, follow
from mt_eval.generation.requests import BeamOptions, Request
from mt_models.canonical import canonical_state

CPU = torch.device("cpu")
REQUESTS = make_requests(8, "ranks")
ALIKE = Request(tuple(range(5, 26)), 12, GREEDY, log_probs=3, prompt_log_probs=True)
BEAMS = Request((5, 6, 7), 6, beams=BeamOptions(3))


def share(dims, family, dtype, work):
    """What the first rank's work with the shared model returns; the others follow."""
    torch.set_num_threads(1)
    whole = make_family(family, dtype)
    calls = Calls()
    part = make_part(whole.config, make_mesh(dims), CPU, dtype, canonical_state(whole).items())
    if torch.distributed.get_rank():
        return follow(part, calls)
    model = SharedModel(part, calls)
    try:
        return work(model)
    finally:
        model.end()


def generate(family, model):
    """Outputs of requests together, of each alone, and the features of a whole sequence."""
    engine = Engine(model, SMALL)
    together = [strip(outputs) for outputs in finish(engine, *REQUESTS)]
    assert engine.stats.free_blocks == engine.stats.total_blocks
    alone = [strip(*finish(engine, request)) for request in REQUESTS]
    with pytest.raises(MtError, match="model: has an engine already; use that one"):
        Engine(model, SMALL)
    (beams,) = finish(engine, BEAMS)
    tokens_BT = torch.arange(12).view(2, 6)
    return together, alone, beams[0].beams, model.logits(model.hidden(tokens_BT))


def run_shared(_: Axis, dims, family, dtype=torch.float64):
    """All that a rank of the shared model does."""
    return share(dims, family, dtype, partial(generate, family))


@pytest.mark.parametrize(
    ("family", "dims"),
    [
        ("llama", ParallelDims(tensor=2)),  # a key/value head for each rank
        ("llama", ParallelDims(tensor=4)),  # each key/value head on two ranks
        ("gpt2", ParallelDims(tensor=2)),
        ("gemma2", ParallelDims(pipeline=2)),  # windows on the first stage only
        ("mla", ParallelDims(tensor=2)),
        ("moe", ParallelDims(tensor=2, pipeline=2)),
    ],
)
def test_ranks_generate_what_one_rank_does(family, dims):
    """Greedy and drawn tokens in fp64, alone as together to the last bit."""
    whole = make_family(family, torch.float64)
    engine = Engine(whole, SMALL)
    expected = [strip(outputs) for outputs in finish(engine, *REQUESTS)]
    together, alone, beams, logits_BTV = run_ranks(dims.ranks, run_shared, dims, family)[0]
    assert [[o[0] for o in outputs] for outputs in together] == [[o[0] for o in outputs] for outputs in expected]
    assert together == alone
    (expected_beams,) = finish(engine, BEAMS)
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in expected_beams[0].beams]
    torch.testing.assert_close(logits_BTV, whole(torch.arange(12).view(2, 6)), rtol=0, atol=1e-11)
    for actual, outputs in zip(together, expected, strict=True):
        log_probs = [[o[1] for o in each if o[1] is not None] for each in (actual, outputs)]
        torch.testing.assert_close(*map(torch.tensor, log_probs), rtol=0, atol=1e-11)


def score(model):
    """A greedy text with the log-probabilities of all its tokens."""
    return finish(Engine(model, SMALL), ALIKE)[0]


def run_scored(_: Axis, dims):
    """`score` on shared ranks, in fp32."""
    return share(dims, "llama", torch.float32, score)


def test_decoding_on_ranks_equals_a_full_pass():
    """fp32, prefill in chunks and decoding on tensor and pipeline ranks, against one pass of the whole model."""
    outputs = run_ranks(4, run_scored, ParallelDims(tensor=2, pipeline=2))[0]
    text = [*ALIKE.prompt, *(output.token for output in outputs)]
    expected_TV = make_family("llama")(torch.tensor([text]))[0].double().log_softmax(-1)
    expected = expected_TV[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    prompt = [score.log_prob for score in outputs[0].prompt_log_probs[1:]]
    actual = torch.tensor([*prompt, *(output.log_prob for output in outputs)], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def refuse(_: Axis, dims, family):
    """What this rank says of a layout that the model does not have."""
    whole = make_family(family)
    with pytest.raises(MtError) as refused:
        make_part(whole.config, make_mesh(dims), CPU, torch.float32, canonical_state(whole).items())
    return str(refused.value)


def test_layouts_that_a_model_does_not_have_are_refused():
    stages = run_ranks(3, refuse, ParallelDims(pipeline=3), "llama")
    assert stages == ["--pipeline: 3 stages for 2 layers; at most 2"] * 3
    heads = run_ranks(3, refuse, ParallelDims(tensor=3), "gpt2")
    assert "multiples of parallel.tensor = 3" in heads[0]
