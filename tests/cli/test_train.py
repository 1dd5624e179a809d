"""`mt train`: resuming, stopping, ranks and precision, on the tiny byte model and real text."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mt_ckpt.conversion.convert import convert
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint import native
from mt_core.distributed.mesh import Mesh
from mt_core.errors import MtError
from tiny import byte_corpus, gpt2, metrics, run_toml

ONE = ["train.steps=1", "lr_schedule.warmup_steps=0"]
MT = [sys.executable, "-m", "mt_cli"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return byte_corpus(tmp_path_factory.mktemp("corpus") / "bytes_text_document")


@pytest.fixture
def toml(tmp_path, corpus):
    return run_toml(tmp_path / "run.toml", corpus, tmp_path / "run")


def train(toml: Path, *overrides: str) -> Path:
    """Train in this process; the run directory."""
    config = load_run_config([toml], overrides)
    assert run(config) == 0
    return Path(config.runtime.run_dir)


def tensors(run_dir: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return dict(native.stream(native.step_directory(run_dir, step), part))


def assert_same_end(one: Path, two: Path, step: int = 6) -> None:
    """Weights, optimizer and logged numbers are bit-equal."""
    assert metrics(one) == metrics(two)
    for part in ("model", "optim"):
        first, second = tensors(one, step, part), tensors(two, step, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_on_real_text(toml):
    lines = metrics(train(toml, "train.steps=40", "log.every=10"))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 40]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, toml, dtype):
    common = [f"precision.dtype={dtype}", "checkpoint.every=2", "train.eval_every=3", "train.eval_batches=2"]
    whole = train(toml, *common, f"runtime.run_dir={tmp_path / 'whole'}")
    cut = train(toml, *common, f"runtime.run_dir={tmp_path / 'cut'}")
    for step in (6, 4):  # as if it had been killed after step 5, the checkpoint of step 4 the last
        (native.step_directory(cut, 6) / native.COMMITTED).unlink(missing_ok=step == 4)
    (native.step_directory(cut, 4) / native.COMMITTED).unlink()
    assert len(native.steps(cut)) == 1
    train(toml, *common, f"runtime.run_dir={cut}")
    assert_same_end(whole, cut)


def test_checkpoints_come_every_n_steps_and_old_ones_go(toml):
    run_dir = train(toml, "checkpoint.every=2", "checkpoint.keep=2", "train.steps=7")
    assert [path.name for path in native.steps(run_dir)] == ["step-00000006", "step-00000007"]


def test_a_checkpoint_carries_the_resolved_configuration_and_the_tokenizer(toml):
    step = native.resolve(train(toml, "train.steps=2", "lr_schedule.warmup_steps=1"))
    meta = native.read_meta(step)
    assert meta["config"]["train"]["steps"] == 2
    assert (meta["step"], meta["samples"], meta["tokens"]) == (2, 8, 8 * 32)
    assert "mt_tokenizer.json" in [file.name for file in native.tokenizer_files(step)]
    assert load_run_config([step.parent / "config.toml"]) == load_run_config(
        [toml], ["train.steps=2", "lr_schedule.warmup_steps=1"]
    )


def test_micro_batches_change_nothing(tmp_path, toml):
    one = train(toml, "precision.dtype=fp64", "batch.micro_batch=4", f"runtime.run_dir={tmp_path / 'one'}")
    four = train(toml, "precision.dtype=fp64", "batch.micro_batch=1", f"runtime.run_dir={tmp_path / 'four'}")
    for a, b in zip(metrics(one), metrics(four), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("real_processes")
def test_two_ranks_train_as_one_does(tmp_path, toml):
    common = ["precision.dtype=fp64", "checkpoint.every=3", "train.eval_every=3", "train.eval_batches=2"]
    one = train(toml, *common, f"runtime.run_dir={tmp_path / 'one'}")
    two = tmp_path / "two"
    options = [part for text in [*common, f"runtime.run_dir={two}"] for part in ("--set", text)]
    subprocess.run([*MT, "train", str(toml), "--nproc", "2", *options], check=True, timeout=120)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    first, second = tensors(one, 6, "model"), tensors(two, 6, "model")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-10, atol=1e-12)


def test_an_error_on_the_first_rank_ends_all_with_exit_code_2(toml):
    command = [*MT, "train", str(toml), "--nproc", "2", "--set", "batch.global_batch=8", "--set", "data.split=1,0,0"]
    done = subprocess.run([*command, "--set", "train.eval_every=2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "mt [rank 0]: the valid split" in done.stderr
    assert "rank  step  phase" in done.stderr, "the heartbeats were there for the report"
    assert not (toml.parent / "run").exists(), "and are gone with all that the failed start made"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, toml, ranks, number):
    options = ["train.steps=60", "log.every=1"]
    whole = train(toml, f"runtime.run_dir={tmp_path / 'whole'}", *options)
    cut = tmp_path / "cut"
    command = [*MT, "train", str(toml), "--nproc", str(ranks)]
    command += [part for text in [f"runtime.run_dir={cut}", *options] for part in ("--set", text)]
    process = subprocess.Popen(command)
    wait_for_steps(cut, 3)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    stopped = native.resolve(cut)
    assert 3 <= native.read_meta(stopped)["step"] < 60
    again = subprocess.run(command, check=True, timeout=120, stderr=subprocess.PIPE, text=True)
    assert f"mt: resuming from {stopped}" in again.stderr
    assert f"mt: step 60 of 60 is in {native.resolve(cut)}" in again.stderr
    if ranks == 1:
        assert_same_end(whole, cut, 60)
    assert metrics(cut)[-1]["loss"] == pytest.approx(metrics(whole)[-1]["loss"], rel=1e-4)


def test_a_preset_alone_can_be_trained(tmp_path, corpus):
    options = [*ONE, f"data.paths=['{corpus}']", "data.tokenizer.type=bytes", f"runtime.run_dir={tmp_path / 'run'}"]
    options += ["log.every=1"]
    command = [*MT, "train", "--preset", "gpt-tiny", *(part for text in options for part in ("--set", text))]
    subprocess.run(command, check=True, timeout=120)
    assert metrics(tmp_path / "run")[0]["step"] == 1


def wait_for_steps(run_dir: Path, steps: int) -> None:
    """Until metrics.jsonl has that many lines."""
    end = time.monotonic() + 60
    file = run_dir / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path, toml):
    options = ["checkpoint.every=5", "train.steps=60"]
    whole = train(toml, f"runtime.run_dir={tmp_path / 'whole'}", *options)
    cut = tmp_path / "cut"
    command = [*MT, "train", str(toml), "--set", f"runtime.run_dir={cut}"]
    command += [part for text in options for part in ("--set", text)]
    process = subprocess.Popen(command)
    wait_for_steps(cut, 12)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert native.resolve(cut)
    subprocess.run(command, check=True, timeout=120)
    assert_same_end(whole, cut, 60)


@pytest.mark.parametrize("loader", ["native", "hf"])
def test_weights_come_from_another_checkpoint(tmp_path, toml, loader):
    common = [*ONE, "train.eval_every=1"]
    source = train(toml, *common, f"runtime.run_dir={tmp_path / 'source'}")
    start = source
    if loader == "hf":
        start = tmp_path / "hf"
        convert("native", source, "hf", start)
    still = ["optim.lr=1e-30", f"checkpoint.init={loader}:{start}", f"runtime.run_dir={tmp_path / 'next'}"]
    run_dir = train(toml, *common, *still)
    assert metrics(run_dir)[-1]["valid_loss"] == metrics(source)[-1]["valid_loss"]
    assert metrics(run_dir)[0]["loss"] != metrics(source)[0]["loss"]


def test_tensorboard_receives_the_metrics(toml):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = train(toml, "log.sinks=['tensorboard']")
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("loss")[2].value == pytest.approx(metrics(run_dir)[2]["loss"])


def test_an_unknown_sink_is_told(toml, capsys):
    train(toml, "log.sinks=['tensorbord']", *ONE)
    assert "log.sinks: no installed plugin offers 'tensorbord'" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(tmp_path, toml):
    plain = train(toml, "train.steps=3", f"runtime.run_dir={tmp_path / 'plain'}")
    fast = train(toml, "train.steps=3", "runtime.compile=true", f"runtime.run_dir={tmp_path / 'fast'}")
    for a, b in zip(metrics(plain), metrics(fast), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_frozen_parameters_keep_the_weights_that_the_run_began_with(tmp_path, toml):
    source = train(toml, *ONE, f"runtime.run_dir={tmp_path / 'source'}")
    tuning = [f"checkpoint.init=native:{source}", f"runtime.run_dir={tmp_path / 'tuned'}", "checkpoint.every=3"]
    tuning += ['optim.trainable=["layers.1.*", "norm.*"]', "precision.dtype=bf16"]
    tuned = train(toml, *tuning)
    before, after = tensors(source, 1, "model"), tensors(tuned, 6, "model")
    moved = {name for name in after if not torch.equal(after[name], before[name].bfloat16())}
    assert moved == {name for name in after if name.startswith(("layers.1.", "norm."))}
    (native.step_directory(tuned, 6) / native.COMMITTED).unlink()
    train(toml, *tuning)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(tuned, 6, "model").items())
    with pytest.raises(MtError, match="with optimizer state in the checkpoint would be frozen; keep the patterns"):
        train(toml, *tuning, 'optim.trainable=["norm.*"]', "train.steps=8")


def test_a_model_that_changed_is_refused_on_resume(toml):
    train(toml, *ONE)
    with pytest.raises(MtError) as caught:
        train(toml, "model.mlp.ffn_hidden_size=64", "model.layers=3")
    assert "model.layers: 3, but" in str(caught.value)
    assert "model.mlp.ffn_hidden_size: 64, but" in str(caught.value)


def test_a_run_directory_in_use_is_refused_without_resume(toml):
    train(toml, *ONE)
    with pytest.raises(MtError, match="has a checkpoint, step-00000001; resume it, or choose another run_dir"):
        train(toml, "checkpoint.resume=false")


def test_a_tokenizer_larger_than_the_model_is_refused(toml):
    with pytest.raises(
        MtError, match="model.vocab_size: 200 rows, but the tokenizer has 257 ids; allowed: 257, more, or"
    ):
        train(toml, "model.vocab_size=200")


def test_another_tokenizer_than_the_checkpoint_s_is_refused(tmp_path, toml, small_bpe):
    train(toml, *ONE, "model.vocab_size=400")
    files = [
        f"data.tokenizer.vocab_file={small_bpe / 'vocab.json'}",
        f"data.tokenizer.merge_file={small_bpe / 'merges.txt'}",
    ]
    with pytest.raises(MtError, match="data.tokenizer: differs from the checkpoint's"):
        train(toml, "model.vocab_size=400", "data.tokenizer.type=GPT2BPETokenizer", *files)


@pytest.fixture
def small_bpe(tmp_path, corpus):
    """A byte-level BPE tokenizer of 300 ids, trained on a source file."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([json.__file__], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.save_model(str(folder))
    return folder


