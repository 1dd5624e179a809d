"""The figures of which rank has what are those that the code draws today, and every one is shown."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache

import pytest

from docs.pages import DOCS, GENERATORS

sys.path.insert(0, str(GENERATORS))
FOLDER = DOCS / "explanation" / "parallelism"
NAMES = sorted(path.name for path in FOLDER.glob("*.svg"))


@cache
def drawn() -> dict[str, str]:
    from figures import draw_figures

    return draw_figures()


def test_every_figure_is_drawn_by_the_script():
    assert sorted(drawn()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_up_to_date(name):
    assert (FOLDER / name).read_text("utf-8") == drawn()[name], "run python tools/docs/figures.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_a_title_and_colours_for_the_dark(name):
    svg = ElementTree.fromstring((FOLDER / name).read_text("utf-8"))
    (title,) = svg.findall("{http://www.w3.org/2000/svg}title")
    assert title.text
    assert "prefers-color-scheme: dark" in ElementTree.tostring(svg, encoding="unicode")


def test_every_page_of_parallelism_has_a_figure_and_every_figure_a_page():
    shown = {
        page.name: re.findall(r"^!\[[^\]]+\]\((\S+\.svg)\)$", page.read_text(), re.M) for page in FOLDER.glob("*.md")
    }
    assert all(shown.values()), shown
    assert sorted(name for names in shown.values() for name in names) == NAMES
