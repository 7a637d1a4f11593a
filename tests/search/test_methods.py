"""The table of methods: laws for every row, and each row against independent numbers."""

import dataclasses
from math import comb

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import strategies as s
from mlflow_soup.decision import pairing
from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.request import spec
from mlflow_soup.request.spec import WINDOWS, Spec
from mlflow_soup.search.methods import METHODS, lattice, resolution, unused
from mlflow_soup.search.space import Space

rows = pytest.mark.parametrize("name", METHODS)
counts = pytest.mark.parametrize("count", [2, 3, 4])
SEARCHES = [name for name, method in METHODS.items() if method.searches]
MERGES = [name for name, method in METHODS.items() if method.merges]
AT_ONCE = [
    "uniform",
    *WINDOWS,
    "fisher",
    "regmean",
]  # these methods choose one fixed recipe, good or bad


def request(count, **said):
    """A request for the given number of versions."""
    return Spec(versions=",".join(f"v{i}" for i in range(1, count + 1)), **said)


def drive(name, spec, score, trials=()):
    """The history when a method has ended; `score` returns None if an evaluation fails."""
    count, trials = len(spec.parents), list(trials)
    space = Space(count, Space.simplex(count, spec.least).alpha, tuple(range(1, count + 1)))
    while (recipe := METHODS[name].proceed(space, trials, spec)) is not None:
        trials.append(Trial(len(trials), recipe, score(recipe)))
        assert len(trials) < 999, "it does not end"
    return space, trials


def choose(name, spec, score):
    """The recipe that a method registers."""
    space, trials = drive(name, spec, score)
    return METHODS[name].choose(space, trials, spec)


def recipes(trials):
    return [trial.recipe for trial in trials]


def by_chance(seed, *, fails=0.0):
    """Random scores in steps of 0.05, so that some are equal; a share of the merges fails."""

    def score(recipe):
        steps = [round(1e4 * weight) for weight in recipe.lam]
        random = np.random.default_rng([seed, *steps, *recipe.method.encode()])
        value = Score(random.integers(8, 14) / 20, 0.01)
        return None if random.random() < fails and max(recipe.lam) < 1.0 else value

    return score


def among(values):
    """A score function for uniform soups, by their members, numbered from 1."""

    def score(recipe):
        members = tuple(i for i, weight in enumerate(recipe.lam, start=1) if weight > 0.0)
        return Score(values[members], 0.01)

    return score


def even(count):
    """The weights of the plain average in steps of 1e-4; the newest parent gets the rest."""
    step = round(1 / count, 4)
    return (*[step] * (count - 1), round(1 - (count - 1) * step, 4))


# --- every row


def test_the_command_line_knows_the_same_methods():
    assert tuple(METHODS) == spec.METHODS


@rows
@counts
def test_parents_come_first_no_recipe_comes_twice_and_it_ends(name, count):
    most = {"greedy": 2 * count - 1, "best": count} | dict.fromkeys(AT_ONCE, count + 1)
    for seed in range(3):
        asked = request(count, seed=seed, trials=count + 5)
        space, trials = drive(name, asked, by_chance(seed))
        found = recipes(trials)
        assert tuple(found[:count]) == space.alone()
        assert len({*found}) == len(found) <= most.get(name, asked.budget)
        assert all(sum(recipe.lam) == pytest.approx(1.0, abs=1e-9) for recipe in found)


@rows
@counts
def test_the_chosen_recipe_has_a_score(name, count):
    for seed in range(3):
        asked = request(count, seed=seed, trials=count + 5)
        space, trials = drive(name, asked, by_chance(seed))
        chosen = METHODS[name].choose(space, trials, asked)
        assert chosen in recipes(trials)
        if name in SEARCHES:
            assert chosen.lam[-1] >= asked.least
        if name not in MERGES:
            assert chosen in space.alone()


@rows
@counts
def test_a_method_interrupted_anywhere_continues_with_the_same_trials(name, count):
    asked = request(count, trials=count + 4, seed=3)
    score = by_chance(1, fails=0.3)
    _, whole = drive(name, asked, score)
    for done in range(len(whole)):
        assert drive(name, asked, score, whole[:done])[1] == whole


