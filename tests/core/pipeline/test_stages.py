"""Layers go to stages as the configuration says, in Megatron's rules; what does not fit is refused with what does."""

import re
from itertools import accumulate, chain, combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mt_core.config.sections import PipelineConfig
from mt_core.errors import MtError
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.layout_string import Stage, format_layout, parse_layout
from mt_core.pipeline.stages import Layers, balance_stages, balance_unequal, cut_stages, number_layers


def count(layers: int, placement: Placement, **keys: object) -> list[int]:
    """Layers of each stage."""
    return [len(stage.layers) for stage in cut_stages(Layers(layers), placement, PipelineConfig.model_validate(keys))]


def test_layers_are_cut_evenly_and_numbered_in_their_order():
    assert cut_stages(Layers(6), Placement(3), PipelineConfig()) == (
        Stage(range(0, 2), embedding=True),
        Stage(range(2, 4)),
        Stage(range(4, 6), loss=True),
    )
    assert count(16, Placement(4, 2)) == [2] * 8


def test_first_and_last_rank_may_have_other_numbers():
    assert count(10, Placement(4), num_layers_in_first_stage=2, num_layers_in_last_stage=2) == [2, 3, 3, 2]
    assert count(11, Placement(4), num_layers_in_first_stage=2) == [2, 3, 3, 3]
    assert count(11, Placement(4), num_layers_in_last_stage=2) == [3, 3, 3, 2]
    assert count(5, Placement(2), num_layers_in_first_stage=2, num_layers_in_last_stage=3) == [2, 3]


def test_numbers_are_of_a_rank_with_all_its_stages():
    """Megatron-Core counts so too; in V shape the first rank has the first and the last stage."""
    keys = {"num_layers_in_first_stage": 2, "num_layers_in_last_stage": 6}
    assert count(16, Placement(4, 2), **keys) == [1, 2, 2, 3, 1, 2, 2, 3]
    assert count(16, Placement(4, 2, "v"), **keys) == [1, 2, 2, 3, 3, 2, 2, 1]


def test_no_two_stages_have_the_same_layer_when_only_the_last_is_uneven():
    """A known fault elsewhere: with interleaving, offsets behind the first rank were wrong."""
    stages = cut_stages(Layers(14), Placement(4, 2), PipelineConfig(num_layers_in_last_stage=2))
    assert [*chain.from_iterable(stage.layers for stage in stages)] == list(range(14))


