"""Which merge weights λ are evaluated next, and when the search ends.

All functions are pure functions of the trials and the seed, so an interrupted search continues as
if it had not been interrupted. There is no `tell`: the caller appends a trial to the history.
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
from mlflow_soup.search.space import Space, distances

# smallest distance between an asked and a measured λ, once a landscape has been checked: it knows
# at which λ the answers to single items change
FINE = 0.002
# candidates per pass of the search for the best one; a prediction by a landscape is costly
LOOKS = 200
# a spent budget is exceeded only while the expected gain is at least so many times the tolerance.
# One hill hardly ever gives as much after 8 evaluations of a pair; two narrow peaks mostly do
WIDE = 5.0


def _nominate(space: Space, trials: Sequence[Trial], candidates: Array) -> dict[str, Array]:
    """Base acquisition → its best candidate."""
    posterior = fit(space, trials)
    mean, std = posterior.predict(space.points(candidates))
    best = posterior.predict(space.points_of([recipe for recipe, _ in scored(trials)]))[0].max()
    return {
        name: candidates[np.argmax(utility(mean, std, best, posterior.scale))]
        for name, utility in ACQUISITIONS.items()
    }


def _gains(space: Space, trials: Sequence[Trial], begin: int) -> dict[str, float]:
    """The gains of GP-Hedge, recomputed from the history (Hoffman et al. 2011, algorithm 2).

    After each step, the gain of each base acquisition grows by the updated posterior mean at its
    own nominee, g_i += μ_t(x_i), in standardised units.
    """
    gains = dict.fromkeys(ACQUISITIONS, 0.0)
    for step in range(begin, len(trials)):
        past = trials[:step]
        if not scored(past):
            continue  # the step was random, without nominees
        nominees = _nominate(space, past, space.fresh([trial.recipe for trial in past]))
        posterior = fit(space, trials[: step + 1])
        mean, _ = posterior.predict(space.points(np.array(list(nominees.values()))))
        for name, value in zip(nominees, (mean - posterior.mean) / posterior.scale, strict=True):
            gains[name] += float(value)
    return gains


def _most_improving(
    space: Space, known: Sequence[Recipe], posterior: Posterior, candidates: Array
) -> tuple[Array, float]:
    """The candidate with the largest expected improvement on the best so far, and its logarithm.

    A landscape predicts every item at every candidate, which is costly. So the first pass looks at
    some candidates in the whole space, the second pass at those near the best one.
    """
    done = [recipe for recipe in known if space.feasible(recipe)] or known
    best = posterior.predict(space.points_of(done))[0].max()

    def look(at: Array) -> tuple[Array, float]:
        mean, std = posterior.predict(space.points(at))
        gain = log_ei(mean, std, best, posterior.scale)
        return at[np.argmax(gain)], float(gain.max())

    if len(candidates) <= 2 * LOOKS:
        return look(candidates)
    coarse = look(candidates[:: -(-len(candidates) // LOOKS)])
    near = np.argsort(
        distances(space.points(candidates), space.points(coarse[0][None]))[:, 0], kind="stable"
    )[:LOOKS]
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

    The parents and the uniform soup come first. After them, `landscape` maximises the expected
    improvement on the curve that is reconstructed from the items; if the items do not determine the
    curve, it works as `gp-hedge`. All others follow Liu et al. 2024, algorithm 1: a pair's λ = α
    comes next, then the maximiser of the acquisition. For `gp-hedge` the acquisition is drawn with
    the probabilities

        p_j = exp(g_j) / Σ exp(g_l)        (Hoffman, Brochu & de Freitas 2011, η = 1)

    Args:
        space: the feasible merge weights.
        trials: the history in order; a failed trial (without a score) is not asked again.
        acquisition: one of `CHOICES`.
        seed: the seed of the draw, together with the number of trials.
        pending: recipes that are being evaluated now. They are not asked again; their scores are
            taken to be the expected ones ("kriging believer", Ginsbourger, Le Riche & Carraro 2010,
            sec. 4.2.1).

    Raises:
        SpecError: every candidate has been evaluated.
    """
    known = [*(trial.recipe for trial in trials), *pending]
    for recipe in space.start():
        if recipe not in known:
            return recipe
    fresh = space.fresh(known)
    if not fresh.size:
        raise SpecError(
            "every candidate λ has been measured already",
            where=f"λ in [{space.alpha}, 1], in steps of 1e-4",
            fix="lower --trials, or lower --alpha to search a wider range",
        )
    if acquisition == LANDSCAPE:
        belief = believe(space, trials) if scored(trials) else None
        if belief is not None and belief.landscape is not None:
            believed = replace(
                belief.landscape, pending=tuple(map(tuple, space.points_of(pending)))
            )
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
    nominees = _nominate(space, _imagine(space, trials, pending), fresh)
    if acquisition == HEDGE:
        gains = _gains(space, trials, len({*space.start(), *space.ends()}))
        logits = np.array([gains[name] for name in nominees])
        weights = np.exp(logits - logits.max())
        acquisition = str(draw.choice(list(nominees), p=weights / weights.sum()))
    return space.recipe(nominees[acquisition])


