"""The methods that make one model out of several; each is a row of the table `METHODS`.

A method decides which recipes are evaluated and which one is chosen. All methods use the same
parents, items, registry and gate. They are pure functions of the trials, so an interrupted run
continues from the trials that MLflow has.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import comb

import numpy as np

from mlflow_soup.decision import pairing
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Recipe, Trial
from mlflow_soup.request.spec import Spec
from mlflow_soup.search import ask, belief, schedule
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Array, Space

DRAWS = 1000  # attempts to draw a new recipe
Proceed = Callable[[Space, Sequence[Trial], Spec], Recipe | None]
Choose = Callable[[Space, Sequence[Trial], Spec], Recipe]
Beside = Callable[[Space, Sequence[Trial], Spec, Sequence[Recipe]], Recipe | None]


@dataclass(frozen=True)
class Method:
    """One way to make one model out of several.

    Attributes:
        words: what the method does, in words for people.
        proceed: gives the recipe to evaluate next, or None at the end; the parents come first.
        choose: gives the recipe to register; it has been evaluated, but may have failed.
        knobs: the fields of the spec that decide what is evaluated, besides parents and tasks.
        also: further fields that it uses, for some requests at least.
        searches: True if the method evaluates many weights, up to `--trials`.
        chooses: True if it picks the best of several scores, so that the best is partly luck.
        merges: True if it may choose a merge, not only a parent.
        needs: the statistics that it measures on calibration text, `fisher` or `regmean`; or empty.
        blind: True if what it evaluates does not depend on the scores.
        beside: gives a recipe to evaluate beside others that are not scored yet, or None.
    """

    words: str
    proceed: Proceed
    choose: Choose
    knobs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    searches: bool = False
    chooses: bool = True
    merges: bool = True
    needs: str = ""
    blind: bool = False
    beside: Beside | None = None

    def foresee(self, space: Space, trials: Sequence[Trial], spec: Spec, most: int) -> list[Recipe]:
        """The recipes that will be asked next whatever the scores are, at most `most`, in order.

        They are the first that a search asks for, and all that a blind method does.
        """
        first = space.start() if self.searches else space.alone()
        known = [trial.recipe for trial in trials]
        if not self.blind:
            return [recipe for recipe in first if recipe not in known][:most]
        imagined = list(trials)
        while len(imagined) < len(trials) + most:
            recipe = self.proceed(space, imagined, spec)
            if recipe is None:
                break
            imagined.append(Trial(len(imagined), recipe, None))
        return [trial.recipe for trial in imagined[len(trials) :]]


def _next(recipes: Sequence[Recipe], trials: Sequence[Trial]) -> Recipe | None:
    known = [trial.recipe for trial in trials]
    return next((recipe for recipe in recipes if recipe not in known), None)


def _highest(trials: Sequence[Trial], among: Callable[[Recipe], bool]) -> Recipe:
    """The recipe with the highest score; among equals, the one with most weight on the newest."""
    scores = {recipe: score.value for recipe, score in belief.scored(trials) if among(recipe)}
    if not scores:
        raise ObjectiveError(
            "no recipe that may be chosen has a score",
            where=f"{len(trials)} trials; the tag soup.failed of their runs says why they failed",
            fix="choose other versions, or raise --trials",
        )
    return max(scores, key=lambda recipe: (scores[recipe], recipe.lam[-1]))


def _feasible(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return _highest(trials, space.feasible)


def resolution(space: Space, trials: Sequence[Trial]) -> float:
    """The paired standard error between the best merge so far and the better parent.

    A gain that is much smaller cannot be told from zero on these items. The result is 0
    until a parent and a merge have a score.
    """
    scored = belief.scored(trials)
    parents = [score for recipe, score in scored if recipe in space.alone()]
    merges = [score for recipe, score in scored if recipe not in space.alone()]
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
        reserve=spec.reserve,
    )


def _ask_beside(
    space: Space, trials: Sequence[Trial], spec: Spec, pending: Sequence[Recipe]
) -> Recipe | None:
    """The next recipe while others are in flight; None if the budget or the space is used up."""
    known = [*(trial.recipe for trial in trials), *pending]
    if len(known) >= spec.budget or not space.fresh(known).size:
        return None
    return ask.ask(space, trials, acquisition=spec.acquisition, seed=spec.seed, pending=pending)


def _recommend(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return recommend(space, trials, measured=True)


def _fixed(recipe: Callable[[Space, Spec], Recipe]) -> tuple[Proceed, Choose]:
    """Evaluate the parents and one recipe, and choose this recipe, whether it is good or bad.

    It is chosen even if its evaluation failed; the caller then reports the failure.
    """

    def proceed(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
        return _next((*space.alone(), recipe(space, spec)), trials)

    def choose(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
        return recipe(space, spec)

    return proceed, choose


def _uniform(space: Space, spec: Spec) -> Recipe:
    return space.uniform()


def _alike(method: str) -> Callable[[Space, Spec], Recipe]:
    """The recipe of a method that refines equal weights with statistics of the parents."""
    return lambda space, spec: Recipe(method, space.uniform().lam)


def _faded(space: Space, spec: Spec, decay: schedule.Decay) -> Recipe:
    """The merge of the whole window by a decay of the learning rate."""
    return space.recipe(schedule.weights(space.times, schedule.longest(space.times), decay))


def _wma(space: Space, spec: Spec) -> Recipe:
    return _faded(space, spec, schedule.power(2.0))


def _ema(space: Space, spec: Spec) -> Recipe:
    """The merge weights c_j ∝ a^(n−j): the exponential moving average."""
    weights = spec.ema ** np.arange(space.count - 1, -1, -1.0)
    return space.recipe(weights / weights.sum())


def _wsm(space: Space, spec: Spec) -> Recipe:
    return _faded(space, spec, schedule.decay_of(spec.decay))


def _parents(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return _next(space.alone(), trials)


def _best(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    """The parent with the best score; the newest among equals, as in the gate."""
    scored = [
        (r, score) for r in space.alone() for found, score in belief.scored(trials) if found == r
    ]
    return scored[pairing.better([score for _, score in scored])][0]


def _stir(space: Space, trials: Sequence[Trial], tie: str) -> tuple[Recipe, Recipe | None]:
    """The greedy soup (Wortsman et al. 2022, recipe 1), as far as the trials determine it.

    The parents are tried in the order of their held-out score, the newest first among equals. A
    parent is added if the uniform average does not get worse (`tie` = add), or only if it gets
    better (`tie` = drop).

    Returns:
        The soup so far, and the recipe to evaluate next; None at the end.
    """
    scores = {recipe: score.value for recipe, score in belief.scored(trials)}
    failed = {trial.recipe for trial in trials} - set(scores)
    alone = space.alone()
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
    return _next(space.alone(), trials) or _stir(space, trials, spec.greedy_tie)[1]


def _stirred(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe:
    return _stir(space, trials, spec.greedy_tie)[0]


@lru_cache(maxsize=32)
def lattice(space: Space, most: int) -> tuple[Recipe, ...]:
    """The parents and the finest regular grid over the feasible weights, at most `most` recipes.

    For a pair the grid has equal steps of λ from α to 1. For n parents it is the lattice of the
    weights k/m with Σ k = m, on the feasible simplex.
    """
    parents, count = list(space.alone()), space.count
    found = parents
    # with the parents, a pair's grid of m steps has m + 1 or m + 2 recipes: try only the largest m
    first = max(most - 2, 1) if count == 2 else 1
    for steps in range(first, most + 1):
        # the number of grid points: stop before building a grid that is too large
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
    """All ways to write `total` as an ordered sum of `parts` whole numbers ≥ 0."""
    if parts == 1:
        return [(total,)]
    return [(k, *rest) for k in range(total + 1) for rest in _compositions(total - k, parts - 1)]


def _walk(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    return _next(lattice(space, spec.budget), trials)


def _draw(space: Space, trials: Sequence[Trial], spec: Spec) -> Recipe | None:
    """New weights, drawn uniformly from the feasible simplex."""
    if (parent := _next(space.alone(), trials)) is not None or len(trials) >= spec.budget:
        return parent
    known = [trial.recipe for trial in trials]
    random = np.random.default_rng([spec.seed, len(trials)])
    corner: Array = np.eye(space.count)[-1]
    for _ in range(DRAWS):
        share = random.dirichlet(np.ones(space.count))
        recipe = space.recipe(space.alpha * corner + (1.0 - space.alpha) * share)
        if recipe not in known and space.feasible(recipe):
            return recipe
    return None  # almost all recipes have been evaluated


METHODS = {
    "bayesopt": Method(
        "weights searched by Bayesian optimisation (Liu et al. 2024)",
        *(_ask, _recommend),
        knobs=("alpha", "acquisition", "seed"),
        also=("space", "time_tag", "trials", "stop"),
        searches=True,
        beside=_ask_beside,
    ),
    "uniform": Method(
        "the plain average (Wortsman et al. 2022); for the last k versions of a run it is LAWA "
        "(Sanyal et al. 2023) and SMA (Li et al. 2025)",
        *_fixed(_uniform),
        chooses=False,
        blind=True,
    ),
    "wma": Method(
        "the average of a window with weights that grow linearly from the oldest to the newest "
        "(WMA, Li et al. 2025)",
        *_fixed(_wma),
        also=("time_tag",),
        chooses=False,
        blind=True,
    ),
    "ema": Method(
        "the average of a window with weights that grow by the same factor from each to the next "
        "(EMA, Li et al. 2025)",
        *_fixed(_ema),
        knobs=("ema",),
        chooses=False,
        blind=True,
    ),
    "wsm": Method(
        "the average of a window that stands for a decay of the learning rate (WSM, Tian et al. "
        "2025)",
        *_fixed(_wsm),
        knobs=("decay",),
        also=("time_tag",),
        chooses=False,
        blind=True,
    ),
    "greedy": Method(
        "starting with the best parent, each parent is added to the average unless the score gets "
        "worse (Wortsman et al. 2022, recipe 1)",
        *(_stir_on, _stirred),
        knobs=("greedy_tie",),
    ),
    "fisher": Method(
        "each parameter is weighted by its diagonal Fisher information (Matena & Raffel 2022)",
        *_fixed(_alike("fisher")),
        knobs=("fisher_estimator",),
        also=("calibration", "calibration_tokens", "seed"),
        chooses=False,
        needs="fisher",
        blind=True,
    ),
    "regmean": Method(
        "each linear layer is fitted by regression on its inputs, the rest is averaged "
        "(Jin et al. 2022)",
        *_fixed(_alike("regmean")),
        knobs=("regmean_scale",),
        also=("calibration", "calibration_tokens"),
        chooses=False,
        needs="regmean",
        blind=True,
    ),
    "grid": Method(
        "the best of equally spaced weights",
        *(_walk, _feasible),
        knobs=("alpha", "trials"),
        searches=True,
        blind=True,
    ),
    "random": Method(
        "the best of weights drawn at random",
        *(_draw, _feasible),
        knobs=("alpha", "seed"),
        also=("trials",),
        searches=True,
        blind=True,
    ),
    "best": Method("no merge: the best parent", _parents, _best, merges=False, blind=True),
}


def unused(methods: Sequence[str], named: Collection[str]) -> Iterator[str]:
    """Which knobs only other methods use, in words.

    Args:
        methods: the methods of a request.
        named: the knobs that the caller named. Policy tags hold for the methods that use them.
    """
    used = {name: {*method.knobs, *method.also} for name, method in METHODS.items()}
    for knob in (field.name for field in fields(Spec) if field.name in named):
        users = [name for name in METHODS if knob in used[name]]
        if users and not {*users} & {*methods}:
            option, plural = "--" + knob.replace("_", "-"), "s" * (len(methods) > 1)
            yield (
                f"{option} changes nothing for the method{plural} {', '.join(methods)}; it is for "
                + ", ".join(users)
            )
