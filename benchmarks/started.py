"""Searchers that start from the parents and the middle: what peers share, random and grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from landscapes import Landscape, lattice
from mlflow_soup.records import Score

Weights = tuple[float, ...]


class Started:
    """Parents and the middle first; after that a subclass proposes. Recommends the best."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.parents, self.alpha, self.seed = landscape.parents, landscape.alpha, seed
        self.rng = np.random.default_rng([seed, 1])
        self.queue = self.start()
        self.told: list[tuple[Weights, float]] = []

    def start(self) -> list[Weights]:
        """What is evaluated first."""
        lam = (1 + self.alpha) / 2 if self.parents == 2 else 1 / self.parents
        middle = np.array([*[(1 - lam) / (self.parents - 1)] * (self.parents - 1), lam])
        return [*map(tuple, np.eye(self.parents)), rounded(middle)]

    def ask(self, pending: Sequence[Weights]) -> Weights:
        """The start, then proposals."""
        return self.queue.pop(0) if self.queue else self.propose()

    def tell(self, weights: Weights, score: Score) -> None:
        """Keep the value; items are for those who can read them."""
        self.told.append((weights, score.value))

    def feasible(self) -> list[tuple[Weights, float]]:
        """What may be recommended among what was told."""
        return [(w, value) for w, value in self.told if w[-1] >= self.alpha]

    def recommend(self) -> Weights:
        """The best one measured."""
        return max(self.feasible(), key=lambda pair: pair[1])[0]

    def propose(self) -> Weights:
        """The next merge weights."""
        raise NotImplementedError


class Random(Started):
    """Uniform on the feasible weights."""

    def propose(self) -> Weights:
        """Rejection where α cuts the simplex; it never cuts a pair to less than half."""
        while True:
            weights = rounded(self.rng.dirichlet(np.ones(self.parents)))
            if weights[-1] >= self.alpha:
                return weights


class Grid(Started):
    """Halves, then quarters, then eighths of the feasible weights; in random order within each."""

    def propose(self) -> Weights:
        """The coarsest point not measured yet."""
        known = {weights for weights, _ in self.told}
        for steps in (2, 4, 8, 16, 32):
            points = lattice(self.parents, steps)
            points[:, :-1] *= 1 - self.alpha
            points[:, -1] = 1 - points[:, :-1].sum(axis=1)
            fresh = [w for w in map(rounded, points) if w not in known]
            if fresh:
                return fresh[self.rng.integers(len(fresh))]
        raise ValueError("the grid is exhausted")


def rounded(weights: np.ndarray[Any, Any]) -> Weights:
    """In steps of 1e-4, as recipes are; the oldest takes what is left."""
    rest = [round(float(x), 4) for x in weights[1:]]
    return (round(max(1 - sum(rest), 0.0), 4), *rest)