def test_embedding_and_loss_count_as_layers():
    assert count(14, Placement(4), account_for_embedding=True, account_for_loss=True) == [3, 4, 4, 3]
    assert count(15, Placement(4), account_for_embedding=True) == [3, 4, 4, 4]
    assert count(15, Placement(4, 2, "v"), account_for_loss=True) == [2] * 7 + [1]
    assert count(2, Placement(4), account_for_embedding=True, account_for_loss=True) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("layers", "placement", "keys", "message"),
    [
        (
            30,
            Placement(4),
            {},
            "model.layers: 30 layers do not divide evenly over 4 ranks; allowed: model.layers = 28 or 32; or "
            'pipeline.layout = "Et*7|t*8|t*8|t*7L" alone',
        ),
        (
            16,
            Placement(4, 2),
            {"account_for_embedding": True},
            "model.layers: 16 layers + embedding do not divide evenly over 4 ranks of 2 stages; allowed: "
            'model.layers = 15 or 23; or pipeline.layout = "Et*2|(t*2|)*6t*2L" alone',
        ),
        (
            2,
            Placement(4),
            {},
            "model.layers: 2 layers do not divide evenly over 4 ranks; allowed: model.layers = 4; or "
            'pipeline.layout = "E|t|t|L" alone',
        ),
        (
            10,
            Placement(4),
            {"num_layers_in_first_stage": 3},
            "model.layers: 10 layers leave 7 for the 3 other ranks, which do not divide evenly; allowed: "
            'model.layers = 9 or 12; or pipeline.layout = "Et*2|t*3|t*3|t*2L" alone',
        ),
        (
            10,
            Placement(2),
            {"num_layers_in_first_stage": 3, "num_layers_in_last_stage": 4},
            "model.layers: 10 layers leave 3 for the 0 other ranks, which do not divide evenly; allowed: "
            'model.layers = 7; or pipeline.layout = "Et*5|t*5L" alone',
        ),
        (
            2,
            Placement(4),
            {"num_layers_in_first_stage": 3},
            "model.layers: 2 layers leave -1 for the 3 other ranks, which do not divide evenly; allowed: "
            'model.layers = 3; or pipeline.layout = "E|t|t|L" alone',
        ),
        (
            15,
            Placement(4, 2),
            {"num_layers_in_first_stage": 3},
            "pipeline.num_layers_in_first_stage: 3 do not divide by the 2 stages of the rank; allowed: multiples of 2; "
            'or pipeline.layout = "Et*2|(t*2|)*6tL" alone',
        ),
        (
            8,
            Placement(4),
            {"num_layers_in_first_stage": 2, "account_for_loss": True},
            "pipeline.account_for_loss: is given beside numbers of layers in the first or last stage; leave one out",
        ),
        (
            4,
            Placement(2),
            {"layout": "Ett|ttL", "num_layers_in_last_stage": 1},
            "pipeline.num_layers_in_last_stage: is given beside pipeline.layout, which says it all; leave one out",
        ),
        (
            8,
            Placement(4),
            {"layout": "Et*3|t*4L"},
            'pipeline.layout: 2 stages, but there are 4 ranks; allowed: 4 stages, such as "Et*2|t*2|t*2|t*2L"\n'
            'pipeline.layout: 7 layers (t), but model.layers is 8; such as "Et*2|t*2|t*2|t*2L"',
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_a_layout_that_can(layers, placement, keys, message):
    with pytest.raises(MtError) as caught:
        count(layers, placement, **keys)
    assert str(caught.value) == message


def test_a_layout_is_taken_as_it_is_written():
    assert count(8, Placement(4), layout="Et*3|t*4||tL") == [3, 4, 0, 1]
    assert count(8, Placement(2, 2, "v"), layout="Et|t*3, t|(t|)t*2 L") == [1, 4, 1, 2]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*3|t*4|t*2L", [3, 4, 2]),
        ("Ettt|tttt|ttL", [3, 4, 2]),
        ("Et*3|(tt|)*2,t|L", [3, 2, 2, 1, 0]),
        ("E|((t|)*2tt|)*2L", [0, 1, 1, 2, 1, 1, 2, 0]),
        ("E|*3L", [0, 0, 0, 0]),
        ("EL", [0]),
    ],
)
def test_letters_repeat_alone_and_in_groups(text, layers):
    stages = parse_layout(text)
    assert [len(stage.layers) for stage in stages] == layers
    assert (stages[0].embedding, stages[-1].loss) == (True, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Et*3|x|t*2L", "'Et*3|>x<|t*2L': 'x' at position 6 is no letter of a layout; allowed: E, t, L, |, *, "),
        ("Et*|tL", "'Et>*<|tL': '*' at position 3 needs a number behind it; allowed: 1 and more"),
        ("Et*0|tL", "'Et>*<0|tL': '*' at position 3 needs a number behind it; allowed: 1 and more"),
        ("E(t|(tL", "'E(t|>(<tL': '(' at position 5 is never closed; write \")\" behind the group"),
        ("Et)|L", "'Et>)<|L': ')' at position 3 closes nothing; leave it out, or write \"(\" before the group"),
        ("Et|m|L", "'Et|>m<|L': 'm' at position 4 is a layer of multi-token prediction, which mt has none of"),
        ("Et*99999999999|L", "'Et*9999999999>9<|L': '9' at position 14 repeats too much; allowed: 100,000 letters"),
        (
            f"E{'(' * 21}t{')' * 21}|L",
            f"'E{'(' * 20}>(<t{')' * 21}|L': '(' at position 22 opens too many groups; allowed: 20",
        ),
        ("t|tL", "stage 0 of 't|tL' is 't'; allowed: one E (embedding), as the first letter of the first stage"),
        ("Et|Et|L", "stage 1 of 'Et|Et|L' is 'Et'; allowed: one E (embedding), as the first letter of the first"),
        ("tE|L", "stage 0 of 'tE|L' is 'tE'; allowed: one E (embedding), as the first letter of the first stage"),
        ("Et|t", "stage 1 of 'Et|t' is 't'; allowed: one L (loss), as the last letter of the last stage"),
        ("EtL|t", "stage 0 of 'EtL|t' is 'EtL'; allowed: one L (loss), as the last letter of the last stage"),
        ("", "stage 0 of '' is ''; allowed: one E (embedding)"),
    ],
)
def test_a_wrong_layout_shows_where(text, problem):
    with pytest.raises(MtError) as caught:
        parse_layout(text)
    assert str(caught.value).startswith(f"pipeline.layout: {problem}")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_what_is_printed_is_read_again(counts):
    stages = number_layers(counts)
    assert parse_layout(format_layout(stages)) == stages


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([3, 4, 2], "Et*3|t*4|t*2L"),
        ([3, *[2] * 29, 1, 0], "Et*3|(t*2|)*29t|L"),
        ([1, 1, 1, 1], "Et|t|t|tL"),
        ([0], "EL"),
    ],
)
def test_a_layout_is_printed_as_short_as_it_goes(counts, text):
    assert format_layout(number_layers(counts)) == text


