"""Where the search may look: recipes as points, and points as recipes.

For a pair the point is λ itself, the weight of the newer checkpoint: Θ(λ) = λ·Θ_new + (1−λ)·Θ_old
with λ ∈ [α, 1] (Liu et al. 2024, eq. 2-3). The older parent, λ = 0, is measured anyway and informs
the surrogate even where α > 0 keeps the search away from it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlflow_soup.records import Recipe

Array = NDArray[np.float64]

# 1,001 candidates: exact enough in one dimension that no inner optimiser is needed
GRID = 1001


@dataclass(frozen=True)
class Space:
    """The feasible merge weights of two parents, λ ∈ [α, 1]."""

    alpha: float

    @classmethod
    def pair(cls, alpha: float) -> "Space":
        """Two parents, the newer weighing at least α ∈ [0, 1), rounded up to 1e-4 as λ is."""
        return cls(math.ceil(round(alpha * 1e4, 6)) / 1e4)

    def recipe(self, point: float) -> Recipe:
        """The recipe at λ = `point`, rounded to 1e-4: what a run shows is what was merged."""
        lam = round(float(point), 4)
        return Recipe("linear", (round(1.0 - lam, 4), lam))

    def point(self, recipe: Recipe) -> float:
        """λ of a recipe; the inverse of `recipe` on points rounded to 1e-4."""
        return recipe.lam[-1]

    def feasible(self, recipe: Recipe) -> bool:
        """Whether the recipe may be recommended."""
        return self.alpha <= self.point(recipe) <= 1.0

    def parents(self) -> tuple[Recipe, Recipe]:
        """Each parent alone, older first."""
        return self.recipe(0.0), self.recipe(1.0)

    def uniform(self) -> Recipe:
        """The uniform soup (Wortsman et al. 2022, arXiv:2203.05482), a baseline."""
        return self.recipe(0.5)

    def start(self) -> tuple[Recipe, ...]:
        """What is measured before the surrogate speaks: parents, uniform soup, ends of [α, 1]."""
        return tuple(dict.fromkeys((*self.parents(), self.uniform(), self.recipe(self.alpha))))

    def candidates(self) -> Array:
        """Points of [α, 1] among which an acquisition chooses, shape (n,), ascending."""
        return np.unique(np.linspace(self.alpha, 1.0, GRID).round(4))
