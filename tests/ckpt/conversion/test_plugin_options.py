"""The options of loaders and savers are what their signatures say, on the command line too."""

import json
import subprocess
import sys

import pytest

from ckpt import faulty_plugins
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.native.loader import Native
from mt_core.cli.options import read_words
from mt_core.errors import MtError
from mt_core.plugin_options import UNSET, read_options
from mt_core.plugins import components


@pytest.fixture
def words(native, tmp_path, add_component):
    """The words of a conversion between a third party's formats, and where it goes."""
    add_component("ckpt-loader", "repeats", "ckpt.faulty_plugins:Repeats")
    add_component("ckpt-saver", "options", "ckpt.faulty_plugins:writes_options")
    target = tmp_path / "out"
    return ["convert", "--loader", "repeats", "--load-dir", native, "--saver", "options", "--save-dir", target], target


def problems(words):
    with pytest.raises(MtError) as raised:
        mt_ckpt(*words)
    return list(map(str, raised.value.problems))


def test_options_are_keyword_only_parameters_with_type_help_and_default():
    loader, saver = read_options(faulty_plugins.Repeats), read_options(faulty_plugins.writes_options)
    assert [(option.usage, option.description) for option in (*loader.values(), *saver.values())] == [
        ("--times INTEGER", "How often.  [required]"),
        ("--notes PATH", "A file."),
        ("--no-tidy", ""),
        ("--times INTEGER", "  [default: 1]"),
        ("--order [up|down]", "Which way.  [default: up]"),
        ("--loud", ""),
        ("--plain TEXT", ""),
    ]
    assert read_options(Native) == {}


@pytest.mark.parametrize("kind", ["ckpt-loader", "ckpt-saver"])
def test_a_declaration_has_the_options_of_what_it_stands_for(kind):
    for name, plugin in components(kind).items():
        declared, implemented = read_options(plugin.load_declaration()), read_options(plugin.load())
        assert list(declared.items()) == list(implemented.items()), name


def test_annotations_may_be_texts_and_names_for_type_checkers_alone_may_stand_elsewhere():
    scope: dict = {}
    exec("def load(path, *, size: 'int | float' = 1) -> 'Missing': ...", scope)
    assert read_options(scope["load"])["size"].usage == "--size [INTEGER|FLOAT]"


def test_words_are_options_values_switches_and_strays():
    sides = {"loader": read_options(faulty_plugins.Repeats), "saver": read_options(faulty_plugins.writes_options)}
    words = ["--times", "-3", "--no-tidy", "--loud", "x", "--order=up=down", "--odd", "word", "--plain"]
    given, strays = read_words(words, sides)
    assert given == {"times": "-3", "tidy": False, "loud": True, "order": "up=down", "odd": "word", "plain": UNSET}
    assert strays == ["x"]


def test_an_option_of_both_goes_to_both_and_texts_become_values(words, monkeypatch):
    command, target = words
    times = []
    monkeypatch.setattr(faulty_plugins.Repeats, "tokenizer_files", lambda loader: times.append(loader.times) or ())
    assert mt_ckpt(*command, "--times", 3, "--order", "down", "--loud", "--plain=a b").exit_code == 0
    written = json.loads((target / "options.json").read_text())
    assert written == {"times": 3, "order": "down", "loud": True, "plain": "a b", "tensors": 30}
    assert times == [3]


def test_everything_wrong_is_told_at_once_and_first(words):
    command, target = words
    wrong = ["--notse", "x", "--dtyp", "bf16", "--times", "0", "--order", "left"]
    wrong += ["--loud=perhaps", "--plain", "--tidy", "y"]
    assert problems([*command, *wrong]) == [
        "root convert: unexpected 'y'; values follow options",
        "--notse: neither loader repeats nor saver options has it; did you mean '--notes'? "
        "allowed: --times, --notes, --tidy, --order, --loud, --plain",
        "--dtyp: neither loader repeats nor saver options has it; did you mean '--dtype'? "
        "allowed: --times, --notes, --tidy, --order, --loud, --plain",
        "--times: '0'; input should be greater than 0",
        "--order: 'left'; input should be 'up' or 'down'",
        "--loud: 'perhaps'; input should be a valid boolean, unable to interpret input",
        "--plain: needs a value; --plain TEXT",
    ]
    assert not target.exists()
    misspelt = ["--lod-dir" if word == "--load-dir" else word for word in command]
    assert "did you mean '--load-dir'?" in problems(misspelt)[0]


def test_what_an_option_needs_is_told_once_where_both_have_it(words, native):
    command, target = words
    number = "input should be a valid integer, unable to parse string as an integer"
    assert problems(command) == ["--times: required, but not given; How often."]
    assert problems([*command, "--times", "many"]) == [f"--times: 'many'; {number}"]
    with pytest.raises(MtError, match="--times: required, but not given; How often."):
        convert("repeats", native, "options", target)


def test_what_the_command_itself_lacks_is_told_by_it(native):
    missing = mt_ckpt("convert", "--load-dir", native, "--moe-grouped-gemm")
    assert (missing.exit_code, "Missing option '--saver'" in missing.stderr) == (2, True)


def test_help_shows_every_plugins_options_and_which_are_broken(words, add_component):
    add_component("ckpt-saver", "absent", "no_such_package:save")
    lines = mt_ckpt(*words[0], "--odd", "--help").stdout.splitlines()
    at = lines.index("Options of --loader repeats:")
    assert lines[at + 1 : at + 5] == [
        "  --times INTEGER  How often.  [required]",
        "  --notes PATH     A file.",
        "  --no-tidy",
        "",
    ]
    at = lines.index("Options of --saver absent:")
    assert lines[at + 1].split()[:6] == ["broken", "MtError:", "ckpt-saver", "'absent':", "needs", "'no_such_package',"]
    assert "Options of --loader core:" in lines
    assert "Options of --loader hf:" not in lines


@pytest.mark.parametrize("named", [[], ["--loader", "hf"], ["--loader", "core", "--saver", "hf"]], ids=" ".join)
def test_help_imports_no_torch_and_shows_all_options(named):
    source = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        f" sys.argv = {['mt', 'ckpt', 'convert', *named, '--help']}; from mt_cli.main import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in ran.stderr.split()}
    assert "mt_ckpt" in imported
    assert not imported & {"torch", "numpy", "safetensors", "transformers", "huggingface_hub"}
    titles = [line for line in ran.stdout.splitlines() if line.startswith("Options of --")]
    assert titles == [
        f"Options of --{side}:"
        for side in ("loader core", "loader legacy", "saver core", "saver hf", "saver legacy", "saver peft")
    ]
    shown = ("--true-vocab-size INTEGER", "--moe-grouped-gemm", "5000000000]")
    assert all(text in ran.stdout for text in shown)
    assert "broken" not in ran.stdout