@rows
@counts
def test_failed_merges_do_not_stop_a_method(name, count):
    asked = request(count, trials=count + 5)
    for seed in range(3):
        score = by_chance(seed, fails=0.7)
        space, trials = drive(name, asked, score)
        assert len({*recipes(trials)}) == len(trials)
        chosen = METHODS[name].choose(space, trials, asked)
        assert name in AT_ONCE or score(chosen) is not None
        assert chosen in recipes(trials)
    # if all merges fail, a parent is chosen
    space, trials = drive(name, asked, by_chance(0, fails=1.0))
    assert len(trials) > count or name not in MERGES
    if name not in AT_ONCE:
        assert METHODS[name].choose(space, trials, asked) in space.alone()


# 1 : 3 : 5 : 7, and 0.7 of the next one
BY_AGE = {
    "wma": {2: (0.25, 0.75), 3: (0.1111, 0.3333, 0.5556), 4: (0.0625, 0.1875, 0.3125, 0.4375)},
    "ema": {2: (0.4118, 0.5882), 3: (0.2237, 0.3196, 0.4567), 4: (0.1354, 0.1934, 0.2764, 0.3948)},
}


@pytest.mark.parametrize("name", AT_ONCE)
@counts
def test_a_fixed_recipe_is_chosen_good_or_bad(name, count):
    method = name if METHODS[name].needs else "linear"
    made = Recipe(method, BY_AGE.get(name, {}).get(count, even(count)))

    def score(recipe):
        return Score(0.1 if recipe == made else 0.9, 0.01)

    assert choose(name, request(count), score) == made
    assert recipes(drive(name, request(count), score)[1])[count:] == [made]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SEARCHES])
def test_only_searches_use_budget_seed_and_alpha(name):
    first = drive(name, request(3), by_chance(5))[1]
    second = drive(name, request(3, trials=99, seed=7, alpha=0.9), by_chance(5))[1]
    assert first == second


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_evaluate_only_feasible_weights(name):
    space, trials = drive(name, request(3, alpha=0.6, trials=9, stop=0.0), by_chance(5))
    apart = {*space.start()} if name == "bayesopt" else {*space.alone()}
    assert all(recipe.lam[-1] >= 0.6 for recipe in recipes(trials) if recipe not in apart)
    assert len(trials) > len(apart)


# --- greedy


def test_greedy_adds_parents_that_help_and_leaves_out_those_that_harm():
    score = among({(1,): 0.5, (2,): 0.6, (3,): 0.4, (1, 2): 0.65, (1, 2, 3): 0.6})
    _, trials = drive("greedy", request(3), score)
    # v2 is the best; v1 is added, v3 is not
    assert [recipe.lam for recipe in recipes(trials)[3:]] == [
        (0.5, 0.5, 0),
        (0.3333, 0.3333, 0.3334),
    ]
    assert choose("greedy", request(3), score).lam == (0.5, 0.5, 0.0)


def test_greedy_continues_after_a_parent_that_was_not_added():
    score = among({(1,): 0.5, (2,): 0.6, (3,): 0.4, (1, 2): 0.59, (2, 3): 0.7})
    assert choose("greedy", request(3), score).lam == (0.0, 0.5, 0.5)


def test_greedy_takes_the_newest_first_among_equals():
    score = among({(1,): 0.6, (2,): 0.6, (3,): 0.6, (2, 3): 0.5, (1, 3): 0.4})
    _, trials = drive("greedy", request(3), score)
    assert [recipe.lam for recipe in recipes(trials)[3:]] == [(0.0, 0.5, 0.5), (0.5, 0.0, 0.5)]
    assert choose("greedy", request(3), score).lam == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(("tie", "members"), [("add", (1, 3, 4)), ("drop", (1, 4))])
def test_greedy_tie_decides_whether_a_parent_without_effect_is_added(tie, members):
    alone = {(1,): 0.6, (2,): 0.6, (3,): 0.5, (4,): 0.7}
    # in the order v4, v2, v1, v3
    score = among(alone | {(2, 4): 0.65, (1, 4): 0.75, (1, 3, 4): 0.75})
    chosen = choose("greedy", request(4, greedy_tie=tie), score).lam
    assert chosen == {(1, 3, 4): (0.3333, 0, 0.3333, 0.3334), (1, 4): (0.5, 0, 0, 0.5)}[members]


