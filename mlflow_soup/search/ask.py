"""Which weights λ are evaluated next, and when the search ends.

All functions are pure functions of the trials and the seed, so a search that was interrupted
continues as if it had not been. To *tell* is to append a record.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlflow_soup.errors import SpecError
from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.search import landscape
from mlflow_soup.search.acquisition import ACQUISITIONS, log_ei
from mlflow_soup.search.belief import (
    HEDGE,
    LANDSCAPE,
    Array,
    Posterior,
    believe,
    fit,
    scored,
)
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Space, distances, points_of

# a landscape that was checked knows between which of them an item turns
FINE = 0.002
# how many candidates the costly utilities are computed at, twice
LOOKS = 200


def _nominate(trials: Sequence[Trial], candidates: Array) -> dict[str, Array]:
    """Each base acquisition's favourite candidate."""
    posterior = fit(trials)
    mean, std = posterior.predict(candidates)
    best = posterior.predict(points_of([recipe for recipe, _ in scored(trials)]))[0].max()
    return {
        name: candidates[np.argmax(utility(mean, std, best, posterior.scale))]
        for name, utility in ACQUISITIONS.items()
    }


def _gains(space: Space, trials: Sequence[Trial], begin: int) -> dict[str, float]:
    """GP-Hedge's gains, replayed from the history alone (Hoffman et al. 2011, algorithm 2).

    After each step every base is rewarded with the updated posterior mean at its own nominee,
    g_i += μ_t(x_i), in standardised units.
    """
    gains = dict.fromkeys(ACQUISITIONS, 0.0)
    for step in range(begin, len(trials)):
        past = trials[:step]
        if not scored(past):
            continue  # the step was a random one: nobody nominated
        nominees = _nominate(past, space.fresh([trial.recipe for trial in past]))
        posterior = fit(trials[: step + 1])
        mean, _ = posterior.predict(np.array(list(nominees.values())))
        for name, value in zip(nominees, (mean - posterior.mean) / posterior.scale, strict=True):
            gains[name] += float(value)
    return gains


