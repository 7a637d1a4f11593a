"""Ask and recommend: what is searched, what is never asked, and that the history decides it all."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup import search, surrogate
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Score, Trial
from mlflow_soup.search import CHOICES, ask, recommend
from mlflow_soup.space import Space

choices = pytest.mark.parametrize("acquisition", CHOICES)


def dome(peak, width=0.5):
    """A landscape like those of equal parents: one smooth hill."""
    return lambda lam: 0.5 + 0.1 * (1.0 - ((lam - peak) / width) ** 2)


def tell(space, trials, recipe, score):
    return [*trials, Trial(len(trials), recipe, None if score is None else Score(score, 0.01))]


def searched(space, score, count, trials=(), **options):
    """The history after `count` trials; `score` gives None where an evaluation fails."""
    trials = list(trials)
    while len(trials) < count:
        recipe = ask(space, trials, **options)
        trials = tell(space, trials, recipe, score(space.point(recipe)))
    return trials


def told(space, pairs):
    """A history of given λ and scores."""
    trials = []
    for lam, score in pairs:
        trials = tell(space, trials, space.recipe(lam), score)
    return trials


@choices
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7])
def test_parents_uniform_soup_and_alpha_are_measured_before_the_surrogate_speaks(
    acquisition, alpha
):
    space = Space.pair(alpha)
    trials = searched(space, dome(0.8), 6, acquisition=acquisition)
    start = space.start()
    assert tuple(t.recipe for t in trials[: len(start)]) == start
    assert all(space.feasible(t.recipe) for t in trials[len(start) :])


@choices
@s.FEW
@given(drawn=st.data(), space=s.spaces(), seed=st.integers(0, 99))
def test_nothing_measured_or_pending_is_asked_again(acquisition, drawn, space, seed):
    trials = drawn.draw(s.histories(space))
    nearby = [space.recipe(point) for point in space.candidates()[::10]]
    pending = drawn.draw(st.lists(st.sampled_from([*space.start(), *nearby]), max_size=5))
    recipe = ask(space, trials, acquisition=acquisition, seed=seed, pending=pending)
    known = [*(t.recipe for t in trials), *pending]
    assert recipe not in known
    if set(space.start()) <= set(known):
        assert space.alpha <= space.point(recipe) <= 1.0
    else:
        assert recipe in space.start()


@choices
def test_a_search_cut_short_goes_on_as_if_it_never_was(acquisition):
    space = Space.pair(0.5)
    whole = searched(space, dome(0.8), 9, acquisition=acquisition, seed=3)
    for cut in range(9):
        assert ask(space, whole[:cut], acquisition=acquisition, seed=3) == whole[cut].recipe


def test_another_process_asks_the_same():
    pairs = [(0.0, 0.41), (1.0, 0.47), (0.5, 0.478), (0.64, 0.486), (0.72, None), (0.88, 0.481)]
    program = (
        "import json, sys, numpy\n"
        "from mlflow_soup.records import Score, Trial\n"
        "from mlflow_soup.search import ask\n"
        "from mlflow_soup.space import Space\n"
        "numpy.random.seed(1)\n"
        "space = Space.pair(0.5)\n"
        "trials = [Trial(i, space.recipe(lam), None if y is None else Score(y, 0.01))\n"
        "          for i, (lam, y) in enumerate(json.loads(sys.argv[1]))]\n"
        "print(*(ask(space, trials, seed=seed).lam[-1] for seed in range(10)))"
    )
    there = subprocess.run(
        [sys.executable, "-c", program, json.dumps(pairs)],
        capture_output=True,
        text=True,
        check=True,
    )
    space = Space.pair(0.5)
    here = [ask(space, told(space, pairs), seed=seed).lam[-1] for seed in range(10)]
    assert list(map(float, there.stdout.split())) == here


def test_the_seed_matters_to_gp_hedge_alone():
    space = Space.pair(0.0)
    trials = searched(space, dome(0.6), 6, acquisition="ei")
    asked = {
        name: {ask(space, trials, acquisition=name, seed=seed) for seed in range(20)}
        for name in CHOICES
    }
    assert {name: len(recipes) for name, recipes in asked.items() if name != "gp-hedge"} == {
        "ei": 1,
        "pi": 1,
        "ucb": 1,
    }
    assert 1 < len(asked["gp-hedge"]) <= 3
    assert asked["gp-hedge"] <= asked["ei"] | asked["pi"] | asked["ucb"]


@choices
def test_the_search_moves_on_from_an_evaluation_that_failed(acquisition):
    space = Space.pair(0.5)

    def breaks_in_the_middle(lam):
        return None if 0.6 < lam < 0.8 else dome(0.9)(lam)

    trials = searched(space, breaks_in_the_middle, 10, acquisition=acquisition)
    points = [space.point(t.recipe) for t in trials]
    assert len(set(points)) == 10
    assert recommend(space, trials) in [t.recipe for t in trials if t.held_out is not None]


def test_a_failed_trial_tells_the_surrogate_nothing():
    space = Space.pair(0.5)
    pairs = [(0.0, 0.41), (1.0, 0.47), (0.5, 0.478)]
    without, with_failure = told(space, pairs), told(space, [*pairs, (0.9, None)])
    grid = space.candidates()
    np.testing.assert_array_equal(
        search.fit(space, without).predict(grid), search.fit(space, with_failure).predict(grid)
    )


@choices
def test_without_any_score_the_search_goes_on_at_random_within_bounds(acquisition):
    space = Space.pair(0.5)
    trials = searched(space, lambda lam: None, 8, acquisition=acquisition, seed=1)
    assert len({t.recipe for t in trials}) == 8
    assert all(space.feasible(t.recipe) for t in trials[len(space.start()) :])
    assert searched(space, lambda lam: None, 8, acquisition=acquisition, seed=1) == trials
    assert searched(space, lambda lam: None, 8, acquisition=acquisition, seed=2) != trials


@choices
def test_the_search_goes_on_once_a_trial_succeeds_after_a_start_that_failed(acquisition):
    space = Space.pair(0.5)
    trials = told(space, [(0.0, None), (1.0, None), (0.5, None), (0.7, 0.5)])
    recipe = ask(space, trials, acquisition=acquisition)
    assert space.feasible(recipe)
    assert recipe not in [t.recipe for t in trials]


@choices
@pytest.mark.parametrize("score", [0.5, None], ids=["scored", "failed"])
def test_when_nothing_is_left_to_ask_the_request_is_refused(acquisition, score):
    space = Space.pair(0.9999)
    trials = told(space, [(lam, score) for lam in (0.0, 1.0, 0.5, 0.9999)])
    with pytest.raises(SpecError) as refusal:
        ask(space, trials, acquisition=acquisition)
    assert "--alpha" in refusal.value.fix


@choices
@pytest.mark.parametrize(("alpha", "peak"), [(0.5, 0.6), (0.5, 0.88), (0.0, 0.3), (0.7, 1.0)])
def test_ten_trials_find_the_top_of_a_dome(acquisition, alpha, peak):
    space = Space.pair(alpha)
    trials = searched(space, dome(peak), 10, acquisition=acquisition)
    assert abs(space.point(recommend(space, trials)) - peak) <= 0.02


@s.FEW
@given(drawn=st.data(), space=s.spaces())
def test_the_recommendation_is_the_feasible_measured_recipe_of_largest_posterior_mean(drawn, space):
    trials = drawn.draw(s.histories(space, least=3))
    scored = [t for t in trials if t.held_out is not None]
    measured = [t.recipe for t in scored if space.feasible(t.recipe)]
    if not measured:
        with pytest.raises(SpecError, match="no feasible trial"):
            recommend(space, trials)
        return
    chosen = recommend(space, trials)
    assert chosen in measured
    posterior = surrogate.fit(
        np.array([space.point(t.recipe) for t in scored]),
        np.array([t.held_out.value for t in scored]),
    )
    means, _ = posterior.predict(np.array([space.point(r) for r in measured]))
    assert means[measured.index(chosen)] == means.max()


def test_the_best_trial_is_not_recommended_when_it_lies_outside_alpha():
    space = Space.pair(0.5)
    trials = told(space, [(0.0, 0.9), (1.0, 0.5), (0.5, 0.6), (0.75, 0.55)])
    assert space.point(recommend(space, trials)) == 0.5


def test_a_lucky_trial_among_worse_neighbours_is_not_recommended():
    space = Space.pair(0.0)
    lams = [0.0, 1.0, 0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.19, 0.21]
    scores = {lam: dome(0.7)(lam) for lam in lams}
    scores[0.2] = max(scores.values()) + 0.01  # its neighbours at 0.19 and 0.21 are far below
    trials = told(space, list(scores.items()))
    assert max(scores, key=scores.get) == 0.2
    assert space.point(recommend(space, trials)) == 0.7


@pytest.mark.parametrize("pairs", [[], [(0.0, 0.5)], [(0.0, 0.5), (1.0, None)]])
def test_without_a_feasible_score_nothing_is_recommended(pairs):
    space = Space.pair(0.5)
    with pytest.raises(SpecError, match="no feasible trial has a score"):
        recommend(space, told(space, pairs))


class Hoffman:
    """Algorithm 2 of Hoffman, Brochu & de Freitas (UAI 2011), played forward and kept simple.

    Nothing is replayed: gains are kept from step to step, each utility is a textbook formula, each
    maximum a loop. The posterior is the package's, which has tests of its own.
    """

    def __init__(self, space, start):
        self.space, self.history = space, list(start)
        self.gains = {"ei": 0.0, "pi": 0.0, "ucb": 0.0}
        self.nominate()

    def posterior(self):
        lams, scores = zip(*((lam, y) for lam, y in self.history if y is not None), strict=True)
        return surrogate.fit(np.array(lams), np.array(scores)), np.array(lams)

    def nominate(self):
        posterior, lams = self.posterior()
        best = posterior.predict(lams)[0].max()
        candidates = self.space.candidates()
        self.nominees, utmost = {}, dict.fromkeys(self.gains, -math.inf)
        for lam, mean, std in zip(candidates, *posterior.predict(candidates), strict=True):
            if min(abs(lam - known) for known, _ in self.history) <= 0.01:
                continue  # ours: so near it would mostly measure the same again
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
        """The nominee of the base in whose share of [0, 1) the seed's first number falls."""
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
            (mean,), _ = posterior.predict(np.array([nominee]))
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
            assert space.point(recipe) == slow.draw(seed)
            asked.add((len(slow.history), space.point(recipe)))
    # the bases did differ, in what they nominated and in what they gained
    assert len(asked) >= 10
    assert max(slow.probabilities().values()) > 1.3 * min(slow.probabilities().values())


@pytest.mark.parametrize("acquisition", CHOICES)
def test_what_is_asked_keeps_its_distance_from_what_is_known(acquisition):
    space, pairs = Space.pair(0.5), []
    while len(pairs) < 12:
        lam = space.point(ask(space, told(space, pairs), acquisition=acquisition, seed=1))
        if len(pairs) >= len(space.start()):
            assert min(abs(lam - known) for known, _ in pairs) > 0.01
        pairs.append((lam, 0.5 - (lam - 0.5) ** 2))  # the best is where one knows already


def test_where_all_is_near_something_known_the_rest_is_asked():
    space = Space.pair(0.99)
    pairs = [(0.0, 0.4), (1.0, 0.5), (0.5, 0.45), (0.99, 0.5), (0.995, 0.5)]
    lam = space.point(ask(space, told(space, pairs)))
    assert 0.99 <= lam <= 1.0
    assert lam not in [known for known, _ in pairs]
