import gzip
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from mt_core.checkpoint import native
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError
from mt_core.plugins import Component, component, hookimpl, manager
from mt_eval.generation.command import generate
from mt_eval.generation.engine import Engine
from mt_eval.generation.requests import BeamOptions, Request
from mt_eval.tasks.command import app

TEXT = "It was the best of times, it was the worst of times. " * 4


def run(application, *arguments):
    return CliRunner().invoke(application, [str(a) for a in arguments], catch_exceptions=False)


def run_generate(*arguments):
    application = Typer()
    application.command()(generate)
    return run(application, *arguments).stdout


@pytest.fixture
def held_out(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def passages(tmp_path):
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two three"}\n{"text": "It was the best of times"}\n')
    return tmp_path / "lambada.jsonl"


def test_perplexity_prints_a_table_and_writes_json(checkpoint, held_out, tmp_path):
    output = tmp_path / "r.json"
    result = run(app, "perplexity", "--load-dir", checkpoint, "--data", held_out, "--output", output, "--device", "cpu")
    report = json.loads(output.read_text())
    assert result.stdout.startswith("perplexity\n")
    assert f"bits per byte     {report['metrics']['bits_per_byte']:.4f}\n" in result.stdout
    assert report["counts"] == {"documents": 1, "tokens": len(TEXT) + 1, "bytes": len(TEXT)}
    assert report["settings"] == {
        "seq_length": 64,
        "seq_length_from": "model's positions",
        "overlapping_eval": 64,
        "batch_size": 32,
        "device": "cpu",
        "dtype": "fp32",
        "tokenizer": "BytesTokenizer",
        "before_each_text": "none",
    }
    samples = [json.loads(line) for line in (tmp_path / "r.perplexity.jsonl").read_text().splitlines()]
    loss_sum = report["metrics"]["loss"] * len(TEXT)
    assert samples == [
        {"where": str(held_out), "tokens": len(TEXT), "bytes": len(TEXT), "loss_sum": pytest.approx(loss_sum)}
    ]
    assert (report["model"], report["data"], report["task"]) == (str(checkpoint), str(held_out), "perplexity")
    assert report["versions"].keys() == {"python", "torch", "mt-eval"}
    assert report["seconds"] > 0


def test_a_metric_of_several_documents_has_its_standard_error_beside_it(checkpoint, passages, tmp_path):
    words = ("perplexity", "--load-dir", checkpoint, "--data", passages, "--output", tmp_path / "r.json")
    stdout = run(app, *words).stdout
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (tmp_path / "r.perplexity.jsonl").read_text().splitlines()]
    tokens, loss = sum(line["tokens"] for line in lines), metrics["loss"]
    assert [line["where"] for line in lines] == [f"{passages}:1", f"{passages}:2"]
    assert loss == pytest.approx(sum(line["loss_sum"] for line in lines) / tokens, rel=1e-12)
    squares = sum((line["loss_sum"] - loss * line["tokens"]) ** 2 for line in lines)
    error = math.sqrt(squares * 2) / tokens
    assert metrics["loss_stderr"] == pytest.approx(error, rel=1e-9)
    assert metrics["perplexity_stderr"] == pytest.approx(math.exp(loss) * error, rel=1e-9)
    assert f"loss              {loss:.4f} ± {error:.4f}\n" in stdout
    assert "stderr" not in stdout


def test_wikitext103_overlaps_by_32_unless_told_otherwise(checkpoint, held_out):
    stdout = run(app, "wikitext103", "--load-dir", checkpoint, "--data", held_out).stdout
    assert stdout.splitlines()[3].startswith("adjusted perplexity")
    assert "overlapping eval     32\n" in stdout
    assert f"original words       {len(TEXT.split())}\n" in stdout
    assert "detokenizer          wikitext\n" in stdout


