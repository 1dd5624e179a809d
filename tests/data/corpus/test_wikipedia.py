"""`mt data wikipedia extract`."""

from pathlib import Path

import pytest

from data.corpus.conftest import read_records, write_records
from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_data.corpus.wikipedia import clean_article, extract_articles


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    (tmp_path / "dump" / "AA").mkdir(parents=True)
    article = {"id": "7", "url": "https://en.wikipedia.org/?curid=7", "title": "Salt", "text": "Salt is a mineral."}
    write_records(tmp_path / "dump" / "AA" / "wiki_01", article, {**article, "id": "8", "text": ""})
    with atomic_file(tmp_path / "dump" / "AA" / "wiki_00", "w") as file:
        file.write(
            '<doc id="5" url="https://en.wikipedia.org/?curid=5" title="Tom &amp; &quot;Jerry&quot;">\n'
            'Tom & "Jerry"\n\nIt began in 1940.&lt;br&gt;\n\n\n\nIt has 161 parts.\n\n</doc>\n'
        )
    return tmp_path / "dump"


def test_articles_of_both_forms(dump: Path, tmp_path: Path):
    counts = extract_articles([dump], tmp_path / "out.jsonl")
    assert counts == {"articles": 3, "kept": 2, "too short": 1, "written": 2}
    url = "https://en.wikipedia.org/?curid="
    assert read_records(tmp_path / "out.jsonl") == [
        {"id": "5", "url": f"{url}5", "title": 'Tom & "Jerry"', "text": "It began in 1940.\n\nIt has 161 parts."},
        {"id": "7", "url": f"{url}7", "title": "Salt", "text": "Salt is a mineral."},
    ]
    assert extract_articles([dump], tmp_path / "long.jsonl", min_characters=20)["kept"] == 1


def test_the_title_is_taken_off_only_where_it_stands_alone():
    assert clean_article("Salt is a mineral.", "Salt") == "Salt is a mineral."
    assert clean_article("Salt\n\nA mineral.<ref name=x />", "Salt") == "A mineral."


def test_dumps_that_are_none(dump: Path, tmp_path: Path):
    with pytest.raises(MtError, match=r"dumb: no such file or folder; did you mean .*dump\?"):
        extract_articles([tmp_path / "dumb"], tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(MtError, match="none: holds no files; the folder that WikiExtractor wrote"):
        extract_articles([tmp_path / "none"], tmp_path / "out")
    for content, message in [
        ("<mediawiki>\n", ":1: is neither JSON nor inside a <doc>: '<mediawiki>'; a file that WikiExtractor wrote"),
        ('<doc id="1" title="A">\nA\n', ":1: has a <doc> that does not end; extract the dump again"),
        ('<doc id="1">\nA\n</doc>\n', ":1: has a <doc> without a title; a file that WikiExtractor wrote"),
        ('{"title": "A"}\n', ":1: has no key 'text', only 'title'"),
    ]:
        (tmp_path / "wiki_00").write_text(content)
        with pytest.raises(MtError, match=message):
            extract_articles([tmp_path / "wiki_00"], tmp_path / "out")
