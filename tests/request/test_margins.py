import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_soup.request.margins import Margin, Margins, has_scale, parse_margins

TERMS = ["piqa:acc", "piqa:acc_norm", "code:acc", "code:perplexity", "text:word_perplexity"]
NAMES = ["piqa", "code", "acc", "perplexity", "piqa:acc", "other"]
margin = st.builds(
    Margin, st.sampled_from([0.0, 0.005, 0.01, 0.02, 1 / 3, 1e-9, 1e17]), st.booleans()
)
margins = st.builds(
    Margins, st.dictionaries(st.sampled_from(NAMES), margin, max_size=3), st.none() | margin
)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        # a task's name with a metric, then a task, then a metric, then the rest
        ("0.02,acc=0.01,piqa=0.005,piqa:acc=0", [0.0, 0.005, 0.01, 0.4, 0.4]),
        ("0.02", [0.02, 0.02, 0.02, 0.4, 0.4]),
        ("", [0.01, 0.01, 0.01, 0.4, 0.4]),
        # a share of the rival's score, which is 20
        ("5%", [1.0] * 5),
        ("0.01,perplexity=5%", [0.01, 0.01, 0.01, 1.0, 0.4]),
        ("word_perplexity=0.3", [0.01, 0.01, 0.01, 0.4, 0.3]),
        ("code=0", [0.01, 0.01, 0.0, 0.0, 0.4]),
    ],
)
def test_the_most_particular_name_counts(text, allowed):
    found = parse_margins(text)
    # the score of a perplexity is negative: larger is better
    assert [found.at(term).of(-20.0) for term in TERMS] == pytest.approx(allowed)


def test_a_filter_is_no_part_of_a_name():
    assert parse_margins("gsm8k:exact_match=0.3").at("gsm8k:exact_match,strict").value == 0.3


@given(found=margins)
def test_margins_read_back_as_they_are_written(found):
    again = parse_margins(str(found))
    for term in TERMS:
        assert again.at(term).relative == found.at(term).relative
        assert again.at(term).value == pytest.approx(found.at(term).value, rel=1e-5)
    assert str(again) == str(parse_margins(str(again)))


@given(ours=margins, theirs=margins)
def test_margins_that_are_at_most_others_allow_no_term_more(ours, theirs):
    if ours.are_at_most(theirs):
        for term in TERMS:
            for score in (-20.0, 0.0, 0.5):
                assert ours.at(term).of(score) <= theirs.at(term).of(score)
    assert ours.are_at_most(ours)
    nothing = parse_margins("0,perplexity=0,word_perplexity=0,byte_perplexity=0")
    assert nothing.are_at_most(theirs) or "perplexity" in str(theirs)


def test_only_perplexities_have_no_scale():
    names = (
        "acc,none",
        "bits_per_byte",
        "exact_match,strict",
        "perplexity",
        "byte_perplexity,none",
    )
    assert [has_scale(name) for name in names] == [True, True, True, False, False]
