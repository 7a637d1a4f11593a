"""`ask`, `recommend` and `proceed`: what is evaluated, when the search ends, what is chosen."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.decision.pairing import paired, upper_bound
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Items, Score, Trial
from mlflow_soup.search import belief, landscape, surrogate
from mlflow_soup.search.ask import WIDE, ask, improvement, proceed
from mlflow_soup.search.belief import CHOICES
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Space, distances

choices = pytest.mark.parametrize("acquisition", CHOICES)
counts = pytest.mark.parametrize("count", [2, 3])


def believe(trials):
    """What is believed of a simplex: it shows the weights as they are, however many."""
    return belief.believe(Space.pair(0.0), trials)


def fit(trials):
    """The Gaussian process of a simplex."""
    return belief.fit(Space.pair(0.0), trials)


def pairs(lams):
    """The merge weights of two parents for given λ."""
    return np.column_stack([1.0 - np.array(lams), lams])


def dome(peak, width=0.5):
    """A score like that of a soup of equally good parents: one smooth hill."""

    def score(lam):
        there = lam[-1:] if np.ndim(peak) == 0 else lam
        square = np.sum((np.array(there) - peak) ** 2)
        return Score(0.5 + 0.1 * (1.0 - float(square) / width**2), 0.001)

    return score


def nothing(lam):
    """An evaluation that always fails."""
    return


def searched(space, score, count, trials=(), **options):
    """The history after `count` trials; `score` returns None if an evaluation fails."""
    trials = list(trials)
    while len(trials) < count:
        recipe = ask(space, trials, **options)
        trials.append(Trial(len(trials), recipe, score(recipe.lam)))
    return trials


def told(space, history):
    """A history with the given weights and scores."""
    scores = [(lam, None if y is None else Score(y, 0.01)) for lam, y in history]
    return [Trial(i, space.recipe(lam), score) for i, (lam, score) in enumerate(scores)]


def spaced(recipes):
    """The smallest distance between two of the recipes."""
    points = np.array([recipe.lam for recipe in recipes])
    return min(distances(points, points)[np.triu_indices(len(points), k=1)])


def nearest(acquisition, kind):
    """The smallest allowed distance to known recipes; it is smaller for a landscape."""
    return 0.002 if (acquisition, kind) == ("landscape", "items") else 0.01


def scores_of(kind, space):
    """A score function, with items or without."""
    if kind == "items":
        return s.Quiz(4, count=space.count, items=60, wild=0.2).score
    return dome(0.8) if space.count == 2 else dome(np.array([0.2, 0.3, 0.5]))


kinds = pytest.mark.parametrize("kind", ["items", "scores"])


# --- ask


@choices
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7])
def test_parents_uniform_soup_and_alpha_are_evaluated_before_the_surrogate_is_used(
    acquisition, alpha
):
    space = Space.pair(alpha)
    trials = searched(space, dome(0.8), 6, acquisition=acquisition)
    first = list(dict.fromkeys((*space.start(), *space.ends())))
    assert [t.recipe for t in trials[: len(first)]] == first
    assert all(space.feasible(t.recipe) for t in trials[3:])


@choices
def test_more_than_two_parents_and_their_uniform_soup_are_evaluated_first(acquisition):
    space = Space.simplex(3, 0.2)
    trials = searched(space, scores_of("scores", space), 6, acquisition=acquisition)
    assert tuple(t.recipe for t in trials[:4]) == space.start()
    assert all(space.feasible(t.recipe) for t in trials[4:])


def test_with_a_landscape_lambda_alpha_is_not_evaluated_first():
    space = Space.pair(0.7)
    # the newer parent is much better, so nothing can be gained at the other end
    quiz = s.Quiz(1, items=200, bend=0.2, side=1.0)
    trials = searched(space, quiz.score, 6)
    assert tuple(t.recipe for t in trials[:3]) == space.start()
    assert space.recipe(0.7) not in [t.recipe for t in trials]
    hedge = searched(space, quiz.score, 4, acquisition="gp-hedge")
    assert hedge[3].recipe == space.recipe(0.7)


@choices
@s.FEW
@given(drawn=st.data(), space=s.spaces(), seed=st.integers(0, 99))
def test_no_evaluated_or_pending_recipe_is_asked_again(acquisition, drawn, space, seed):
    trials = drawn.draw(s.histories(space))
    nearby = [space.recipe(point) for point in space.candidates()[::10]]
    pending = drawn.draw(st.lists(st.sampled_from([*space.start(), *nearby]), max_size=5))
    recipe = ask(space, trials, acquisition=acquisition, seed=seed, pending=pending)
    known = [*(t.recipe for t in trials), *pending]
    assert recipe not in known
    if set(space.start()) <= set(known):
        assert space.feasible(recipe)
    else:
        assert recipe in space.start()


@choices
@kinds
def test_no_recipe_of_three_parents_is_asked_again(acquisition, kind):
    space = Space.simplex(3, 0.1)
    trials = searched(space, scores_of(kind, space), 8, acquisition=acquisition)
    pending = []
    for _ in range(3):
        pending.append(ask(space, trials, acquisition=acquisition, pending=pending))
    recipes = [*(t.recipe for t in trials), *pending]
    assert len(set(recipes)) == 11
    assert all(space.feasible(recipe) for recipe in recipes[4:])
    assert all(sum(round(1e4 * x) for x in recipe.lam) == 10_000 for recipe in recipes)


@choices
@counts
@kinds
def test_four_at_once_are_distinct_and_well_apart(acquisition, count, kind):
    space = Space.simplex(count, 0.0)
    trials = searched(space, scores_of(kind, space), 5, acquisition=acquisition)
    pending = []
    for _ in range(4):
        pending.append(ask(space, trials, acquisition=acquisition, seed=2, pending=pending))
    assert spaced([*(t.recipe for t in trials), *pending]) > nearest(acquisition, kind)


@pytest.mark.parametrize("acquisition", ["ei", "pi", "ucb"])
def test_a_pending_recipe_counts_with_its_expected_score(acquisition):
    space = Space.pair(0.5)
    trials = told(space, [(0.0, 0.41), (1.0, 0.47), (0.5, 0.478), (0.7, 0.486)])
    pending = [space.recipe(0.62), space.recipe(0.8)]
    means, _ = fit(trials).predict(np.array([recipe.lam for recipe in pending]))
    imagined = [
        Trial(4 + i, recipe, Score(float(mean), 0.01))
        for i, (recipe, mean) in enumerate(zip(pending, means, strict=True))
    ]
    asked = ask(space, trials, acquisition=acquisition, pending=pending)
    assert asked == ask(space, [*trials, *imagined], acquisition=acquisition)


def test_a_pending_recipe_makes_a_landscape_look_elsewhere():
    space = Space.pair(0.0)
    apart = []
    for seed in range(5):
        quiz = s.Quiz(seed, items=100, wild=0.3)
        trials = searched(space, quiz.score, 5)
        first = ask(space, trials)
        second = ask(space, trials, pending=[first])
        # for comparison: a recipe that is only excluded and does not narrow the band
        failed = ask(space, [*trials, Trial(5, first, None)])
        apart.append((spaced([first, second]), spaced([first, failed])))
    there, beside = np.array(apart).T
    assert there.mean() > beside.mean()


@counts
def test_the_search_does_not_wait_for_pending_start_recipes(count):
    space, pending = Space.simplex(count, 0.0), []
    for recipe in space.start():
        assert ask(space, [], pending=pending) == recipe
        pending.append(recipe)
    assert ask(space, [], pending=pending) not in pending


@choices
@kinds
@counts
def test_an_interrupted_search_continues_with_the_same_trials(acquisition, kind, count):
    space = Space.simplex(count, 0.5)
    whole = searched(space, scores_of(kind, space), 7, acquisition=acquisition, seed=3)
    surrogate._fit.cache_clear()
    for cut in range(7):
        assert ask(space, whole[:cut], acquisition=acquisition, seed=3) == whole[cut].recipe


def test_another_process_asks_the_same():
    space = Space.pair(0.5)
    quiz = s.Quiz(3, items=40, wild=0.3)
    plain = [(0.0, 0.41), (1.0, 0.47), (0.5, 0.478), (0.64, 0.486), (0.72, None), (0.88, 0.481)]
    histories = [
        [(lam, None if y is None else {"value": y, "stderr": 0.01}) for lam, y in plain],
        [(lam, dataclasses.asdict(quiz.score((1 - lam, lam)))) for lam, _ in plain],
    ]
    program = (
        "import json, sys, numpy\n"
        "from mlflow_soup.records import Items, Score, Trial\n"
        "from mlflow_soup.search.ask import ask\n"
        "from mlflow_soup.search.space import Space\n"
        "numpy.random.seed(1)\n"
        "space = Space.pair(0.5)\n"
        "def score(d):\n"
        "    items = [{k: tuple(map(tuple, v)) if v and isinstance(v, list) and\n"
        "              isinstance(v[0], list) else tuple(v) if isinstance(v, list) else v\n"
        "              for k, v in i.items()} for i in d.get('items', ())]\n"
        "    return Score(d['value'], d['stderr'], tuple(Items(**i) for i in items))\n"
        "for history in json.load(sys.stdin):\n"
        "    trials = [Trial(i, space.recipe(lam), None if d is None else score(d))\n"
        "              for i, (lam, d) in enumerate(history)]\n"
        "    print(*(ask(space, trials, seed=seed).lam[-1] for seed in range(10)))"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(histories),
        capture_output=True,
        text=True,
        check=True,
    )
    trials = [
        told(space, plain),
        [
            Trial(i, space.recipe(lam), quiz.score((1 - lam, lam)))
            for i, (lam, _) in enumerate(plain)
        ],
    ]
    here = [[ask(space, t, seed=seed).lam[-1] for seed in range(10)] for t in trials]
    assert [list(map(float, line.split())) for line in there.stdout.splitlines()] == here


def test_the_seed_matters_only_for_gp_hedge():
    space = Space.pair(0.0)
    trials = searched(space, dome(0.6), 6, acquisition="ei")
    asked = {
        name: {ask(space, trials, acquisition=name, seed=seed) for seed in range(20)}
        for name in CHOICES
    }
    assert {name: len(asked[name]) for name in ("ei", "pi", "ucb")} == {"ei": 1, "pi": 1, "ucb": 1}
    assert 1 < len(asked["gp-hedge"]) <= 3
    assert asked["gp-hedge"] <= asked["ei"] | asked["pi"] | asked["ucb"]


@counts
def test_the_seed_does_not_matter_for_a_landscape(count):
    space = Space.simplex(count, 0.0)
    trials = searched(space, scores_of("items", space), 6)
    assert len({ask(space, trials, seed=seed) for seed in range(5)}) == 1


@s.FEW
@given(drawn=st.data(), seed=st.integers(0, 99))
def test_without_items_a_landscape_is_searched_by_gp_hedge(drawn, seed):
    space = drawn.draw(s.spaces(3))
    trials = [
        dataclasses.replace(
            t, held_out=None if t.held_out is None else dataclasses.replace(t.held_out, items=())
        )
        for t in drawn.draw(s.histories(space, most=6))
    ]
    pending = [space.recipe(space.candidates()[7])] * drawn.draw(st.integers(0, 1))
    options = {"seed": seed, "pending": pending}
    hedge = ask(space, trials, acquisition="gp-hedge", **options)
    assert ask(space, trials, acquisition="landscape", **options) == hedge


@choices
@kinds
def test_the_search_continues_after_an_evaluation_that_failed(acquisition, kind):
    space = Space.pair(0.5)
    score = scores_of(kind, space)

    def breaks_in_the_middle(lam):
        return None if 0.6 < lam[-1] < 0.8 else score(lam)

    trials = searched(space, breaks_in_the_middle, 9, acquisition=acquisition)
    assert len({t.recipe for t in trials}) == 9
    measured = [t.recipe for t in trials if t.held_out is not None]
    assert recommend(space, trials, measured=True) in measured


@kinds
def test_a_failed_trial_does_not_change_the_surrogate(kind):
    space = Space.pair(0.5)
    score = scores_of(kind, space)
    trials = [Trial(i, space.recipe(x), score((1 - x, x))) for i, x in enumerate((0, 1, 0.5, 0.7))]
    failed = [*trials, Trial(4, space.recipe(0.9), None)]
    grid = space.candidates()
    np.testing.assert_array_equal(fit(trials).predict(grid), fit(failed).predict(grid))
    before, after = believe(trials), believe(failed)
    np.testing.assert_array_equal(before.posterior.predict(grid), after.posterior.predict(grid))
    assert (before.landscape is None) is (kind == "scores")


@choices
@counts
def test_without_any_score_the_search_draws_at_random_within_bounds(acquisition, count):
    space = Space.simplex(count, 0.5)
    trials = searched(space, nothing, 8, acquisition=acquisition, seed=1)
    assert len({t.recipe for t in trials}) == 8
    assert all(space.feasible(t.recipe) for t in trials[len(space.start()) :])
    assert searched(space, nothing, 8, acquisition=acquisition, seed=1) == trials
    assert searched(space, nothing, 8, acquisition=acquisition, seed=2) != trials


@choices
def test_the_search_continues_once_a_trial_succeeds_after_a_failed_start(acquisition):
    space = Space.pair(0.5)
    trials = told(space, [(0.0, None), (1.0, None), (0.5, None), (0.7, 0.5)])
    recipe = ask(space, trials, acquisition=acquisition)
    assert space.feasible(recipe)
    assert recipe not in [t.recipe for t in trials]


@choices
@pytest.mark.parametrize("score", [0.5, None], ids=["scored", "failed"])
def test_when_no_candidate_is_left_ask_raises_an_error(acquisition, score):
    space = Space.pair(0.9999)
    trials = told(space, [(lam, score) for lam in (0.0, 1.0, 0.5, 0.9999)])
    with pytest.raises(SpecError) as refusal:
        ask(space, trials, acquisition=acquisition)
    assert "--alpha" in refusal.value.fix


@pytest.mark.parametrize("acquisition", ["gp-hedge", "ei", "pi", "ucb"])
@pytest.mark.parametrize(("alpha", "peak"), [(0.5, 0.6), (0.5, 0.88), (0.0, 0.3), (0.7, 1.0)])
def test_ten_trials_find_the_top_of_a_dome(acquisition, alpha, peak):
    space = Space.pair(alpha)
    trials = searched(space, dome(peak), 10, acquisition=acquisition)
    assert abs(recommend(space, trials).lam[-1] - peak) <= 0.02
    assert abs(recommend(space, trials, measured=True).lam[-1] - peak) <= 0.02


@pytest.mark.parametrize("acquisition", ["gp-hedge", "ei", "ucb"])
@pytest.mark.parametrize("peak", [(0.2, 0.3, 0.5), (0.0, 0.5, 0.5)])
def test_twelve_trials_find_the_top_of_a_dome_over_a_triangle(acquisition, peak):
    space = Space.simplex(3, 0.0)
    trials = searched(space, dome(np.array(peak)), 12, acquisition=acquisition)
    assert distances(np.array([recommend(space, trials).lam]), np.array([peak]))[0, 0] <= 0.05


@pytest.mark.parametrize(("count", "alpha"), [(2, 0.0), (2, 0.6), (3, 0.0), (4, 0.0)])
def test_five_evaluations_find_the_top_where_curves_are_smooth(count, alpha):
    """Five for a pair, and one more for each further parent, which is evaluated too."""
    space = Space.simplex(count, alpha)
    for seed in range(4):
        quiz = s.Quiz(seed, count=count, items=300)
        trials = searched(space, quiz.score, count + 3)
        best = max(t.held_out.value for t in trials if space.feasible(t.recipe))
        start = max(t.held_out.value for t in trials[: count + 1] if space.feasible(t.recipe))
        top = quiz.accuracy(space.candidates()[:: 3 * count]).max()
        assert best >= top - 0.004
        assert start <= best


# --- recommend


def lags(score, parents):
    """Whether a score is shown to be below a parent's; without items, whether it is below."""
    if not score.items:
        return any(score.value < parent.value for parent in parents)
    return any(upper_bound(paired(score, parent), 0.95) < 0.0 for parent in parents)


