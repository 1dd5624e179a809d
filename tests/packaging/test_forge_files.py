"""Files for a forge and its visitors parse, agree with each other and name only commands that exist."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from mt_core.config.renamed_keys import RENAMED

ROOT = Path(__file__).parents[2]
PACKAGES = sorted((ROOT / "packages").iterdir())
SHARED = ("version", "requires-python", "license", "license-files", "authors", "keywords", "classifiers")


def read_project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_metadata_and_licence_are_those_of_the_workspace(package):
    workspace, project = read_project(ROOT), read_project(package)
    assert {key: project[key] for key in SHARED} == {key: workspace[key] for key in SHARED}
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_licence_is_named_alike_everywhere():
    project, citation = read_project(ROOT), read_yaml("CITATION.cff")
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text("utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_the_citation_has_the_version_and_authors_of_the_packages():
    project, citation = read_project(ROOT), read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "type"} <= citation.keys()
    assert citation["version"] == project["version"]
    assert citation["authors"] == project["authors"]


def test_the_workflow_runs_targets_of_the_makefile_on_every_python_that_is_promised():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert all(program == "make" and wanted and set(wanted) <= targets for program, *wanted in commands)
    assert {"lint", "types", "test", "try-wheels"} <= {word for words in commands for word in words}
    pythons = [c.rpartition(" ")[2] for c in read_project(ROOT)["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert [job["strategy"]["matrix"]["python"] for job in jobs.values() if "strategy" in job] == [pythons, pythons]


def test_hooks_run_in_this_checkout_without_fetching_anything():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    commands = [hook["entry"] for hook in repository["hooks"]]
    assert all(command.startswith("uv run --no-sync ") for command in commands)
    assert [command.split()[3] for command in commands] == ["ruff", "ruff", "pyright"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_has_what_a_forge_asks_for(name):
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["attributes"]["label"] for field in form["body"])
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)


def test_files_that_the_pull_request_template_links_exist():
    folder = ROOT / ".github"
    links = re.findall(r"\]\(([^)]+)\)", (folder / "pull_request_template.md").read_text("utf-8"))
    assert links
    assert all((folder / link).exists() for link in links)


def test_the_changelog_has_the_present_version_and_every_renamed_key():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert read_project(ROOT)["version"] in versions
    assert dict(re.findall(r"^  \| `([\w.]+)` \| `([\w.]+)` \|$", text, re.MULTILINE)) == RENAMED
