"""`mt ckpt` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mt_ckpt.command import app
from mt_ckpt.tools.inspect import format_size, inspect_checkpoint
from mt_core.errors import MtError
from mt_core.plugins import components


def mt_ckpt(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_convert_reports_what_was_written_and_proven(save_model, tmp_path):
    source, target = save_model("llama"), tmp_path / "out"
    options = ["--model-type", "GPT", "--loader", "llama_mistral", "--saver", "native", "--verify"]
    result = mt_ckpt("convert", *options, "--load-dir", source, "--save-dir", target)
    assert result.exit_code == 0
    wrote, tokenizer, *verified = result.stdout.splitlines()
    assert wrote == f"wrote {target}: 30 tensors, 27,168 parameters, 109 kB"
    assert tokenizer == "tokenizer files: generation_config.json"
    assert [line.split(": logits")[0] for line in verified] == [
        "verified: source in transformers = source in mt",
        "verified: source in mt = result in mt",
    ]


def test_convert_takes_a_dtype(native, tmp_path):
    result = mt_ckpt(
        *("convert", "--loader", "native", "--load-dir", native),
        *("--saver", "hf", "--save-dir", tmp_path / "out", "--dtype", "bf16"),
    )
    assert result.exit_code == 0
    assert {row.dtype for row in inspect_checkpoint(tmp_path / "out").rows} == {"bfloat16"}


def test_convert_writes_the_family_asked_for(native, tmp_path):
    options = ["--load-dir", native, "--saver", "hf", "--target-model-type", "phi3", "--verify"]
    assert mt_ckpt("convert", *options, "--save-dir", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "phi3"


@pytest.mark.parametrize(("option", "kind"), [("--loader", "ckpt-loader"), ("--saver", "ckpt-saver")])
def test_a_misspelt_format_suggests_the_nearest(option, kind, native, tmp_path):
    names = {"--loader": "native", "--saver": "native", option: "nativ"}
    options = [text for pair in names.items() for text in pair]
    with pytest.raises(MtError, match=f"{kind}: unknown name 'nativ'; did you mean 'native'"):
        mt_ckpt("convert", *options, "--load-dir", native, "--save-dir", tmp_path / "out")


def test_inspect_shows_tensors_totals_and_configuration(native):
    lines = mt_ckpt("inspect", native).stdout.splitlines()
    assert lines[0] == f"{native}  (native format)"
    assert "  embed.weight                   [61, 32]         float32    7.81 kB" in lines
    assert "  layers.{0-2}.attn.k.weight     [16, 32]         float32    6.14 kB" in lines
    assert "  30 tensors, 27,168 parameters, 109 kB" in lines
    attention = "  attention      kind gqa, heads 4, num_kv_heads 2, head_size 8, qkv_bias False, out_bias False"
    assert any(line.startswith(attention) for line in lines)
    assert lines[-1] == "tokenizer files: generation_config.json"


def test_inspect_reads_a_step_and_hugging_face_alike(save_model, native):
    rows = inspect_checkpoint(native).rows
    assert inspect_checkpoint(native / "step-00000000").rows == rows
    assert inspect_checkpoint(save_model("llama")).rows == rows


def test_layers_that_are_not_alike_are_told_apart(save_model):
    path = save_model("llama")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].half()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    labels = {row.label: row.dtype for row in inspect_checkpoint(path).rows if "up" in row.name}
    assert labels == {"layers.{0,2}.mlp.up.weight": "float32", "layers.{1}.mlp.up.weight": "float16"}


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (1500, "1.5 kB"), (269e6, "269 MB"), (1.4e13, "14 TB")])
def test_sizes_are_readable(size, text):
    assert format_size(size) == text


def test_every_component_loads():
    mine = [c for kind in ("command", "ckpt-loader", "ckpt-saver") for c in components(kind).values()]
    mine = [component for component in mine if component.target.startswith("mt_ckpt.")]
    assert {c.name for c in mine} >= {"ckpt", "hf", "llama_mistral", "mixtral_hf", "native"}
    assert all(callable(component.load()) and component.requires == ("mt-ckpt",) for component in mine)


def test_help_imports_no_torch():
    code = "import sys, mt_ckpt.plugin, mt_ckpt.command; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readmes_commands_run(save_model, tmp_path, monkeypatch):
    readme = Path(__file__).parents[2] / "packages" / "mt-ckpt" / "README.md"
    block = readme.read_text().split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line.startswith("mt ckpt ")]
    assert len(lines) == 4
    save_model("llama").rename(tmp_path / "llama-dir")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert mt_ckpt(*line.split("#")[0].split()[2:]).exit_code == 0