@pytest.mark.parametrize(("tie", "lam"), [("add", (0.5, 0.5)), ("drop", (0.0, 1.0))])
@pytest.mark.parametrize(("alone", "soup"), [(0.1 + 0.2, 0.3), (0.3, 0.1 + 0.2)])
def test_sums_that_differ_by_rounding_are_a_tie(tie, lam, alone, soup):
    assert alone != soup
    score = among({(1,): 0.2, (2,): alone, (1, 2): soup})
    assert choose("greedy", request(2, greedy_tie=tie), score).lam == lam


def wortsman(count, values, tie):
    """Recipe 1 of Wortsman et al. 2022, as printed; members are numbered from 1."""
    ingredients, val_acc = [], -1.0
    for model in sorted(range(1, count + 1), key=lambda i: (-values[(i,)], -i)):
        trial = values[tuple(sorted([*ingredients, model]))]
        if trial >= val_acc if tie == "add" else trial > val_acc:
            ingredients, val_acc = [*ingredients, model], trial
    return sorted(ingredients)


@given(drawn=st.data(), count=st.integers(2, 6), tie=st.sampled_from(spec.TIES))
def test_greedy_is_the_recipe_of_the_paper(drawn, count, tie):
    values = {
        tuple(i + 1 for i in range(count) if bits >> i & 1): drawn.draw(st.integers(0, 4)) / 4
        for bits in range(1, 2**count)
    }
    members = wortsman(count, values, tie)
    chosen = choose("greedy", request(count, greedy_tie=tie), among(values))
    assert [i for i, weight in enumerate(chosen.lam, start=1) if weight] == members
    assert chosen.lam == pytest.approx(
        [(i in members) / len(members) for i in range(1, count + 1)], abs=1.5e-4 * count
    )
    assert sum(chosen.lam) == pytest.approx(1.0, abs=1e-9)


# --- grid


@given(alpha=st.integers(1, 9_900).map(lambda n: n / 1e4), most=st.integers(4, 40))
@example(alpha=0.5, most=6)
def test_a_pairs_grid_is_equally_spaced_from_alpha_to_1(alpha, most):
    found = list(lattice(Space.pair(alpha), most))
    assert found[:2] == list(Space.pair(alpha).alone())
    assert len(found) == most
    lams = sorted(recipe.lam[-1] for recipe in found[1:])
    np.testing.assert_allclose(lams, np.linspace(alpha, 1.0, most - 1), atol=0.6e-4)


@given(most=st.integers(4, 40))
def test_a_pairs_grid_with_alpha_0_has_the_parents_as_its_ends(most):
    lams = sorted(recipe.lam[-1] for recipe in lattice(Space.pair(0.0), most))
    np.testing.assert_allclose(lams, np.linspace(0.0, 1.0, most), atol=0.6e-4)


def test_a_pairs_grid_by_hand():
    found = list(lattice(Space.pair(0.5), 6))
    assert {recipe.lam[-1] for recipe in found} == {0.0, 0.5, 0.625, 0.75, 0.875, 1.0}
    assert len(found) == 6


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1 / 3, 0.5])
@given(count=st.integers(2, 5), most=st.integers(5, 90))
def test_the_grid_is_the_finest_lattice_that_fits(alpha, count, most):
    space = Space.simplex(count, alpha)
    found = list(lattice(space, most))
    assert found[:count] == list(space.alone())
    assert len(found) == len({*found}) <= max(most, count)
    # with α = 0 all corners are parents, else only the newest parent's corner
    extra = count - 1 if alpha else 0
    sizes = {m: comb(m + count - 1, count - 1) + extra for m in range(1, most + 1)}
    fitting = [m for m, size in sizes.items() if size <= most]
    if not fitting:
        assert len(found) == count
        return
    finest = max(fitting)
    assert len(found) == sizes[finest]
    inside = np.array([recipe.lam for recipe in found if space.feasible(recipe)])
    parts = finest * (inside - space.alpha * np.eye(count)[-1]) / (1.0 - space.alpha)
    # each weight is rounded to 1e-4, and one weight gets the rest
    loose = 0.5e-4 * count * finest / (1.0 - space.alpha)
    np.testing.assert_allclose(parts, parts.round(), atol=loose)
    np.testing.assert_array_equal(parts.round().sum(axis=1), finest)
    assert len(np.unique(parts.round(), axis=0)) == sizes[finest] - extra


