"""Which weights λ are chosen in the end."""

import math
from collections.abc import Sequence

import numpy as np

from mlflow_soup.errors import SpecError
from mlflow_soup.records import Recipe, Trial
from mlflow_soup.search.belief import believe, scored
from mlflow_soup.search.space import Space, points_of


def recommend(space: Space, trials: Sequence[Trial], *, measured: bool = False) -> Recipe:
    """The feasible recipe of which most is expected, not the luckiest trial.

    By posterior mean; where the curve was reconstructed, by the one of the population that the
    held-out items are a sample of. What was measured to be worse than a feasible parent is out.

    Args:
        space: the feasible merge weights.
        trials: the history.
        measured: only among recipes that have a score. Otherwise the choice may be one that was
            never measured: measure it before it is relied on.

    Raises:
        SpecError: no feasible trial has a score.
    """
    feasible = [(recipe, score.value) for recipe, score in scored(trials) if space.feasible(recipe)]
    if not feasible:
        raise SpecError(
            "no feasible trial has a score",
            where=f"{len(trials)} trials, λ in [{space.alpha}, 1]",
            fix="raise --trials",
        )
    least = max((v for recipe, v in feasible if recipe in space.parents()), default=-math.inf)
    options = points_of([recipe for recipe, value in feasible if value >= least])
    if not measured:
        fresh = space.fresh([trial.recipe for trial in trials])
        options = np.concatenate([options, fresh])
    belief = believe(trials)
    if belief.landscape is not None:
        mean = belief.landscape.population(options)
    else:
        mean, _ = belief.posterior.predict(options)
    return space.recipe(options[np.argmax(mean)])
