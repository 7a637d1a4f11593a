"""The power of the gate, against closed forms and against verdicts on drawn items."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from mlflow_soup.decision.gate import judge
from mlflow_soup.decision.power import ENOUGH, Design, Measure, chance, times_items, times_margins
from mlflow_soup.records import Evidence, Items, Rules, Score, Version
from mlflow_soup.request.margins import parse_margins

MARGINS = parse_margins("0.01")


def design(tasks, *, count=2000, discordance=0.05, replaced=0, margins=MARGINS):
    measure = Measure.of_answers(count, discordance)
    return Design(measure, dict.fromkeys(tasks, measure), margins, 0.95, replaced)


def test_one_task_passes_as_often_as_the_normal_distribution_says():
    # P(Z > 1.6456 − 0.01 / se), and the held-out score is not refuted in 97.5 %
    stderr = math.sqrt(2000 * 0.05 + 2) / 2002
    expected = norm.cdf(0.01 / stderr - 1.6456) * 0.975
    assert chance(design(["a:acc"])) == pytest.approx(expected, abs=0.012)


def test_two_tasks_under_one_margin_pass_more_often_than_one_and_alone_less_often():
    together, one = chance(design(["a:acc", "b:acc"])), chance(design(["a:acc"]))
    alone = chance(design(["a:acc", "b:acc"], margins=parse_margins("0.01,a=alone,b=alone")))
    assert together > one > alone
    assert alone == pytest.approx(one**2 / 0.975, abs=0.02)


def test_a_soup_as_good_as_parents_and_champion_passes_in_80_percent():
    assert chance(design(["a:acc", "b:acc"], replaced=1)) >= 0.8


def test_the_remedies_lead_to_80_percent():
    weak = design(["a:acc"], replaced=1)
    assert chance(weak) < 0.7
    for better in (weak.with_items(times_items(weak)), weak.with_margins(times_margins(weak))):
        assert chance(better) == pytest.approx(ENOUGH, abs=0.01)
    # an error falls with the root of the number of items
    assert times_margins(weak) == pytest.approx(math.sqrt(times_items(weak)), rel=0.02)


def test_a_relative_margin_is_a_share_of_the_level():
    measure = Measure(500, 0.1, level=20.0)
    share = Design(Measure(500, 0.0), {"a:perplexity": measure}, MARGINS, 0.95)
    points = replace(share, margins=parse_margins("0.01,perplexity=0.4"))
    assert chance(share) == pytest.approx(chance(points))
    assert 0.5 < chance(replace(share, ood={"a:perplexity": replace(measure, stderr=0.2)})) < 0.8


def drawn(rng, count, discordance, number):
    """Evidence of models that differ in a share of their answers, on two tasks."""
    flips = (1.0 - math.sqrt(1.0 - 2.0 * discordance)) / 2.0
    sets = {}
    for name in ("held-out", "a:acc", "b:acc"):
        ancestor = rng.random(count) < 0.5
        sets[name] = ancestor ^ (rng.random((number, count)) < flips)

    def score(name, model):
        values = sets[name][model].astype(float)
        ids, shares = tuple(f"{name}{i}" for i in range(count)), (1.0 / count,) * count
        items = Items(name, "acc,none", 1.0, ids, tuple(values.tolist()), shares)
        return Score(float(values.mean()), 0.0, (items,))

    return [
        Evidence(
            Version("toy", model),
            str(model),
            score("held-out", model),
            tuple((name, score(name, model)) for name in ("a:acc", "b:acc")),
        )
        for model in range(number)
    ]


def test_verdicts_on_drawn_items_pass_as_often_as_said():
    rng, draws, passed = np.random.default_rng(5), 400, 0
    for _ in range(draws):
        soup, parent, champion = drawn(rng, 500, 0.05, 3)
        passed += judge(soup, [parent], [champion], Rules("0.02", 0.95)).passed
    told = chance(design(["a:acc", "b:acc"], count=500, replaced=1, margins=parse_margins("0.02")))
    assert passed / draws == pytest.approx(told, abs=3 * math.sqrt(0.25 / draws))


def test_the_design_of_a_verdict_has_its_measured_errors():
    soup, parent, champion = drawn(np.random.default_rng(6), 500, 0.1, 3)
    verdict = judge(soup, [parent], [champion], Rules("0.01", 0.95))
    found = Design.of(verdict)
    assert (found.replaced, list(found.ood), found.held_out.freedom) == (
        1,
        ["a:acc", "b:acc"],
        499,
    )
    tasks = {c.tasks: c.difference.stderr for c in verdict.checks if c.against == champion.version}
    assert found.ood["a:acc"].stderr == tasks["a:acc",]
    assert (
        Design.of(judge(replace(soup, ood=()), [replace(parent, ood=())], [], Rules("0", 0.95)))
        is None
    )


def test_a_refused_perplexity_has_a_design():
    # one of two perplexities rises by more than its margin, which may be luck
    rng = np.random.default_rng(8)

    def score(name, factor):
        values = 20.0 * factor * (1.0 + 0.2 * rng.standard_normal(50))
        items = Items(
            name, "perplexity,none", -1.0, tuple(map(str, range(50))), tuple(values), (0.02,) * 50
        )
        return Score(-float(values.mean()), 0.0, (items,))

    held_out = drawn(rng, 50, 0.1, 1)[0].held_out
    soup, parent = (
        Evidence(
            Version("toy", n),
            str(n),
            held_out,
            tuple((f"{t}:perplexity", score(t, f)) for t in "ab"),
        )
        for n, f in ((1, 1.03), (2, 1.0))
    )
    verdict = judge(soup, [parent], [], Rules("0.01", 0.95))
    assert not verdict.passed
    found = Design.of(verdict)
    assert [m.level for m in found.ood.values()] == pytest.approx(
        [-score.value for _, score in parent.ood]
    )
    assert 0.0 <= chance(found) < 0.5
