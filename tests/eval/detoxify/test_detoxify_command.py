"""`mt task detoxify` from a checkpoint to a trained one and its toxicity; a killed step goes on where it was."""

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from bad_inputs import fill_disk
from eval.detoxify.perspective_server import KEY, rate, start_perspective
from eval.finetuning.task_files import write_bert
from mt_core.checkpoint.native import steps
from mt_core.errors import MtError
from mt_eval.detoxify import toxicity
from mt_eval.detoxify.command import app
from mt_eval.detoxify.continuations import Drawing, TextPrompt, TextSource, write_continuations
from mt_eval.generation.generate import generate
from mt_eval.generation.sampling import SamplingOptions
from mt_eval.load import Checkpoint, load_model
from mt_eval.options import ModelOptions, RankOptions

pytestmark = pytest.mark.slow


def detoxify(*words, **variables):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, env=variables)
    assert done.exit_code == 0, done.output
    return done.output


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_prompts(path, *prompts):
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def samples(checkpoint, tmp_path_factory):
    """Twelve texts of the toy model."""
    output = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    words = ["generate", "--load-dir", checkpoint, "--output", output, "--num-samples", 12, "--batch-size", 5]
    printed = detoxify(*words, *CPU, "--max-new-tokens", 20)
    assert "texts   12" in printed
    return output


def test_texts_begin_with_nothing_and_differ(samples, checkpoint, encoder):
    lines = read(samples)
    assert [(line["id"], line["prompt"]) for line in lines] == [(number, "") for number in range(12)]
    assert len({line["text"] for line in lines}) == 12
    model = load_model(Checkpoint.open(checkpoint), device="cpu")
    start, end = encoder.encode(""), frozenset({encoder.tokenizer.eod})
    alone = generate(model, [start] * 12, max_new_tokens=20, options=SamplingOptions(top_p=0.9), ends=end)
    assert [line["text"] for line in lines] == [encoder.tokenizer.decode(tokens) for tokens in alone]
    assert [line["finish_reason"] for line in lines] == ["length" if len(ids) == 20 else "stop" for ids in alone]


def test_ranks_that_share_a_model_draw_the_same_texts(samples, checkpoint, tmp_path):
    words = ["generate", "--load-dir", checkpoint, "--num-samples", 12, "--batch-size", 5, "--max-new-tokens", 20]
    detoxify(*words, *CPU, "--output", tmp_path / "two.jsonl", "--nproc", 2)
    assert (tmp_path / "two.jsonl").read_bytes() == samples.read_bytes()


def test_texts_are_as_long_as_training_s_samples_if_nothing_else_is_said(checkpoint, tmp_path):
    printed = detoxify("generate", "--load-dir", checkpoint, "--output", tmp_path / "a.jsonl", "--num-samples", 1, *CPU)
    assert "tokens  63\n" in printed  # positions, without the one that begins the text
    assert read(tmp_path / "a.jsonl")[0]["finish_reason"] == "length"
    with pytest.raises(MtError, match="--max-new-tokens: 64 new tokens in 64 positions; 1 to 63"):
        detoxify("generate", "--load-dir", checkpoint, "--output", tmp_path / "b.jsonl", *CPU, "--max-new-tokens", 64)


def source(checkpoint, encoder, batch_size=4):
    drawing = Drawing(20, SamplingOptions(top_p=0.9), batch_size=batch_size)
    return TextSource(Checkpoint.open(checkpoint), encoder, drawing, ModelOptions(device="cpu"), RankOptions())


def test_a_bert_draws_no_texts(tmp_path):
    words = ["generate", "--load-dir", write_bert(tmp_path), "--output", tmp_path / "a.jsonl", *CPU]
    with pytest.raises(
        MtError, match="holds a model of kind 'bert', which does not continue a text; a model of kind gpt"
    ):
        detoxify(*words)


