import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_soup.request.margins import Margin, Margins, has_scale, parse_margins

TERMS = ["piqa:acc", "piqa:acc_norm", "code:acc", "code:perplexity", "text:word_perplexity"]
BITS = "code:bits_per_byte"
NAMES = ["piqa", "code", "acc", "perplexity", "piqa:acc", "other"]
margin = st.builds(
    Margin, st.sampled_from([0.0, 0.005, 0.01, 0.02, 1 / 3, 1e-9, 1e17]), st.booleans()
)
margins = st.builds(
    Margins,
    st.dictionaries(st.sampled_from(NAMES), margin | st.none(), max_size=3),
    st.none() | margin,
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
    stricter = {
        name: None if m is None else replace(m, value=m.value / 2)
        for name, m in theirs.named.items()
    }
    assert Margins(stricter, theirs.rest).are_at_most(theirs)


@pytest.mark.parametrize(
    ("policy", "ours"),
    [
        # the names of these tasks end like a perplexity, or hold a colon
        ("0.01,olaph_perplexity:word_perplexity=1%", "0.01,olaph_perplexity:word_perplexity=90%"),
        ("0.01", "0.01,olaph_perplexity:word_perplexity=90%"),
        ("0.01", "0.01,olaph_perplexity=90%"),
        ("0.01", "0.01,a:b:acc=0.9"),
        # shares weigh the tasks of a mean otherwise than amounts
        ("0.01", "0%"),
        ("2%", "0"),
        ("0.01,perplexity=2%", "0.01,perplexity=0"),
        ("0.01,piqa=alone", "0.01"),
    ],
)
def test_other_margins_are_not_at_most_the_policys(policy, ours):
    assert not parse_margins(ours).are_at_most(parse_margins(policy))


def test_only_perplexities_have_no_scale():
    names = (
        "acc,none",
        "bits_per_byte",
        "exact_match,strict",
        "perplexity",
        "byte_perplexity,none",
    )
    assert [has_scale(name) for name in names] == [True, True, True, False, False]


@given(ours=margins, theirs=margins)
def test_margins_that_are_at_most_others_judge_no_terms_together_that_those_keep_apart(
    ours, theirs
):
    if not ours.are_at_most(theirs):
        return
    for one, other in itertools.combinations([*TERMS, BITS], 2):
        if ours.group(one) == ours.group(other):
            assert theirs.group(one) == theirs.group(other)


def test_terms_of_one_entry_are_one_group_and_named_tasks_are_alone():
    def groups(text):
        found = parse_margins(text)
        names = [found.group(term) for term in (*TERMS, BITS)]
        return [names.index(name) for name in names]

    assert groups("0.01") == [0, 0, 0, 3, 3, 5]
    assert groups("0.01,acc=0.01") == [0, 1, 0, 3, 3, 5]
    assert groups("0.01,piqa=0.01") == [0, 1, 2, 3, 3, 5]
    assert groups("0.01,piqa:acc=alone,acc=alone") == [0, 1, 2, 3, 3, 5]
    assert groups("0.01,perplexity=2%") == [0, 0, 0, 3, 4, 5]
    assert groups("2%") == [0, 0, 0, 3, 3, 5]


def test_a_task_that_is_judged_alone_has_the_margin_that_it_would_have():
    margins = parse_margins("0.01,acc=0.02,piqa=alone,code:perplexity=alone")
    assert str(margins) == "0.01,acc=0.02,piqa=alone,code:perplexity=alone"
    assert [str(margins.at(term)) for term in TERMS] == ["0.02", "0.01", "0.02", "2%", "2%"]
    more = parse_margins("0.01").alone(["piqa", "acc"])
    assert (str(more), more.at("piqa:acc").value) == ("0.01,piqa=alone,acc=alone", 0.01)


@pytest.mark.parametrize("text", ["alone", "=alone", "piqa", "0.01,piqa", "piqa=alone,piqa=0.01"])
def test_what_is_no_margin_is_refused(text):
    with pytest.raises(ValueError, match=r"margin"):
        parse_margins(text)