@given(
    alpha=st.integers(1, 9_900).map(lambda n: n / 1e4),
    count=st.integers(2, 5),
    most=st.integers(5, 150),
)
@example(alpha=1 / 3, count=4, most=38)
def test_the_grid_evaluates_no_infeasible_merge(alpha, count, most):
    space = Space.simplex(count, alpha)
    found = list(lattice(space, most))
    assert found[:count] == list(space.alone())
    assert len(found) <= max(most, count)
    assert all(space.feasible(recipe) for recipe in found[count:])


def test_a_grid_of_three_by_hand():
    found = [recipe.lam for recipe in lattice(Space.simplex(3, 0.0), 6)]
    halves = {(0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)}
    assert {*found} == {(1, 0, 0), (0, 1, 0), (0, 0, 1), *halves}


def test_the_grid_evaluates_its_lattice_in_order():
    space, trials = drive("grid", request(2, trials=7), by_chance(0))
    assert recipes(trials) == list(lattice(space, 7))


# --- random


@given(seed=st.integers(0, 9), alpha=st.sampled_from([0.0, 0.3, 0.9]), count=st.integers(2, 4))
@settings(max_examples=20)
def test_random_draws_are_feasible_distinct_and_continue_with_a_larger_budget(seed, alpha, count):
    asked = request(count, alpha=alpha, seed=seed, trials=12)
    _, few = drive("random", asked, by_chance(0))
    assert len(few) == 12
    assert all(recipe.lam[-1] >= alpha for recipe in recipes(few)[count:])
    assert all(min(recipe.lam) >= 0.0 for recipe in recipes(few))
    more = request(count, alpha=alpha, seed=seed, trials=20)
    assert recipes(drive("random", more, by_chance(1))[1])[:12] == recipes(few)
    other = request(count, alpha=alpha, seed=seed + 1, trials=12)
    assert recipes(drive("random", other, by_chance(0))[1])[count] != recipes(few)[count]


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_random_draws_are_uniform_on_the_feasible_simplex(alpha):
    count = 4
    _, trials = drive("random", request(count, alpha=alpha, trials=700), by_chance(0))
    lams = np.array([recipe.lam for recipe in recipes(trials)[count:]])
    shares = (lams - alpha * np.eye(count)[-1]) / (1.0 - alpha)
    # on the unit simplex each weight is Beta(1, n − 1), and so is n times the smallest
    law = stats.beta(1, count - 1)
    for weights in (*shares.T, count * shares.min(axis=1)):
        assert stats.kstest(weights, law.cdf).pvalue > 0.01


def test_random_draws_every_recipe_of_a_small_space():
    # λ = 0 and the eleven from 0.9990 to 1
    _, trials = drive("random", request(2, alpha=0.999, trials=12), by_chance(0))
    lams = sorted(round(recipe.lam[-1], 4) for recipe in recipes(trials))
    assert lams == [0.0, *(round(0.999 + i / 1e4, 4) for i in range(11))]


# --- the choice


@pytest.mark.parametrize("name", ["grid", "random"])
@counts
def test_the_highest_feasible_score_is_chosen(name, count):
    for seed in range(5):
        asked = request(count, trials=count + 9, alpha=0.5, seed=seed)
        space, trials = drive(name, asked, by_chance(seed, fails=0.2))
        chosen = METHODS[name].choose(space, trials, asked)
        options = [t for t in trials if t.held_out is not None and t.recipe.lam[-1] >= 0.5]
        highest = max(t.held_out.value for t in options)
        winners = [t.recipe for t in options if t.held_out.value == highest]
        assert chosen in winners
        assert chosen.lam[-1] == max(recipe.lam[-1] for recipe in winners)


@pytest.mark.parametrize("name", ["grid", "random"])
def test_among_equal_scores_the_newest_parent_is_chosen(name):
    asked = request(3, trials=12, alpha=0.5)
    assert choose(name, asked, lambda recipe: Score(0.5, 0.01)).lam == (0.0, 0.0, 1.0)
    best_first = choose(name, asked, lambda recipe: Score(recipe.lam[0], 0.01))
    assert best_first.lam[-1] >= 0.5


@pytest.mark.parametrize(
    ("values", "lam"),
    [
        ((0.5, 0.6, 0.4), (0, 1, 0)),
        ((0.6, 0.5, 0.6), (0, 0, 1)),
        ((0.6, 0.6, 0.5), (0, 1, 0)),
        ((0.5, 0.5, 0.5), (0, 0, 1)),
    ],
)
def test_best_chooses_the_best_parent_and_the_newest_among_equals(values, lam):
    score = among({(i,): value for i, value in enumerate(values, start=1)})
    assert choose("best", request(3), score).lam == lam


