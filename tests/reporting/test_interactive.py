"""The page to explore: what it holds, and that names of others stay text."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import strategies as s
from mlflow_soup.decision import pairing
from mlflow_soup.records import Items, Parent, Score, Soup, Version
from mlflow_soup.reporting import interactive, report
from mlflow_soup.search.schedule import Schedule
from mlflow_soup.search.space import Space

HOSTILE = "</script><script>window.taken=1</script><img src=//evil.test onerror=window.taken=1>"


def quiz_story(space, points, *, task="quiz", items=60):
    """A finished search over the items of a quiz, in which the third trial was chosen."""
    quiz = s.Quiz(3, count=space.count, items=items)
    trials = tuple(quiz.trials(points))
    scores = {trial.recipe: trial.held_out for trial in trials}
    trials = tuple(
        replace(t, held_out=replace(t.held_out, items=(replace(t.held_out.items[0], task=task),)))
        for t in trials
    )
    versions = tuple(Version("llm", i + 1) for i in range(space.count))
    recipe = trials[2].recipe
    merged = tuple(Parent(v, f"sha256:{v.number}", Path()) for v in versions)
    soup = Soup(Version("llm", 9), recipe, merged, scores[recipe], "sha256:s")
    alone = [scores[r] for r in space.alone()]
    return report.Story(
        method="bayesopt",
        space=space,
        soup=soup,
        existed=False,
        trials=trials,
        references=versions[-len(alone) :],
        gains=tuple(pairing.paired(soup.held_out, score) for score in alone),
        better=pairing.better(alone),
        roles={},
        verdict=None,
        target="",
        promotion=None,
        distance=None,
    )


PAIR = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (0.4, 0.6)]


class Tags(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.cells, self._inside = [], "", [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def test_the_page_tells_every_trial_and_marks_the_chosen_one():
    story = quiz_story(Space.pair(0.0), PAIR)
    page = Tags(interactive.page(story))
    assert [attrs for tag, attrs in page.found if attrs.get("class") == "chosen"]
    for trial in story.trials:
        assert story.space.label(trial.recipe) in page.text
        assert f"{trial.held_out.value:.4f}" in page.text
    assert "Chosen: λ = 0.5" in page.text


def test_names_of_others_stay_text():
    pages = [
        Tags(interactive.page(quiz_story(Space.pair(0.0), PAIR, task=task)))
        for task in ("quiz", HOSTILE)
    ]
    benign, hostile = ([tag for tag, _ in page.found] for page in pages)
    assert hostile == benign
    assert "window.taken=1" in pages[1].text
    assert "img" not in hostile


def test_the_page_asks_no_network():
    page = Tags(interactive.page(quiz_story(Space.pair(0.0), PAIR)))
    assert not [attrs for _, attrs in page.found if {"src", "href"} & attrs.keys()]


def test_items_flip_where_the_answer_changes():
    ids, shares = ("a", "b", "c", "d"), (0.25,) * 4
    ours = Items("t", "acc,none", 1.0, ids, (1.0, 0.0, 1.0, 0.0), shares)
    theirs = Items("t", "acc,none", 1.0, ids, (0.0, 1.0, 1.0, 0.0), shares)
    found = interactive.flips(Score(0.5, 0.1, (ours,)), Score(0.5, 0.1, (theirs,)))
    assert found == interactive.Flips(("t:a",), ("t:b",))
    assert found.names == "+t:a, −t:b"
    loss = [replace(items, weight=-1.0) for items in (ours, theirs)]  # smaller is better
    found = interactive.flips(Score(-0.5, 0.1, (loss[0],)), Score(-0.5, 0.1, (loss[1],)))
    assert found == interactive.Flips(("t:b",), ("t:a",))
    bits = [replace(items, values=(1.5, 2.5, 1.0, 0.0)) for items in (ours, theirs)]
    found = interactive.flips(Score(0.5, 0.1, (bits[0],)), Score(0.5, 0.1, (theirs,)))
    assert found == interactive.Flips((), ())


def test_of_many_names_some_are_told_and_the_rest_is_counted():
    names = tuple(f"t:{i}" for i in range(20))
    assert interactive.Flips(names, ()).names.endswith("+t:11, and 8 more")


TIMES = tuple(1000.0 * i for i in range(1, 5))


@pytest.mark.parametrize(
    ("space", "points"),
    [
        (Schedule(2, 0.0, TIMES[:2]), [(0, 1), (0.5, 0.5), (0.25, 0.75)]),
        (Schedule(4, 0.0, TIMES), [(0, 0, 0, 1), (0, 0, 0.5, 0.5), (0.25,) * 4]),
        (Space.simplex(3, 0.0), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.3, 0.5)]),
    ],
)
def test_more_than_two_parents_have_a_page_too(space, points):
    story = quiz_story(space, points)
    text = Tags(interactive.page(story)).text
    for trial in story.trials:
        assert f"{trial.held_out.value:.4f}" in text


def test_scores_without_items_have_a_page_too():
    story = quiz_story(Space.pair(0.0), PAIR)
    bare = tuple(replace(t, held_out=replace(t.held_out, items=())) for t in story.trials)
    assert "0.5" in Tags(interactive.page(replace(story, trials=bare))).text


def test_a_method_that_does_not_search_has_a_page_without_a_curve():
    story = quiz_story(Space.pair(0.0), PAIR)
    assert "expected score" in interactive.page(story)
    assert "expected score" not in interactive.page(replace(story, method="uniform"))
