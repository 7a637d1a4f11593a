"""The words, the table and the figure of a merged window."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlflow_soup.records import (
    Difference,
    Parent,
    Recipe,
    Score,
    Soup,
    Trial,
    Version,
    Window,
    listed,
)
from mlflow_soup.reporting import report, windows
from mlflow_soup.search.schedule import Schedule, longest, power, weights
from mlflow_soup.search.space import Space

TIMES = tuple(1000.0 * i for i in range(1, 7))
SPACE = Schedule(6, 0.0, TIMES)
VERSIONS = tuple(Version("llm", i) for i in range(1, 7))


def of(duration, p):
    return SPACE.recipe(weights(TIMES, duration, power(p)))


def story(recipe, time_tag="tokens_seen"):
    recipes = dict.fromkeys([*SPACE.start(), of(2000, 1), of(6000, 4), recipe])
    trials = tuple(Trial(i, r, Score(0.5 + 0.01 * i, 0.01)) for i, r in enumerate(recipes))
    merged = [v for v, weight in zip(VERSIONS, recipe.lam, strict=True) if weight]
    parents = tuple(Parent(v, f"sha256:{v.number}", Path()) for v in merged)
    soup = Soup(Version("llm", 7), recipe, parents, Score(0.56, 0.01), "sha256:s")
    return report.Story(
        method="bayesopt",
        space=SPACE,
        soup=soup,
        existed=False,
        trials=trials,
        references=VERSIONS[-1:],
        gains=(Difference(0.06, 0.02, 200),),
        better=0,
        roles={},
        verdict=None,
        target="",
        promotion=None,
        distance=None,
        time_tag=time_tag,
    )


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (of(3000, 1), ["3,000 tokens seen long", "3 of the 6", "p is 1: as in a plain average"]),
        (of(4000, 2), ["4,000 tokens seen long", "4 of the 6", "the newer a version, the larger"]),
        (
            of(2000, 0.5),
            ["2,000 tokens seen long", "2 of the 6", "the older a version, the larger"],
        ),
        (of(longest(TIMES), 2), ["6 of the 6", "No longer window was searched"]),
        (SPACE.alone()[0], ["No window is expected to be better than the newest version alone."]),
    ],
)
def test_the_window_is_told_in_words(recipe, said):
    told = " ".join(windows.words(SPACE, story(recipe).soup, "tokens_seen", searched=True))
    for words in said:
        assert words in told
    assert "equally spaced" not in told


def test_the_plain_average_of_the_window_stands_beside_the_chosen_soup():
    told = story(of(4000, 2))
    assert "plain average of the window" not in report.summary(told, [])  # not evaluated
    assert windows.window(told) == Window(4000.0, 2.0, "tokens_seen", None)
    average = of(4000, 1)
    assert [weight for weight in average.lam if weight] == 4 * [0.25]
    score = Score(0.52, 0.01)
    told = replace(told, trials=(*told.trials, Trial(9, average, score)))
    lines = report.summary(told, []).splitlines()
    (place,) = (i for i, line in enumerate(lines) if "plain average of the window" in line)
    assert lines[place].split() == [
        *("plain", "average", "of", "the", "window", "(window", "4,000,", "p", "=", "1)", "0.5200")
    ]
    assert "chosen soup" in lines[place + 1]
    assert windows.window(told) == Window(4000.0, 2.0, "tokens_seen", score)


@pytest.mark.parametrize(
    ("recipe", "method", "window"),
    [
        (of(3000, 1), "bayesopt", (3000.0, 1.0)),
        (SPACE.alone()[0], "bayesopt", None),
        (of(longest(TIMES), 2), "wma", (longest(TIMES), 2.0)),
        (of(longest(TIMES), 3), "wsm", (longest(TIMES), None)),  # no power that is searched
        (SPACE.recipe([0.5, 0, 0, 0, 0, 0.5]), "bayesopt", None),
    ],
)
def test_the_window_of_a_soup_is_told_by_its_numbers(recipe, method, window):
    found = windows.window(replace(story(recipe), method=method))
    assert (found and (found.duration, found.power)) == window


def test_a_soup_of_no_run_has_no_window():
    space = Space.simplex(6, 0.0)
    assert windows.window(replace(story(of(3000, 1)), space=space)) is None


def test_a_window_that_ends_between_two_versions_is_told_by_its_weights():
    # the older of two versions is only half in the window, and weighs less in spite of p < 1
    recipes = map(SPACE.recipe, SPACE.candidates())
    recipe = next(
        r
        for r in recipes
        if r.lam[-3] == 0.0 < r.lam[-2] < r.lam[-1] and SPACE.shape_of(r)[1] < 1.0
    )
    told = " ".join(windows.words(SPACE, story(recipe).soup, "tokens_seen", searched=True))
    assert ": the newer a version, the larger its weight" in told


def test_a_window_that_was_named_does_not_ask_for_a_longer_one():
    told = windows.words(SPACE, story(of(longest(TIMES), 2)).soup, "tokens_seen", searched=False)
    assert "No longer window" not in " ".join(told)


def test_where_versions_have_no_times_the_words_say_so():
    told = windows.words(SPACE, story(of(3000, 1)).soup, "", searched=True)
    assert "so they count as equally spaced" in told[0]
    assert "checkpoints long" in told[1]


def test_a_recipe_that_is_no_schedule_is_told_by_its_weights():
    odd = SPACE.recipe([0.5, 0, 0, 0, 0, 0.5])
    soup = replace(story(of(3000, 1)).soup, recipe=odd)
    assert windows.words(SPACE, soup, "tokens_seen", searched=True) == []
    assert SPACE.label(odd) == odd.label
    assert SPACE.label(of(4000, 2)) == "window 4,000, p = 2"
    assert SPACE.label(SPACE.alone()[0]) == "newest alone"


def test_the_table_has_a_row_for_each_trial_and_the_chosen_one_is_bold():
    told = story(of(4000, 2))
    table = windows.trials_table(told)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(told.trials)
    assert "length of the window, tokens seen" in rows[0]
    bold = [row for row in rows if "**" in row]
    assert len(bold) == 1
    assert "| **4,000** | **2** |" in bold[0]


def test_the_figure_shows_the_weights_over_time_and_the_map_with_its_trials():
    told = story(of(4000, 2))
    chart, *_, bars = windows.figure(told).axes[:2]
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == list(told.soup.recipe.lam)
    places = [patch.get_x() + patch.get_width() / 2 for patch in bars.patches]
    np.testing.assert_allclose(places, TIMES)
    drawn = {line.get_label(): line.get_xydata() for line in chart.lines}
    assert len(drawn["trial"]) == len(told.trials)
    np.testing.assert_allclose(drawn["chosen"], [[4000.0, 1.0]])  # log2 of p


def test_bad_windows_leave_colours_for_the_good_ones():
    scores = np.array([-0.3, -0.29, 0.001, 0.002, 0.004, 0.008])
    limits = report.bounds(scores)
    assert (limits[0], limits[-1]) == (-0.3, 0.008)
    assert (np.diff(limits) > 0.0).all()
    assert len({*np.digitize(scores[2:], limits[:-1])}) == 2  # with equal steps, one
    assert (np.diff(report.bounds(np.full(3, 0.5))) > 0.0).all()


def test_a_fixed_rule_has_no_map():
    told = replace(story(of(longest(TIMES), 2)), method="wma")
    (bars,) = windows.figure(told).axes
    assert len(bars.patches) == 6


def test_a_few_versions_are_listed_and_of_many_the_ends():
    assert listed(VERSIONS[:2]) == "llm v1 and llm v2"
    assert listed(VERSIONS) == "llm v1 to llm v6 (6 versions)"


@pytest.mark.parametrize(
    ("lam", "words"),
    [
        ((0.3, 0.7), "0.7"),
        ((0.2, 0.3, 0.5), "0.2, 0.3, 0.5"),
        ((0.0,) * 7 + (0.25, 0.75), "last 2: 0.25, 0.75"),
        ((0.05,) * 20, "last 20: 0.05, 0.05, 0.05, …, 0.05, 0.05, 0.05"),
    ],
)
def test_a_recipe_of_many_weights_is_cut(lam, words):
    assert str(Recipe("linear", lam)) == words