def _most_improving(
    space: Space, known: Sequence[Recipe], posterior: Posterior, candidates: Array
) -> tuple[Array, float]:
    """The candidate of largest expected improvement on what is known, and that improvement's log.

    Every item is predicted at every candidate, so first some all over the space are looked at,
    then those around the best of them.
    """
    done = [recipe for recipe in known if space.feasible(recipe)] or known
    best = posterior.predict(points_of(done))[0].max()

    def look(at: Array) -> tuple[Array, float]:
        mean, std = posterior.predict(at)
        gain = log_ei(mean, std, best, posterior.scale)
        return at[np.argmax(gain)], float(gain.max())

    if len(candidates) <= 2 * LOOKS:
        return look(candidates)
    coarse = look(candidates[:: -(-len(candidates) // LOOKS)])
    near = np.argsort(distances(candidates, coarse[0][None])[:, 0], kind="stable")[:LOOKS]
    return max(coarse, look(candidates[near]), key=lambda found: found[1])


def ask(
    space: Space,
    trials: Sequence[Trial],
    *,
    acquisition: str = LANDSCAPE,
    seed: int = 0,
    pending: Sequence[Recipe] = (),
) -> Recipe:
    """The recipe to evaluate next.

    First the parents and the uniform soup. Then `landscape`: the maximiser of the expected
    improvement on the curve that is reconstructed from the items; where the items do not tell of
    it, `gp-hedge`. The others (Liu et al. 2024, algorithm 1): a pair's λ = α, then the maximiser of
    the acquisition, for `gp-hedge` that of one base acquisition drawn by

        p_j = exp(g_j) / Σ exp(g_l)        (Hoffman, Brochu & de Freitas 2011, η = 1)

    Args:
        space: the feasible merge weights.
        trials: the history in order; failed trials (no score) are not asked again.
        acquisition: one of `CHOICES`.
        seed: together with the number of trials it fixes the draw.
        pending: recipes that are being evaluated: not asked again, and imagined to come out as is
            expected ("kriging believer", Ginsbourger, Le Riche & Carraro 2010, sec. 4.2.1).

    Raises:
        SpecError: nothing is left to ask.
    """
    known = [*(trial.recipe for trial in trials), *pending]
    for recipe in space.start():
        if recipe not in known:
            return recipe
    fresh = space.fresh(known)
    if not fresh.size:
        raise SpecError(
            "every candidate λ has been measured",
            where=f"[{space.alpha}, 1] in steps of 1e-4",
            fix="lower --trials or --alpha",
        )
    if acquisition == LANDSCAPE:
        belief = believe(trials) if scored(trials) else None
        if belief is not None and belief.landscape is not None:
            believed = replace(belief.landscape, pending=tuple(r.lam for r in pending))
            done = [*(recipe for recipe, _ in scored(trials)), *pending]
            if len(believed.misses) > 1 and not pending:
                fresh = space.fresh(known, FINE)
            return space.recipe(_most_improving(space, done, believed, fresh)[0])
        acquisition = HEDGE
    for recipe in space.ends():
        if recipe not in known:
            return recipe
    draw = np.random.default_rng([seed, len(known)])
    if not scored(trials):
        return space.recipe(draw.choice(fresh))
    nominees = _nominate(_imagine(trials, pending), fresh)
    if acquisition == HEDGE:
        gains = _gains(space, trials, len({*space.start(), *space.ends()}))
        logits = np.array([gains[name] for name in nominees])
        weights = np.exp(logits - logits.max())
        acquisition = str(draw.choice(list(nominees), p=weights / weights.sum()))
    return space.recipe(nominees[acquisition])


def _imagine(trials: Sequence[Trial], pending: Sequence[Recipe]) -> Sequence[Trial]:
    """The trials, and what is pending as if it came out as expected."""
    if not pending:
        return trials
    mean, _ = fit(trials).predict(points_of(pending))
    scores = [Score(float(value), 0.0) for value in mean]
    return [*trials, *(Trial(-1, r, s) for r, s in zip(pending, scores, strict=True))]


def improvement(space: Space, trials: Sequence[Trial]) -> float:
    """How much one more evaluation is expected to gain on the best so far, in score units, ≥ 0.

    Args:
        space: the feasible merge weights.
        trials: the history; one of them at least has a score.
    """
    fresh = space.fresh([trial.recipe for trial in trials])
    if not fresh.size:
        return 0.0
    done = [recipe for recipe, _ in scored(trials)]
    return math.exp(_most_improving(space, done, believe(trials).posterior, fresh)[1])


def proceed(
    space: Space,
    trials: Sequence[Trial],
    *,
    acquisition: str = LANDSCAPE,
    seed: int = 0,
    budget: int,
    tolerance: float,
) -> Recipe | None:
    """The next recipe of a search that comes to an end, or None at its end.

    It ends when the budget or the space is spent, or early when one more evaluation is expected to
    gain less than `tolerance`; but not before what is then recommended has been measured itself. So
    the last trial of a budget may be a recommendation, where a larger budget would go on asking.

    Args:
        space: as of `ask`.
        trials: as of `ask`.
        acquisition: as of `ask`.
        seed: as of `ask`.
        budget: how many trials there may be.
        tolerance: in score units; 0 never ends early.
    """
    left = budget - len(trials)
    if left <= 0:
        return None
    known = [trial.recipe for trial in trials]
    started = {*space.start()} <= {*known} and len(scored(trials)) > landscape.LEAST
    if started and any(space.feasible(recipe) for recipe, _ in scored(trials)):
        enough = tolerance > 0 and improvement(space, trials) < tolerance
        if enough or left == 1:
            chosen = recommend(space, trials)
            if chosen not in known:
                return chosen
            if enough:
                return None
    if {*space.start(), *space.ends()} <= {*known} and not space.fresh(known).size:
        return None
    return ask(space, trials, acquisition=acquisition, seed=seed)