@s.FEW
@given(drawn=st.data(), space=s.spaces())
def test_the_evaluated_recipe_with_the_largest_expected_score_is_recommended(drawn, space):
    trials = drawn.draw(s.histories(space, least=3))
    scored = [t for t in trials if t.held_out is not None]
    feasible = [t for t in scored if space.feasible(t.recipe)]
    if not feasible:
        for measured in (True, False):
            with pytest.raises(SpecError, match="no feasible trial"):
                recommend(space, trials, measured=measured)
        return
    parents = [t.held_out for t in feasible if t.recipe in space.alone()]
    options = [t.recipe for t in feasible if not lags(t.held_out, parents)]
    chosen = recommend(space, trials, measured=True)
    assert chosen in options
    points = np.array([t.recipe.lam for t in scored])
    belief = believe(trials)
    if belief.landscape is None:
        posterior = surrogate.fit(points, np.array([t.held_out.value for t in scored]))
        means, _ = posterior.predict(np.array([r.lam for r in options]))
    else:
        means = landscape.fit(Space.pair(0.0), trials).population(
            np.array([r.lam for r in options])
        )
    best = options[int(means.argmax())]
    if chosen != space.uniform():
        assert means[options.index(chosen)] == pytest.approx(means.max(), abs=1e-12)
    else:  # a tie counts for the plain average of a pair
        scores = {t.recipe: t.held_out for t in feasible}
        both = scores[best], scores[chosen]
        error = (
            paired(*both).stderr
            if all(b.items for b in both)
            else math.hypot(*(b.stderr for b in both))
        )
        gain = means.max() - means[options.index(chosen)]
        assert gain <= (0.5 * error if space.count == 2 else 0.0) + 1e-12


