"""The ways to make one model out of several, a row each: what is evaluated, what is chosen.

All run on the same parents, items, registry and gate. Like the search they are pure functions of
the trials, so whatever was cut short goes on from what MLflow remembers of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

from mlflow_soup.decision import pairing
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Recipe, Trial
from mlflow_soup.request.spec import Spec
from mlflow_soup.search import ask, belief
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Array, Space

DRAWS = 1000  # until one is new
Proceed = Callable[[Space, Sequence[Trial], Spec], Recipe | None]
Choose = Callable[[Space, Sequence[Trial], Spec], Recipe]


@dataclass(frozen=True)
class Method:
    """One way to make one model out of several.

    Attributes:
        words: what it does, for people.
        proceed: what is evaluated next, or None at the end; first the parents.
        choose: what is registered in the end; it has been evaluated, perhaps in vain.
        knobs: of the spec, those that decide what is evaluated, besides parents and tasks.
        searches: whether it looks around in the space of weights, at the price of `--trials`.
        chooses: whether it takes the best of several, whose score is somewhat luck.
        merges: whether it may choose anything but a parent.
        needs: the statistics of the parents that it takes from calibration text; empty for none.
    """

    words: str
    proceed: Proceed
    choose: Choose
    knobs: tuple[str, ...] = ()
    searches: bool = False
    chooses: bool = True
    merges: bool = True
    needs: str = ""


def _next(recipes: Sequence[Recipe], trials: Sequence[Trial]) -> Recipe | None:
    known = [trial.recipe for trial in trials]
    return next((recipe for recipe in recipes if recipe not in known), None)


def _highest(trials: Sequence[Trial], among: Callable[[Recipe], bool]) -> Recipe:
    """The recipe with the highest score; the one that weighs the newest most, among equals."""
    scores = {recipe: score.value for recipe, score in belief.scored(trials) if among(recipe)}
    if not scores:
        raise ObjectiveError(
            "nothing that might be chosen has a score",
            where=f"{len(trials)} trials; tag soup.failed of their runs says why",
            fix="choose other versions, or raise --trials",
        )
    return max(scores, key=lambda recipe: (scores[recipe], recipe.lam[-1]))


def _feasible(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return _highest(trials, space.feasible)


def resolution(space: Space, trials: Sequence[Trial]) -> float:
    """The paired standard error between the best merge so far and the better parent.

    Much smaller gains cannot be told from none on these items. 0 before there are both.
    """
    scored = belief.scored(trials)
    parents = [score for recipe, score in scored if recipe in space.parents()]
    merges = [score for recipe, score in scored if recipe not in space.parents()]
    if not parents or not merges:
        return 0.0
    best, parent = (scores[pairing.better(scores)] for scores in (merges, parents))
    return pairing.paired(best, parent).stderr


def _ask(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return ask.proceed(
        space,
        trials,
        acquisition=spec.acquisition,
        seed=spec.seed,
        budget=spec.budget,
        tolerance=spec.stop * resolution(space, trials),
    )


def _recommend(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return recommend(space, trials, measured=True)


def _fixed(recipe: Callable[[Space], Recipe]) -> tuple[Proceed, Choose]:
    """Evaluate the parents and one recipe, and choose that one, good or bad.

    Even without a score: whoever relies on it then says that its evaluation failed.
    """

    def proceed(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
        return _next((*space.parents(), recipe(space)), trials)

    def choose(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
        return recipe(space)

    return proceed, choose


def _alike(method: str) -> Callable[[Space], Recipe]:
    """Equal weights that the statistics of the parents refine."""
    return lambda space: Recipe(method, space.uniform().lam)


def _parents(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return _next(space.parents(), trials)


def _best(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    """The parent one would ship without a soup; the newest among equals, as the gate has it."""
    scored = [
        (r, score) for r in space.parents() for found, score in belief.scored(trials) if found == r
    ]
    return scored[pairing.better([score for _, score in scored])][0]


def _stir(space: Space, trials: Sequence[Trial], tie: str) -> tuple[Recipe, Recipe | None]:
    """Greedy soup (Wortsman et al. 2022, recipe 1), as far as the trials go.

    Parents by held-out score, the newest first among equals; each is added to the soup where the
    uniform average does not get worse by it (`tie` = add), or gets better (drop).

    Returns:
        The soup so far; and what has to be evaluated to go on, None at the end.
    """
    scores = {recipe: score.value for recipe, score in belief.scored(trials)}
    failed = {trial.recipe for trial in trials} - set(scores)
    alone = space.parents()
    order = sorted(range(space.count), key=lambda i: (scores[alone[i]], i), reverse=True)
    taken, soup = {order[0]}, alone[order[0]]
    least = pairing.ROUNDING if tie == "drop" else -pairing.ROUNDING
    for newcomer in order[1:]:
        members = taken | {newcomer}
        weights = np.array([float(i in members) for i in range(space.count)]) / len(members)
        candidate = space.recipe(weights)
        if candidate not in scores and candidate not in failed:
            return soup, candidate
        if candidate in scores and scores[candidate] - scores[soup] > least:
            taken, soup = members, candidate
    return soup, None


def _stir_on(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return _next(space.parents(), trials) or _stir(space, trials, spec.greedy_tie)[1]


def _stirred(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return _stir(space, trials, spec.greedy_tie)[0]


@lru_cache(maxsize=32)
def lattice(space: Space, most: int) -> tuple[Recipe, ...]:
    """The parents and the finest regular grid over the feasible weights, `most` recipes in all.

    For a pair equal steps of λ from α to 1, for n parents the lattice of weights k/m, Σ k = m, on
    the feasible simplex; as many as fit.
    """
    parents, count = list(space.parents()), space.count
    found = parents
    # that it fits can be told before it is made: at most all corners are parents
    first = max(most - 2, 1) if count == 2 else 1  # of a pair, two counts can be the finest
    for steps in range(first, most + 1):
        if comb(steps + count - 1, count - 1) > most:
            break
        corner = np.eye(count)[-1]
        points = [
            space.recipe(space.alpha * corner + (1.0 - space.alpha) * np.array(parts) / steps)
            for parts in _compositions(steps, count)
        ]
        together = list(dict.fromkeys([*parents, *points]))
        if len(together) > most:
            break
        found = together
    return tuple(found)


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered sum of so many whole numbers from 0."""
    if parts == 1:
        return [(total,)]
    return [(k, *rest) for k in range(total + 1) for rest in _compositions(total - k, parts - 1)]


