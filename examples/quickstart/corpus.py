"""Gather a corpus of real text from this machine: the Python standard library's own sources, one document a file.

usage: corpus.py OUT_DIR          writes OUT_DIR/train.jsonl and OUT_DIR/heldout.jsonl

Nothing is downloaded. Every twentieth file (by a hash of its name, so the choice is stable) is held out.
"""

import hashlib
import json
import sys
import sysconfig
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "encodings", "turtledemo"}
LIMIT_BYTES = 6_000_000


def documents(root: Path):
    """Name and text of every source file, in a fixed order that mixes the folders."""
    files = [f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    for file in sorted(files, key=lambda f: digest(str(f.relative_to(root)))):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 500:
            yield str(file.relative_to(root)), text


def digest(name: str) -> int:
    """A number that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def main(out: Path) -> None:
    """Write both files and say how large they are."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {"train": 0, "heldout": 0}
    with (out / "train.jsonl").open("w") as train, (out / "heldout.jsonl").open("w") as heldout:
        for name, text in documents(Path(sysconfig.get_paths()["stdlib"])):
            part, file = ("heldout", heldout) if digest(name) % 20 == 0 else ("train", train)
            file.write(json.dumps({"text": text, "name": name}) + "\n")
            sizes[part] += len(text)
            if sum(sizes.values()) > LIMIT_BYTES:
                break
    print(f"corpus: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['heldout'] / 1e6:.2f} MB held out, in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