@pytest.mark.parametrize(("right", "chosen"), [(3, 0.5), (60, 0.7)])
def test_a_pair_is_averaged_unless_another_weight_is_told_from_the_average(right, chosen):
    """Of 1000 items, λ = 0.7 loses 37 of λ = 0.5, and wins some more: few are luck."""
    space = Space.pair(0.0)

    def score(lam):
        lost, won = {0.0: (200, 0), 0.5: (0, 0), 0.7: (37, 37 + right), 1.0: (200, 0)}[lam]
        values = (0.0,) * lost + (1.0,) * (600 - lost + won) + (0.0,) * (400 - won)
        names, shares = tuple(map(str, range(1000))), (0.001,) * 1000
        items = Items("quiz", "acc,none", 1.0, names, values, shares)
        return Score(sum(values) / 1000, 0.015, (items,))

    lams = (0.0, 1.0, 0.5, 0.7)
    trials = [Trial(i, space.recipe(lam), score(lam)) for i, lam in enumerate(lams)]
    assert recommend(space, trials, measured=True).lam[-1] == chosen


@s.FEW
@given(drawn=st.data(), space=s.spaces(3))
def test_the_recommendation_is_feasible_and_not_known_to_have_failed_or_lost(drawn, space):
    trials = drawn.draw(s.histories(space, least=4))
    values = {t.recipe: t.held_out for t in trials}
    parents = [values.get(r) for r in space.alone() if space.feasible(r)]
    if not any(values[r] for r in values if space.feasible(r)):
        return
    chosen = recommend(space, trials)
    assert space.feasible(chosen)
    if chosen in values:
        assert values[chosen] is not None
        assert not lags(values[chosen], [p for p in parents if p is not None])


