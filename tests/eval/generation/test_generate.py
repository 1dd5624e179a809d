import copy
import math

import pytest
import torch

from mt_core.errors import MtError
from mt_eval.generation.generate import generate, stream
from mt_eval.generation.sampling import SamplingOptions

GREEDY = SamplingOptions(top_k=1)
PROMPTS = [[5, 6, 7], [200], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9]]


def recomputed(model, prompt, new):
    """Greedy text without a cache: the whole sequence is computed again for every token."""
    tokens = list(prompt)
    for _ in range(new):
        with torch.inference_mode():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_the_cache_gives_the_text_of_a_full_recompute(model):
    assert generate(model, PROMPTS[:1], max_new_tokens=40, options=GREEDY) == [recomputed(model, PROMPTS[0], 40)]


def test_prompts_of_different_lengths_do_not_change_each_other(model):
    together = generate(model, PROMPTS, max_new_tokens=20, options=GREEDY)
    assert together == [recomputed(model, prompt, 20) for prompt in PROMPTS]


def test_a_prompt_may_fill_all_positions_but_one(model):
    prompt = [i % 257 for i in range(63)]
    assert generate(model, [prompt], max_new_tokens=1, options=GREEDY) == [recomputed(model, prompt, 1)]


def test_the_same_seed_gives_the_same_text(model):
    first, again, other = (generate(model, PROMPTS, max_new_tokens=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_draws_do_not_depend_on_the_other_prompts(model):
    together = generate(model, PROMPTS, max_new_tokens=12, seed=5)
    assert generate(model, PROMPTS[:1], max_new_tokens=12, seed=5) == together[:1]


def test_equal_prompts_are_continued_differently(model):
    first, second = generate(model, [[5], [5]], max_new_tokens=12, seed=5)
    assert first != second


def test_a_text_ends_before_the_end_of_document_and_the_others_go_on(model):
    whole = generate(model, PROMPTS, max_new_tokens=20, options=GREEDY)
    eod = whole[0][4]
    expected = [ids[: ids.index(eod)] if eod in ids else ids for ids in whole]
    assert generate(model, PROMPTS, max_new_tokens=20, options=GREEDY, ends={eod}) == expected
    assert len(expected[0]) <= 4
    assert max(map(len, expected)) == 20


def test_an_end_of_document_inside_a_prompt_ends_nothing(model):
    longer = [1, 2, 256, 4]
    assert len(generate(model, [[1], longer], max_new_tokens=3, options=GREEDY, ends={256})[1]) == 3


def test_tokens_are_told_one_by_one(model):
    steps = stream(model, PROMPTS[:1], max_new_tokens=20, options=GREEDY)
    assert [next(steps), next(steps)] == [(0, token) for token in recomputed(model, PROMPTS[0], 2)]


def test_no_new_tokens_are_none(model):
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 4, "--prompt: no prompt; give at least one --prompt, or a --prompt-file"),
        ([[1], []], 4, "prompt 2: has no tokens; at least one token"),
        ([[1]], -1, "--max-new-tokens: -1; 0 or more"),
        (
            [[1], [1] * 60],
            5,
            "prompt 2: 60 tokens and 5 new ones exceed the model's 64 positions; --max-new-tokens 4 or",
        ),
        ([[1] * 70], 5, "prompt 1: 70 tokens and 5 new ones exceed .* a prompt of at most 63 tokens"),
        ([[1] * 64], 5, "prompt 1: 64 tokens and 5 new ones exceed .* a prompt of at most 63 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(model, prompts, new, message):
    with pytest.raises(MtError, match=message):
        generate(model, prompts, max_new_tokens=new)


def test_a_prompt_that_has_ended_may_be_followed_by_anything(model):
    """After its end a prompt is fed that end, whose logits nobody reads."""
    (first,) = generate(model, [[1]], max_new_tokens=3, options=GREEDY)
    end = first[1]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[end] = math.nan
    assert generate(broken, [[1], [2]], max_new_tokens=2, options=GREEDY, ends={end}) == generate(
        model, [[1], [2]], max_new_tokens=2, options=GREEDY, ends={end}
    )
    with pytest.raises(MtError, match="prompt 1, after token 3: the model computes NaN or infinite logits"):
        generate(broken, [[1]], max_new_tokens=3, options=GREEDY)
