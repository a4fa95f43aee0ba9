"""Which sentences count as hiding their subject or verb, and where the script finds them."""

import ast

import pytest

from ops.english import TARGET, Sentence, blocks, collect, docstrings, main, sentences, strings

HANGING = [
    "It decides what is sent to the receiver.",
    "Whatever the script sets, the factor stays.",
    "A rank is told of the new table.",
    "Ranks that nobody heard of are stale.",
    "The value is held against the baseline.",
    "The trainer holds loss and norm against its guards.",
    "Steps are judged by the sidecar alone.",
]
PLAIN = [
    "The sidecar evaluates each step and answers.",
    "What happened inside a slow step?",
    "The file holds a lock until its process ends.",
]


def hangs(text):
    return Sentence("docs", "page.md", text).hangs()


@pytest.mark.parametrize("text", HANGING)
def test_a_sentence_that_hides_its_subject_or_verb_counts(text):
    assert hangs(text)


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_sentence_does_not_count(text):
    assert not hangs(text)


def test_words_that_only_contain_such_a_word_do_not_count():
    assert not hangs("Somewhat later a foretold and unheard shell command follows.")


def test_a_page_is_read_without_its_code():
    page = (
        "# A heading\n\nOne paragraph, over\ntwo lines. Another `what is code` sentence here.\n"
        "```\nwhat a block of code says\n```\n"
        "- an item\n  that goes on\n\n| a cell | [a link](what.md) |\n| --- | --- |\n"
    )
    found = [" ".join(each.split()) for each in blocks(page)]
    assert "One paragraph, over two lines. Another \x00 sentence here." in found
    assert "an item that goes on" in found
    assert "a link" in found
    assert not any("what" in each for each in found)


def test_sentences_have_more_than_four_words():
    text = "Too short to count. This one has six words, etc. and goes on. \x00 is not one."
    assert list(sentences(text)) == ["This one has six words, etc. and goes on."]


def test_strings_are_those_that_people_read():
    tree = ast.parse(
        '"""A docstring."""\n\ndef f(x):\n    """Another."""\n    say(f"a {x} b" "c")'
    )
    assert list(strings(tree)) == ["a \x00 bc"]


def test_docstrings_are_those_of_public_methods_and_of_fields():
    source = '''
class A:
    """Of the class."""

    field = 1
    """Of the field."""

    def public(self):
        """Of the method."""

    def _private(self):
        """Of no interest."""
'''
    (node,) = ast.parse(source).body
    assert list(docstrings(node)) == ["Of the class.", "Of the field.", "Of the method."]


def test_the_sources_are_found_and_meet_the_target(capsys):
    every = collect()
    sizes = [
        sum(each.source == one for each in every) for one in ("docs", "texts", "docstrings")
    ]
    assert all(size > least for size, least in zip(sizes, (2500, 1000, 150), strict=True))
    hanging = [each for each in every if each.hangs()]
    assert len(hanging) <= TARGET * len(every), "python -m ops.english lists them"
    assert main([]) == 0
    assert "(target 2%)" in capsys.readouterr().out