def test_a_recipe_that_scored_worse_than_a_parent_is_not_recommended():
    space = Space.pair(0.5)
    # so close that their expected scores are equal; the soup was the unlucky one
    trials = told(space, [(0.0, 0.40), (1.0, 0.50), (0.5, 0.44), (0.98, 0.499), (0.99, 0.501)])
    assert recommend(space, trials, measured=True).lam[-1] in (0.99, 1.0)
    trials = told(space, [(0.0, 0.40), (1.0, 0.50), (0.5, 0.49), (0.7, 0.4999), (0.8, 0.4999)])
    assert recommend(space, trials, measured=True) == space.recipe(1.0)
    # an older parent counts only if it may be recommended itself
    old = [(0.0, 0.6), (1.0, 0.50), (0.5, 0.52), (0.7, 0.51)]
    assert recommend(space, told(space, old), measured=True) == space.recipe(0.5)
    everywhere = Space.pair(0.0)
    assert recommend(everywhere, told(everywhere, old), measured=True) == space.recipe(0.0)


def test_a_lucky_parent_does_not_bar_a_soup_that_is_not_shown_to_be_worse():
    space, below = Space.pair(0.5), 0
    lams = [(1.0 - lam, lam) for lam in (0.0, 1.0, 0.5, 0.7)]
    for seed in range(40):
        quiz = s.Quiz(seed, items=80, bend=0.1)
        trials = [Trial(i, space.recipe(lam), quiz.score(lam)) for i, lam in enumerate(lams)]
        chosen, parent = recommend(space, trials, measured=True), trials[1].held_out
        score = next(t.held_out for t in trials if t.recipe == chosen)
        assert not lags(score, [parent])
        below += score.value < parent.value
    assert below >= 3


