"""The whole pipeline as a user types it, over real text: the documentation of the standard library's own modules.

Planted in it: a near-copy of a module, a page in French, a passage of an evaluation set. And it is killed on the way.
"""

import ast
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FRENCH = (
    "Ce module n’est pas documenté en anglais, mais il est tout de même assez long pour être reconnu comme tel. " * 9
)
PASSAGE = "my wife refused to allow me to come to hong kong when the plague was at its height and"
COMMANDS = (
    *("blacklist-urls", "clean", "find-duplicates", "group-duplicates", "remove-duplicates", "filter-ngrams", "add-id"),
)


def mt(folder: Path, *args: str) -> dict[str, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "mt_cli", "data", *args], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return {line.rpartition("  ")[0].strip(): line.rpartition("  ")[2] for line in ran.stdout.splitlines()}


def docstrings(source: Path) -> str:
    """All docstrings of a module."""
    nodes = ast.walk(ast.parse(source.read_text("utf-8", errors="replace")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))))


def pages(count: int) -> dict[str, str]:
    texts = {}
    for source in sorted(Path(ast.__file__).parent.glob("[a-z]*.py")):
        if len(text := docstrings(source)) > 2000:
            texts[f"http://docs.org/{source.stem}"] = text[:20_000]
        if len(texts) == count:
            return texts
    pytest.skip("the standard library has no sources on this machine")


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    """`crawl.jsonl`: 30 modules; a changed copy of the third; French; a leak in the middle of the fifth."""
    texts = pages(30)
    urls = list(texts)
    texts["http://copies.org/1"] = texts[urls[2]].replace("the", "teh", 4)
    texts["http://autres.fr/1"] = FRENCH
    middle = len(texts[urls[4]]) // 2
    texts[urls[4]] = f"{texts[urls[4]][:middle]}. {PASSAGE.title()}. {texts[urls[4]][middle:]}"
    with (tmp_path / "crawl.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text, "url": url}) + "\n" for url, text in texts.items())
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": PASSAGE}) + "\n")
    return tmp_path


def read_urls(path: Path) -> list[str]:
    return [json.loads(line)["url"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_the_pipeline_finds_what_was_planted(crawl: Path):
    everything = read_urls(crawl / "crawl.jsonl")
    step = ("openwebtext",)
    rows = mt(crawl, *step, "clean", "--input", "crawl.jsonl", "--output", "clean.jsonl", "--workers", "2")
    assert read_urls(crawl / "clean.jsonl") == everything[:-1]
    assert rows["other language"] == "1"
    mt(crawl, *step, "find-duplicates", "--input", "clean.jsonl", "--output", "dup.jsonl")
    mt(crawl, *step, "group-duplicates", "--input", "dup.jsonl", "--output", "groups.jsonl")
    assert json.loads((crawl / "groups.jsonl").read_text()) == {"0": [everything[2], "http://copies.org/1"]}
    mt(
        crawl,
        *step,
        "remove-duplicates",
        "--input",
        "clean.jsonl",
        "--groups",
        "groups.jsonl",
        "--output",
        "once.jsonl",
    )
    assert read_urls(crawl / "once.jsonl") == everything[:30]
    rows = mt(crawl, *step, "filter-ngrams", "--input", "once.jsonl", "--tasks", "test.jsonl", "--output", "free.jsonl")
    assert rows["cut"] == "1"
    assert "refused to allow me" in (crawl / "once.jsonl").read_text("utf-8").lower()
    assert "refused to allow me" not in (crawl / "free.jsonl").read_text("utf-8").lower()
    assert set(read_urls(crawl / "free.jsonl")) == set(everything[:30])
    mt(crawl, *step, "add-id", "--input", "free.jsonl", "--output", "ids.jsonl", "--id-prefix", "web")
    last = json.loads((crawl / "ids.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["adlr_id"] == f"web-{len(read_urls(crawl / 'free.jsonl')):010d}"


@pytest.mark.slow
def test_a_killed_step_is_taken_up_and_gives_the_same_bytes(tmp_path: Path):
    """SIGKILL after the first, second and third piece; nothing is visible under the final name before the end."""
    text = "".join(path.read_text("utf-8", errors="replace") for path in sorted(Path(ast.__file__).parent.glob("*.py")))
    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(1400):
            file.write(json.dumps({"text": text[3000 * i : 3000 * (i + 1)], "url": str(i)}) + "\n")
    words = ["openwebtext", "find-duplicates", "--input", "in.jsonl", "--num-seeds", "20", "--output"]
    mt(tmp_path, *words, "whole.jsonl")
    code = "import mt_data.corpus.step as step; step.JOURNAL_INTERVAL_S = 0.0; from mt_cli.main import main; main()"
    journal = tmp_path / "cut.jsonl.signatures.journal"
    for pieces in (1, 2, 3):
        running = subprocess.Popen([sys.executable, "-c", code, "data", *words, "cut.jsonl"], cwd=tmp_path)
        while not journal.exists() or json.loads(journal.read_text())["items"] < pieces:
            assert running.poll() is None, "the step ended before it could be killed"
            time.sleep(0.005)
        running.kill()
        assert running.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut.jsonl").exists()
    mt(tmp_path, *words, "cut.jsonl")
    for name in ("", ".signatures"):
        assert (tmp_path / f"cut.jsonl{name}").read_bytes() == (tmp_path / f"whole.jsonl{name}").read_bytes() != b""


PIECES = "import mt_data.text_io.lines as lines; lines.BLOCK_BYTES = 2048; lines.CHUNK_LINES = 8"


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    """A list of URLs, each three times and far apart, as words of a step."""
    once = [f"https://site{i % 50}.org/page/{i}" for i in range(3000)]
    (tmp_path / "urls.txt").write_text("\n".join(once * 3) + "\n")
    (tmp_path / "blacklist.txt").write_text("site7.org\n")
    return ["blacklist-urls", "--input", "urls.txt", "--blacklist", "blacklist.txt"]


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Pairs whose groups grow together as the file goes on, as words of a step."""
    lines = [{f"d{i}": [{f"d{i + gap}": 0.9}]} for gap in (1000, 500, 250) for i in range(0, 3000, 3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["group-duplicates", "--input", "pairs.jsonl"]


@pytest.mark.parametrize(("step", "part"), [("urls", "cut"), ("pairs", "cut.links")])
def test_a_step_that_remembers_what_it_saw_is_taken_up(
    step: str, part: str, tmp_path: Path, request: pytest.FixtureRequest
):
    """SIGKILL between two pieces: the next run knows from the unfinished output what the killed one had seen."""
    words = request.getfixturevalue(step)
    mt(tmp_path, "openwebtext", *words, "--output", "whole")
    code = f"""
import os, signal
{PIECES}
import mt_data.corpus.step as step
step.JOURNAL_INTERVAL_S, write, left = 0.0, step._write_state, 20
def killing(path, state):
    global left
    write(path, state)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
step._write_state = killing
from mt_cli.main import main
main()
"""
    command = [sys.executable, "-c", code, "data", "openwebtext", *words, "--output", "cut"]
    assert subprocess.run(command, cwd=tmp_path).returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert json.loads((tmp_path / f"{part}.journal").read_text())["items"] == 20
    kept = (tmp_path / f"{part}.part").read_bytes()
    go_on = f"{PIECES}; from mt_cli.main import main; main()"
    subprocess.run([sys.executable, "-c", go_on, *command[3:]], cwd=tmp_path, check=True)
    assert (tmp_path / part).read_bytes().startswith(kept)
    assert kept
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes() != b""


@pytest.mark.parametrize("command", [*(("openwebtext", name) for name in COMMANDS), ("wikipedia", "extract")])
def test_help_imports_no_library(command: tuple[str, str]):
    heavy = ("numpy", "ftfy", "datasketch", "py3langid", "tokenizers", "torch")
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in heavy)
    code = f"import sys; {block}; from mt_cli.main import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, "data", *command, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--output" in ran.stdout
