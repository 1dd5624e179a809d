"""A wheel of each package has what it needs in it, and runs alone in an empty environment."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(build_once) -> Path:
    """A folder with the six wheels, built without network."""
    command = ["uv", "build", "--quiet", "--offline", "--all-packages", "--wheel", "--out-dir"]
    return build_once("wheels", lambda folder: subprocess.run([*command, folder], cwd=ROOT, check=True))


@pytest.fixture(scope="module")
def tried(dist) -> dict[str, str]:
    """What `tools/try_wheels.py` prints of each requirement."""
    words = [sys.executable, ROOT / "tools" / "try_wheels.py", dist, "--installed"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    parts = re.split(r"^(mt-\S+): ", ran.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_package_has_one_wheel(dist):
    names = [path.name.split("-")[0].replace("_", "-") for path in sorted(dist.glob("*.whl"))]
    assert names == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_has_the_licence_the_mark_of_types_and_every_file_of_its_source(package, dist):
    (wheel,) = dist.glob(f"{package.replace('-', '_')}-*.whl")
    source = ROOT / "packages" / package / "src"
    files = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert f"{package.replace('-', '_')}/py.typed" in names
    assert files <= set(names)


def test_presets_and_gpu_profiles_are_in_the_wheels(dist):
    names = [name for wheel in dist.glob("*.whl") for name in ZipFile(wheel).namelist()]
    assert "mt_models/presets/gpt2-124m.toml" in names
    assert [name for name in names if name.startswith("mt_core/planning/") and name.endswith(".toml")]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_found_where_only_its_requirements_are_installed(package, tried):
    assert f"{package.replace('-', '_')}.plugin" in tried[package].splitlines()[0].split()


def test_the_command_line_alone_has_its_own_commands(tried):
    assert "Usage: mt train " in tried["mt-cli"]
    assert "Usage: mt data " not in tried["mt-cli"]


def test_the_command_line_brings_lm_eval_by_its_extra(dist):
    tool = runpy.run_path(str(ROOT / "tools" / "try_wheels.py"))
    brought = tool["close_over"]("mt-cli[lm-eval]", tool["read_requirements"](dist))
    assert {"lm-eval", "mt-eval"} <= brought
    assert "lm-eval" not in tool["close_over"]("mt-cli[eval]", tool["read_requirements"](dist))


@pytest.mark.parametrize(
    "command", ["ckpt", "config", "data", "eval", "generate", "plan", "serve", "serve-client", "train", "verify"]
)
def test_a_command_starts_where_all_wheels_are_installed(command, tried):
    assert f"Usage: mt {command} " in tried["mt-cli[all]"]