@kinds
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_the_newest_parent_can_always_be_recommended(kind, alpha):
    space = Space.pair(alpha)
    if kind == "items":
        score = s.Quiz(5, items=200, bend=-0.5, side=1.0).score
    else:
        score = dome(1.0, width=0.3)
    trials = searched(space, score, 7)
    assert recommend(space, trials) == space.recipe(1.0)
    assert recommend(space, trials, measured=True) == space.recipe(1.0)


@kinds
def test_without_measured_a_recipe_that_was_never_evaluated_may_be_recommended(kind):
    space = Space.pair(0.0)
    score = s.Quiz(6, items=300, bend=1.0).score if kind == "items" else dome(0.3)
    lams = (0.0, 1.0, 0.12, 0.9)
    trials = [Trial(i, space.recipe(x), score((1 - x, x))) for i, x in enumerate(lams)]
    unmeasured = recommend(space, trials)
    assert unmeasured.lam[-1] not in lams
    assert spaced([unmeasured, *(t.recipe for t in trials)]) > 0.01
    measured = recommend(space, trials, measured=True)
    assert measured.lam[-1] in lams
    belief = believe(trials)
    points = np.array([unmeasured.lam, measured.lam])
    if kind == "items":
        mean = belief.landscape.population(points)
    else:
        mean = belief.posterior.predict(points)[0]
    assert mean[0] > mean[1]


def test_the_best_trial_is_not_recommended_when_it_lies_outside_alpha():
    space = Space.pair(0.5)
    trials = told(space, [(0.0, 0.9), (1.0, 0.5), (0.5, 0.6), (0.75, 0.55)])
    assert recommend(space, trials, measured=True).lam[-1] == 0.5


def test_a_lucky_trial_among_worse_neighbours_is_not_recommended():
    space = Space.pair(0.0)
    lams = [0.0, 1.0, 0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.19, 0.21]
    scores = {lam: dome(0.7)((1 - lam, lam)).value for lam in lams}
    scores[0.2] = max(scores.values()) + 0.01  # the neighbours 0.19 and 0.21 score far lower
    trials = told(space, list(scores.items()))
    assert max(scores, key=scores.get) == 0.2
    assert recommend(space, trials, measured=True).lam[-1] == 0.7


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("history", [[], [(0.0, 0.5)], [(0.0, 0.5), (1.0, None)]])
def test_without_a_feasible_score_nothing_is_recommended(history, measured):
    space = Space.pair(0.5)
    with pytest.raises(SpecError, match="no feasible trial has a score"):
        recommend(space, told(space, history), measured=measured)


# --- gp-hedge


