"""Discovery of plugins, with real entry points in the `mt` process: what is broken, doubled, disabled or missing."""

import re

import pytest

HEAD = "from mt_core.plugins import Component, hookimpl\n"
HOOK = HEAD + "@hookimpl\ndef mt_components():\n    return [Component({arguments})]\n"


def providing(*arguments: object) -> str:
    """The source of a plugin with one component."""
    return HOOK.format(arguments=", ".join(map(repr, arguments)))


def test_a_plugin_is_listed_with_what_it_provides(mt, plugin):
    path = plugin("mt-extra", providing("optimizer", "lion", "mt_extra:lion", "Lion"))
    listed = mt("plugins", PYTHONPATH=path).stdout
    assert ["optimizer", "lion", "mt-extra", "Lion"] in [line.split() for line in listed.splitlines()]
    assert listed.endswith("plugins: mt-ckpt, mt-cli, mt-core, mt-data, mt-eval, mt-extra, mt-models\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        (HEAD + "@hookimpl\ndef mt_components(oops):\n    return []", "PluginValidationError"),
        (HEAD + "@hookimpl\ndef mt_components():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
        (HEAD + "@hookimpl\ndef mt_components():\n    return None", "TypeError: 'NoneType' object is not iterable"),
        (
            HEAD + "@hookimpl\ndef mt_components():\n    return ['lion']",
            "TypeError: mt_components gave 'lion', which is not a Component",
        ),
        (
            providing("ckpt_loader", "x", "a:b", "typing error"),
            "ValueError: component 'x' has kind 'ckpt_loader'; did you mean 'ckpt-loader'?",
        ),
    ],
    ids=["needs a package", "fails", "hook of another shape", "hook fails", "nothing", "no component", "unknown kind"],
)
def test_a_broken_plugin_is_listed_and_stops_nothing(mt, plugin, source, reason):
    path = plugin("mt-broken", source)
    listed = mt("plugins", PYTHONPATH=path)
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("broken: ")]
    assert line.startswith(f"broken: mt-broken: {reason}")
    assert "plugins: mt-ckpt, mt-cli, mt-core, mt-data, mt-eval, mt-models\n" in listed.stdout
    assert listed.returncode == 0
    assert mt("--help", PYTHONPATH=path).stdout == mt("--help").stdout


def test_columns_stay_aligned_whatever_the_names(mt, plugin):
    path = plugin("mt-of-a-long-name", providing("tokenizer", "GPTSentencePieceTokenizerOfALongName", "a:b", "Long"))
    rows = [line for line in mt("plugins", PYTHONPATH=path).stdout.splitlines() if line.startswith("tokenizer ")]
    (long,) = [row for row in rows if "OfALongName" in row]
    short = [row for row in rows if " mt-data " in row]
    assert {row.index("mt-data") for row in short} == {long.index("mt-of-a-long-name")}
    summaries = {len(re.match(r"tokenizer +\S+ +\S+ +", row)[0]) for row in rows}
    assert summaries == {long.index("Long", long.index("mt-of"))} or len(summaries) == 1


def test_an_unknown_name_mentions_plugins_that_are_broken(mt, plugin):
    ran = mt("lion", PYTHONPATH=plugin("mt-broken", "1 / 0"))
    assert ran.stderr.startswith("mt: command: unknown name 'lion'; allowed: ckpt, config,")
    assert ran.stderr.endswith("; broken plugins: mt-broken\n")
    assert ran.returncode == 2


def test_a_name_that_two_plugins_provide_is_an_error_naming_both(mt, plugin):
    plugin("mt-one", providing("ckpt-loader", "same", "mt_one:load", "first"))
    path = plugin("mt-two", providing("ckpt-loader", "same", "mt_two:load", "second"))
    words = ["ckpt", "convert", "--loader", "same", "--load-dir", ".", "--saver", "native", "--save-dir", "out"]
    ran = mt(*words, PYTHONPATH=path)
    assert ran.returncode == 2
    assert "mt: ckpt-loader 'same': provided by both mt-" in ran.stderr
    assert "mt-one (mt_one:load)" in ran.stderr
    assert "mt-two (mt_two:load)" in ran.stderr
    assert "disable one: MT_DISABLE_PLUGINS=mt-" in ran.stderr


