"""`mt eval harness --apply-chat-template` asks what lm-evaluation-harness asks, with the same template."""

import json
import re

import pytest

from eval.harness.test_against_hf import open_ours
from eval.harness.test_harness_command import KINDS, QUESTIONS, run
from eval.tiny_hugging_face import write_llama
from mt_core.errors import MtError

TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] | trim }}\
{% if not loop.last or add_generation_prompt %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"""
PREFIX = 'gen_prefix: "it is"\n'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer has a chat template, one without, and task files."""
    root = tmp_path_factory.mktemp("chat")
    for name in ("llama", "plain"):
        (root / name).mkdir()
        write_llama(root / name)
    path = root / "llama" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    (root / "tasks").mkdir()
    (root / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    files = f"{{data_files: {{test: {root / 'questions.jsonl'}}}, cache_dir: {root / 'cache'}}}"
    source = f"dataset_path: json\ndataset_kwargs: {files}\ntest_split: test\nmetadata: {{version: 1}}\n"
    for name, text in {"choose": KINDS["choose"], "write": KINDS["write"], "begun": KINDS["write"] + PREFIX}.items():
        more = "" if "fewshot_split" in text else "fewshot_split: test\n"
        (root / "tasks" / f"{name}.yaml").write_text(f"task: toy_{name}\n{source}{more}{text}")
    return root


@pytest.mark.parametrize("multiturn", [True, False])
def test_conversations_are_lm_evals(folder, multiturn):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(folder / "llama"), device="cpu", dtype="float32", batch_size=2, logits_cache=False)
    results = simple_evaluate(
        theirs,
        tasks=["toy_choose", "toy_write", "toy_begun"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction="the on",
    )
    assert results is not None
    output = folder / f"r{multiturn}.json"
    turns = "--fewshot-as-multiturn" if multiturn else "--fewshot-in-one-turn"
    words = ("--apply-chat-template", "--system-instruction", "the on", "--num-fewshot", 1, "--output", output, turns)
    run(folder, "toy_choose,toy_write,toy_begun", *words)
    for kind in ("choose", "write", "begun"):
        path = output.with_name(f"{output.stem}.toy_{kind}.jsonl")
        samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for sample, expected in zip(samples, results["samples"][f"toy_{kind}"], strict=True):
            ours, wanted = sample["arguments"], [[*arguments] for arguments in expected["arguments"]]
            assert [each[0] for each in ours] == [each[0] for each in wanted]
            assert ours[0][0].startswith("<s>s the on</s>u ")
            if kind == "choose":
                answers, theirs_answers = sample["filtered_resps"], expected["filtered_resps"]
                assert [a for a, _ in answers] == pytest.approx([a for a, _ in theirs_answers], abs=1e-4)
            else:
                assert sample["filtered_resps"] == expected["filtered_resps"]
    settings = json.loads(output.read_text())["settings"]
    assert settings["fewshot_as_multiturn"] is multiturn
    assert settings["chat_template"].endswith("tokenizer_config.json")


def test_a_template_of_ones_own_is_taken_from_its_file(folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for message in messages %}{{ message['content'] }} of {% endfor %}")
    output = tmp_path / "r.json"
    words = ("--apply-chat-template", "--chat-template", tmp_path / "t.jinja", "--output", output, "--limit", 1)
    run(folder, "toy_write", *words)
    (line,) = (tmp_path / "r.toy_write.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["arguments"][0][0] == "he was of "


def test_what_a_chat_lacks_is_said(folder):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with pytest.raises(MtError) as error:
        run(folder, "toy_write", "--chat-template", "t.jinja", "--fewshot-as-multiturn")
    assert str(error.value).splitlines() == [
        f"{name}: samples are not asked as conversations; give --apply-chat-template too"
        for name in ("--chat-template", "--fewshot-as-multiturn")
    ]
    plain = ("--load-dir", folder / "plain")
    message = (
        "--apply-chat-template: the tokenizer of this model has no chat template; name a Jinja file: --chat-template"
    )
    with pytest.raises(MtError, match=f"^{re.escape(message)} FILE$"):
        run(folder, "toy_write", "--apply-chat-template", *plain)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    with pytest.raises(
        MtError, match="apply_chat_template: the tokenizer of this model has no chat template; a chat_te"
    ):
        simple_evaluate(
            open_ours(folder / "plain"), tasks=["toy_write"], task_manager=manager, apply_chat_template=True
        )