class Hoffman:
    """Algorithm 2 of Hoffman, Brochu & de Freitas (UAI 2011), step by step.

    The gains are kept from step to step, each utility is a textbook formula, each
    maximum a loop. The posterior is the package's, which has tests of its own.
    """

    def __init__(self, space, start):
        self.space, self.history = space, list(start)
        self.gains = {"ei": 0.0, "pi": 0.0, "ucb": 0.0}
        self.nominate()

    def posterior(self):
        lams, scores = zip(*((lam, y) for lam, y in self.history if y is not None), strict=True)
        return surrogate.fit(pairs(lams), np.array(scores)), pairs(lams)

    def nominate(self):
        posterior, lams = self.posterior()
        best = posterior.predict(lams)[0].max()
        candidates = self.space.candidates()
        self.nominees, utmost = {}, dict.fromkeys(self.gains, -math.inf)
        for (_, lam), mean, std in zip(candidates, *posterior.predict(candidates), strict=True):
            if min(abs(lam - known) for known, _ in self.history) <= 0.01 + 1e-9:
                continue  # our rule: a closer point would give little news
            z = (mean - best) / std
            utilities = {
                "ei": (mean - best) * cdf(z) + std * math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
                "pi": cdf((mean - best - 0.01 * posterior.scale) / std),
                "ucb": mean + 1.96 * std,
            }
            for name, utility in utilities.items():
                if utility > utmost[name]:
                    self.nominees[name], utmost[name] = float(lam), utility

    def probabilities(self):
        total = sum(math.exp(gain) for gain in self.gains.values())
        return {name: math.exp(gain) / total for name, gain in self.gains.items()}

    def draw(self, seed):
        """The nominee of the base whose share of [0, 1) contains the seed's first number."""
        u, reached = np.random.default_rng([seed, len(self.history)]).random(), 0.0
        for name, probability in self.probabilities().items():
            reached += probability
            if u < reached:
                return self.nominees[name]
        return self.nominees["ucb"]

    def tell(self, lam, score):
        self.history.append((lam, score))
        posterior, _ = self.posterior()
        for name, nominee in self.nominees.items():
            (mean,), _ = posterior.predict(pairs([nominee]))
            self.gains[name] += (mean - posterior.mean) / posterior.scale
        self.nominate()


def cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def test_gp_hedge_is_hoffmans_algorithm():
    space = Space.pair(0.0)
    slow = Hoffman(space, [(0.0, 0.40), (1.0, 0.43), (0.5, 0.47)])
    asked = set()
    for lam, score in [(0.7, 0.46), (0.31, 0.49), (0.2, None), (0.36, 0.485), (0.9, 0.44)]:
        slow.tell(lam, score)
        for seed in range(40):
            recipe = ask(space, told(space, slow.history), acquisition="gp-hedge", seed=seed)
            assert recipe.lam[-1] == slow.draw(seed)
            asked.add((len(slow.history), recipe.lam[-1]))
    # the test data are not trivial: the bases differ in nominees and gains
    assert len(asked) >= 10
    assert max(slow.probabilities().values()) > 1.3 * min(slow.probabilities().values())


@choices
@kinds
@pytest.mark.parametrize(("count", "alpha"), [(2, 0.5), (3, 0.0)])
def test_an_asked_recipe_keeps_its_distance_from_the_known_ones(acquisition, kind, count, alpha):
    space = Space.simplex(count, alpha)
    trials = []
    if kind == "items":
        score = scores_of(kind, space)
    else:  # the best point is one that is known already
        score = dome(np.array(space.uniform().lam), width=0.3)
    while len(trials) < 9:
        recipe = ask(space, trials, acquisition=acquisition, seed=1)
        if len(trials) >= len({*space.start(), *space.ends()}):
            apart = spaced([recipe, *(t.recipe for t in trials)])
            assert apart > nearest(acquisition, kind)
        trials.append(Trial(len(trials), recipe, score(recipe.lam)))


@choices
def test_if_every_candidate_is_close_to_a_known_recipe_the_rest_is_asked(acquisition):
    space = Space.pair(0.99)
    known = [(0.0, 0.4), (1.0, 0.5), (0.5, 0.45), (0.99, 0.5), (0.995, 0.5)]
    lam = ask(space, told(space, known), acquisition=acquisition).lam[-1]
    assert 0.99 <= lam <= 1.0
    assert lam not in [x for x, _ in known]


# --- belief


def loud(items):
    """A straight curve of scores; the older parent's log-likelihoods are a thousand times larger.

    They dominate all others, so the landscape is worthless.
    """

    def score(lam):
        right = np.arange(items) / items < 0.5 + 0.2 * lam[1]
        size = 1000.0 if lam[1] == 0.0 else 1.0
        return s.scored(s.choices([[0.0, -size if r else size] for r in right], [0] * items))

    return score


def test_a_landscape_with_large_leave_one_out_errors_is_not_trusted():
    space = Space.pair(0.0)
    lams = (0.0, 1.0, 0.5, 0.7, 0.8, 0.9, 0.2)
    trials = [Trial(i, space.recipe(x), loud(100)((1 - x, x))) for i, x in enumerate(lams)]
    scape, process = landscape.fit(Space.pair(0.0), trials), fit(trials)
    assert scape.doubt > 3
    belief = believe(trials)
    assert belief.landscape is None
    grid = space.candidates()
    np.testing.assert_array_equal(belief.posterior.predict(grid), process.predict(grid))
    ours = math.sqrt(np.mean(np.square(scape.misses)))
    theirs = math.sqrt(np.mean(process.misses[2:] ** 2))  # the parents come first
    assert f"error would be {ours:.4f}" in belief.why
    assert f"Gaussian process is {theirs:.4f}" in belief.why
    for seed in range(3):
        hedge = ask(space, trials, acquisition="gp-hedge", seed=seed)
        assert ask(space, trials, acquisition="landscape", seed=seed) == hedge
    options = np.array([t.recipe.lam for t in trials])
    best = options[process.predict(options)[0].argmax()]
    assert recommend(space, trials, measured=True) == space.recipe(best)


