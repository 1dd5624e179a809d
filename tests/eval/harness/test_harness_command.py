"""`mt eval harness` on task files written here, without a network."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from eval.tiny_hugging_face import write_llama
from mt_core.errors import MtError
from mt_eval.tasks.command import app

QUESTIONS = [
    {"question": "he was", "options": ["to be", "it", "they"], "answer": 0},
    {"question": "it is", "options": ["a", "the"], "answer": 1},
    {"question": "they", "options": ["was", "is with his", "on"], "answer": 2},
    {"question": "a", "options": ["of", "and"], "answer": 0},
]
KINDS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
fewshot_split: test
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{options | join(' ')}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[answer]}}"
generation_kwargs: {until: ["the"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "beams": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["the"], num_beams: 4}
""",
    "types": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [1], max_gen_toks: many, top_p: hot, do_sample: 1}
""",
    "draws": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 200}
""",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files by the names of `KINDS`, one whose data is on the hub, and a checkpoint."""
    root = tmp_path_factory.mktemp("harness")
    (root / "llama").mkdir()
    write_llama(root / "llama")
    (root / "tasks").mkdir()
    (root / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    files = f"{{data_files: {{test: {root / 'questions.jsonl'}}}, cache_dir: {root / 'cache'}}}"
    for name, text in KINDS.items():
        source = f"dataset_path: json\ndataset_kwargs: {files}\ntest_split: test\nmetadata: {{version: 1}}\n"
        (root / "tasks" / f"{name}.yaml").write_text(f"task: toy_{name}\n{source}{text}")
    (root / "tasks" / "hub.yaml").write_text(
        f"task: toy_hub\ndataset_path: nobody/none\ntest_split: test\n{KINDS['read']}"
    )
    return root


def run(folder, tasks, *options):
    words = ["harness", "--load-dir", folder / "llama", "--include-path", folder / "tasks", "--tasks", tasks]
    words += ["--device", "cpu", *options]
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def everything(folder):
    """What the three kinds of task print and write."""
    printed = run(folder, "toy_choose,toy_read,toy_write", "--output", folder / "r.json").stdout
    samples = {
        kind: [json.loads(line) for line in (folder / f"r.toy_{kind}.jsonl").read_text("utf-8").splitlines()]
        for kind in ("choose", "read", "write")
    }
    return printed, json.loads((folder / "r.json").read_text("utf-8")), samples


def test_the_results_are_lm_evals_for_its_own_model(folder, everything):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(folder / "llama"), device="cpu", dtype="float32", batch_size=2, logits_cache=False)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = simple_evaluate(theirs, tasks=["toy_choose", "toy_write"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    _, document, samples = everything
    mine = document["lm_eval"]["results"]
    assert mine["toy_choose"]["acc,none"] == results["results"]["toy_choose"]["acc,none"]
    for kind in ("choose", "write"):
        pairs = list(zip(samples[kind], results["samples"][f"toy_{kind}"], strict=True))
        assert len(pairs) == len(QUESTIONS)
        for sample, expected in pairs:
            assert sample["doc_hash"] == expected["doc_hash"]
            answers, wanted = sample["filtered_resps"], expected["filtered_resps"]
            if kind == "write":
                assert answers == wanted
            else:
                assert [a for a, _ in answers] == pytest.approx([a for a, _ in wanted], abs=1e-4)


def test_the_table_the_document_and_the_samples_agree(everything):
    printed, document, samples = everything
    accuracy = sum(sample["acc"] for sample in samples["choose"]) / len(QUESTIONS)
    assert document["metrics"]["toy_choose.acc"] == accuracy
    assert re.search(rf"^toy_choose +0 +4 +acc +{accuracy:.4f} +0\.\d{{4}}$", printed, re.MULTILINE)
    log_probs = [sample["filtered_resps"][0] for sample in samples["read"]]
    words = sum(len(sample["target"].split()) for sample in samples["read"])
    bits = -sum(log_probs) / sum(len(sample["target"]) for sample in samples["read"])
    assert document["metrics"]["toy_read.bits_per_byte"] == pytest.approx(bits / 0.6931471805599453)
    assert document["metrics"]["toy_read.word_perplexity"] == pytest.approx(
        2.718281828459045 ** (-sum(log_probs) / words)
    )
    assert document["counts"] == {"toy_choose": 4, "toy_read": 4, "toy_write": 4}
    assert document["settings"] | {"seq_length": 64, "before_each_text": "<s> (1)"} == document["settings"]
    assert document["versions"].keys() == {"python", "torch", "mt-eval", "lm-eval"}


def test_limit_shots_and_a_task_by_its_file(folder):
    words = (folder / "tasks" / "choose.yaml", "--limit", 2, "--num-fewshot", 1, "--output", folder / "few.json")
    printed = run(folder, *words).stdout
    assert re.search(r"^toy_choose +1 +2 +acc ", printed, re.MULTILINE)
    samples = [json.loads(line) for line in (folder / "few.toy_choose.jsonl").read_text("utf-8").splitlines()]
    assert [sample["arguments"][0][0].count("\n\n") for sample in samples] == [1, 1]


def test_everything_wrong_with_the_tasks_is_said_at_once(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MtError) as error:
        run(folder, "toy_hub,toy_beams,toy_choose,toy_draws,toy_types")
    hub, *others = str(error.value).splitlines()
    assert hub.startswith("--tasks: toy_hub: cannot be loaded (")
    assert "nobody/none" in hub
    assert hub.endswith("cache; or use files of your own")
    allowed = (
        "until, max_gen_toks, max_new_tokens, max_tokens, max_completion_tokens, do_sample, temperature, top_k, top_p"
    )
    assert others == [
        f"--tasks: toy_beams: generation_kwargs: num_beams = 4 is not supported; {allowed}",
        "--tasks: toy_draws: max_gen_toks: 200 new tokens in a model that reads 64; 1 to 63",
        "--tasks: toy_types: generation_kwargs: until = [1]; a text or a list of texts",
        "--tasks: toy_types: generation_kwargs: 'many' new tokens; a whole number",
        "--tasks: toy_types: generation_kwargs: do_sample = 1; true or false",
        "--tasks: toy_types: generation_kwargs: top_p = 'hot'; a number",
    ]


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ("toy_choose,", (), "--tasks: 'toy_choose,' has an empty name; names with commas between them"),
        ("toy_choose", ("--limit", 0), "--limit: 0; a whole number from 1 on, or a share between 0 and 1"),
        ("toy_choose", ("--limit", 1.5), "--limit: 1.5; a whole number from 1 on, or a share between 0 and 1"),
        (
            "toy_choose",
            ("--include-path", "nowhere"),
            "--include-path: nowhere is not a folder; a folder of task files",
        ),
        ("toy_choose", ("--seq-length", 65), "--seq-length: 65 tokens; 1 to 64, the model's positions"),
    ],
)
def test_a_wrong_option_is_named(folder, tasks, options, message):
    with pytest.raises(MtError) as error:
        run(folder, tasks, *options)
    assert str(error.value).startswith(message)


def test_names_that_are_not_of_the_readers_folders_are_looked_for_among_lm_evals_own(folder, tmp_path, monkeypatch):
    """With a small folder in place of lm-eval's 14,000 tasks, which take ten seconds to list."""
    text = (folder / "tasks" / "choose.yaml").read_text().replace("toy_choose", "toy_chosen")
    (tmp_path / "theirs.yaml").write_text(text)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    printed = run(folder, "toy_cho*", "--limit", 0.25).stdout
    assert re.findall(r"^(toy_\w+) +0 +1 +acc ", printed, re.MULTILINE) == ["toy_choose", "toy_chosen"]
    (tmp_path / "both.yaml").write_text(
        "group: toy_both\ntask: [toy_choose, toy_chosen]\naggregate_metric_list: [{metric: acc}]\n"
    )
    printed = run(folder, "toy_both", "--limit", 2).stdout
    assert {name for name, _ in re.findall(r"^(toy_\w+) .* acc +(\S+)", printed, re.MULTILINE)} == {
        *("toy_both", "toy_choose", "toy_chosen")
    }
    with pytest.raises(
        MtError, match="^--tasks: Duplicate task 'toy_chosen': found .*; ask for each task once, by its"
    ):
        run(folder, "toy_both,toy_chosen")
    with pytest.raises(MtError) as error:
        run(folder, "toy_chosn,toy_reed,toy_choose")
    listed = "`lm-eval ls tasks` lists all; --include-path names a folder of your own"
    assert str(error.value).splitlines() == [
        f"--tasks: 'toy_chosn' is unknown; did you mean 'toy_chosen'? {listed}",
        f"--tasks: 'toy_reed' is unknown; did you mean 'toy_read'? {listed}",
    ]


def test_without_lm_eval_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = "mt eval harness: needs 'lm_eval', which is not installed; pip install 'mt-cli[lm-eval]'"
    with pytest.raises(MtError, match=f"^{re.escape(message)}$"):
        run(folder, "toy_choose")


def test_ranks_share_the_model(folder, everything):
    """Log-likelihoods, rolling ones and texts on two tensor ranks are those of one process."""
    run(folder, "toy_choose,toy_read,toy_write", "--nproc", "2", "--output", folder / "ranks.json")
    _, document, samples = everything
    shared = json.loads((folder / "ranks.json").read_text("utf-8"))
    assert shared["settings"]["ranks"] == "tensor 2 × pipeline 1"
    assert shared["metrics"] == pytest.approx(document["metrics"], rel=1e-5)
    texts = [json.loads(line) for line in (folder / "ranks.toy_write.jsonl").read_text("utf-8").splitlines()]
    assert [text["filtered_resps"] for text in texts] == [text["filtered_resps"] for text in samples["write"]]
