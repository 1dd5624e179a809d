"""Take every address out of uv.lock, so that it pins versions and works with any index or mirror.

usage: strip_lock.py uv.lock

What stays is each package's name, version and kind of source. `uv sync` takes the pins from it, resolves the rest
again and finds the files itself.
"""

import sys
import tomllib
from pathlib import Path

HEADER = "# Versions only: no address, so any index or mirror serves it. Written by `make lock`."


def stripped(text: str) -> str:
    """The lock file without addresses."""
    lock = tomllib.loads(text)
    lines = [HEADER, f"version = {lock['version']}", f'requires-python = "{lock["requires-python"]}"', ""]
    for package in lock["package"]:
        lines += ["[[package]]", f'name = "{package["name"]}"']
        lines += [f'version = "{package["version"]}"'] if "version" in package else []
        lines += [f"source = {source(package['source'])}", ""]
    return "\n".join(lines)


def source(table: dict[str, str]) -> str:
    """A package from an index has `registry = "."`; a workspace member keeps its folder."""
    if "registry" in table:
        return '{ registry = "." }'
    return "{ " + ", ".join(f'{key} = "{value}"' for key, value in table.items()) + " }"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(stripped(path.read_text()))
