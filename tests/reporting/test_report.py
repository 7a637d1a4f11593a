import re
from dataclasses import replace

import pytest

from mlflow_soup.records import (
    Check,
    Difference,
    Distance,
    Evidence,
    Items,
    LayerDistance,
    Metric,
    Parent,
    Recipe,
    Rules,
    Score,
    Soup,
    Trial,
    Unbiased,
    Verdict,
    Version,
)
from mlflow_soup.reporting import report
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Space

SPACE = Space.pair(0.5)
OLD, NEW, SOUP = Version("llm", 12), Version("llm", 13), Version("llm", 14)


def score(value):
    return Score(value, 0.01, metrics=(Metric("piqa", "acc,none", value, 0.01, True),))


@pytest.fixture
def story(tmp_path):
    values = {0.0: 0.50, 1.0: 0.52, 0.5: 0.53, 0.8: 0.56}
    trials = [
        Trial(i, SPACE.recipe(lam), score(value)) for i, (lam, value) in enumerate(values.items())
    ]
    trials.append(Trial(4, SPACE.recipe(0.9), None))
    parents = tuple(Parent(v, "sha256:0", tmp_path) for v in (OLD, NEW))
    soup = Soup(SOUP, Recipe("linear", (0.2, 0.8)), parents, score(0.56), "sha256:1")
    differences = Difference(-0.02, 0.01, 300), Difference(0.04, 0.01, 200)
    ood = Check(("code:acc",), NEW, differences[0], "lower", -0.0365, -0.01, False, "0.01")
    held_out = Check((), NEW, differences[1], "", 0.04, 0.0, True, "0")
    roles = {
        "soup": Evidence(SOUP, "sha256:1", score(0.56), (("code:acc", score(0.30)),)),
        "parent 1": Evidence(NEW, "sha256:2", score(0.52), (("code:acc", score(0.32)),)),
    }
    return report.Story(
        method="bayesopt",
        space=SPACE,
        soup=soup,
        existed=False,
        trials=tuple(trials),
        references=(OLD, NEW),
        gains=(Difference(0.06, 0.02, 200), Difference(0.04, 0.01, 200)),
        better=1,
        roles=roles,
        verdict=Verdict((held_out, ood), Rules("0.05", 0.95)),
        target="",
        promotion=None,
        distance=Distance((LayerDistance("layer 0", (1.0, 1.0), ((0.0, 0.25), (0.25, 0.0))),)),
        notes=("A note.",),
    )


def test_the_report_has_every_number_a_reader_needs(story):
    links = {
        "run": "#/run",
        "all λ": "#/trials",
        "plot": "#/plot",
        "interactive": "#/html",
        str(OLD): f"[{OLD}](#/old)",
    }
    links[str(NEW)] = f"[{NEW}](#/new)"
    text = report.markdown(story, links) + report.trials_table(story)
    for words in (
        "Soup of [llm v12](#/old) and [llm v13](#/new): 0.8 × llm v13 + 0.2 × llm v12. bayesopt: "
        "weights searched by Bayesian optimisation",
        "5 evaluations ([run](#/run), [all λ](#/trials), [plot](#/plot), [interactive](#/html)).",
        "| chosen soup (λ = 0.8) | 0.5600 | 0.0100 |",
        "- Against the better parent, llm v13: **+0.0400",
        "## Out of domain: refused",
        "| parent (llm v13) | 0.5200 | 0.3200 |",
        "| code:acc | llm v13 | -0.0200 ± 0.0100 | not surely above -0.0100 "
        "(lower bound -0.0365) | **no** |",
        "- Against llm v12: **+0.0600",
        "A note.",
        "| 2 | 0.5 | 0.5300 |",
        "| **3** | **0.8** | **0.5600** |",
        "| 4 | 0.9 | failed |",
    ):
        assert words in text


def test_the_last_line_is_the_command_that_promotes(story):
    told = report.summary(replace(story, next="mlflow-soup promote --model llm"), ["run: #/run"])
    assert told.splitlines()[-1] == "next: mlflow-soup promote --model llm"


