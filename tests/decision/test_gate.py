"""The gate's arithmetic against plain NumPy and tables, and its rules case by case."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm
from scipy.stats import t as student

import strategies as s
from mlflow_soup.decision.gate import judge, questions
from mlflow_soup.decision.pairing import (
    _variance,
    better,
    interval,
    lower_bound,
    optimism,
    paired,
)
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Difference, Evidence, Items, Rules, Score, Verdict, Version
from mlflow_soup.request.margins import parse_margins

OLD, NEW, SOUP, SHIPPED = (Version("toy", number) for number in (1, 2, 3, 9))
RULES = Rules(margin="0.01", confidence=0.95)
# Student's t, one-sided 95 %, from a printed table
T95 = {2: 2.920, 9: 1.833, 99: 1.660}


def task(values, *, weight=1.0, shares=None, ids=None, name="task", metric="acc,none"):
    """The items of one task; with `shares` the task's value is Σ share·value, else the mean."""
    count = len(values)
    return Items(
        name,
        metric,
        weight,
        tuple(ids or map(str, range(count))),
        tuple(map(float, values)),
        tuple(shares or [1.0 / count] * count),
    )


def score(*tasks):
    value = sum(t.weight * np.dot(t.shares, t.values) for t in tasks)
    return Score(float(value), 0.0, tasks)


def evidence(version, held_out, ood=(), digest=None):
    """The evidence for a model, from its answers on one held-out and one OOD task."""
    tasks = (("ood", score(task(ood))),) if len(ood) else ()
    return Evidence(version, digest or f"sha256:{version.number}", score(task(held_out)), tasks)


def test_means_are_compared_item_by_item():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 50))
    difference = paired(score(task(ours)), score(task(theirs)))
    d = ours - theirs
    assert difference.value == pytest.approx(d.mean())
    assert difference.stderr == pytest.approx(d.std(ddof=1) / np.sqrt(50))
    assert difference.count == 50


def test_tasks_add_up_by_their_weights():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(2, 30)), rng.normal(size=(2, 30))
    first, second = (
        score(task(a, weight=0.25), task(b[:20], weight=-0.75)) for a, b in (ours, theirs)
    )
    difference = paired(first, second)
    a, b = ours[0] - theirs[0], (ours[1] - theirs[1])[:20]
    assert difference.value == pytest.approx(0.25 * a.mean() - 0.75 * b.mean())
    variance = 0.25**2 * a.var(ddof=1) / 30 + 0.75**2 * b.var(ddof=1) / 20
    assert difference.stderr == pytest.approx(math.sqrt(variance))
    assert difference.count == 50


def test_a_smaller_value_is_a_gain_if_smaller_is_better():
    ours, theirs = (score(task(v, weight=-1.0)) for v in ([0.7, 0.8, 0.75], [0.9, 0.95, 1.0]))
    assert paired(ours, theirs).value == pytest.approx(0.2)


def test_items_with_unequal_shares_by_hand():
    # d = 1, 3 with shares 1/4, 3/4: Δ = 2.5, deviations −1.5 and 0.5,
    # se² = (1/16·2.25 + 9/16·0.25) · 2/1 = 0.5625
    shares = [0.25, 0.75]
    ours, theirs = (score(task(v, shares=shares)) for v in ([1.5, 4.0], [0.5, 1.0]))
    assert paired(ours, theirs) == Difference(2.5, 0.75, 2)


