"""Which merge weights λ are chosen at the end of a search."""

import math
from collections.abc import Sequence

import numpy as np

from mlflow_soup.decision.pairing import paired, upper_bound
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.search.belief import Array, believe, scored
from mlflow_soup.search.space import Space

CONFIDENCE = 0.95  # that a recipe is worse than a parent
TIE = 0.5  # paired standard errors: an expected gain below this is a tie


def recommend(space: Space, trials: Sequence[Trial], *, measured: bool = False) -> Recipe:
    """The feasible recipe with the largest expected score, not the luckiest trial.

    `expected` gives the expected score. A recipe that scored worse than a feasible parent is left
    out. In a tie of a pair's λ with the plain average, the plain average is chosen: where a curve
    is flat, luck places its highest point.

    Args:
        space: the feasible merge weights.
        trials: the history.
        measured: if True, choose among recipes with a score. If False, the choice may be a recipe
            that was never evaluated; evaluate it before you use it.

    Raises:
        SpecError: no feasible trial has a score.
    """
    feasible = [(recipe, score) for recipe, score in scored(trials) if space.feasible(recipe)]
    if not feasible:
        raise SpecError(
            "no feasible trial has a score",
            where=f"{len(trials)} trials, λ in [{space.alpha}, 1]",
            fix="raise --trials; the tag soup.failed of a trial's run says why it failed",
        )
    parents = [score for recipe, score in feasible if recipe in space.alone()]
    kept = [r.lam for r, score in feasible if not any(_lags(score, p) for p in parents)]
    options = np.array(kept)
    if not measured:
        fresh = space.fresh([trial.recipe for trial in trials])
        options = np.concatenate([options, fresh])
    values = expected(space, trials, options)
    best, plain = space.recipe(options[np.argmax(values)]), space.uniform()
    if measured and space.count == 2 and plain in space.start() and plain.lam in kept:
        gain, scores = values.max() - values[kept.index(plain.lam)], dict(feasible)
        if gain < TIE * _error(scores[best], scores[plain]):
            return plain
    return best


def _error(ours: Score, theirs: Score) -> float:
    """The paired standard error of two scores; without items, the most that it can be."""
    if ours.items and theirs.items:
        return paired(ours, theirs).stderr
    return math.hypot(ours.stderr, theirs.stderr)


def _lags(score: Score, parent: Score) -> bool:
    """Whether a score is shown to be below a parent's; without items, whether it is below."""
    if not score.items:
        return score.value < parent.value
    return upper_bound(paired(score, parent), CONFIDENCE) < 0.0


def expected(space: Space, trials: Sequence[Trial], weights: Array) -> Array:
    """What a score is expected to be, given all trials; only differences between points matter.

    It is the posterior mean, or `Landscape.population` if the curve was reconstructed from the
    items.

    Args:
        space: the space of the merge weights.
        trials: the history, with a score at least.
        weights: merge weights, shape (m, count).

    Returns:
        Shape (m,), in score units.
    """
    belief = believe(space, trials)
    points = space.points(weights)
    if belief.landscape is not None:
        return belief.landscape.population(points)
    return belief.posterior.predict(points)[0]