# --- budget


def test_only_a_budget_that_nobody_set_may_be_exceeded():
    wild = s.Quiz(4, items=100, wild=0.4)  # the band stays wide
    trials = drive("bayesopt", request(2, alpha=0.0), lambda recipe: wild.score(recipe.lam))[1]
    assert 8 < len(trials) <= 16
    spec = request(2, alpha=0.0, trials=8)
    assert drive("bayesopt", spec, lambda recipe: wild.score(recipe.lam))[1] == trials[:8]


# --- resolution


def test_the_resolution_is_the_paired_error_of_the_best_merge_and_the_better_parent():
    quiz = s.Quiz(3, items=120, side=0.4)
    space = Space.pair(0.0)
    trials = quiz.trials([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.2, 0.8), (0.9, 0.1)])
    parents, merges = ([t.held_out for t in some] for some in (trials[:2], trials[2:]))
    parent, best = (max(some, key=lambda score: score.value) for some in (parents, merges))
    assert len({score.value for score in (*parents, *merges)}) == 5
    assert resolution(space, trials) == pairing.paired(best, parent).stderr > 0.0
    others = [
        pairing.paired(m, p).stderr for m in merges for p in parents if (m, p) != (best, parent)
    ]
    assert resolution(space, trials) not in others
    # other merges and failed merges do not matter
    failed = Trial(5, space.recipe(0.3), None)
    assert resolution(space, [*trials, failed]) == resolution(space, trials)


def test_there_is_no_resolution_without_a_merge():
    space = Space.pair(0.0)
    trials = s.Quiz(3).trials([(1.0, 0.0), (0.0, 1.0)])
    assert resolution(space, trials) == 0.0
    assert resolution(space, []) == 0.0
    assert resolution(space, [*trials, Trial(2, space.uniform(), None)]) == 0.0


def test_random_ends_if_almost_no_recipe_is_left():
    space, spec = Space.pair(0.9995), Spec(pair="v1,v2", method="random", trials=60)
    trials = []
    while (recipe := METHODS["random"].proceed(space, trials, spec)) is not None:
        trials.append(Trial(len(trials), recipe, Score(0.5, 0.1)))
    assert 6 < len(trials) <= 8  # two parents and at most six steps of 1e-4


def test_a_fine_grid_of_a_pair_is_made_at_once():
    assert len(lattice(Space.pair(0.0), 10_001)) == 10_001
    assert len(lattice(Space.pair(0.5), 4_000)) == 4_000


# -- knobs of other methods

OF_METHODS = {knob for method in METHODS.values() for knob in (*method.knobs, *method.also)}


def test_each_option_of_the_search_says_which_methods_use_it():
    options = {
        knob.name
        for knob in dataclasses.fields(Spec)
        if knob.metadata["group"] == spec.SEARCH and "run" in knob.metadata["commands"]
    }
    assert options == OF_METHODS


@rows
@pytest.mark.parametrize("knob", sorted(OF_METHODS))
def test_a_knob_that_a_method_does_not_use_is_told(name, knob):
    used = knob in METHODS[name].knobs + METHODS[name].also
    told = [*unused([name], {knob, "tasks", "method"})]
    assert len(told) == (not used)
    assert [*unused([name], set())] == []
    assert [*unused([*METHODS], {knob})] == []
    if told:
        assert told[0].startswith(
            f"--{knob.replace('_', '-')} changes nothing for the method {name};"
        )


@rows
def test_a_knob_that_changes_nothing_is_none_that_the_method_reads(name):
    """A spec that tells what is read of it."""
    read = set()

    class Watched(Spec):
        def __getattribute__(self, knob):
            if knob in OF_METHODS:
                read.add(knob)
            return super().__getattribute__(knob)

    watched = Watched(versions="v1,v2,v3", trials=9)
    read.clear()
    space, trials = drive(name, watched, by_chance(0))
    METHODS[name].choose(space, trials, watched)
    ours = {*METHODS[name].knobs, *METHODS[name].also}
    # `drive` and `budget` read these for every method
    assert read - {"alpha", "trials", "space"} <= ours