def test_the_last_lines_say_what_happened(story):
    text = report.summary(story, ["run: #/run"])
    assert text.splitlines() == [
        "held-out score",
        "  llm v12 alone (λ = 0)   0.5000",
        "  llm v13 alone (λ = 1)   0.5200",
        "  uniform soup (λ = 0.5)  0.5300",
        "  chosen soup (λ = 0.8)   0.5600",
        "soup against the better parent, llm v13: +0.0400 (95 % interval +0.0203 to +0.0597, "
        "200 paired items)",
        "soup against llm v12: +0.0600 (95 % interval +0.0206 to +0.0994, 200 paired items)",
        "registered as models:/llm/14 (λ = 0.8, 5 evaluations)",
        "gate REFUSED (margin 0.05, confidence 0.95; positive where the soup is better)",
        "  held-out against llm v13: +0.0400, not below 0: holds",
        "  code:acc against llm v13: -0.0200, not surely above -0.0100 (lower bound -0.0365): "
        "REFUSED",
        "This may be bad luck: with so many items and these errors, a soup that is exactly as good "
        "as its rivals passes in 97 %.",
        "A note.",
        "run: #/run",
    ]


def answered(*right):
    """The score of a model that got some of the test items right."""
    shares = tuple(1.0 / len(right) for _ in right)
    ids = tuple(map(str, range(len(right))))
    value = sum(right) / len(right)
    items = (Items("boolq", "acc,none", 1.0, ids, tuple(map(float, right)), shares),)
    return Score(value, 0.25, items, (Metric("boolq", "acc,none", value, 0.25, True),))


@pytest.fixture
def tested(story):
    """The same, with a test set on which the parents change places, and with a champion."""
    roles = {
        "soup": Unbiased(SOUP, answered(1, 1, 1, 0)),
        "parent 0": Unbiased(OLD, answered(1, 1, 0, 0)),
        "parent 1": Unbiased(NEW, answered(0, 0, 0, 1)),
        "champion 0": Unbiased(Version("llm", 9), answered(0, 0, 0, 0)),
        "champion 1": Unbiased(OLD, answered(1, 1, 0, 0)),
    }
    return replace(story, tested=roles)


def test_the_gain_on_the_test_set_is_over_the_parent_that_the_held_out_items_rank_first(tested):
    assert [(v, d.value, d.count) for v, d in report.test_gains(tested).items()] == [
        (NEW, 0.5, 4),
        (OLD, 0.25, 4),  # which is a champion too
        (Version("llm", 9), 0.75, 4),
    ]


def test_the_lines_and_the_report_tell_both_gains_and_which_one_is_unbiased(story, tested):
    text = report.summary(tested, [])
    lines = text.splitlines()
    first = lines.index("score on the test set")
    assert lines[first : first + 5] == [
        "score on the test set",
        "  soup (llm v14)     0.7500",
        "  parent (llm v12)   0.5000",
        "  parent (llm v13)   0.2500",
        "  champion (llm v9)  0.0000",
    ]
    said = (
        "These items took no part in the choice of the soup or in the gate, so these gains are "
        "unbiased; those on the held-out items are somewhat optimistic."
    )
    assert lines[first + 8] == said
    links = {
        "run": "#/run",
        "all λ": "#/trials",
        "plot": "#/plot",
        "interactive": "#/html",
        str(OLD): "[o](#/o)",
        str(NEW): "[n](#/n)",
    }
    page = report.markdown(tested, links)
    for words in (
        "## Test set: boolq acc",
        "| soup (llm v14) | 0.7500 | 0.2500 |",
        "- Against llm v13, the better parent on the held-out items: **+0.5000 (95 % interval",
        "- Against llm v9, the champion: **+0.7500 (95 % interval",
        said,
    ):
        assert words in page
    assert page.index("## Held-out") < page.index("## Test set") < page.index("## Out of domain")
    # a later verdict replaces only the last section
    renewed = report.renew(page, "## Out of domain: passed\n")
    assert renewed == page[: page.index("## Out of domain")] + "## Out of domain: passed\n"
    # a method that chooses nothing makes no optimistic gain
    plain = report.summary(replace(tested, method="uniform"), [])
    assert "unbiased." in plain
    assert "optimistic" not in plain
    for untested in (report.summary(story, []), report.markdown(story, links)):
        assert "test set" not in untested.lower()


