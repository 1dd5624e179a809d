"""The example plugin, installed for real into an environment of its own and used as its README says."""

import math
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mt_ckpt.conversion.verify import fixed_tokens, our_logits
from mt_ckpt.native.loader import Native
from mt_core.errors import MtError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
SOURCES = [EXAMPLE, ROOT / "packages" / "mt-cli"]
"""What the environment gets installed; mt-cli too, for an `mt` of its own."""

Run = Callable[..., subprocess.CompletedProcess[str]]


def install(environment: Path) -> None:
    """Build and install `SOURCES`: with uv, which brings the build back end and needs no network, else with pip."""
    python, uv = environment / "bin" / "python", shutil.which("uv") or shutil.which(str(ROOT / ".uv/bin/uv"))
    paths = list(map(str, SOURCES))
    if uv:
        options = ["--quiet", "--offline", "--no-deps", "--cache-dir", str(environment / "cache"), "--python", python]
        subprocess.run([uv, "pip", "install", *options, *paths], check=True, timeout=120)
        return
    subprocess.run([sys.executable, "-m", "venv", "--upgrade", environment], check=True, timeout=120)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *paths]
    ran = subprocess.run(pip, capture_output=True, text=True, timeout=200)
    if ran.returncode:
        pytest.skip(f"no uv, and pip cannot build the example here: {ran.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A throwaway environment with the example in it, which borrows everything else from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    borrow = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / "borrow.pth").write_text(borrow)
    install(folder)
    return folder


@pytest.fixture
def run(environment, tmp_path) -> Run:
    """`run("mt", "plugins")` in the environment, from the test's folder."""

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / program, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    return run


def gpt2(*, bias: bool) -> GPT2LMHeadModel:
    """GPT-2 with exact GELU, as nanoGPT computes it, with random weights; without `bias`, every bias is zero."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40, activation_function="gelu", bos_token_id=0
    )
    model = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("bias") and not bias:
                parameter.zero_()
    return model


def save_as_nanogpt(model: GPT2LMHeadModel, out_dir: Path, *, bias: bool, prefix: str = "") -> None:
    """What nanoGPT's train.py saves: [out, in] weights, the tied head twice, and its own settings and state."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {
        prefix + name: (tensor.t() if name.endswith(linear) else tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if bias or not name.endswith("bias")
    }
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 40, "bias": bias, "vocab_size": 61, "dropout": 0.0}
    out_dir.mkdir()
    saved = {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "model_args": args}
    torch.save({**saved, "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {}}, out_dir / "ckpt.pt")


def readme_commands() -> list[list[str]]:
    """The commands that the README shows."""
    return [
        shlex.split(line) for line in re.findall(r"^    ((?:pip|mt) .*)$", (EXAMPLE / "README.md").read_text(), re.M)
    ]


def test_the_plugin_is_listed(run):
    assert re.search(r"^  count +Count a checkpoint's parameters by part\.$", run("mt", "--help").stdout, re.M)
    listed = run("mt", "plugins").stdout
    rows = [line.split() for line in listed.splitlines()]
    assert ["ckpt-loader", "nanogpt", "mt-nanogpt", "nanoGPT's", "ckpt.pt"] in rows
    assert listed.endswith(", mt-models, mt-nanogpt\n")
    assert "broken" not in listed


def test_without_it_mt_knows_none_of_its_names(mt):
    assert "nanogpt" not in mt("plugins").stdout
    assert mt("count", ".").stderr.startswith("mt: command: unknown name 'count'")


@pytest.mark.parametrize("bias", [True, False])
def test_the_readme_s_commands_convert_and_count(run, tmp_path, bias):
    model = gpt2(bias=bias)
    save_as_nanogpt(model, tmp_path / "out-shakespeare", bias=bias)
    pip, convert, count = readme_commands()
    assert pip == ["pip", "install", "./examples/plugin"]  # what the environment was made with

    converted = run(*convert, "--verify")
    assert converted.returncode == 0, converted.stderr
    assert "verified: source in mt = result in mt: logits differ by at most 0 of" in converted.stdout
    native = Native(tmp_path / "shakespeare")
    tokens_BT = fixed_tokens(native.config())
    with torch.inference_mode():
        torch.testing.assert_close(our_logits(native, tokens_BT), model(tokens_BT).logits, rtol=0, atol=1e-5)

    rows = [line.split() for line in run(*count).stdout.splitlines()]
    assert rows[-1] == ["total", f"{sum(math.prod(shape) for shape in native.config().canonical_shapes().values()):,}"]
    assert next(row[:2] for row in rows if row[0] == "embed") == ["embed", "1,952"]


def test_a_compiled_model_s_names_are_read_from_another_file(run, tmp_path):
    save_as_nanogpt(gpt2(bias=True), tmp_path / "out", bias=True, prefix="_orig_mod.")
    (tmp_path / "out" / "ckpt.pt").rename(tmp_path / "out" / "best.pt")
    words = ["--loader", "nanogpt", "--load-dir", "out", "--ckpt", "best.pt", "--saver", "hf", "--save-dir", "hf"]
    assert "wrote hf: 36 tensors" in run("mt", "ckpt", "convert", *words).stdout


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "code"])
def test_a_file_that_is_not_nanogpt_s_is_one_line(monkeypatch, tmp_path, damage):
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    from mt_nanogpt.loader import NanoGPT

    file = tmp_path / "out" / "ckpt.pt"
    save_as_nanogpt(gpt2(bias=True), file.parent, bias=True)
    match damage:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "other":
            torch.save({"weights": torch.zeros(2)}, file)
        case "code":
            torch.save({"model": print, "model_args": {}}, file)
    with pytest.raises(MtError) as caught:
        NanoGPT(file.parent)
    assert str(caught.value) == f"{file}: missing, cut short or not nanoGPT's; give the out_dir of its train.py"


def test_the_example_is_as_small_as_it_should_be():
    loader = (EXAMPLE / "src" / "mt_nanogpt" / "loader.py").read_text()
    assert sum(bool(line.strip()) for line in loader.splitlines()) <= 45
    assert len((EXAMPLE / "README.md").read_text().splitlines()) <= 40
