"""lm-evaluation-harness's `local-completions` asks a running `mt serve`: its answers are those of the model itself."""

import json

import pytest

from eval.harness.test_against_hf import PAIRS, ask, open_ours
from eval.serving.serve_process import start_server
from eval.tiny_hugging_face import write_llama

pytestmark = pytest.mark.slow


QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/quiz.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def evaluate_quiz(model, folder):
    """The results of a task of our own, by lm-eval itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    choices = [
        (question, ["to be", "it was", "the"], n % 3) for n, question in enumerate(("he was", "it is", "they") * 4)
    ]
    lines = [{"question": text, "options": options, "answer": answer} for text, options, answer in choices]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "quiz.yaml").write_text(QUIZ.format(folder=folder))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=["quiz"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    assert results is not None
    return results["results"]["quiz"]


def test_answers_are_those_of_the_model_asked_directly(tmp_path):
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    directory = write_llama(tmp_path)
    ours = open_ours(directory)
    pairs = [ask(*pair) for pair in PAIRS[:-2]]  # the longest ones lose another token, as one is always generated
    texts = [ask(context, {"until": ["the"], "max_gen_toks": 9}) for context, _ in PAIRS[2:-2:3]]
    rolling = [ask(text) for text in ("it was", "the of and a")]
    with start_server(directory, "--device", "cpu") as server:
        theirs = LocalCompletionsAPI(
            base_url=f"http://{server.address}/v1/completions",
            model=directory.name,
            tokenizer=str(directory),
            tokenizer_backend="huggingface",
            add_bos_token=True,
            max_length=64,
            batch_size=4,
        )
        scored = theirs.loglikelihood(pairs, disable_tqdm=True)
        written = theirs.generate_until(texts, disable_tqdm=True)
        theirs.add_bos_token = False  # else it puts a second one before whole texts, and scores it
        rolled = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
        theirs.add_bos_token = True
        through = evaluate_quiz(theirs, tmp_path)
    expected = ours.loglikelihood(pairs, disable_tqdm=True)
    for pair, answer, (log_prob, greedy) in zip(pairs, scored, expected, strict=True):
        assert answer == (pytest.approx(log_prob, abs=1e-4), greedy), pair.args
    direct = ours.generate_until(texts)  # decoded alone, so without the space that the first word has behind a prompt
    assert [text.removeprefix(" ") for text in written] == direct
    straight = evaluate_quiz(ours, tmp_path)
    assert {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"} <= through.keys()
    assert 0 < through["acc,none"] < 1
    assert through == straight
    assert rolled == pytest.approx(ours.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4)
