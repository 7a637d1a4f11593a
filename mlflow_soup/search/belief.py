"""What the trials say of the whole space: the landscape of the items, or a Gaussian process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.search import landscape, surrogate
from mlflow_soup.search.acquisition import ACQUISITIONS
from mlflow_soup.search.landscape import Landscape, NoLandscape
from mlflow_soup.search.space import points_of
from mlflow_soup.search.surrogate import Surrogate

Array = NDArray[np.float64]
# how many of its own standard deviations a landscape may be off where it can be checked
DOUBT = 3.0
LANDSCAPE, HEDGE = "landscape", "gp-hedge"
CHOICES = (LANDSCAPE, HEDGE, *ACQUISITIONS)


class Posterior(Protocol):
    """What is believed of the score at any weights."""

    @property
    def scale(self) -> float:
        """Standard deviation of the scores, or 1 when they are all equal."""

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, shape (m,), at points of shape (m, count)."""


@dataclass(frozen=True)
class Belief:
    """What the trials say of the whole space.

    Attributes:
        posterior: of the held-out score.
        why: why it was not reconstructed from the items, in words.
    """

    posterior: Posterior
    why: str = ""

    @property
    def landscape(self) -> Landscape | None:
        """The posterior where it was reconstructed from the items."""
        return self.posterior if isinstance(self.posterior, Landscape) else None


def scored(trials: Sequence[Trial]) -> list[tuple[Recipe, Score]]:
    """The trials whose evaluation gave a score, in order."""
    return [(trial.recipe, trial.held_out) for trial in trials if trial.held_out is not None]


def fit(trials: Sequence[Trial]) -> Surrogate:
    """The Gaussian process of the trials that have a score, at least one."""
    recipes, scores = zip(*scored(trials), strict=True)
    return surrogate.fit(points_of(recipes), np.array([score.value for score in scores]))


def believe(trials: Sequence[Trial]) -> Belief:
    """The landscape if the items tell of it and it can be trusted, else the Gaussian process.

    It is not where scores that were left out lie far outside its own band and the process misses
    them by less.
    """
    process = fit(trials)
    try:
        scape = landscape.fit(trials)
    except NoLandscape as reason:
        return Belief(process, str(reason))
    inside = scape.points.max(axis=1) < 1.0
    if scape.doubt > DOUBT:
        ours, theirs = (
            math.sqrt(np.mean(np.square(misses)))
            for misses in (scape.misses, process.misses[inside])
        )
        if ours > theirs:
            why = (
                f"scores that were left out were missed by {ours:.4f}, by the Gaussian process by "
                f"{theirs:.4f}"
            )
            return Belief(process, why)
    return Belief(scape)
