import pytest

from mt_eval.tasks.detokenization import PTB, WIKITEXT, detokenize

RULES = {
    "plural possessives": ("the actors ' roles", "the actors' roles"),
    "slashed years": ("/' 9/", "/'9/"),
    "marks inside words and numbers": ("guest @-@ starring 1 @,@ 000 @.@ 5", "guest-starring 1,000.5"),
    "space before punctuation": ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
    "space inside brackets and quotes": (
        "( a ) [ b ] { c } \" d \" and ' e '",
        "(a) [b] {c} \"d\" and 'e'",
    ),
    "headings": ("= = = = Deep = = = = | = = = Mid = = = | = = Top = =", "==== Deep ==== | === Mid === | == Top =="),
    "degrees": ("20 ° C", "20°C"),
    "space around line breaks": ("end \n \n Start", "end\n\nStart"),
    "numerals": ("about N people", "about 1 people"),
    "possessives": ("Teddy 's Story", "Teddy's Story"),
}


PTB_RULES = {
    "apostrophes": ("Avon 's and the investors ' view", "Avon's and the investors' view"),
    "negations": ("it does n't", "it doesn't"),
    "numerals": ("about N people", "about1 people"),
    "dollars": ("$ 1 billion", "$1 billion"),
    "number signs": ("# 1 choice", "#1 choice"),
}


def test_there_is_a_golden_string_for_each_rule():
    assert list(RULES) == [name for name, _ in WIKITEXT]
    assert list(PTB_RULES) == [name for name, _ in PTB]


@pytest.mark.parametrize(("name", "rule"), PTB)
def test_a_rule_of_the_treebank_alone_and_with_the_others_gives_its_golden_string(name, rule):
    before, after = PTB_RULES[name]
    assert rule(before) == after == detokenize(before, "ptb")


@pytest.mark.parametrize(("name", "rule"), WIKITEXT)
def test_a_rule_alone_gives_its_golden_string(name, rule):
    before, after = RULES[name]
    assert rule(before) == after


@pytest.mark.parametrize("name", RULES)
def test_the_whole_table_keeps_the_golden_string_of_each_rule(name):
    before, after = RULES[name]
    assert detokenize(before) == after


def test_punctuation_without_a_space_after_it_stays():
    assert detokenize("the end .") == "the end ."


def test_quotes_pair_with_the_nearest_and_across_lines():
    assert detokenize('" a " b " c\n "') == '"a" b "c"'


def test_later_rules_see_what_earlier_ones_left():
    assert detokenize(' = = Life = = \n He left ( at 5 @.@ 5 ) , " at once " . \n') == (
        ' == Life ==\nHe left (at 5.5), "at once".\n'
    )
