"""What the documentation says of commands, options, fields and modules exists."""

import importlib
import importlib.util
import re
import sys

import pytest

from docs.pages import DOCS, GENERATORS
from mt_cli.run_config import run_config_type
from mt_core.plugins import components

sys.path.insert(0, str(GENERATORS))
commands_reference, configuration_reference, megatron_arguments = map(
    importlib.import_module, ("commands_reference", "configuration_reference", "megatron_arguments")
)

RECORDS = {"api", "decisions", "specs", "benchmarks.md"}
"""Generated, or about other programs too."""
WRITTEN = [path for path in sorted(DOCS.rglob("*.md")) if not RECORDS & set(path.parts)]
SECTIONS = tuple(run_config_type().model_fields)
FIELD = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)")
FILES = (".py", ".bin", ".idx", ".json", ".jsonl", ".toml", ".safetensors")


THEIRS = re.compile(r"Megatron's\s`[^`]*`")
"""An option of Megatron-LM, quoted."""
THEIR_COLUMN = re.compile(r"^\|.*?(?<!\\)\|", re.MULTILINE)


def prose(path) -> str:
    """A page without its blocks, Megatron's options, and the first column of tables called Megatron-LM."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    paragraphs = THEIRS.sub("", text).split("\n\n")
    return "\n\n".join(THEIR_COLUMN.sub("", p) if p.startswith("| Megatron-LM |") else p for p in paragraphs)


@pytest.mark.parametrize(
    "reference", [configuration_reference, commands_reference, megatron_arguments], ids=lambda module: module.__name__
)
def test_a_generated_page_is_up_to_date(reference):
    command = f"python tools/docs/{reference.__name__}.py"
    assert reference.PAGE.read_text("utf-8") == reference.render_page(), f"run {command}"


def test_every_argument_of_megatron_that_is_read_is_documented():
    rows = (row for rows in megatron_arguments.ROWS.values() for row in rows)
    read = {name for row in rows for name in megatron_arguments.list_read(row)}
    assert read == {*megatron_arguments.list_arguments()}


def test_every_field_of_the_configuration_is_documented():
    rows = [line.split(" | ") for line in configuration_reference.render_page().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows if len(row) == 4 and not row[3].strip(" |")] == []


def find_tables(text: str) -> list[list[str]]:
    """The rows of every table of a page."""
    return [block.strip().splitlines() for block in re.findall(r"(?:^\|.*\n(?:[^\n|].*\n)*)+", text, re.MULTILINE)]


def test_every_row_of_the_reference_s_tables_has_all_cells():
    tables = find_tables(configuration_reference.render_page())
    assert len(tables) > 20
    for table in tables:
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in table} == {len(re.findall(r"\|", table[0]))}


@pytest.mark.parametrize("kind", ["preset", "tokenizer", "optimizer", "attention", "ckpt-loader"])
def test_the_reference_lists_names_that_a_user_can_type(kind):
    page = configuration_reference.render_page()
    assert [name for name in components(kind) if f"\n| `{name}` | " not in page] == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: str(path.relative_to(DOCS)))
def test_options_that_the_page_names_exist(page):
    known = set(re.findall(r"--[a-z][a-z0-9-]*", commands_reference.PAGE.read_text("utf-8"))) | {"--help"}
    assert set(re.findall(r"`[^`]*?(--[a-z][a-z0-9-]*)", prose(page))) <= known


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: str(path.relative_to(DOCS)))
def test_fields_that_the_page_names_exist(page):
    known = set(FIELD.findall(configuration_reference.PAGE.read_text("utf-8")))
    named = {name for name in FIELD.findall(prose(page)) if not name.endswith((*FILES, "."))}
    assert named <= known


def test_modules_of_the_api_pages_exist():
    names = [n for page in DOCS.glob("reference/api/*.md") for n in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(names) > 60
    assert [name for name in names if importlib.util.find_spec(name) is None] == []
