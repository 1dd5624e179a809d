"""Installs each wheel of a folder alone into an empty environment and starts what it brings.

usage: python tools/try_wheels.py DIST [--installed]

Dependencies come from the package index; with --installed they are this interpreter's own packages, without network.
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOAD = (
    "from importlib.metadata import entry_points; print(*[point.load().__name__ for point in entry_points(group='mt')])"
)
"""Imports the plugin of every package that is installed, and prints their names."""


def read_requirements(dist: Path) -> dict[str, list[Requirement]]:
    """Return the requirements of every wheel in `dist`, by the distribution's name."""
    wheels = {}
    for wheel in sorted(dist.glob("*.whl")):
        (distribution,) = metadata.distributions(path=[str(wheel)])
        parsed = Metadata.from_email(distribution.read_text("METADATA") or "", validate=False)
        wheels[canonicalize_name(parsed.name)] = parsed.requires_dist or []
    return wheels


def close_over(requirement: str, wheels: dict[str, list[Requirement]]) -> set[str]:
    """Return the names of all distributions that installing `requirement` brings, of the extras that are asked for."""
    closure: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        this = waiting.pop()
        key = (canonicalize_name(this.name), frozenset(this.extras))
        if key in closure:
            continue
        closure.add(key)
        needed = wheels[key[0]] if key[0] in wheels else map(Requirement, metadata.requires(key[0]) or ())
        extras = key[1] | {""}
        waiting += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, _ in closure}


def link_installed(names: set[str], target: Path) -> None:
    """Link the files of these installed distributions into the site-packages `target`."""
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (target / top).exists():
                (target / top).symlink_to(Path(str(distribution.locate_file(top))))


def install(requirement: str, dist: Path, environment: Path, *, installed: bool) -> None:
    """Make `environment` and install `requirement` there from the wheels in `dist`."""
    run("uv", "venv", "--quiet", "--python", sys.executable, environment)
    pip = ["uv", "pip", "install", "--quiet", "--python", environment / "bin" / "python", "--find-links", dist]
    if not installed:
        run(*pip, requirement)
        return
    wheels = read_requirements(dist)
    closure = close_over(requirement, wheels)
    ours = [next(dist.glob(f"{name.replace('-', '_')}-*.whl")) for name in sorted(closure & wheels.keys())]
    run(*pip, "--offline", "--no-deps", *ours)
    site = sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)})
    link_installed(closure - wheels.keys(), Path(site))


def run(*words: object) -> str:
    """Run a command and return what it prints; stop with its output where it fails."""
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def try_requirement(requirement: str, dist: Path, *, installed: bool) -> str:
    """Install `requirement` alone; return the plugins that load there, and the help of `mt` and its commands."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        install(requirement, dist, environment, installed=installed)
        printed = run(environment / "bin" / "python", "-I", "-c", LOAD)
        mt = environment / "bin" / "mt"
        if not mt.exists():
            return printed
        commands = [line.split()[1] for line in run(mt, "plugins").splitlines() if line.startswith("command ")]
        return printed + run(mt, "--help") + "".join(run(mt, command, "--help") for command in commands)


def main() -> None:
    """Try every wheel alone, and then all of them through the extra `all` of mt-cli."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--installed", action="store_true", help="take dependencies from this interpreter's packages")
    given = parser.parse_args()
    for requirement in (*read_requirements(given.dist), "mt-cli[all]"):
        print(f"{requirement}: {try_requirement(requirement, given.dist, installed=given.installed)}")


if __name__ == "__main__":
    main()