def test_folders_that_are_called_as_corpora_change_no_detokenizer(checkpoint, tmp_path):
    raw = "the profit did n't reach N shares , he said .\n = = A = = \n" * 3
    metrics = {}
    for folder in ("ptb", "wiki", "lambada", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(raw)
        words = ["wikitext103", "--load-dir", checkpoint, "--data", tmp_path / folder / "test.txt"]
        for options in ([], ["--detokenizer", "ptb"]):
            run(app, *words, *options, "--output", tmp_path / "r.json")
            metrics[folder, *options] = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert all(metrics[key] == metrics["other", *key[1:]] for key in metrics)
    assert metrics["other",] != metrics["other", "--detokenizer", "ptb"]


def test_lambada_tells_both_accuracies_unless_one_is_asked_for(checkpoint, passages):
    arguments = ("lambada", "--load-dir", checkpoint, "--data", passages)
    assert {"strict accuracy", "loose accuracy"} <= {
        line[:15].strip() for line in run(app, *arguments).stdout.splitlines()
    }
    assert "loose" not in run(app, *arguments, "--strict").stdout
    assert "strict" not in run(app, *arguments, "--loose").stdout


def test_a_sequence_longer_than_the_models_positions_is_refused(checkpoint, held_out, passages):
    for task, data in (("perplexity", held_out), ("lambada", passages)):
        with pytest.raises(MtError, match="--seq-length: 65 tokens; 1 to 64, the model's positions"):
            run(app, task, "--load-dir", checkpoint, "--data", data, "--seq-length", 65)


@pytest.fixture
def trained_shorter(checkpoint, tmp_path):
    """The checkpoint as a run leaves it that trained on samples of 48 tokens."""
    run = shutil.copytree(checkpoint, tmp_path / "shorter")
    meta = native.resolve(run) / "meta.json"
    content = json.loads(meta.read_text())
    content["config"]["data"] = {"kind": "gpt", "seq_length": 48}
    meta.write_text(json.dumps(content))
    return run


def test_inputs_are_as_long_as_the_samples_in_training(trained_shorter, held_out, passages, tmp_path):
    for options, seq_length, source in (
        ((), 48, "samples in training"),
        (("--seq-length", 64), 64, "--seq-length"),
        (("--seq-length", 20), 20, "--seq-length"),
    ):
        words = ("perplexity", "--load-dir", trained_shorter, "--data", held_out, "--output", tmp_path / "r.json")
        result = run(app, *words, *options)
        settings = json.loads((tmp_path / "r.json").read_text())["settings"]
        assert (settings["seq_length"], settings["seq_length_from"]) == (seq_length, source)
        assert f"seq length from   {source}\n" in result.stdout
        assert f" windows of {seq_length} ({source})\n" in result.stderr
    run(app, "lambada", "--load-dir", trained_shorter, "--data", passages, "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["seq_length_from"] == "longest input of the task"
    with pytest.raises(MtError, match="--seq-length: 65 tokens; 1 to 64, the model's positions"):
        run(app, "perplexity", "--load-dir", trained_shorter, "--data", held_out, "--seq-length", 65)


@pytest.fixture
def broken(checkpoint, tmp_path):
    """The checkpoint with one NaN, in the embedding of the letter t."""
    source = open_checkpoint(checkpoint)
    tensors = dict(source.tensors())
    tensors["embed.weight"] = tensors["embed.weight"].clone()
    tensors["embed.weight"][ord("t"), 3] = math.nan
    native.write_model(
        tmp_path / "broken", source.config().model_dump(mode="json"), tensors.items(), source.tokenizer_files()
    )
    return tmp_path / "broken"


def test_a_model_with_one_nan_gives_no_number_and_no_text(broken, held_out, passages, tmp_path):
    allowed = "look for NaN and infinity in the weights (mt ckpt inspect), and try --dtype fp32"
    output = tmp_path / "r.json"
    for task, data, message in (
        ("perplexity", held_out, f"{held_out}, token 3: the model computes a loss that is not finite here; {allowed}"),
        ("wikitext103", held_out, f"{held_out}, token 3: the model computes a loss that is not finite here; {allowed}"),
        ("lambada", passages, f"{passages}:2, token 19: the model computes NaN or infinite logits here; {allowed}"),
    ):
        with pytest.raises(MtError) as error:
            run(app, task, "--load-dir", broken, "--data", data, "--output", output, "--device", "cpu")
        assert (str(error.value), error.value.exit_code) == (message, 1)
    for options in (("--top-k", 1), ("--top-k", 3), ("--top-p", 0.9), ()):
        with pytest.raises(MtError) as error:
            run_generate(broken, "--prompt", "a", "--prompt", "at", "--max-new-tokens", 4, *options)
        assert error.value.exit_code == 1
        assert str(error.value) == f"prompt 2, after token 2: the model computes NaN or infinite logits here; {allowed}"
    assert not output.exists()
    command = [sys.executable, "-m", "mt_cli", "eval", "perplexity", "--load-dir", str(broken), "--data", str(held_out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert [line for line in result.stderr.splitlines() if line.startswith("mt:")] == [
        f"mt: {held_out}, token 3: the model computes a loss that is not finite here; {allowed}"
    ]


def test_an_output_without_a_directory_is_refused_before_the_work(checkpoint, tmp_path):
    output = tmp_path / "nowhere" / "r.json"
    with pytest.raises(MtError, match=r"--output: .*r\.json: its directory does not exist; create it first"):
        run(app, "perplexity", "--load-dir", checkpoint, "--data", tmp_path / "missing", "--output", output)


def test_the_kind_of_a_tokenizer_is_found_from_its_files(checkpoint, held_out, tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    asked = ("--load-dir", checkpoint, "--data", held_out, "--tokenizer-model", tmp_path)
    shown = [run(app, "perplexity", *options).stdout.partition("seconds")[0] for options in (asked, asked[:4])]
    assert shown[0] == shown[1] != ""
    with pytest.raises(MtError, match=r"tokenizer.vocab_file: no file vocab.json"):
        run(app, "perplexity", "--load-dir", checkpoint, "--data", held_out, "--vocab-file", "vocab.json")


def test_a_task_of_a_third_party_is_listed_without_being_imported():
    class Plugin:
        @staticmethod
        @hookimpl
        def mt_components():
            return [
                Component("eval-task", "theirs", "their_package.tasks:theirs", "Their own task", ("their-package",))
            ]

    manager().register(Plugin, name="theirs")
    try:
        assert "Their own task" in run(app, "--help").stdout
        with pytest.raises(MtError, match="needs 'their_package', which is not installed; pip install 'their-package'"):
            run(app, "theirs")
    finally:
        manager().unregister(name="theirs")


@pytest.mark.parametrize("arguments", [["eval", "--help"], ["eval", "lambada", "--help"], ["generate", "--help"]])
def test_help_imports_neither_torch_nor_numpy(arguments):
    program = (
        "import sys; from mt_cli.main import app\n"
        f"try: app({arguments})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'tokenizers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")


def test_generate_prints_the_prompt_and_what_follows(checkpoint):
    options = ["--prompt", "It was", "--max-new-tokens", 8, "--top-k", 1]
    stdout = run_generate(checkpoint, *options)
    assert stdout.startswith("It was")
    assert len(stdout) > len("It was\n")
    assert stdout == run_generate("--load-dir", checkpoint, *options)


def test_generate_decays_top_p_down_to_a_bound(checkpoint):
    def text(*options):
        return run_generate(checkpoint, "--prompt", "a", "--max-new-tokens", 12, "--seed", 3, *options)

    constant, likeliest = text("--top-p", 0.9), text("--top-k", 1)
    assert text("--top-p", 0.9, "--top-p-decay", 1) == constant
    assert text("--top-p", 0.9, "--top-p-decay", 0.001, "--top-p-bound", 0.9) == constant
    assert text("--top-p", 1e-9, "--top-p-decay", 0.001) == likeliest
    assert text("--top-p", 0.9, "--top-p-decay", 0.001) not in (constant, likeliest)


def test_generate_reads_a_checkpoint_of_megatrons_as_it_reads_ours(checkpoint, tmp_path):
    source = open_checkpoint(checkpoint)
    save = component("ckpt-saver", "core")
    save(tmp_path / "megatron", source.config(), source.tensors(), source.tokenizer_files())
    options = ["--prompt", "It was", "--max-new-tokens", 8, "--top-k", 1]
    assert run_generate("--load-dir", tmp_path / "megatron", *options) == run_generate(checkpoint, *options)


def test_the_same_seed_prints_the_same_text(checkpoint):
    def text(seed):
        return run_generate(checkpoint, "--prompt", "a", "--max-new-tokens", 20, "--seed", seed)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_several_prompts_are_printed_in_their_order(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("third\n\n")
    stdout = run_generate(
        checkpoint,
        "--prompt",
        "first",
        "--prompt",
        "second one",
        "--prompt-file",
        tmp_path / "prompts.txt",
        "--max-new-tokens",
        5,
    )
    for number, prompt in enumerate(("first", "second one", "third"), start=1):
        assert f"--- prompt {number}\n{prompt}" in stdout


def test_a_prompt_ends_with_its_line_only(checkpoint, tmp_path):
    prompts = ["a\u2028b", "c\x85d", "e\x0cf", "g\x0b\x1ch"]
    (tmp_path / "prompts.txt.gz").write_bytes(gzip.compress("\r\n".join(prompts).encode()))
    stdout = run_generate(checkpoint, "--prompt-file", tmp_path / "prompts.txt.gz", "--max-new-tokens", 1)
    assert [f"--- prompt {n}\n{prompt}" in stdout for n, prompt in enumerate(prompts, start=1)] == [True] * 4
    assert "--- prompt 5" not in stdout


def test_a_prompt_that_is_not_utf8_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        MtError, match=r"^--prompt 2: 'b\\udcff' is not UTF-8; a text; --prompt-file names one in a file$"
    ):
        run_generate(checkpoint, "--prompt", "a", "--prompt", "b\udcff")
    (tmp_path / "p.txt").write_bytes(b"a\n\xff")
    with pytest.raises(MtError, match=r"p\.txt: is not UTF-8 at byte 3; UTF-8 text"):
        run_generate(checkpoint, "--prompt-file", tmp_path / "p.txt")
    with pytest.raises(MtError, match="is a directory; the path of a file"):
        run_generate(checkpoint, "--prompt-file", tmp_path)


def test_an_empty_prompt_begins_a_document(checkpoint):
    assert len(run_generate(checkpoint, "--prompt", "", "--max-new-tokens", 5)) > 1


def test_generate_needs_one_checkpoint():
    allowed = "give one: a run, a step or a Hugging Face directory"
    with pytest.raises(MtError, match=f"^--load-dir: no checkpoint; {allowed}$"):
        run_generate("--prompt", "a")
    with pytest.raises(MtError, match=f"^--load-dir: two checkpoints, x and y; {allowed}$"):
        run_generate("y", "--load-dir", "x", "--prompt", "a")


def test_generate_needs_a_prompt_that_fits(checkpoint):
    with pytest.raises(MtError, match="--prompt: no prompt"):
        run_generate(checkpoint)
    with pytest.raises(MtError, match="prompt 1: 60 tokens and 5 new ones exceed the model's 64 positions"):
        run_generate(checkpoint, "--prompt", "x" * 60, "--max-new-tokens", 5)


@pytest.fixture
def lines(checkpoint, tmp_path):
    """Runs `mt generate` on two prompts; what stdout shows, and the objects of its file."""

    def run_and_read(*arguments):
        prompts = ("--prompt", "ab", "--prompt", "c", "--max-new-tokens", 12, "--seed", 3, "--top-k", 20)
        stdout = run_generate(checkpoint, *prompts, "--output", tmp_path / "o.jsonl", *arguments)
        return stdout, [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]

    return run_and_read


def test_generate_writes_a_line_of_json_for_each_prompt(lines):
    stdout, (first, second) = lines()
    assert first.keys() == {"prompt", "text", "finish_reason"}
    assert (first["prompt"], first["finish_reason"], second["prompt"]) == ("ab", "length", "c")
    assert stdout == f"--- prompt 1\nab{first['text']}\n--- prompt 2\nc{second['text']}\n"


def test_a_stop_text_ends_its_own_text_only_and_is_no_part_of_it(lines, checkpoint):
    _, (first, second) = lines()
    stop = first["text"][4:6]
    assert stop not in second["text"]
    stdout, stopped = lines("--stop", stop, "--stop", "not there")
    cut = first["text"][: first["text"].index(stop)]
    assert stopped == [{"prompt": "ab", "text": cut, "finish_reason": "stop"}, second]
    assert f"ab{cut}\n---" in stdout
    alone = ("--prompt", "ab", "--max-new-tokens", 12, "--seed", 3, "--top-k", 20, "--stop", stop)
    assert run_generate(checkpoint, *alone) == f"ab{cut}\n"


def read_byte(entry):
    """The id of a token of bytes; a part of a character is spelled `<0xC3>`."""
    return int(entry["token"][1:-1], 16) if entry["token"].startswith("<0x") else ord(entry["token"])


def test_log_probabilities_in_the_file_are_the_model_s_own(lines, model, tokenizer):
    _, (first, _) = lines("--logprobs", "--top-logprobs", 2, "--temperature", 0.5, "--dtype", "fp32")
    entries = first["logprobs"]
    ids = [*b"ab", *map(read_byte, entries)]
    assert tokenizer.decode(ids) == "ab" + first["text"]
    with torch.inference_mode():
        expected_TV = model(torch.tensor([ids]))[0].log_softmax(-1)[1:-1]
    for entry, token, row in zip(entries, ids[2:], expected_TV, strict=True):
        best, values = entry["top_logprobs"], row.topk(2)
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-5)
        assert [other["logprob"] for other in best] == pytest.approx(values.values.tolist(), abs=1e-5)
        assert list(map(read_byte, best)) == values.indices.tolist()


def test_options_of_the_texts_that_have_no_meaning_are_refused(checkpoint, tmp_path):
    with pytest.raises(
        MtError, match="--stop: ''; a text in UTF-8, not empty(.|\n)*--logprobs: they are written to --out"
    ):
        run_generate(checkpoint, "--prompt", "a", "--stop", "", "--logprobs")
    with pytest.raises(MtError, match="--top-logprobs: there are no log-probabilities; give --logprobs too"):
        run_generate(checkpoint, "--prompt", "a", "--top-logprobs", 1)
    with pytest.raises(MtError, match="--output: .* its directory does not exist"):
        run_generate(checkpoint, "--prompt", "a", "--output", tmp_path / "none" / "o.jsonl")


def test_generate_searches_with_beams(checkpoint, tmp_path, model, tokenizer):
    prompts = ("--prompt", "ab", "--max-new-tokens", 6, "--dtype", "fp32", "--output", tmp_path / "o.jsonl")
    stdout = run_generate(checkpoint, *prompts, "--beam-width", 3, "--length-penalty", 0.5)
    (line,) = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    engine = Engine(model)
    engine.add(Request((97, 98), 6, ends=frozenset({256}), beams=BeamOptions(3, 0.5)))
    outputs = []
    while not outputs:
        outputs = engine.step()
    expected = outputs[0].beams
    assert line.keys() == {"prompt", "beams"}
    assert len(line["beams"]) == len(expected) == 3
    for number, (written, beam) in enumerate(zip(line["beams"], expected, strict=True), start=1):
        assert "ab" + written["text"] == tokenizer.decode([97, 98, *beam.tokens])
        assert written["finish_reason"] == beam.finish
        assert (written["score"], written["logprob"]) == pytest.approx((beam.score, beam.log_prob), abs=1e-4)
        assert f"--- prompt 1, beam {number}, score {written['score']:.4f}" in stdout


def test_beams_beside_what_they_would_not_obey_are_refused(checkpoint):
    words = (checkpoint, "--prompt", "a", "--beam-width", 2)
    with pytest.raises(MtError, match="--beam-width: together with options of drawing; one(.|\n)*--stop or --log"):
        run_generate(*words, "--top-k", 1, "--stop", "x")
    with pytest.raises(MtError, match="--length-penalty: there are no beams; give --beam-width too"):
        run_generate(checkpoint, "--prompt", "a", "--length-penalty", 2)
    with pytest.raises(MtError, match=r"beam_width: 33; at most 32 \(max_running\)"):
        run_generate(checkpoint, "--prompt", "a", "--beam-width", 33, "--max-new-tokens", 2)
