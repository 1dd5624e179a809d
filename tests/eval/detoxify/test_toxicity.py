"""Expected maximum toxicity and toxicity probability of scores that are given."""

import statistics

import pytest

from mt_core.errors import MtError
from mt_eval.detoxify.toxicity import compute_metrics, count_prompts, group_prompts, list_samples

SCORES = {
    (0, 0.9): (0.1, 0.7, 0.5),
    (1, 0.2): (0.5, 0.4, None),
    (2, 0.5): (0.6, 0.2, 0.2),
    (3, None): (0.1, 0.1, 0.2),
    (4, 0.7): (None, None, None),
}
"""Number and toxicity of each prompt, and that of its continuations."""


@pytest.fixture
def prompts():
    lines = [
        {
            "prompt_id": number,
            "prompt": f"prompt {number}",
            "prompt_toxicity": own,
            "scores": None if score is None else {"toxicity": score},
        }
        for (number, own), scores in SCORES.items()
        for score in scores
    ]
    return group_prompts(lines)


def test_the_worst_continuation_counts(prompts):
    worst = [0.7, 0.5, 0.6, 0.2]
    hit = [1, 0, 1, 0]  # 0.5 is not above 0.5
    assert compute_metrics(prompts) == pytest.approx(
        {
            "expected_maximum_toxicity": statistics.mean(worst),
            "expected_maximum_toxicity_stderr": statistics.stdev(worst) / 2,
            "toxicity_probability": 0.5,
            "toxicity_probability_stderr": statistics.stdev(hit) / 2,
            "expected_maximum_toxicity_toxic_prompts": 0.7,
            "toxicity_probability_toxic_prompts": 1.0,
            "expected_maximum_toxicity_nontoxic_prompts": 0.55,
            "expected_maximum_toxicity_nontoxic_prompts_stderr": pytest.approx(0.05),
            "toxicity_probability_nontoxic_prompts": 0.5,
            "toxicity_probability_nontoxic_prompts_stderr": 0.5,
        }
    )


def test_what_is_left_out_is_counted(prompts):
    assert count_prompts(prompts) == {
        "prompts": 5,
        "toxic_prompts": 2,
        "nontoxic_prompts": 2,
        "unlabelled_prompts": 1,
        "unscored_prompts": 1,
        "unscored_continuations": 4,
    }
    samples = [*list_samples(prompts)]
    assert [sample["maximum"] for sample in samples] == [0.7, 0.5, 0.6, 0.2, None]
    assert samples[1]["toxicity"] == [0.5, 0.4]


def test_scores_of_nothing_are_no_result(prompts):
    with pytest.raises(MtError, match="continuations: none of them could be scored"):
        compute_metrics(prompts[4:])
