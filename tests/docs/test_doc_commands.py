"""Every command of the documentation runs, page by page and in order, and prints what the page shows."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs.pages import DOCS, PAGES, ROOT, matches, read
from eval.finetuning.task_files import write_bert
from preloaded import processes

TUTORIAL = DOCS / "tutorials" / "first-model.md"
LIMIT_S = 600
"""For a step of a page; the longest takes a tenth on a quiet machine."""
ROLES = {
    "corpus": "train.jsonl",
    "heldout": "heldout.jsonl",
    "text": "heldout.jsonl",
    "config": str(Path(__file__).with_name("small.toml")),
}
"""Files of the tutorial, or of this folder."""
WITH_COMMANDS = [path for path in PAGES if path != TUTORIAL and any(not s.title for s in read(path).steps)]


@pytest.fixture(scope="session")
def installed() -> dict[str, str]:
    """The environment of a reader, whose path has the installed `mt`."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def environment(installed, tmp_path_factory) -> dict[str, str]:
    """The same with an `mt` that is a fork of a preloaded process."""
    folder = tmp_path_factory.mktemp("bin")
    processes.write_script(folder)
    return installed | {"PATH": f"{folder}:{installed['PATH']}", processes.ADDRESS: processes.server_address()}


def follow(path: Path, folder: Path, environment: dict[str, str]) -> None:
    """Do in `folder` what the page says."""
    for step in read(path).steps:
        if step.title:
            (folder / step.title).write_text(step.body)
            continue
        script = f"set -euo pipefail\n{step.body}"
        ran = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            timeout=LIMIT_S,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        told = f"{path.relative_to(ROOT)}\n$ {step.body}\n{ran.stdout}"
        assert ran.returncode == step.code, told
        assert step.output is None or matches(step.output, ran.stdout), f"{told}\nthe page shows:\n{step.output}"


@pytest.fixture(scope="session")
def first_model(build_once, installed) -> Path:
    """The directory that the tutorial leaves: its commands are the installed ones, every other page's are forks."""
    return build_once("first-model", lambda folder: follow(TUTORIAL, folder, installed))


def test_the_tutorial_runs(first_model):
    assert {"tokenizer", "corpus_text_document.bin", "run", "hf"} <= {path.name for path in first_model.iterdir()}


@pytest.fixture(scope="session")
def toy_bert(build_once) -> Path:
    """A checkpoint of a BERT, for pages that begin with a pretrained one: the role "bert"."""
    return build_once("toy-bert", write_bert) / "bert"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_the_page_run(page, first_model, toy_bert, environment, tmp_path):
    for role, name in read(page).given:
        source = toy_bert if role == "bert" else first_model / ROLES.get(role, name)
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    follow(page, tmp_path, environment)


@pytest.mark.parametrize("page", [p for p in PAGES if DOCS in p.parents], ids=lambda path: str(path.relative_to(DOCS)))
def test_every_block_of_the_page_says_what_it_is(page):
    fences = re.findall(r"^\s*```(.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert all(fences[::2]), "a block without a language is neither run nor marked as not to be run"


def test_the_sources_that_the_readme_installs_bring_all_they_need():
    """What pip cannot find among the folders of a line it would look for in the index, where mt is not."""
    lines = re.findall(r"^pip install ./packages/mt-\{(.*)\}", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        names = {f"mt-{name}" for name in line.split(",")}
        for name in names:
            project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text("utf-8"))["project"]
            needed = {requirement.partition("==")[0].partition("[")[0] for requirement in project["dependencies"]}
            assert {requirement for requirement in needed if requirement.startswith("mt-")} <= names
    assert {f"mt-{name}" for name in lines[-1].split(",")} == {path.name for path in ROOT.glob("packages/mt-*")}