def test_token_ids_beyond_the_vocabulary_are_refused(toml):
    toml.write_text(toml.read_text().replace('[data.tokenizer]\ntype = "bytes"', ""))
    with pytest.raises(MtError, match=r"token id \d+.*100"):
        train(toml, "model.vocab_size=100")


def test_a_number_of_ranks_that_does_not_run_is_refused(toml):
    with pytest.raises(MtError, match="tensor 1 × context 1 × data 2 = 2, but 1 ranks run; start 2 ranks"):
        train(toml, "parallel.data=2")


def test_a_gpu_that_is_not_there_is_refused(toml):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MtError, match="runtime.device: 'cuda', but no GPU is available"):
        train(toml, "runtime.device=cuda")


def test_a_checkpoint_of_another_shape_is_refused_with_all_differences(tmp_path, toml):
    source = train(toml, *ONE, f"runtime.run_dir={tmp_path / 'source'}")
    changed = gpt2(vocab_size=257).model_dump(mode="json", exclude_none=True)
    other = run_toml(tmp_path / "other.toml", Path(), tmp_path / "other", model=changed)
    from mt_cli.train.compose import build_state

    with pytest.raises(MtError, match=f"other.toml: model.position.kind: 'learned', but native:{source} has 'rope'"):
        load_run_config([other], [f"checkpoint.init=native:{source}"])
    config = load_run_config([other], rules=False)
    checkpoint = config.checkpoint.model_copy(update={"init": f"native:{source}"})
    initialised = config.model_copy(update={"checkpoint": checkpoint})
    with pytest.raises(MtError) as caught:
        build_state(initialised, Mesh(), torch.device("cpu"), resume=False)
    assert "position.weight: tensor is missing" in str(caught.value)
    assert "layers.0.mlp.gate.weight: unexpected tensor" in str(caught.value)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_the_last_checkpoint(toml, small_disk):
    big = ["model.hidden_size=256", "model.mlp.ffn_hidden_size=512", "checkpoint.every=1"]
    command = [*MT, "train", str(toml), "--set", f"runtime.run_dir={small_disk}"]
    command += [part for text in big for part in ("--set", text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("the disk is full; free some space and run again; nothing was committed")
    )
    assert not [p for p in small_disk.iterdir() if p.name.startswith("step-") and not (p / native.COMMITTED).exists()]


def test_the_environment_of_the_tests_is_not_a_launcher_s():
    assert "RANK" not in os.environ