def _imagine(space: Space, trials: Sequence[Trial], pending: Sequence[Recipe]) -> Sequence[Trial]:
    """The trials, and the pending recipes as trials with their expected scores."""
    if not pending:
        return trials
    mean, _ = fit(space, trials).predict(space.points_of(pending))
    scores = [Score(float(value), 0.0) for value in mean]
    return [*trials, *(Trial(-1, r, s) for r, s in zip(pending, scores, strict=True))]


def improvement(space: Space, trials: Sequence[Trial]) -> float:
    """The expected gain of one more evaluation on the best so far, in score units, ≥ 0.

    Args:
        space: the feasible merge weights.
        trials: the history; at least one trial has a score.
    """
    fresh = space.fresh([trial.recipe for trial in trials])
    if not fresh.size:
        return 0.0
    done = [recipe for recipe, _ in scored(trials)]
    return math.exp(_most_improving(space, done, believe(space, trials).posterior, fresh)[1])


def proceed(
    space: Space,
    trials: Sequence[Trial],
    *,
    acquisition: str = LANDSCAPE,
    seed: int = 0,
    budget: int,
    tolerance: float,
    reserve: int = 0,
) -> Recipe | None:
    """The recipe to evaluate next, or None at the end of the search.

    The search ends when the budget or the candidates are used up. It ends early when one more
    evaluation is expected to gain less than `tolerance`. Before either end, the recommended recipe
    is evaluated if it has not been; so the last trial of a budget may be the recommendation, where
    a larger budget would ask for another recipe.

    If the band of a landscape is still wide when the budget is used up, the search draws on the
    reserve, while one more evaluation is expected to gain at least `WIDE` times `tolerance`. Only
    `landscape` does so, and only while it can be trusted: the band of a Gaussian process stays wide
    on ordinary curves too.

    Args:
        space: as for `ask`.
        trials: as for `ask`.
        acquisition: as for `ask`.
        seed: as for `ask`.
        budget: the largest number of trials.
        tolerance: the smallest expected gain, in score units; with 0 the search never ends early.
        reserve: the largest number of trials after the budget; none if the tolerance is 0.
    """
    known = [trial.recipe for trial in trials]
    started = {*space.start()} <= {*known} and len(scored(trials)) > landscape.LEAST
    started = started and any(space.feasible(recipe) for recipe, _ in scored(trials))
    left = budget - len(trials)
    if left <= 0 < left + reserve and started and acquisition == LANDSCAPE and tolerance > 0:
        trusted = believe(space, trials).landscape is not None
        if trusted and improvement(space, trials) >= WIDE * tolerance:
            left += reserve
    if left <= 0:
        return None
    if started:
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
