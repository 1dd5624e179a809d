import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mt_cli.main import app

README = Path(__file__).parents[2] / "packages" / "mt-eval" / "README.md"
COMMANDS = re.findall(r"^    mt (.+)$", README.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(autouse=True)
def _workplace(checkpoint, tmp_path, monkeypatch):
    """A directory with the files that the README names."""
    (tmp_path / "RUN").symlink_to(checkpoint)
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "one two three"}\n')
    for name in ("wikitext103_test.txt", "held-out.txt"):
        (tmp_path / name).write_text("a few words of text")
    monkeypatch.chdir(tmp_path)


def test_the_readme_shows_every_task_and_generate():
    assert [command.split(" --")[0] for command in COMMANDS] == [
        "eval lambada",
        "eval wikitext103",
        "eval perplexity",
        "generate",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command):
    assert CliRunner().invoke(app, shlex.split(command), catch_exceptions=False).stdout


def test_the_python_of_the_readme_runs(capsys):
    code = README.read_text("utf-8").split("From Python:\n")[1].split("\nA third party")[0]
    exec(compile(re.sub("^    ", "", code, flags=re.MULTILINE), str(README), "exec"), {})
    assert capsys.readouterr().out
