"""Real weights: SmolLM2-135M-Instruct, which ../shared/data/make_smollm2.py builds, asked as lm-eval's `hf` is."""

import os
from pathlib import Path

import pytest

from eval.harness.test_against_hf import ask, open_ours

SOURCE = Path(os.environ.get("MT_SMOLLM2", "/work/smollm2"))
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " the city of Paris"),
    ("Question: what falls from clouds?\nAnswer: ", "rain"),
    ("", "Once upon a time"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "config.json").exists(), reason=f"no SmolLM2 in {SOURCE} (set MT_SMOLLM2)"),
]


def test_answers_are_those_of_lm_evals_own_model():
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(SOURCE), device="cpu", dtype="float32", batch_size=2, logits_cache=False)
    ours = open_ours(SOURCE)
    pairs, texts = [ask(*pair) for pair in PAIRS], [ask("The cat sat on the mat."), ask("")]
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for answer, (log_prob, greedy) in zip(ours.loglikelihood(pairs, disable_tqdm=True), expected, strict=True):
        assert answer == (pytest.approx(log_prob, abs=1e-4), greedy)
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-4)
    written = [ask(context, {"until": ["\n"], "max_gen_toks": 12}) for context, _ in PAIRS if context]
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)