def test_answers_count_one_more_won_and_lost_item_by_hand():
    # 10 items, 3 won and 1 lost: Δ = 0.2; with 4, 2 and n = 12 (Bonett & Price 2012)
    # se² = (4 + 2 − (4 − 2)²/12) / 12² = (6 − 1/3) / 144
    ours = [1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    theirs = [0, 0, 0, 1, 0, 0, 1, 1, 1, 0]
    difference = paired(score(task(ours)), score(task(theirs)))
    assert difference.value == pytest.approx(0.2)
    assert difference.stderr == pytest.approx(math.sqrt((6 - 1 / 3) / 144))
    assert difference.count == 10


def test_answers_that_all_agree_have_the_error_root_two_over_n_plus_two():
    for count in (1, 8, 98):
        difference = paired(score(task([1] * count)), score(task([1] * count)))
        assert (difference.value, difference.count) == (0.0, count)
        assert difference.stderr == pytest.approx(math.sqrt(2) / (count + 2))


def test_equal_log_likelihoods_are_one_model_with_no_error():
    said = tuple((-1.0 - i, -2.0) for i in range(4))
    ours = replace(task([1, 0, 1, 1]), log_likelihoods=said)
    assert paired(score(ours), score(ours)) == Difference(0.0, 0.0, 4)
    other = replace(ours, log_likelihoods=(*said[:3], (-9.0, -2.0)))
    assert paired(score(ours), score(other)).stderr > 0.1


def test_one_item_that_is_not_right_or_wrong_has_an_infinite_error():
    assert paired(score(task([0.3])), score(task([0.1]))).stderr == math.inf


@given(pair=s.paired_items() | s.paired_items(binary=True))
def test_swapping_the_models_only_changes_the_sign(pair):
    ours, theirs = map(score, pair)
    there, back = paired(ours, theirs), paired(theirs, ours)
    assert there.value == -back.value
    assert there.stderr == back.stderr
    assert there.stderr > 0 or np.ptp(np.subtract(pair[0].values, pair[1].values)) == 0


@given(pair=s.paired_items())
def test_the_paired_difference_is_the_difference_of_the_scores(pair):
    ours, theirs = map(score, pair)
    assert paired(ours, theirs).value == pytest.approx(ours.value - theirs.value, abs=1e-9)


@given(wins=st.integers(1, 60), ties=st.integers(0, 60), seed=st.integers(0, 999))
def test_as_many_items_won_as_lost_are_a_tie(wins, ties, seed):
    answers = np.array([[1, 0]] * wins + [[0, 1]] * wins + [[1, 1]] * ties)
    ours, theirs = np.random.default_rng(seed).permutation(answers).T
    assert paired(score(task(ours)), score(task(theirs))).value == 0.0
    soup, parent = evidence(SOUP, ours), evidence(NEW, theirs)
    assert judge(soup, [parent], [], RULES).passed


@pytest.mark.parametrize(
    "theirs",
    [
        score(task([1, 0, 1], ids="abd")),
        score(task([1, 0, 1], ids="acb")),
        score(task([1, 0], ids="ab")),
        score(task([1, 0, 1], ids="abc"), task([1])),
        score(task([1, 0, 1], ids="abc", metric="acc_norm,none")),
    ],
    ids=["other item", "other order", "fewer items", "more tasks", "other metric"],
)
def test_scores_on_other_items_are_refused(theirs):
    ours = score(task([1, 1, 0], ids="abc"))
    with pytest.raises(ObjectiveError):
        paired(ours, theirs)
    with pytest.raises(ObjectiveError):
        paired(theirs, ours)


def test_the_refusal_of_other_items_names_the_task():
    with pytest.raises(ObjectiveError, match="not scored on the same items") as refusal:
        paired(score(task([1, 0, 1], name="piqa")), score(task([1, 0], name="piqa")))
    assert "piqa" in refusal.value.where


@pytest.mark.parametrize(
    ("values", "chosen"),
    [([0.5, 0.4], 0), ([0.4, 0.5], 1), ([0.5, 0.5], 1), ([-0.9, -0.8], 1), ([0.3], 0)],
)
def test_the_better_model_has_the_higher_score_and_the_newer_wins_ties(values, chosen):
    assert better([Score(value, 0.1) for value in values]) == chosen


def test_an_interval_has_the_width_of_students_t():
    # two-sided 90 % leaves 5 % on each side
    low, high = interval(Difference(0.2, 0.1, 10), 0.9)
    assert low == pytest.approx(0.2 - T95[9] * 0.1, abs=1e-4)
    assert high == pytest.approx(0.2 + T95[9] * 0.1, abs=1e-4)
    low, high = interval(Difference(0.0, 1.0, 10**7), 0.95)
    assert (low, high) == pytest.approx((-1.96, 1.96), abs=1e-3)


RIGHT = [1] * 60 + [0] * 40  # of 100 items
WORSE = [1] * 55 + [0] * 45
# 100 OOD items, 2 won and 3 lost: Δ = −0.01; most likely 4.009 of 102 are lost: see `error_at`
OOD_SOUP, OOD_PARENT = [1, 1, 0, 0, 0] + [1] * 95, [0, 0, 1, 1, 1] + [1] * 95
BOUND = -0.01 - T95[99] * 0.02594


def test_each_rule_is_recorded_with_its_numbers():
    soup = evidence(SOUP, RIGHT, OOD_SOUP)
    verdict = judge(soup, [evidence(NEW, WORSE, OOD_PARENT)], [], RULES)
    held_out, ood = verdict.checks
    assert (held_out.name, held_out.against, held_out.required) == ("held-out", NEW, 0.0)
    assert held_out.difference.value == pytest.approx(0.05)
    assert (held_out.bound, held_out.side, ood.side) == (pytest.approx(0.05), "", "lower")
    assert (ood.name, ood.against, ood.required) == ("ood", NEW, -0.01)
    assert ood.difference.value == pytest.approx(-0.01)
    assert ood.bound == pytest.approx(BOUND, abs=1e-4)
    assert (held_out.passed, ood.passed, verdict.passed) == (True, False, False)


def test_a_check_passes_if_its_bound_reaches_the_margin_and_a_larger_margin_never_refuses():
    soup, parent = evidence(SOUP, RIGHT, OOD_SOUP), evidence(NEW, WORSE, OOD_PARENT)
    passed = []
    for margin in np.linspace(0.0, 0.2, 101):
        check = judge(soup, [parent], [], Rules(repr(float(margin)), 0.95)).checks[1]
        assert check.required == pytest.approx(-margin)
        assert check.passed == (check.bound >= check.required)
        passed.append(check.passed)
    assert passed == sorted(passed)
    assert 0.05 < 0.002 * passed.index(True) < 0.08


def test_one_ood_task_that_is_judged_alone_and_below_its_margin_is_enough_to_refuse():
    def with_second(model, answers):
        return replace(model, ood=(*model.ood, ("second", score(task(answers)))))

    soup = with_second(evidence(SOUP, RIGHT, OOD_SOUP), WORSE)
    parent = with_second(evidence(NEW, WORSE, OOD_PARENT), RIGHT)
    verdict = judge(soup, [parent], [], Rules("0.1,second=alone", 0.95))
    assert [(c.name, c.passed) for c in verdict.checks] == [
        ("held-out", True),
        ("ood", True),
        ("second", False),
    ]
    assert not verdict.passed


def test_more_confidence_is_harder_to_pass():
    soup, parent = evidence(SOUP, RIGHT, OOD_SOUP), evidence(NEW, WORSE, OOD_PARENT)
    bounds = [
        judge(soup, [parent], [], Rules("0.01", confidence)).checks[1].bound
        for confidence in (0.6, 0.8, 0.9, 0.95, 0.99)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 5


def test_a_soup_that_is_shown_to_be_worse_on_held_out_items_is_refused_at_any_margin():
    # 7 of 100 are lost and none is won: the upper bound is −0.07 + 1.98·0.029
    soup, parent = evidence(SOUP, [1] * 53 + [0] * 47, RIGHT), evidence(NEW, RIGHT, RIGHT)
    verdict = judge(soup, [parent], [], Rules("1e9", 0.95))
    assert [c.passed for c in verdict.checks] == [False, True]
    assert not verdict.passed


@pytest.mark.parametrize(
    ("old", "new", "reference"),
    [(RIGHT, WORSE, OLD), (WORSE, RIGHT, NEW), (RIGHT, RIGHT, NEW)],
    ids=["older is better", "newer is better", "equal"],
)
def test_the_better_parent_by_held_out_score_is_the_reference(old, new, reference):
    # the other parent is better on the OOD task, which must not matter
    parents = [evidence(OLD, old, WORSE), evidence(NEW, new, RIGHT)]
    verdict = judge(evidence(SOUP, RIGHT, RIGHT), parents, [], RULES)
    assert {check.against for check in verdict.checks} == {reference}


@pytest.mark.parametrize(
    ("champion", "references"),
    [(None, [NEW]), (SHIPPED, [NEW, SHIPPED]), (OLD, [NEW, OLD]), (NEW, [NEW]), (SOUP, [NEW])],
    ids=["none", "another version", "the worse parent", "the better parent", "the soup itself"],
)
def test_the_champion_is_a_reference_unless_it_is_a_reference_already(champion, references):
    parents = [evidence(OLD, WORSE, RIGHT), evidence(NEW, RIGHT, RIGHT)]
    reigning = [evidence(champion, WORSE, RIGHT)] if champion else []
    verdict = judge(evidence(SOUP, RIGHT, RIGHT), parents, reigning, Rules("0.05", 0.95))
    assert list(dict.fromkeys(check.against for check in verdict.checks)) == references
    assert len(verdict.checks) == 2 * len(references)
    assert verdict.passed


def test_a_soup_behind_the_champion_is_refused():
    parents = [evidence(OLD, WORSE, RIGHT), evidence(NEW, WORSE, RIGHT)]
    champion = evidence(SHIPPED, [1] * 70 + [0] * 30, RIGHT)
    verdict = judge(evidence(SOUP, WORSE, RIGHT), parents, [champion], Rules("0.05", 0.95))
    failed = [(check.name, check.against) for check in verdict.checks if not check.passed]
    assert failed == [("held-out", SHIPPED)]


def test_equal_weights_pass_with_any_number_of_items():
    answers, digest = [1, 0, 1], "sha256:same"
    soup, parent = (evidence(v, answers, answers, digest) for v in (SOUP, NEW))
    verdict = judge(soup, [parent], [], Rules("0.0", 0.95))
    assert verdict.passed
    assert verdict.checks[1].bound == 0.0
    # other weights with the same three answers may be worse: −t₂·√2/5
    other = judge(replace(soup, digest="sha256:other"), [parent], [], Rules("0.0", 0.95))
    assert not other.passed
    assert other.checks[1].bound == pytest.approx(-T95[2] * math.sqrt(2) / 5, abs=1e-3)


def test_a_verdict_without_checks_has_not_passed():
    assert not Verdict((), Rules("0.05", 0.95)).passed


# shares of items won and lost; at least five losses are expected
@pytest.mark.parametrize(
    ("count", "won", "lost"),
    [(100, 0.10, 0.10), (100, 0.05, 0.15), (300, 0.03, 0.05), (1000, 0.02, 0.02)],
)
def test_the_bound_holds_with_the_promised_confidence(count, won, lost):
    rng = np.random.default_rng([count, int(1000 * lost)])
    draws, held = 1500, 0
    for drawn in rng.random((draws, count)):
        ours, theirs = drawn < won, (won <= drawn) & (drawn < won + lost)
        soup, parent = evidence(SOUP, RIGHT, ours), evidence(NEW, WORSE, theirs)
        held += judge(soup, [parent], [], RULES).checks[1].bound <= won - lost
    # allow three standard errors of the simulation, and 0.01 because counts are whole numbers
    assert held / draws >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws) - 0.01
    assert held / draws <= 0.99  # the bound is not so wide that nothing could pass


def scores_of(*rows):
    """The scores of models on the same items, from right (1) and wrong (0) answers."""
    count = len(rows[0])
    ids, shares = tuple(map(str, range(count))), (1.0 / count,) * count
    return [
        Score(
            float(np.mean(row)),
            0.0,
            (Items("t", "acc,none", 1.0, ids, tuple(map(float, row)), shares),),
        )
        for row in rows
    ]


def test_one_score_or_equal_scores_have_no_optimism():
    row = np.random.default_rng(0).integers(0, 2, 50)
    assert optimism(scores_of(row)) == 0.0
    assert optimism(scores_of(row, row, row)) == pytest.approx(0.0, abs=1e-15)


def test_the_optimism_of_the_better_of_two_equals_is_its_expected_luck():
    # E max(d, 0) = s / √(2π) for d ~ N(0, s²), s the paired standard error
    random = np.random.default_rng(1)
    one, other = np.repeat([1, 0], 200), random.permutation(np.repeat([1, 0], 200))
    first, second = scores_of(one, other)
    stderr = np.std(one - other) / 20
    found = optimism([first, second], draws=4000)
    assert found == pytest.approx(stderr / np.sqrt(2 * np.pi), rel=0.08)


def test_a_clear_winner_has_no_optimism():
    row = np.repeat([1, 0], 100)
    assert optimism(scores_of(row, np.zeros(200), np.ones(200))) == 0.0


@given(seed=st.integers(0, 999), models=st.integers(1, 6))
def test_optimism_is_never_negative(seed, models):
    rows = np.random.default_rng(seed).integers(0, 2, (models, 60))
    assert optimism(scores_of(*rows)) >= 0.0


def of_text(version, perplexity, digest=None):
    """Evidence with a perplexity: the smaller, the better."""
    ood = score(task(perplexity, weight=-1.0, metric="perplexity,none"))
    held_out = score(task(RIGHT))
    return Evidence(version, f"sha256:{version.number}", held_out, (("lm:perplexity", ood),))


@pytest.mark.parametrize(
    ("margin", "words", "required", "passed"),
    [
        ("0.01", "2%", -0.4, True),
        ("0.01,perplexity=1%", "1%", -0.2, False),
        ("lm=0.3", "0.3", -0.3, True),
        ("0.5,lm:perplexity=0.1", "0.1", -0.1, False),
        ("3%", "3%", -0.6, True),
    ],
)
def test_a_perplexity_may_rise_by_a_share_of_the_rivals(margin, words, required, passed):
    parent = of_text(NEW, [15.0, 25.0] * 30)
    soup = of_text(SOUP, [15.25, 25.25] * 30)  # each item loses a quarter
    verdict = judge(soup, [parent], [], Rules(margin, 0.95))
    check = verdict.checks[1]
    assert check.difference.value == pytest.approx(-0.25)
    assert check.required == pytest.approx(required)
    assert (check.margin, check.passed) == (words, passed)
    assert check.bound == pytest.approx(-0.25, abs=1e-9)


def error_at(won, lost, count, loss):
    """The error of a model that loses a share: the likelihood is maximised numerically."""
    won, lost, count = won + 1, lost + 1, count + 2

    def surprise(q):  # won with q − loss, lost with q
        rest = 1 - 2 * q + loss
        return -(
            won * math.log(q - loss) + lost * math.log(q) + (count - won - lost) * math.log(rest)
        )

    bounds = (loss + 1e-12, (1 + loss) / 2 - 1e-12)
    q = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return math.sqrt((2 * q - loss - loss**2) / count)


@pytest.mark.parametrize(
    ("won", "lost", "count", "loss"),
    [(20, 20, 2000, 0.01), (0, 2, 540, 0.01), (9, 4, 30, 0.05), (0, 0, 100, 0.2), (70, 5, 99, 0.5)],
)
def test_against_a_margin_the_error_is_that_of_a_model_that_loses_it(won, lost, count, loss):
    ours, theirs = (score(task(side)) for side in answers(count, won=won, lost=lost))
    found = paired(ours, theirs, [loss])
    assert found.stderr == pytest.approx(error_at(won, lost, count, loss), rel=1e-5)
    assert found.value == paired(ours, theirs).value


# exactly, over all outcomes: (items, share that differs), at a margin of 0.01 or 0.05
@pytest.mark.parametrize("count", [10, 30, 100, 300, 1000, 2000])
@pytest.mark.parametrize(
    ("differing", "margin"),
    [(0.01, 0.01), (0.02, 0.01), (0.05, 0.01), (0.2, 0.01), (0.5, 0.01), (0.05, 0.05), (0.5, 0.05)],
)
def test_a_soup_that_is_worse_by_the_margin_passes_in_five_percent_or_less(
    count, differing, margin
):
    chance, shares = 0.0, ((differing - margin) / 2, (differing + margin) / 2)
    quantile = student.ppf(0.95, count - 1)
    for both in np.flatnonzero(binom.pmf(np.arange(count + 1), count, differing) > 1e-9):
        won = np.arange(both + 1)
        errors = np.array(
            [math.sqrt(_variance(w + 1.0, both - w + 1.0, count + 2.0, margin)) for w in won]
        )
        passes = (2 * won - both) / count - quantile * errors >= -margin - 1e-12
        likely = binom.pmf(won, both, shares[0] / differing)
        chance += binom.pmf(both, count, differing) * likely[passes].sum()
    assert chance <= 0.0502


def answers(count, *, won=0, lost=0):
    """Answers of two models: `won` items only the first answers right, `lost` only the second."""
    rest = [1] * (count - won - lost)
    return [1] * won + [0] * lost + rest, [0] * won + [1] * lost + rest


def two_models(version, rival, *tasks, held_out=(40, 0, 0)):
    """Evidence of a soup and a rival, from (count, won, lost) of each OOD task."""
    parts = [[], []]
    for number, (count, won, lost) in enumerate(tasks):
        for model, values in zip(parts, answers(count, won=won, lost=lost), strict=True):
            ids = [f"{number}:{i}" for i in range(count)]
            model.append((f"t{number}:acc", score(task(values, ids=ids, name=f"t{number}"))))
    sides = answers(held_out[0], won=held_out[1], lost=held_out[2])
    return [
        Evidence(v, f"sha256:{v.number}", score(task(values)), tuple(ood))
        for v, values, ood in zip((version, rival), sides, parts, strict=True)
    ]


def test_tasks_under_one_margin_are_judged_together_by_hand():
    # Δ = (0 − 0.005) / 2; se² = (se₁² + se₂²) / 4
    soup, parent = two_models(SOUP, NEW, (2000, 20, 20), (2000, 10, 20))
    verdict = judge(soup, [parent], [], RULES)
    first, second, both = verdict.checks[1:]
    assert (first.name, second.name, both.name) == ("t0:acc", "t1:acc", "2 OOD tasks together")
    assert both.difference.value == pytest.approx(-0.0025)
    errors = [error_at(20, 20, 2000, 0.01), error_at(10, 20, 2000, 0.01)]
    stderr = math.hypot(*errors) / 2
    assert both.difference.stderr == pytest.approx(stderr, rel=1e-6)
    assert both.difference.count == 4000
    assert both.bound == pytest.approx(-0.0025 - 1.6452 * stderr, abs=1e-5)
    assert (both.required, both.side) == (-0.01, "lower")
    # each task alone must only not be refuted, and its loss is within the margin
    assert [(c.side, c.bound, c.required) for c in (first, second)] == [
        ("", 0.0, -0.01),
        ("", pytest.approx(-0.005), -0.01),
    ]
    assert verdict.passed


# 2000 items, 40 differ; half of 5 % for the two tasks of the margin: 98.75 %, t = 2.2414 + 0.0008
@pytest.mark.parametrize(
    ("won", "lost", "passed"), [(10, 30, True), (9, 31, False), (60, 84, True)]
)
def test_one_task_of_several_is_refused_if_it_loses_more_than_the_margin_and_by_no_luck(
    won, lost, passed
):
    soup, parent = two_models(SOUP, NEW, (2000, 90, 0), (2000, won, lost))
    verdict = judge(soup, [parent], [], RULES)
    assert [c.name for c in verdict.checks if not c.passed] == ([] if passed else ["t1:acc"])
    check = verdict.checks[2]
    stderr = error_at(won, lost, 2000, 0.01)
    upper = (won - lost) / 2000 + 2.2432 * stderr
    if won - lost < -20:
        assert (check.side, check.required) == ("upper", 0.0)
        assert check.bound == pytest.approx(upper, abs=2e-5)
    else:
        assert (check.side, check.bound) == ("", pytest.approx((won - lost) / 2000))


def test_many_small_losses_are_refused_together_though_none_is_shown():
    tasks = [(200, 2, 5)] * 8
    soup, parent = two_models(SOUP, NEW, *tasks)
    failed = [c.name for c in judge(soup, [parent], [], RULES).checks if not c.passed]
    assert failed == ["8 OOD tasks together"]


def test_perplexities_are_judged_together_as_shares_of_the_rivals_score():
    rng = np.random.default_rng(3)
    levels, noise = (8.0, 40.0), rng.normal(0.0, 0.01, (2, 50))
    ours, theirs = [], []
    for number, level in enumerate(levels):
        shared = level * (1.0 + rng.normal(0.0, 0.2, 50))
        losses = (shared * (1.01 + noise[number]), shared)
        for model, values in zip((ours, theirs), losses, strict=True):
            part = task(values, weight=-1.0, name=f"t{number}", metric="perplexity")
            model.append((f"t{number}:perplexity", score(part)))
    soup, parent = (
        Evidence(v, f"sha256:{v.number}", score(task([1, 0] * 20)), tuple(ood))
        for v, ood in ((SOUP, ours), (NEW, theirs))
    )
    check = judge(soup, [parent], [], RULES).checks[-1]
    expected = np.mean(
        [a.value / -b.value + 1 for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    )
    assert check.difference.value == pytest.approx(expected)
    assert -0.02 < check.difference.value < -0.005
    assert (check.required, check.margin, check.passed) == (-0.02, "2%", True)


def test_against_the_better_parent_the_difference_counts_if_the_soup_would_replace_another():
    # 8 lost of 1000: the difference is within the margin, the bound is not
    soup, parent = two_models(SOUP, NEW, (1000, 0, 8))
    assert not judge(soup, [parent], [], RULES).passed
    weaker = two_models(SOUP, SHIPPED, (1000, 60, 0))[1]
    verdict = judge(soup, [parent], [weaker], RULES)
    check = verdict.checks[1]
    assert (check.against, check.bound, check.side) == (NEW, pytest.approx(-0.008), "")
    assert verdict.passed
    soup, parent = two_models(SOUP, NEW, (1000, 2, 13))
    assert not judge(soup, [parent], [weaker], RULES).passed


def test_a_version_that_would_be_replaced_must_be_matched_though_a_parent_scores_higher():
    soup, champion = two_models(SOUP, SHIPPED, (1000, 0, 8), held_out=(40, 9, 0))
    parent = two_models(SOUP, NEW, (1000, 60, 0))[1]
    verdict = judge(soup, [parent], [champion], RULES)
    assert [(c.name, c.against) for c in verdict.checks if not c.passed] == [("t0:acc", SHIPPED)]


def test_a_soup_as_good_as_a_rival_is_refuted_by_luck_in_five_percent_or_less():
    margins, levels = parse_margins("0.01"), {"a:acc": 0.5, "b:acc": 0.5}

    def luck(confidence, shown):
        asked = questions(margins, confidence, levels, shown=shown)
        return [1 - q.confidence for q in asked if not q.shown]

    # the held-out score; then both tasks, and against what is not replaced both together, too
    assert luck(0.95, True) == pytest.approx([0.025, 0.0125, 0.0125])
    assert luck(0.95, False) == pytest.approx([0.025, *[0.025 / 3] * 3])
    assert luck(0.9999, True) == luck(0.6, True)  # more confidence does not refute less


@pytest.mark.parametrize("confidence", [0.95, 0.9999, 1 - 1e-16])
def test_more_confidence_refutes_no_less(confidence):
    soup, parent = two_models(SOUP, NEW, (2000, 300, 0), (2000, 20, 70))
    verdict = judge(soup, [parent], [], Rules("0.01", confidence))
    assert "t1:acc" in [c.name for c in verdict.checks if not c.passed]


def test_a_rival_that_is_not_replaced_does_not_weaken_the_check_against_the_parent():
    soup, parent = two_models(SOUP, NEW, (1000, 0, 8))
    weak = replace(two_models(SOUP, SHIPPED, (1000, 60, 0))[1], digest="sha256:weak")
    assert not judge(soup, [parent], [], RULES).passed
    verdict = judge(soup, [parent], [], RULES, [weak])
    assert [(c.name, c.against) for c in verdict.checks if not c.passed] == [("t0:acc", NEW)]
    assert judge(soup, [parent], [weak], RULES).passed
    checks = {c.against: c.side for c in verdict.checks if c.tasks}
    assert checks == {NEW: "lower", SHIPPED: ""}
    # and it is a rival: the soup must not be refuted by it
    soup, strong = two_models(SOUP, SHIPPED, (1000, 0, 60))
    assert not judge(soup, [soup], [], RULES, [strong]).passed


def test_a_wrong_answer_of_a_metric_where_less_is_better_is_a_loss():
    sides = answers(300, won=0, lost=9)
    more = [score(task(side)) for side in sides]
    less = [score(task([1 - v for v in side], weight=-1.0)) for side in sides]
    assert paired(*less, [0.02]).value == pytest.approx(paired(*more, [0.02]).value)
    assert paired(*less, [0.02]).stderr == pytest.approx(paired(*more, [0.02]).stderr)


def test_a_copy_of_a_parent_is_still_judged_against_what_it_would_replace():
    soup, champion = two_models(SOUP, SHIPPED, (1000, 0, 9))
    verdict = judge(soup, [replace(soup, version=NEW)], [champion], RULES)
    assert [(c.name, c.against) for c in verdict.checks if not c.passed] == [("t0:acc", SHIPPED)]


def test_the_same_items_under_two_metrics_are_no_more_evidence_than_once():
    ours, theirs = answers(500, won=5, lost=9)
    ids = list(map(str, range(500)))
    once = [score(task(values, ids=ids)) for values in (ours, theirs)]
    twice = [
        score(*(task(v, ids=ids, weight=0.5, metric=m) for m in ("acc", "acc_norm")))
        for v in (ours, theirs)
    ]
    assert paired(*twice).value == pytest.approx(paired(*once).value)
    assert paired(*twice).stderr == pytest.approx(paired(*once).stderr, rel=0.04)
    # other items: half the variance
    apart = [
        score(*(task(v, ids=[f"{m}{i}" for i in ids], weight=0.5, metric=m) for m in "ab"))
        for v in (ours, theirs)
    ]
    assert paired(*apart).stderr == pytest.approx(paired(*once).stderr / math.sqrt(2), rel=1e-9)


def test_a_loss_of_the_margin_does_not_look_impossible_when_few_items_differ():
    # at the margin, 5.4 of 540 items are lost on average, and 2 or less in 9 % of the cases
    soup, parent = two_models(SOUP, NEW, (540, 0, 2))
    assert not judge(soup, [parent], [], RULES).passed


def passages(rng, clusters, size, correlation, win=0.05, lose=0.05):
    """Two models on passages with several questions each, right or wrong.

    A question is won if its normal number is below a threshold. The numbers of one passage have
    this correlation.
    """
    sizes = rng.integers(1, 2 * size, clusters)
    passage = np.repeat(np.arange(clusters), sizes)
    noise = math.sqrt(correlation) * rng.standard_normal(clusters)[passage]
    noise += math.sqrt(1.0 - correlation) * rng.standard_normal(len(passage))
    won, lost = noise < norm.ppf(win), noise > norm.ppf(1.0 - lose)
    ids = [f"{i}:p:{label}" for i, label in enumerate(passage)]
    middle = ~won & ~lost & (rng.random(len(passage)) < 0.5)
    return [score(task((side | middle).astype(float), ids=ids)) for side in (won, lost)]


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
def test_an_interval_covers_the_truth_if_items_of_a_passage_go_together(correlation):
    rng, draws, covered, naive = np.random.default_rng(7), 1000, 0, 0
    for _ in range(draws):
        ours, theirs = passages(rng, 100, 10, correlation)
        low, high = interval(paired(ours, theirs), 0.95)
        covered += low <= 0.0 <= high
        alone = [
            replace(s.items[0], ids=tuple(map(str, range(len(s.items[0].ids)))))
            for s in (ours, theirs)
        ]
        low, high = interval(paired(*map(score, alone)), 0.95)
        naive += low <= 0.0 <= high
    assert covered / draws >= 0.93
    if correlation == 0.5:
        assert naive / draws < 0.85  # the clusters matter


def test_the_error_of_clusters_by_hand():
    # two passages with differences 1, 1 and −1, 0: Δ = 1/4, sums of deviations 3/8 and −3/8
    ids = ["a:x:1", "b:x:1", "c:x:2", "d:x:2"]
    ours, theirs = (score(task(v, ids=ids)) for v in ([1.5, 1.5, 0.0, 0.5], [0.5, 0.5, 1.0, 0.5]))
    found = paired(ours, theirs)
    alone = np.var([1, 1, -1, 0], ddof=1) / 4
    squares = sum((d - 0.25) ** 2 / 16 for d in (1, 1, -1, 0))
    more = (2 * (3 / 8) ** 2 - squares) * (2 / 1) ** 2
    assert found.value == pytest.approx(0.25)
    assert found.stderr == pytest.approx(math.sqrt(alone + more))
    assert (found.count, found.clusters, found.freedom) == (4, 2, 1)
    assert found.effect == pytest.approx(1 + more / alone)


def test_a_task_on_one_passage_proves_nothing_whatever_others_say():
    ids = [f"{i}:x:all" for i in range(200)]
    ours, theirs = (task(v, ids=ids) for v in ([1] * 200, [0] * 60 + [1] * 140))
    assert paired(score(ours), score(theirs)).stderr == math.inf
    more = [
        task(side, ids=[f"{i}:y" for i in range(900)], name="b") for side in answers(900, won=9)
    ]
    assert paired(score(ours, more[0]), score(theirs, more[1])).stderr == math.inf


@pytest.mark.parametrize(("clusters", "size"), [(10, 50), (4, 75), (2, 150)])
def test_a_task_on_few_passages_has_few_degrees_of_freedom(clusters, size):
    """At the margin, pooled with a task of many single items."""
    rng, draws, passed = np.random.default_rng(clusters), 1000, 0
    for _ in range(draws):
        few = passages(rng, clusters, size, 0.3, win=0.045, lose=0.055)
        many = (rng.random(1000) < 0.045, rng.random(1000) < 0.055)
        ids = [f"{i}:m" for i in range(1000)]
        sides = [
            score(one.items[0], task(side.astype(float), ids=ids, name="b"))
            for one, side in zip(few, many, strict=True)
        ]
        both = [
            replace(side, items=tuple(replace(i, weight=0.5) for i in side.items)) for side in sides
        ]
        difference = paired(*both, [0.01, 0.01])
        passed += lower_bound(difference, 0.95) >= -0.01
    assert passed / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


@given(pair=s.paired_items() | s.paired_items(binary=True))
def test_clusters_of_one_item_change_nothing(pair):
    ours, theirs = pair
    ids = tuple(f"d:{name}:{number}" for number, name in enumerate(ours.ids))
    alone = [score(replace(items, ids=ids)) for items in pair]
    assert paired(*alone) == paired(score(ours), score(theirs))


def test_the_optimism_draws_whole_clusters():
    # ten copies of each item: the luck is that of the items, not that of ten times as many
    random = np.random.default_rng(2)
    rows = random.integers(0, 2, (2, 60))
    few = scores_of(*rows)
    ids = [f"{i}:x:{i // 10}" for i in range(600)]
    many = [score(task(np.repeat(row, 10), ids=ids)) for row in rows]
    assert optimism(many, draws=2000) == pytest.approx(optimism(few, draws=2000), rel=0.15)
