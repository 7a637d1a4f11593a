"""The predicted score at any weights: from the landscape of the items, or a Gaussian process."""

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
from mlflow_soup.search.space import Space
from mlflow_soup.search.surrogate import Surrogate

Array = NDArray[np.float64]
# how many of its own standard deviations a landscape may be wrong at the points that check it
DOUBT = 3.0
LANDSCAPE, HEDGE = "landscape", "gp-hedge"
CHOICES = (LANDSCAPE, HEDGE, *ACQUISITIONS)


class Posterior(Protocol):
    """The predicted score at any weights."""

    @property
    def scale(self) -> float:
        """Standard deviation of the measured scores, or 1 if they are all equal."""

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, each of shape (m,), at points of shape (m, count)."""


@dataclass(frozen=True)
class Belief:
    """The posterior of the held-out score, given the trials.

    Attributes:
        posterior: the landscape of the items, or a Gaussian process.
        why: why the landscape was not used, in words for people; empty if it was.
    """

    posterior: Posterior
    why: str = ""

    @property
    def landscape(self) -> Landscape | None:
        """The posterior if it is a landscape, else None."""
        return self.posterior if isinstance(self.posterior, Landscape) else None


def scored(trials: Sequence[Trial]) -> list[tuple[Recipe, Score]]:
    """Recipe and score of each trial with a score, in order."""
    return [(trial.recipe, trial.held_out) for trial in trials if trial.held_out is not None]


def fit(space: Space, trials: Sequence[Trial]) -> Surrogate:
    """The Gaussian process fitted to the trials with a score, of which there is at least one."""
    recipes, scores = zip(*scored(trials), strict=True)
    values, noise = ([getattr(s, name) for s in scores] for name in ("value", "noise"))
    return surrogate.fit(space.points_of(recipes), np.array(values), noise=max(noise))


def believe(space: Space, trials: Sequence[Trial]) -> Belief:
    """The landscape if the items determine it and it can be trusted, else the Gaussian process.

    The check is leave-one-out. The landscape is not trusted if it misses the scores that were left
    out by more than `DOUBT` of its standard deviations, and the Gaussian process misses them by
    less.
    """
    process = fit(space, trials)
    try:
        scape = landscape.fit(space, trials)
    except NoLandscape as reason:
        return Belief(process, str(reason))
    inside = landscape.mixed(trials)
    if scape.doubt > DOUBT:
        ours, theirs = (
            math.sqrt(np.mean(np.square(misses)))
            for misses in (scape.misses, process.misses[inside])
        )
        if ours > theirs:
            why = (
                f"its leave-one-out error would be {ours:.4f}, that of the Gaussian process is "
                f"{theirs:.4f}"
            )
            return Belief(process, why)
    return Belief(scape)