def test_a_landscape_that_doubts_itself_is_trusted_while_it_misses_by_less(monkeypatch):
    space = Space.pair(0.0)
    trials = searched(space, scores_of("items", space), 6)
    monkeypatch.setattr("mlflow_soup.search.belief.DOUBT", 0.5)  # any landscape doubts itself
    scape, process = landscape.fit(Space.pair(0.0), trials), fit(trials)
    assert np.square(scape.misses).mean() < np.square(process.misses[2:]).mean()
    belief = believe(trials)
    assert belief.landscape is not None
    assert belief.posterior is belief.landscape
    assert belief.why == ""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_reason_for_having_no_landscape_is_given(count):
    space = Space.pair(0.0)
    plain = searched(space, dome(0.6), count)
    belief = believe(plain)
    assert belief.landscape is None
    least = "fewer than 3 values of λ have a score"
    assert belief.why == (least if count < 3 else "the scores have no items")


# --- improvement


@s.FEW
@given(drawn=st.data(), space=s.spaces(3))
def test_an_improvement_is_never_negative(drawn, space):
    trials = drawn.draw(s.histories(space, least=3))
    gain = improvement(space, trials)
    assert math.isfinite(gain)
    assert gain >= 0.0


@pytest.mark.parametrize(
    ("alpha", "history"),
    [
        (0.0, [(0.0, 0.41), (1.0, 0.47), (0.5, 0.478), (0.64, 0.486)]),
        # the best score is infeasible, so it is not the one to improve on
        (0.5, [(0.0, 0.6), (1.0, 0.5), (0.5, 0.52), (0.75, 0.55)]),
    ],
)
def test_the_improvement_is_the_largest_of_all_candidates(alpha, history):
    space = Space.pair(alpha)
    trials = told(space, history)
    posterior = fit(trials)
    done = np.array([t.recipe.lam for t in trials if space.feasible(t.recipe)])
    best = posterior.predict(done)[0].max()
    largest = 0.0
    for (_, lam), mean, std in zip(
        space.candidates(), *posterior.predict(space.candidates()), strict=True
    ):
        if min(abs(lam - t.recipe.lam[-1]) for t in trials) > 0.01:
            z = (mean - best) / std
            gain = (mean - best) * cdf(z) + std * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            largest = max(largest, gain)
    assert improvement(space, trials) == pytest.approx(largest, rel=1e-9)


@counts
@pytest.mark.parametrize("wild", [0.0, 0.05])
def test_the_improvement_shrinks_as_smooth_curves_become_known(count, wild):
    space = Space.simplex(count, 0.0)
    score = s.Quiz(7, count=count, items=200, wild=wild).score
    trials = searched(space, score, count + 6)
    early, late = (improvement(space, trials[:n]) for n in (count + 1, count + 6))
    assert early > 1e-3
    assert late < 0.5 * early


def test_without_candidates_the_improvement_is_zero():
    space = Space.pair(0.9999)
    trials = told(space, [(lam, 0.5) for lam in (0.0, 1.0, 0.5, 0.9999)])
    assert improvement(space, trials) == 0.0


# --- proceed


def ended(space, score, trials=(), **options):
    """The history of a search when it has ended."""
    trials = list(trials)
    while (recipe := proceed(space, trials, **options)) is not None:
        trials.append(Trial(len(trials), recipe, score(recipe.lam)))
    return trials


@counts
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 1e-2])
def test_a_search_keeps_its_budget_and_ends_early_only_if_little_can_be_gained(
    count, seed, tolerance
):
    space = Space.simplex(count, 0.3)
    quiz = s.Quiz(seed, count=count, items=100, wild=0.2)
    budget = count + 6
    trials = ended(space, quiz.score, budget=budget, tolerance=tolerance)
    assert len(trials) <= budget
    assert len({t.recipe for t in trials}) == len(trials)
    recipes = [t.recipe for t in trials]
    if tolerance == 0.0:
        assert len(trials) == budget
    if len(trials) < budget:
        assert improvement(space, trials) < tolerance
        assert recommend(space, trials) in recipes
    # the search did not continue when it should have ended
    for n in range(count + 2, len(trials)):
        if improvement(space, trials[:n]) < tolerance:
            assert trials[n].recipe == recommend(space, trials[:n])
            assert trials[n].recipe not in recipes[:n]
    # and the last evaluation was not wasted
    assert recommend(space, trials[: budget - 1]) in recipes


def test_with_a_large_tolerance_a_search_ends_once_its_recommendation_is_evaluated():
    space = Space.pair(0.0)
    quiz = s.Quiz(8, items=200)
    trials = ended(space, quiz.score, budget=50, tolerance=1.0)
    assert 4 <= len(trials) <= 6
    assert recommend(space, trials) in [t.recipe for t in trials]


def test_without_a_tolerance_the_search_continues_even_on_exactly_known_curves():
    space = Space.pair(0.0)
    quiz = s.Quiz(7, items=200)
    trials = ended(space, quiz.score, budget=9, tolerance=0.0)
    assert improvement(space, trials) == 0.0
    assert len(trials) == 9


