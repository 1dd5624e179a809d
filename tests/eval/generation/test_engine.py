"""The engine gives each request what a full pass of the model gives it, whatever else it does."""

import copy
import math
import random

import pytest
import torch

from eval.generation.families import FAMILIES, make_family
from mt_core.errors import MtError
from mt_eval.generation.engine import Engine, EngineOptions
from mt_eval.generation.requests import Request
from mt_eval.generation.sampling import SamplingOptions

GREEDY = SamplingOptions(top_k=1)
SMALL = EngineOptions(blocks=24, block_size=4, chunk_tokens=9, max_running=4)


def finish(engine, *requests):
    """The outputs of each request, all added at once."""
    numbers = [engine.add(request) for request in requests]
    outputs = {number: [] for number in numbers}
    while not engine.idle:
        for output in engine.step():
            outputs[output.request].append(output)
    return [outputs[number] for number in numbers]


def strip(outputs):
    """Everything but the ids of requests, which depend on their order."""
    return [(o.token, o.log_prob, o.alternatives, o.prompt_log_probs, o.finish, o.error) for o in outputs]


def make_requests(count, seed):
    """Requests of all kinds; many begin alike."""
    rng, stems = random.Random(seed), [tuple(random.Random(n).choices(range(97), k=23)) for n in range(2)]
    samplings = [GREEDY, SamplingOptions(), SamplingOptions(0.7, top_k=5), SamplingOptions(1.2, top_p=0.8)]
    samplings.append(SamplingOptions(top_p=0.9, top_p_decay=0.9, top_p_bound=0.2))
    return [
        Request(
            (*rng.choice(stems)[: rng.randint(1, 23)], *rng.choices(range(97), k=rng.choice([0, 1, 6]))),
            rng.randint(0, 9),
            rng.choice(samplings),
            seed=rng.randint(0, 5),
            ends=frozenset(rng.choices(range(97), k=3)),
            log_probs=rng.choice([None, 0, 2]),
            prompt_log_probs=rng.random() < 0.3,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_those_of_a_full_pass(name):
    """fp32 decoding, prefill in chunks, against one pass without a cache, to 1e-5."""
    model = make_family(name)
    request = Request(tuple(range(5, 26)), 12, GREEDY, log_probs=3, prompt_log_probs=True)
    (outputs,) = finish(Engine(model, SMALL), request)
    text = [*request.prompt, *(output.token for output in outputs)]
    expected_TV = model(torch.tensor([text]))[0].double().log_softmax(-1)
    prompt = [score and score.log_prob for score in outputs[0].prompt_log_probs]
    actual = torch.tensor([*prompt[1:], *(output.log_prob for output in outputs)], dtype=torch.float64)
    chosen = expected_TV[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    torch.testing.assert_close(actual, chosen, rtol=0, atol=1e-5)
    assert prompt[0] is None
    for output, row in zip(outputs, expected_TV[len(request.prompt) - 1 :], strict=False):
        ids, scores = zip(*output.alternatives, strict=True)
        assert list(ids) == row.topk(3).indices.tolist()
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), row.topk(3).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_request_does_not_depend_on_the_others_to_the_last_bit(name):
    """Random arrivals and removals, chunks, blocks and prefixes, against each request alone."""
    model, rng = make_family(name), random.Random(name)
    requests = make_requests(12, name)
    alone = [strip(*finish(Engine(model, EngineOptions(blocks=16, prefix_reuse=False)), r)) for r in requests]
    engine = Engine(model, SMALL)
    todo, numbers, outputs = list(enumerate(requests)), {}, {}
    while todo or not engine.idle:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if todo:
                number, request = todo.pop()
                numbers[engine.add(request)] = number
                engine.add(rng.choice(requests))  # one of many that nobody waits for
        if rng.random() < 0.3:
            engine.remove(rng.randint(1, max(numbers, default=1) + 1) // 2 * 2)  # those have even ids
        for output in engine.step():
            outputs.setdefault(output.request, []).append(output)
    assert [strip(outputs[number]) for number in sorted(numbers, key=numbers.get)] == alone
    assert engine.stats.prefix_hits > 0
    assert engine.stats.free_blocks == engine.stats.total_blocks


def test_blocks_return_to_the_start_after_a_thousand_requests():
    engine, rng, numbers = Engine(make_family("mistral"), SMALL), random.Random(0), []
    for request in make_requests(1000, 0):
        numbers.append(engine.add(request))
        if rng.random() < 0.9:
            engine.remove(rng.choice(numbers[-8:]))
        if rng.random() < 0.1:
            engine.step()
    for number in numbers:
        engine.remove(number)
    stats, pool = engine.stats, engine.cached.pool
    assert (stats.running, stats.waiting, stats.free_blocks, stats.total_blocks) == (0, 0, 24, 24)
    assert (pool.available, engine.idle, engine.step()) == (24, True, [])


def test_a_request_waits_for_blocks_and_starts_when_they_are_free():
    engine = Engine(make_family("llama"), EngineOptions(blocks=4, block_size=4, chunk_tokens=8, max_running=4))
    first, second = (engine.add(Request((number, 2, 3, 4, 5), 8, GREEDY)) for number in (1, 9))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 1)
    engine.remove(first)
    assert engine.stats.free_blocks == 4
    outputs = [output for _ in range(8) for output in engine.step()]
    assert [output.request for output in outputs] == [second] * 8
    assert outputs[-1].finish == "length"
    assert engine.idle


def test_a_prefix_that_was_computed_is_taken_from_the_cache():
    engine = Engine(make_family("llama"), SMALL)
    prompt = tuple(range(20))
    (first,) = finish(engine, Request(prompt, 2, GREEDY))
    assert engine.stats.prefix_hits == 0
    (second,) = finish(engine, Request(prompt, 2, GREEDY))
    assert engine.stats.prefix_hits == 16  # the last token is computed in any case
    assert strip(second) == strip(first)
    finish(engine, Request((*prompt[:9], 50, 51), 2, GREEDY))
    assert engine.stats.prefix_hits == 16 + 8
    finish(engine, *(Request((number,) * 40, 20, GREEDY) for number in range(40, 44)))  # these need all blocks
    finish(engine, Request(prompt, 2, GREEDY))
    assert engine.stats.prefix_hits == 16 + 8


def test_windows_of_all_layers_need_few_blocks():
    options = EngineOptions(blocks=5, block_size=4, chunk_tokens=8, max_running=1)
    (outputs,) = finish(Engine(make_family("mistral"), options), Request(tuple(range(50)), 14, GREEDY))
    (expected,) = finish(Engine(make_family("mistral")), Request(tuple(range(50)), 14, GREEDY))
    assert strip(outputs) == strip(expected)


def test_a_block_that_one_request_leaves_and_another_has_is_not_free():
    """Two requests begin alike; each comes to have four blocks of its own, which five blocks are too few for."""
    model = make_family("mistral", window=10)
    options = EngineOptions(blocks=5, block_size=4, chunk_tokens=2, max_running=2)
    request = Request(tuple(range(13)), 10, GREEDY)
    engine = Engine(model, options)
    first = engine.add(request)
    for _ in range(6):
        assert engine.step() == []
    second = engine.add(request)
    outputs = {first: [], second: []}
    while not engine.idle:
        for output in engine.step():
            outputs[output.request].append(output)
    (expected,) = finish(Engine(model), request)
    assert [strip(each) for each in outputs.values()] == [strip(expected)] * 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request((1,) * 60, 5),
            "prompt: 60 tokens and 5 new ones exceed the model's 64 positions; at most 64 together",
        ),
        (Request((97,), 5), "prompt: token 97 is not in the vocabulary; ids below 97"),
        (Request((1,) * 30, 8), "prompt: needs 10 blocks of 4 tokens, the cache has 9; a larger cache"),
    ],
)
def test_what_can_never_run_is_refused(request_, message):
    engine = Engine(make_family("llama"), EngineOptions(blocks=9, block_size=4))
    with pytest.raises(MtError, match=message):
        engine.add(request_)
    assert engine.idle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gib": 0.0}, "cache_gib: 0.0; above 0"),
        ({"blocks": 0}, "blocks: 0; 1 or more"),
        ({"block_size": 12}, "block_size: 12; a power of 2 from 1 to 128"),
        ({"max_running": 0}, "max_running: 0; 1 or more"),
        ({"chunk_tokens": 4, "max_running": 8}, "chunk_tokens: 4; max_running = 8 or more"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(options, message):
    with pytest.raises(MtError, match=message):
        EngineOptions(**options)


def test_a_step_has_as_many_tokens_as_suit_the_device():
    assert Engine(make_family("llama")).cached.chunk_tokens == EngineOptions().choose_chunk("cpu") == 256
    assert EngineOptions().choose_chunk("cuda") == 2048
    assert EngineOptions(max_running=3000).choose_chunk("cuda") == 3000
    assert EngineOptions(chunk_tokens=64).choose_chunk("cuda") == 64


def test_the_cache_has_the_memory_that_it_is_given_and_no_more_than_it_can_use():
    model = make_family("llama")  # a block of 16 tokens has 16 · 2 layers · 2 · 2 groups · 8 features · 4 bytes
    assert Engine(model, EngineOptions(cache_gib=100 * 4096 / 2**30)).stats.total_blocks == 100
    assert Engine(model, EngineOptions(max_running=3)).stats.total_blocks == 3 * 4


def test_no_new_tokens_are_an_output_without_a_token():
    plain, scored = finish(
        Engine(make_family("llama")), Request((1, 2), 0), Request((1, 2), 0, prompt_log_probs=True, log_probs=1)
    )
    assert [(o.token, o.finish, o.prompt_log_probs) for o in plain] == [(None, "length", None)]
    (output,) = scored
    assert (output.token, output.finish, output.prompt_log_probs[0]) == (None, "length", None)
    assert len(output.prompt_log_probs[1].alternatives) == 1


def test_nan_ends_the_request_that_has_it_and_the_others_go_on():
    broken, requests = copy.deepcopy(make_family("llama")), [Request((1, 2), 3, GREEDY), Request((96, 5), 3, GREEDY)]
    with torch.no_grad():
        broken.embed.weight[96] = math.nan
    engine = Engine(broken, EngineOptions(blocks=8, block_size=4, chunk_tokens=8, max_running=4))
    for _ in range(2):  # what the first one leaves in the cache reaches none that follows
        good, bad = finish(engine, *requests)
        assert strip(good) == strip(*finish(Engine(make_family("llama")), requests[0]))
        assert [(o.token, o.finish) for o in bad] == [(None, "error")]
        assert bad[0].error.startswith("after token 2: the model computes NaN or infinite logits here; look for NaN")
    (scored,) = finish(engine, Request((1, 96, 5), 3, GREEDY, prompt_log_probs=True))
    assert scored[0].error.startswith("after token 2: ")


def test_nan_does_not_reach_what_others_take_of_its_prompt():
    broken, prompt = copy.deepcopy(make_family("llama")), tuple(range(8))
    with torch.no_grad():
        broken.embed.weight[96] = math.nan
    engine = Engine(broken, SMALL)
    (bad,) = finish(engine, Request((*prompt, 96), 3, GREEDY))
    assert bad[0].finish == "error"
    (good,) = finish(engine, Request((*prompt, 1), 3, GREEDY))
    assert engine.stats.prefix_hits == 8
    assert strip(good) == strip(*finish(Engine(make_family("llama")), Request((*prompt, 1), 3, GREEDY)))


def test_samples_of_a_prompt_differ_and_equal_seeds_do_not():
    requests = [Request((1, 2), 12, seed=seed, sample=sample) for seed, sample in ((0, 0), (0, 0), (0, 1), (1, 0))]
    first, same, sample, seed = (
        [o.token for o in outputs] for outputs in finish(Engine(make_family("llama")), *requests)
    )
    assert first == same
    assert len({tuple(tokens) for tokens in (first, sample, seed)}) == 3


def test_an_end_is_the_last_token_of_a_request():
    (whole,) = finish(Engine(make_family("llama")), Request((1, 2), 9, GREEDY))
    end = whole[3].token
    (ended,) = finish(Engine(make_family("llama")), Request((1, 2), 9, GREEDY, ends=frozenset({end})))
    assert [o.token for o in ended] == [o.token for o in whole[: [o.token for o in whole].index(end) + 1]]
    assert [o.finish for o in ended[-1:]] == ["stop"]


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(MtError, match=r"model: is in training mode, in which it drops features; call model\.eval\(\)"):
        Engine(copy.deepcopy(make_family("llama")).train())


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            lambda m: setattr(m, "embed", None),
            "model: is a stage of a pipeline, without the other stages; a whole model, or the SharedModel",
        ),
        (lambda m: setattr(m.embed, "weight", torch.nn.Parameter(m.embed.weight[:64])), "model: has 64 of 97 rows"),
    ],
)
def test_a_model_that_ranks_share_is_refused(cut, message):
    model = copy.deepcopy(make_family("llama"))
    cut(model)
    with pytest.raises(MtError, match=message):
        Engine(model)
