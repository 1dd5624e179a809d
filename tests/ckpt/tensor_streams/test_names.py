"""Renaming tables."""

import pytest

from mt_ckpt.huggingface.families import FAMILIES
from mt_ckpt.tensor_streams.names import Names

NAMES = Names({"a.{n}.x.weight": "layers.{n}.y.weight", "top.weight": "embed.weight"}, ignore=(r"\.buffer$",))


def test_a_layer_number_travels_both_ways():
    assert NAMES.ours("a.17.x.weight") == "layers.17.y.weight"
    assert NAMES.theirs("layers.17.y.weight") == "a.17.x.weight"


def test_a_name_without_a_layer_travels_both_ways():
    assert NAMES.ours("top.weight") == "embed.weight"
    assert NAMES.theirs("embed.weight") == "top.weight"


def test_unknown_names_are_collected_and_ignored_ones_are_not_among_them():
    assert NAMES.unknown(["a.0.x.weight", "b", "a.0.buffer", "a.0.z.weight"]) == ["b", "a.0.z.weight"]


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"both a\.weight and b\.weight map to c\.weight"):
        Names({"a.weight": "c.weight", "b.weight": "c.weight"})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_name_of_a_family_comes_back(family):
    for theirs in family.names.table:
        theirs = theirs.replace("{n}", "3")
        assert family.names.theirs(family.names.ours(theirs)) == theirs