def _walk(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return _next(lattice(space, spec.budget), trials)


def _draw(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    """Weights drawn uniformly from the feasible simplex, none twice."""
    if (parent := _next(space.parents(), trials)) is not None or len(trials) >= spec.budget:
        return parent
    known = [trial.recipe for trial in trials]
    random = np.random.default_rng([spec.seed, len(trials)])
    corner: Array = np.eye(space.count)[-1]
    for _ in range(DRAWS):
        share = random.dirichlet(np.ones(space.count))
        recipe = space.recipe(space.alpha * corner + (1.0 - space.alpha) * share)
        if recipe not in known and space.feasible(recipe):
            return recipe
    return None  # hardly anything is left


METHODS = {
    "bayesopt": Method(
        "weights searched by Bayesian optimisation (Liu et al. 2024)",
        *(_ask, _recommend),
        knobs=("alpha", "acquisition", "seed"),
        searches=True,
    ),
    "uniform": Method(
        "the plain average (Wortsman et al. 2022); LAWA, where it is of the last k versions "
        "(Sanyal et al. 2023)",
        *_fixed(Space.uniform),
        chooses=False,
    ),
    "greedy": Method(
        "from the best parent on, each is added to the average unless that gets worse "
        "(Wortsman et al. 2022, recipe 1)",
        *(_stir_on, _stirred),
        knobs=("greedy_tie",),
    ),
    "fisher": Method(
        "every parameter weighted by its diagonal Fisher information (Matena & Raffel 2022)",
        *_fixed(_alike("fisher")),
        knobs=("fisher_estimator",),
        chooses=False,
        needs="fisher",
    ),
    "regmean": Method(
        "every linear layer by regression on its inputs, the rest averaged (Jin et al. 2022)",
        *_fixed(_alike("regmean")),
        knobs=("regmean_scale",),
        chooses=False,
        needs="regmean",
    ),
    "grid": Method(
        "the best of equally spaced weights",
        *(_walk, _feasible),
        knobs=("alpha", "trials"),
        searches=True,
    ),
    "random": Method(
        "the best of weights drawn at random",
        *(_draw, _feasible),
        knobs=("alpha", "seed"),
        searches=True,
    ),
    "best": Method("no merge: the better parent", _parents, _best, merges=False),
}
