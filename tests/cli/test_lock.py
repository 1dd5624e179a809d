"""uv.lock pins versions and nothing else, and no file of the repository says where packages are downloaded from."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HOSTS = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|\.whl[\"']?[#?]"
"""Names of registries and of their files; this pattern does not match itself."""


@pytest.fixture(scope="module")
def locked() -> list[dict]:
    """The locked packages; a name comes twice if a newer Python gets a newer version."""
    return tomllib.loads((ROOT / "uv.lock").read_text())["package"]


def versions(locked: list[dict], name: str) -> list[str]:
    return [package["version"] for package in locked if package["name"] == name]


def test_the_lock_holds_no_address():
    text = (ROOT / "uv.lock").read_text()
    assert "://" not in text
    assert not re.search(r"\bhash(es)?\b", text)
    assert "Written by `make lock`" in text.splitlines()[0]


def test_a_package_of_an_index_is_a_name_and_a_version(locked):
    from_index = [package for package in locked if "registry" in package["source"]]
    assert len(from_index) > 50
    assert all(package["source"] == {"registry": "."} for package in from_index)
    assert {key for package in from_index for key in package} == {"name", "version", "source"}


def test_torch_is_the_gpu_machine_s(locked):
    assert versions(locked, "torch") == ["2.11.0"]


def projects() -> dict[str, dict]:
    """Folder and [project] table of every package of the workspace."""
    files = {file.parent.name: file for file in (ROOT / "packages").glob("*/pyproject.toml")}
    return {folder: tomllib.loads(file.read_text())["project"] for folder, file in files.items()}


def test_every_package_of_the_workspace_is_locked(locked):
    of_workspace = {package["name"]: package for package in locked if "editable" in package["source"]}
    assert of_workspace == {
        project["name"]: {
            "name": project["name"],
            "version": project["version"],
            "source": {"editable": f"packages/{folder}"},
        }
        for folder, project in projects().items()
    }
    assert len(of_workspace) == 6


def test_a_version_is_locked_for_everything_that_a_package_requires(locked):
    for project in projects().values():
        extras = project.get("optional-dependencies", {}).values()
        for requirement in map(Requirement, [*project["dependencies"], *(text for extra in extras for text in extra)]):
            locked_versions = versions(locked, requirement.name)
            assert locked_versions, requirement
            assert all(requirement.specifier.contains(version) for version in locked_versions), requirement


def test_no_file_names_a_registry_or_a_download_address():
    """Files that are not tracked yet are read too, unless git ignores them."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "--is-inside-work-tree"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    ran = subprocess.run([*git, "grep", "--untracked", "-nIE", HOSTS], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("", 1)