def test_what_is_provided_twice_is_still_listed(mt, plugin):
    plugin("mt-one", providing("ckpt-loader", "same", "mt_one:load", "first"))
    path = plugin("mt-two", providing("ckpt-loader", "same", "mt_two:load", "second"))
    ran = mt("plugins", PYTHONPATH=path)
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert ["ckpt-loader", "same", "mt-one", "first"] in rows
    assert ["ckpt-loader", "same", "mt-two", "second"] in rows
    assert "mt: ckpt-loader 'same': provided by both" in ran.stderr
    assert ran.returncode == 2


def test_disabling_one_of_two_resolves_the_doubt(mt, plugin):
    plugin("mt-one", providing("ckpt-loader", "same", "mt_one:load", "first"))
    path = plugin("mt-two", providing("ckpt-loader", "same", "mt_two:load", "second"))
    ran = mt("plugins", PYTHONPATH=path, MT_DISABLE_PLUGINS="mt-one")
    assert ran.returncode == 0
    assert "first" not in ran.stdout
    assert "disabled by MT_DISABLE_PLUGINS: mt-one\n" in ran.stdout


def test_several_plugins_can_be_disabled_and_are_not_imported(mt, plugin):
    path = plugin("mt-broken", "1 / 0")
    ran = mt("plugins", PYTHONPATH=path, MT_DISABLE_PLUGINS="mt-broken, mt-eval")
    assert "disabled by MT_DISABLE_PLUGINS: mt-broken, mt-eval\n" in ran.stdout
    assert "broken:" not in ran.stdout
    assert "lambada" not in ran.stdout


def test_one_distribution_can_hold_several_plugins(mt, plugin):
    path = plugin("mt-pair", providing("optimizer", "lion", "mt_pair:lion", "first"))
    (path / "mt_pair_two.py").write_text(providing("optimizer", "sophia", "mt_pair_two:sophia", "second"))
    with (path / "mt_pair-1.0.dist-info" / "entry_points.txt").open("a") as file:
        file.write("pair = mt_pair_two\n")
    listed = mt("plugins", PYTHONPATH=path).stdout
    assert "mt-pair, mt-pair:pair\n" in listed
    assert [line.split()[1:3] for line in listed.splitlines() if line.startswith("optimizer")] == [
        ["adamw", "mt-core"],
        ["lion", "mt-pair"],
        ["sophia", "mt-pair:pair"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pluginz"], "mt: command: unknown name 'pluginz'; did you mean 'plugins'? allowed: ckpt, config, data, "),
        (["eval", "lambda"], "mt: eval-task: unknown name 'lambda'; did you mean 'lambada'? allowed: harness, "),
        (["eval", "LAMBADA"], "mt: eval-task: unknown name 'LAMBADA'; did you mean 'lambada'? allowed: harness, "),
        (["config", "show", "--preset", "GPT-Tiny"], "mt: preset: unknown name 'GPT-Tiny'; did you mean 'gpt-tiny'? "),
        (["config", "show", "--preset", "gpt2"], "mt: preset: unknown name 'gpt2'; did you mean 'gpt2-124m'? allowed:"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(mt, words, message):
    ran = mt(*words)
    assert ran.stderr.startswith(message)
    assert (ran.stdout, ran.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("requires", "install"),
    [((), "no_such_package"), (("mt-x[all]", "other>=2"), "'mt-x[all]' 'other>=2'")],
    ids=["by the module's name", "as the plugin says"],
)
def test_a_component_whose_package_is_missing_says_what_to_install(mt, plugin, requires, install):
    path = plugin("mt-x", providing("command", "x", "mt_x_command:x", "Does x.", requires))
    (path / "mt_x_command.py").write_text("import no_such_package\n")
    assert re.search(r"^  x +Does x\.$", mt("--help", PYTHONPATH=path).stdout, re.MULTILINE)
    ran = mt("x", PYTHONPATH=path)
    assert ran.stderr == f"mt: command 'x': needs 'no_such_package', which is not installed; pip install {install}\n"
    assert ran.returncode == 2


def test_a_command_may_be_a_plain_function(mt, plugin):
    source = providing("command", "twice", "mt_x:twice", "Doubles.")
    path = plugin("mt-x", source + "\ndef twice(number: int, add: int = 0):\n    print(2 * number + add)\n")
    assert mt("twice", "20", "--add", "2", PYTHONPATH=path).stdout == "42\n"
