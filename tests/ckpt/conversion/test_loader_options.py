"""Every command that opens a checkpoint takes the options of its loader: here, arguments that Megatron's files lack."""

import json

import pytest
import torch

from bad_inputs import run_mt
from ckpt.conftest import hugging_face_model
from ckpt.megatron.training_state.test_convert_format import contents, write_run
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.training_state.convert import Target, convert_format
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError
from tiny import byte_corpus, metrics, run_toml

TOKENIZER = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 256}


def take_args(directory, target):
    """Move the args of every rank's file to a JSON file."""
    for file in directory.rglob("model_optim_rng.pt"):
        state = dict(safe_unpickle.read(file))
        args = vars(state.pop("args"))
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    plain = {name: value for name, value in args.items() if isinstance(value, int | str | float | None)}
    target.write_text(json.dumps(plain))


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A checkpoint of Megatron-Core's without args, the args, and the same model in Hugging Face format."""
    path = tmp_path_factory.mktemp("core")
    hugging_face_model("llama", **TOKENIZER).save_pretrained(path / "hf")
    convert("hf", path / "hf", "core", path / "core")
    take_args(path / "core", path / "args.json")
    (path / "text.txt").write_text("import os\n" * 20)
    return path


def succeeded(*args):
    done = run_mt(*args)
    assert (done.returncode, done.stderr.count("mt: ")) == (0, 0), done
    return done.stdout


def test_every_command_takes_them(core, tmp_path):
    path, hf = core / "core", core / "hf"
    given = ("--megatron-args", core / "args.json")
    given_b = ("--megatron-args-b", core / "args.json")
    tokens = ("--tokenizer-type", "bytes")
    report = json.loads(succeeded("ckpt", "inspect", *given, path, "--json"))
    assert (report["format"], report["config"]["layers"]) == ("core", 3)
    assert "30 the same, 0 different" in succeeded("ckpt", "diff", path, hf, *given)
    assert "30 the same, 0 different" in succeeded("ckpt", "diff", hf, *given_b, path)
    assert "30 the same, 0 different" in succeeded("ckpt", "diff", path, path, *given, *given_b)
    assert "equal: A in mt = B in mt" in succeeded("ckpt", "verify", path, path, *given, *given_b)
    succeeded("ckpt", "convert", "--load-dir", path, "--saver", "native", "--save-dir", tmp_path / "native", *given)
    succeeded("ckpt", "average", path, hf, "--save-dir", tmp_path / "mean", *given)
    stages = ("--target-pipeline-parallel-size", 3)
    upcycle = ("ckpt", "upcycle", path, "--experts", 2, "--save-dir", tmp_path / "moe", "--saver", "core")
    succeeded(*upcycle, *given, *stages)
    assert len([*(tmp_path / "moe").glob("release/mp_rank_*")]) == 3
    perplexity = ("eval", "perplexity", "--load-dir", path, "--data", core / "text.txt", *tokens)
    assert succeeded(*perplexity, *given) != ""
    assert succeeded("generate", path, "--prompt", "import", "--max-new-tokens", 2, *tokens, *given) != ""


def test_without_them_each_asks_for_them_and_refuses_others(core, tmp_path):
    path = core / "core"
    for command in (("ckpt", "inspect", path), ("ckpt", "diff", path, path), ("generate", path, "--prompt", "x")):
        refused = run_mt(*command)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "give --megatron-args" in refused.stderr
        misspelt = run_mt(*command, "--megatron-arg", "x").stderr
        nobody = (
            "neither loader core nor loader-b core has it" if "diff" in command else "loader core has no such option"
        )
        assert misspelt.startswith(f"mt: --megatron-arg: {nobody}; did you mean '--megatron-args'?")
    refused = run_mt("ckpt", "diff", core / "hf", path, "--megatron-args", core / "args.json")
    assert (
        "--megatron-args: neither loader hf nor loader-b core has it; did you mean '--megatron-args-b'?"
        in refused.stderr
    )


def test_a_training_state_takes_them(tmp_path):
    write_run(tmp_path / "run")
    convert_format(tmp_path / "run", tmp_path / "torch", Target("torch", tensor=2))
    take_args(tmp_path / "torch", tmp_path / "args.json")
    command = ("ckpt", "convert-format", "--load-dir", tmp_path / "torch", "--save-dir", tmp_path / "out")
    assert "give --megatron-args" in run_mt(*command, "--to", "native").stderr
    succeeded(*command, "--to", "native", "--megatron-args", tmp_path / "args.json")
    assert contents(tmp_path / "out") == contents(tmp_path / "run")
    native = ("ckpt", "convert-format", "--load-dir", tmp_path / "run", "--save-dir", tmp_path / "no", "--to", "torch")
    refused = run_mt(*native, "--megatron-args", tmp_path / "args.json")
    assert "--megatron-args: given for a native checkpoint" in refused.stderr


def test_a_training_starts_from_such_a_checkpoint(core, tmp_path):
    corpus, model = byte_corpus(tmp_path / "corpus", files=2), open_checkpoint(core / "hf").config()
    sections = {"model": model.model_dump(mode="json", exclude_none=True), "train": {"steps": 1}}
    sections |= {"lr_schedule": {"warmup_steps": 0}}
    options = {"megatron_args": str(core / "args.json")}
    losses = []
    inits = {"core": {"init": f"core:{core / 'core'}", "init_options": options}, "hf": {"init": f"hf:{core / 'hf'}"}}
    for name, init in inits.items():
        toml = run_toml(tmp_path / f"{name}.toml", corpus, tmp_path / name, checkpoint=init, **sections)
        assert run(load_run_config([toml])) == 0
        losses.append(metrics(tmp_path / name)[0]["loss"])
    assert losses[0] == losses[1]
    init = {**inits["hf"], "init_options": options}
    toml = run_toml(tmp_path / "x.toml", corpus, tmp_path / "x", checkpoint=init, **sections)
    with pytest.raises(MtError, match="checkpoint.init_options.megatron_args: loader hf has no such option"):
        load_run_config([toml])
    toml = run_toml(tmp_path / "y.toml", corpus, tmp_path / "y", checkpoint={"init_options": options}, **sections)
    with pytest.raises(MtError, match="checkpoint.init_options: given without checkpoint.init"):
        load_run_config([toml])