@kinds
def test_the_last_evaluation_is_the_recommendation_if_it_was_not_evaluated(kind):
    space = Space.pair(0.0)
    score = s.Quiz(9, items=200, wild=0.2).score if kind == "items" else dome(0.3)
    for budget in range(5, 9):
        trials = searched(space, score, budget - 1)
        recommended = recommend(space, trials)
        last = proceed(space, trials, budget=budget, tolerance=0.0)
        if recommended in [t.recipe for t in trials]:
            assert last == ask(space, trials)
        else:
            assert last == recommended
        assert proceed(space, trials, budget=budget + 1, tolerance=0.0) == ask(space, trials)


def twin_peaks(lam):
    """A quiz whose accuracy has two narrow peaks, at λ = 0.25 and 0.75."""
    rng = np.random.default_rng(3)
    right = rng.integers(4, size=300)
    levels = rng.normal(size=(300, 4))
    height = sum(np.exp(-0.5 * ((lam[-1] - at) / 0.05) ** 2) for at in (0.25, 0.75))
    levels[np.arange(300), right] += 0.4 * rng.normal(size=300) * lam[-1] + height
    return s.scored(s.choices(levels.tolist(), right.tolist()))


def test_a_reserve_is_for_a_band_that_is_still_wide():
    space, options = Space.pair(0.0), {"budget": 8, "tolerance": 1e-4, "reserve": 8}
    trials = ended(space, twin_peaks, **options)
    assert 8 < len(trials) <= 16
    for n in range(8, len(trials)):
        assert improvement(space, trials[:n]) >= WIDE * 1e-4
    if len(trials) < 16:
        assert improvement(space, trials) < WIDE * 1e-4
    # the first trials are those of a search without a reserve
    assert trials[:8] == ended(space, twin_peaks, **options | {"reserve": 0})


def test_smooth_curves_and_scores_without_items_leave_the_reserve():
    space, options = Space.pair(0.0), {"budget": 6, "reserve": 6}
    assert len(ended(space, s.Quiz(7, items=200).score, tolerance=1e-4, **options)) <= 6
    assert len(ended(space, dome(0.8), tolerance=1e-9, **options)) == 6


@pytest.mark.parametrize("acquisition", sorted({*CHOICES} - {"landscape"}))
def test_other_acquisitions_leave_the_reserve(acquisition):
    options = {"budget": 5, "tolerance": 1e-9, "acquisition": acquisition, "reserve": 5}
    assert len(ended(Space.pair(0.0), twin_peaks, **options)) <= 5


def test_without_a_tolerance_there_is_no_reserve():
    trials = ended(Space.pair(0.0), twin_peaks, budget=6, tolerance=0.0, reserve=6)
    assert len(trials) == 6


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_search_that_never_scores_leaves_the_reserve(tolerance):
    space = Space.pair(0.2)
    assert len(ended(space, nothing, budget=7, tolerance=tolerance, reserve=7)) == 7


@choices
def test_a_larger_budget_continues_with_the_same_trials(acquisition):
    space = Space.pair(0.4)
    quiz = s.Quiz(10, items=60, wild=0.3)
    options = {"acquisition": acquisition, "seed": 5, "tolerance": 0.0}
    short = ended(space, quiz.score, budget=6, **options)
    # all but the last trial, which may be the recommendation
    whole = ended(space, quiz.score, budget=8, **options)
    assert whole[:5] == short[:5]
    longer = ended(space, quiz.score, short, budget=8, **options)
    assert longer[:6] == short
    assert len(longer) == 8


@choices
def test_proceed_gives_the_recipes_of_ask_until_the_end(acquisition):
    space = Space.pair(0.4)
    trials = searched(space, dome(0.8), 7, acquisition=acquisition, seed=4)
    for n in range(7):
        recipe = proceed(
            space, trials[:n], acquisition=acquisition, seed=4, budget=20, tolerance=0.0
        )
        assert recipe == trials[n].recipe


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_budget_smaller_than_the_start_is_used_for_the_start(budget, tolerance):
    space = Space.pair(0.0)
    trials = ended(space, dome(0.5), budget=budget, tolerance=tolerance)
    assert tuple(t.recipe for t in trials) == space.start()[:budget]
    assert proceed(space, trials, budget=budget - 1, tolerance=tolerance) is None


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_search_that_never_scores_spends_its_budget(tolerance):
    space = Space.simplex(3, 0.2)
    assert len(ended(space, nothing, budget=7, tolerance=tolerance)) == 7


def test_a_recommendation_whose_evaluation_failed_does_not_end_the_search():
    space = Space.pair(0.0)
    quiz = s.Quiz(11, items=200)
    trials = searched(space, quiz.score, 4)
    failed = recommend(space, trials)
    assert failed not in [t.recipe for t in trials]
    trials.append(Trial(4, failed, None))
    following = proceed(space, trials, budget=20, tolerance=1.0)
    assert following is None or following != failed
    if following is None:
        assert recommend(space, trials) in [t.recipe for t in trials if t.held_out is not None]