def test_the_figure_marks_each_kind_of_point(story):
    figure = report.landscape(story)
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["Gaussian process, 95 % band", "trial", "parents", "uniform soup", "chosen λ"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["chosen λ"] == [[0.8, 0.56]]
    assert drawn["parents"] == [[0.0, 0.50], [1.0, 0.52]]
    assert len(drawn["trial"]) == 4
    assert "llm v13" in axes.get_xlabel()
    assert "piqa" in axes.get_ylabel()


def three(story, tmp_path):
    """The same story with three parents."""
    space = Space.simplex(3, 0.5)
    recipes = [*space.start(), space.recipe((0.1, 0.2, 0.7))]
    trials = [Trial(i, r, score(0.5 + 0.01 * i)) for i, r in enumerate(recipes)]
    oldest = Parent(Version("llm", 11), "sha256:3", tmp_path)
    soup = Soup(SOUP, recipes[-1], (oldest, *story.soup.parents), score(0.54), "sha256:1")
    versions = tuple(parent.version for parent in soup.parents)
    return replace(story, space=space, soup=soup, trials=tuple(trials), references=versions)


def test_a_soup_of_three_is_told_with_all_its_weights(story, tmp_path):
    names = [f"llm v{number}" for number in (11, 12, 13)]
    links = {
        "run": "#/run",
        "all λ": "#/trials",
        "plot": "#/plot",
        "interactive": "#/html",
        **{name: f"[{name}](#/x)" for name in names},
    }
    text = report.markdown(three(story, tmp_path), links)
    assert "0.7 × llm v13 + 0.2 × llm v12 + 0.1 × llm v11. bayesopt: " in text
    assert "| uniform soup (λ = 0.3333, 0.3333, 0.3334) | 0.5300 | 0.0100 |" in text


def test_the_figure_of_three_shows_scores_by_trial(story, tmp_path):
    (axes,) = report.landscape(three(story, tmp_path)).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["chosen λ"] == [[4.0, 0.54]]
    assert [x for x, _ in drawn["trial"]] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert axes.get_xlabel() == "trial"


# a curve with its top at 0.7, and a lucky score at 0.55
LUCKY = {
    0.0: 0.46,
    1.0: 0.52,
    0.5: 0.52,
    0.9: 0.546,
    0.6: 0.543,
    0.7: 0.552,
    0.8: 0.553,
    0.55: 0.56,
}


def of_scores(values):
    trials = [
        Trial(i, SPACE.recipe(lam), score(value)) for i, (lam, value) in enumerate(values.items())
    ]
    return trials, [(t.recipe, t.held_out) for t in trials if SPACE.feasible(t.recipe)]


def test_a_higher_score_that_was_not_chosen_is_explained(story):
    trials, measured = of_scores(LUCKY)
    chosen = recommend(SPACE, trials, measured=True)
    assert chosen != SPACE.recipe(0.55)
    soup = replace(story.soup, recipe=chosen, held_out=score(LUCKY[chosen.lam[-1]]))
    first, second = report.luck("bayesopt", SPACE, trials, soup, measured)
    assert first.startswith("The highest of the 7 scores that could be chosen is expected to be")
    assert "chosen by the curve" in first
    assert second.startswith(f"λ = 0.55 scored 0.5600, more than the chosen {chosen.label} with")
    (more,) = re.findall(r"better by (\S+) on new items", second)
    assert float(more) >= 0.0
    # in a tie the plain average is chosen, and the curve expects a bit more of the highest
    plain = replace(story.soup, recipe=SPACE.recipe(0.5), held_out=score(LUCKY[0.5]))
    second = report.luck("bayesopt", SPACE, trials, plain, measured)[1]
    assert second.startswith("λ = 0.55 scored 0.5600, more than the chosen λ = 0.5 with 0.5200.")
    (more,) = re.findall(r"expects it to be better by only (\S+) on new items, too little", second)
    assert float(more) > 0.0
    # what has the highest score needs no explanation, and other methods take the highest
    top = replace(story.soup, recipe=SPACE.recipe(0.55), held_out=score(0.56))
    assert len(report.luck("bayesopt", SPACE, trials, top, measured)) == 1
    (only,) = report.luck("grid", SPACE, trials, top, measured)
    assert "curve" not in only


def test_a_refusal_that_shows_a_loss_is_not_called_bad_luck(story):
    def words(**changes):
        ood = replace(story.verdict.checks[1], **changes)
        return report.luckless(replace(story.verdict, checks=(story.verdict.checks[0], ood)))

    assert "This may be bad luck" in words()
    assert words(passed=True) == ""
    assert words(difference=Difference(-0.05, 0.01, 300), bound=-0.0665) == ""
    refuted = replace(story.verdict.checks[1], side="upper", bound=-0.001, required=0.0)
    assert report.luckless(replace(story.verdict, checks=(*story.verdict.checks, refuted))) == ""