@given(st.integers(0, 100), st.integers(1, 20))
def test_balanced_stages_differ_by_one_layer_at_most(layers, stages):
    counts = [len(stage.layers) for stage in balance_stages(layers, stages)]
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    if stages > 2:
        assert max(counts[0], counts[-1]) <= min(counts[1:-1]) or counts[0] == max(counts)


@given(st.integers(1, 60), st.integers(1, 6), st.sampled_from([1, 2]), st.booleans(), st.booleans())
def test_numbers_of_layers_that_a_refusal_names_pass(layers, ranks, chunks, first, last):
    keys = {"account_for_embedding": first, "account_for_loss": last}
    try:
        assert sum(count(layers, Placement(ranks, chunks), **keys)) == layers
    except MtError as err:
        allowed = re.search(r"model.layers = ([\d or]+);.*layout = \"(.*)\" alone", str(err))
        for number in map(int, allowed[1].split(" or ")):
            assert sum(count(number, Placement(ranks, chunks), **keys)) == number
        assert sum(count(layers, Placement(ranks, chunks), layout=allowed[2])) == layers


@pytest.mark.parametrize(
    ("first", "last", "counts"),
    [
        (0, 0, [8, 8, 8, 8]),
        (0, 2, [8, 9, 9, 6]),
        (1, 5, [8, 10, 10, 4]),
        (0, 40, [10, 11, 11, 0]),
        (0.5, 0.5, [8, 8, 8, 8]),
    ],
)
def test_ends_that_take_as_long_as_layers_leave_fewer_to_their_stages(first, last, counts):
    assert [len(stage.layers) for stage in balance_stages(32, 4, first=first, last=last)] == counts


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 1.0, 4.0]),
)
def test_the_longest_stage_of_unequal_layers_is_as_short_as_any_cut_makes_it(seconds, stages, first, last):
    def get_longest(counts: list[int]) -> float:
        bounds = pairwise([0, *accumulate(counts)])
        loads = [sum(seconds[start:end]) for start, end in bounds]
        loads[0] += first
        loads[-1] += last
        return max(loads)

    cuts = combinations_with_replacement(range(len(seconds) + 1), stages - 1)
    shortest = min(get_longest([b - a for a, b in pairwise([0, *cut, len(seconds)])]) for cut in cuts)
    found = balance_unequal(seconds, stages, first=first, last=last)
    assert [*chain(*(stage.layers for stage in found))] == [*range(len(seconds))]
    assert get_longest([len(stage.layers) for stage in found]) == pytest.approx(shortest, rel=1e-12)


def test_equally_long_layers_are_divided_as_before():
    assert balance_unequal([0.1] * 32, 4, first=0.1, last=0.5) == balance_stages(32, 4, first=1, last=5)