def test_what_an_interrupt_stops_goes_on_with_nothing_lost_or_doubled(checkpoint, encoder, samples, tmp_path):
    output, prompts = tmp_path / "a.jsonl", [TextPrompt("", {"prompt": ""})]
    stopped = source(checkpoint, encoder)
    draw, batches = stopped.draw, []

    def stop(engine, prompts):
        if batches:
            raise KeyboardInterrupt
        batches.append(prompts)
        return draw(engine, prompts)

    object.__setattr__(stopped, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        write_continuations(stopped, prompts, output, samples=12)
    assert not output.exists()
    goes_on = source(checkpoint, encoder)
    draw_rest = goes_on.draw
    object.__setattr__(goes_on, "draw", lambda engine, prompts: batches.append(prompts) or draw_rest(engine, prompts))
    write_continuations(goes_on, prompts, output, samples=12)
    assert [[*batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert output.read_bytes() == samples.read_bytes()
    batches.clear()
    write_continuations(goes_on, prompts, output, samples=12)
    assert batches == []


OFTEN = "import mt_data.corpus.step as step; step.JOURNAL_INTERVAL_S = 0; from mt_cli.main import main; main()"
"""`mt` that notes its progress after every batch, so that it need not run for seconds before it is killed."""


def test_a_killed_command_goes_on_and_writes_what_an_unbroken_one_does(checkpoint, tmp_path, real_processes):
    words = ["generate", "--load-dir", str(checkpoint), "--num-samples", "60", "--batch-size", "4", *CPU, "--output"]
    killed = [sys.executable, "-c", OFTEN, "task", "detoxify", *words, str(tmp_path / "a.jsonl")]
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "a.jsonl.journal"
    while process.poll() is None and not journal.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = json.loads(journal.read_text())["items"]
    assert 0 < done < 15
    assert not (tmp_path / "a.jsonl").exists()
    for name in ("a.jsonl", "b.jsonl"):
        detoxify(*words, tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert [line["id"] for line in read(tmp_path / "a.jsonl")] == [*range(60)]


def test_a_full_disk_stops_drawing_with_one_line(checkpoint, encoder, small_disk):
    fill_disk(small_disk, left=4096)
    prompts = [TextPrompt("", {"prompt": "", "filling": "x" * 2000})]
    with pytest.raises(MtError, match="a.jsonl: the disk is full; free some space and run again"):
        write_continuations(source(checkpoint, encoder), prompts, small_disk / "a.jsonl", samples=12)
    (small_disk / "filling").unlink()
    write_continuations(source(checkpoint, encoder), prompts, small_disk / "a.jsonl", samples=12)
    assert [line["id"] for line in read(small_disk / "a.jsonl")] == [*range(12)]


def test_from_texts_to_a_trained_model(checkpoint, samples, tmp_path):
    scored, kept, run = tmp_path / "scored.jsonl", tmp_path / "kept.jsonl", tmp_path / "run"
    printed = detoxify("score", "--input", samples, "--output", scored)
    assert "scored  12" in printed
    assert [line["text"] for line in read(scored)] == [line["text"] for line in read(samples)]
    assert "kept                   6" in detoxify("filter", "--input", scored, "--output", kept)
    words = ["train", "--load-dir", checkpoint, "--train-data", kept, "--save-dir", run, "--seq-length", 16]
    words += ["--steps", 2, "--global-batch-size", 4, "--set", "runtime.device=cpu", "--set", "runtime.threads=1"]
    detoxify(*words)
    assert steps(run)[-1].name == "step-00000002"
    trained = Checkpoint.open(run)
    assert trained.loader.config() == Checkpoint.open(checkpoint).loader.config()
    before, after = (dict(each.loader.tensors()) for each in (Checkpoint.open(checkpoint), trained))
    moved = max((after[name].double() - before[name].double()).abs().max().item() for name in before)
    assert 0 < moved < 1e-4  # two steps of 2e-5
    assert "complete" in detoxify(*words)
    with pytest.raises(MtError, match="by its name holds no JSON lines; a name that ends with .jsonl"):
        kept.rename(tmp_path / "kept.out")
        detoxify(*words[:4], tmp_path / "kept.out", *words[5:])


def test_toxicity_is_that_of_the_worst_continuation(checkpoint, tmp_path):
    prompts = write_prompts(
        tmp_path / "prompts.jsonl",
        {"filename": "x", "prompt": {"text": "be rude", "toxicity": 0.8, "insult": 0.1}, "continuation": {"text": "y"}},
        {"prompt": {"text": "b", "toxicity": None}},
        {"prompt": {"text": "c", "toxicity": 0.1}},
        {"text": "d", "toxicity": 0.5},
        {"prompt": "e"},
    )
    folder = tmp_path / "toxicity"
    with start_perspective() as server:
        scorer = ["--scorer", "perspective", "--url", server.url, "--requests-per-second", 1000, "--connections", 3]
        words = ["evaluate", "--load-dir", checkpoint, "--prompts", prompts, "--save-dir", folder, *CPU, *scorer]
        words += ["--num-continuations", 3, "--max-new-tokens", 8, "--batch-size", 4]
        printed = detoxify(*words, PERSPECTIVE_API_KEY=KEY)
    lines = read(folder / "scored.jsonl")
    assert [(line["id"], line["prompt_id"]) for line in lines] == [(n, n // 3) for n in range(15)]
    assert len({line["text"] for line in lines}) == 15
    results = json.loads((folder / "results.json").read_text())
    assert results["counts"] == {
        "prompts": 5,
        "toxic_prompts": 1,
        "nontoxic_prompts": 2,
        "unlabelled_prompts": 2,
        "unscored_prompts": 0,
        "unscored_continuations": sum(not line["text"].strip() for line in lines),
        "cut_continuations": 0,
    }
    worst = [max(rate(line["text"]) for line in lines[n : n + 3] if line["text"].strip()) for n in range(0, 15, 3)]
    assert results["metrics"]["expected_maximum_toxicity"] == pytest.approx(sum(worst) / 5)
    assert "expected maximum toxicity" in printed
    samples = read(folder / "results.detoxify.jsonl")
    assert [sample["maximum"] for sample in samples] == worst


def test_a_prompt_that_is_too_long_loses_its_beginning(checkpoint, encoder, tmp_path):
    prompts = [TextPrompt("x" * 60 + "abc"), TextPrompt("abc")]
    counts = write_continuations(source(checkpoint, encoder), prompts, tmp_path / "a.jsonl", samples=2)
    assert (counts["texts"], counts["of cut prompts"]) == (4, 2)
    kept, cut = source(checkpoint, encoder).encode("x" * 60 + "abc")
    assert (len(kept), kept[-3:], cut) == (44, tuple(encoder.encode_plain("abc")), True)


def test_prompts_that_cannot_be_read_are_named_all_at_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n{"prompt": {"text": ""}}\nx\n{"prompt": {"text": "b", "toxicity": "0.5"}}\n{"a": 1}\n'
    )
    with pytest.raises(MtError) as error:
        toxicity.read_prompts(path)
    assert [str(problem).partition("; ")[0] for problem in error.value.problems] == [
        f"{path}:2: the prompt is ''",
        f"{path}:3: is not JSON: Expecting value at column 1",
        f"{path}:4: the prompt's toxicity is '0.5'",
        f"{path}:5: the prompt is None",
    ]
    assert [prompt.text for prompt in toxicity.read_prompts(path, limit=1)] == ["a"]
    path.write_text("\n")
    with pytest.raises(MtError, match="holds no prompts"):
        toxicity.read_prompts(path)
