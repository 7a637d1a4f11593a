"""The space of the search: the merge weights of two or more parents.

For a pair, λ is the weight of the newer checkpoint: Θ(λ) = λ·Θ_new + (1−λ)·Θ_old with λ ∈ [α, 1]
(Liu et al. 2024, eq. 2-3). For n parents, Θ = Σ λ_i·Θ_i with λ on the simplex and λ_newest ≥ α
(eq. 1). Each parent alone is always evaluated. Its score informs the surrogate even if α > 0 makes
the parent infeasible.

A point is the vector of weights itself. The distance of two points is measured on a simplex with
edges of length 1, so for a pair it is |λ − λ'|. Softmax or stick-breaking coordinates would squeeze
the corners and favour some parents.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from mlflow_soup.records import Recipe

Array = NDArray[np.float64]

# smallest distance between a new point and the measured ones; a closer one would give little news
SPACING = 0.01
# candidates for a pair: dense enough that no inner optimiser is needed
GRID = 1001
# candidates for three or more parents: inside the simplex, and on its faces of each dimension
INSIDE, ON_FACES = 2048, 512


@dataclass(frozen=True)
class Space:
    """The feasible merge weights of `count` parents, oldest first; the newest weighs at least α."""

    count: int
    alpha: float
    times: tuple[float, ...] = ()  # when the parents were saved; empty if nobody asked

    @classmethod
    def pair(cls, alpha: float) -> "Space":
        """Two parents; the newer weighs at least α ∈ [0, 1), rounded up to a multiple of 1e-4."""
        return cls.simplex(2, alpha)

    @classmethod
    def simplex(cls, count: int, alpha: float) -> "Space":
        """`count` ≥ 2 parents; the newest weighs at least α, rounded up to a multiple of 1e-4."""
        return cls(count, math.ceil(round(alpha * 1e4, 6)) / 1e4)

    def recipe(self, weights: float | Sequence[float] | Array) -> Recipe:
        """The recipe with these weights, rounded to 1e-4, so that a run shows the exact weights.

        The weights must sum to 1 after rounding. If the sum is too small, the largest weight gets
        the rest. If it is too large, the rest is taken from the largest weight of an older parent,
        so that the newest parent does not fall below α.

        Args:
            weights: one weight per parent, oldest first; or λ of a pair.
        """
        if isinstance(weights, float | int):
            weights = (1.0 - weights, weights)
        steps = [round(1e4 * float(weight)) for weight in weights]
        left = 10_000 - sum(steps)
        older = range(len(steps) - 1) if left < 0 and max(steps[:-1]) >= -left else ()
        largest = max(older or range(len(steps)), key=lambda i: (steps[i], i))
        steps[largest] += left
        return Recipe("linear", tuple(step / 1e4 for step in steps))

    def label(self, recipe: Recipe) -> str:
        """A recipe as a label: its weights."""
        return recipe.label

    def feasible(self, recipe: Recipe) -> bool:
        """True if the newest parent weighs at least α, so that the recipe may be recommended."""
        return self.alpha <= recipe.lam[-1] <= 1.0

    def alone(self) -> tuple[Recipe, ...]:
        """The parents that every method scores alone, oldest first: all of them."""
        return tuple(self.recipe(row) for row in np.eye(self.count))

    def uniform(self) -> Recipe:
        """The uniform soup (Wortsman et al. 2022, arXiv:2203.05482), a baseline."""
        return self.recipe(np.full(self.count, 1.0 / self.count))

    def start(self) -> tuple[Recipe, ...]:
        """The recipes that are evaluated first: the parents and the uniform soup."""
        return (*self.alone(), self.uniform())

    def ends(self) -> tuple[Recipe, ...]:
        """The ends of a pair's [α, 1], where the paper starts (Liu et al. 2024, algorithm 1)."""
        return (self.recipe(self.alpha), self.recipe(1.0)) if self.count == 2 else ()

    def candidates(self) -> Array:
        """The points among which the next recipe is chosen, shape (m, count), distinct, read-only.

        For a pair they are equal steps of λ from α to 1. For more parents they are spread evenly
        over the feasible simplex and over each of its faces.
        """
        return _candidates(self.count, self.alpha)

    def points(self, weights: Sequence[Sequence[float]] | Array) -> Array:
        """Where the surrogates see merge weights of shape (m, count): the weights, shape (m, d).

        The coordinates of a point sum to 1, and `distances` measures how far two points are apart.
        """
        return np.asarray(weights, np.float64)

    def points_of(self, recipes: Sequence[Recipe]) -> Array:
        """The points of recipes, shape (len(recipes), d)."""
        rows = [recipe.lam for recipe in recipes]
        return self.points(np.array(rows) if rows else np.empty((0, self.count)))

    def fresh(self, taken: Sequence[Recipe], spacing: float = SPACING) -> Array:
        """The candidates that are not taken yet, shape (m, count).

        They are farther than `spacing` from every taken recipe. If there are no such candidates,
        all candidates that differ from the taken recipes are returned.
        """
        candidates = self.candidates()
        distance = distances(self.points(candidates), self.points_of(taken)).min(axis=1)
        far: Array = candidates[distance > spacing + 1e-9]
        return far if far.size else candidates[distance > 1e-9]


@lru_cache(maxsize=32)
def _candidates(count: int, alpha: float) -> Array:
    if count == 2:
        lam = np.linspace(alpha, 1.0, GRID)
        points = np.column_stack([1.0 - lam, lam])
    else:
        # the feasible weights are a smaller simplex at the newest parent's corner
        points = alpha * np.eye(count)[-1] + (1.0 - alpha) * _spread(count)
    steps = np.round(1e4 * points)
    largest = steps.argmax(axis=1)
    steps[np.arange(len(steps)), largest] += 1e4 - steps.sum(axis=1)
    steps = np.unique(steps[steps[:, -1] >= 1e4 * alpha - 1e-6], axis=0)[::-1]
    points = steps / 1e4
    points.flags.writeable = False
    return points


def _spread(count: int) -> Array:
    """Points on the unit simplex with `count` corners: the corners, the inside and the faces."""
    parts = [np.eye(count), _uniform(count, INSIDE)]
    for corners in range(2, count):
        faces = list(itertools.combinations(range(count), corners))
        sample = _uniform(corners, max(ON_FACES // len(faces), 1))
        for face in faces:
            part = np.zeros((len(sample), count))
            part[:, face] = sample
            parts.append(part)
    return np.concatenate(parts)


def _uniform(corners: int, size: int) -> Array:
    """Points spread evenly over a simplex, shape (size, corners), from a Halton sequence.

    Each weight is a Beta-distributed share of the rest that the weights before it left. So the
    points are uniform on the simplex (Devroye 1986, ch. XI.4).
    """
    cube = (qmc.Halton(corners - 1, scramble=False).random(size) + 0.5 / size) % 1.0
    left = np.cumprod(cube ** (1.0 / np.arange(corners - 1, 0, -1)), axis=1)
    gaps: Array = -np.diff(left, axis=1, prepend=1.0, append=0.0)
    return gaps


def distances(a: Array, b: Array) -> Array:
    """Distances between points on a simplex with edges of length 1, shape (len(a), len(b))."""
    difference = a[:, None, :] - b[None, :, :]
    out: Array = np.sqrt(0.5 * (difference**2).sum(axis=2))
    return out
