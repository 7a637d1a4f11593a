"""Ask and tell: which λ next, and which in the end.

Both are pure functions of the trials and the seed, so a search that was cut short goes on as if it
never was: *tell* is appending a record.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlflow_soup import surrogate
from mlflow_soup.acquisition import ACQUISITIONS
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Recipe, Trial
from mlflow_soup.space import Space
from mlflow_soup.surrogate import Surrogate

Array = NDArray[np.float64]

# λ closer than this to a measured one would mostly measure the same again
SPACING = 0.01
HEDGE = "gp-hedge"
CHOICES = (HEDGE, *ACQUISITIONS)


def _observed(space: Space, trials: Sequence[Trial]) -> tuple[Array, Array]:
    """λ and score of every trial that has one."""
    pairs = [(space.point(t.recipe), t.held_out.value) for t in trials if t.held_out is not None]
    points, scores = zip(*pairs, strict=True)
    return np.array(points), np.array(scores)


def fit(space: Space, trials: Sequence[Trial]) -> Surrogate:
    """The posterior over λ given the trials that have a score, at least one."""
    return surrogate.fit(*_observed(space, trials))


def _fresh(space: Space, taken: set[float]) -> Array:
    """The candidates that are not taken yet, at least one; far from the taken while any is."""
    candidates = space.candidates()
    distance: Array = np.abs(candidates[:, None] - np.array(sorted(taken))).min(axis=1)
    fresh: Array = candidates[distance > SPACING]
    if not fresh.size:
        fresh = candidates[distance > 0]
    if not fresh.size:
        raise SpecError(
            "every candidate λ has been measured",
            where=f"[{space.alpha}, 1] in steps of 1e-4",
            fix="lower --trials or --alpha",
        )
    return fresh


def _nominate(space: Space, trials: Sequence[Trial], taken: set[float]) -> dict[str, float]:
    """Each base acquisition's favourite λ that is not taken yet."""
    candidates = _fresh(space, taken)
    posterior = fit(space, trials)
    mean, std = posterior.predict(candidates)
    best = posterior.predict(_observed(space, trials)[0])[0].max()
    return {
        name: float(candidates[np.argmax(utility(mean, std, best, posterior.scale))])
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
        if all(trial.held_out is None for trial in past):
            continue  # the step was a random one: nobody nominated
        nominees = _nominate(space, past, {space.point(t.recipe) for t in past})
        posterior = fit(space, trials[: step + 1])
        mean, _ = posterior.predict(np.array(list(nominees.values())))
        for name, value in zip(nominees, (mean - posterior.mean) / posterior.scale, strict=True):
            gains[name] += float(value)
    return gains


def ask(
    space: Space,
    trials: Sequence[Trial],
    *,
    acquisition: str = HEDGE,
    seed: int = 0,
    pending: Sequence[Recipe] = (),
) -> Recipe:
    """The recipe to evaluate next (Liu et al. 2024, algorithm 1).

    First the parents, the uniform soup and the ends of [α, 1]; then the maximiser of the
    acquisition, or for `gp-hedge` that of one base acquisition drawn by

        p_j = exp(g_j) / Σ exp(g_l)        (Hoffman, Brochu & de Freitas 2011, η = 1)

    Args:
        space: the feasible λ.
        trials: the history in order; failed trials (no score) are not asked again.
        acquisition: one of `CHOICES`.
        seed: together with the number of trials it fixes the draw.
        pending: recipes that are being evaluated and are not asked again.

    Raises:
        SpecError: nothing is left to ask.
    """
    known = {space.point(recipe) for recipe in (*(t.recipe for t in trials), *pending)}
    start = space.start()
    for recipe in start:
        if space.point(recipe) not in known:
            return recipe
    if all(trial.held_out is None for trial in trials):
        fresh = _fresh(space, known)
        return space.recipe(np.random.default_rng([seed, len(trials)]).choice(fresh))
    nominees = _nominate(space, trials, known)
    if acquisition == HEDGE:
        gains = _gains(space, trials, len(start))
        logits = np.array([gains[name] for name in nominees])
        weights = np.exp(logits - logits.max())
        draw = np.random.default_rng([seed, len(trials)])
        acquisition = str(draw.choice(list(nominees), p=weights / weights.sum()))
    return space.recipe(nominees[acquisition])


def recommend(space: Space, trials: Sequence[Trial]) -> Recipe:
    """The measured feasible recipe with the highest posterior mean, not the luckiest trial.

    Raises:
        SpecError: no feasible trial has a score.
    """
    feasible = [t.recipe for t in trials if t.held_out is not None and space.feasible(t.recipe)]
    if not feasible:
        raise SpecError(
            "no feasible trial has a score",
            where=f"{len(trials)} trials, λ in [{space.alpha}, 1]",
            fix="raise --trials",
        )
    mean, _ = fit(space, trials).predict(np.array([space.point(r) for r in feasible]))
    return feasible[int(np.argmax(mean))]
