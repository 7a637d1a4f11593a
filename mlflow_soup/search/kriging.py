"""Universal kriging of many curves at once (Matheron 1969), with shared hyper-parameters.

    y_j(λ) = h(λ)ᵀβ_j + σ·z_j(λ),   z_j ~ GP(0, Matérn_5/2(|λ−λ'|/l) + τ²)

h is the trend's basis, l the length-scale, τ² the nugget, Y the measurements (n points × M curves).
Thousands of curves, measured at the same few points, determine how smooth they are: l and τ
maximise the restricted likelihood (Patterson & Thompson 1971, Biometrika 58), pooled over all
curves j, with σ² profiled out for each group of curves. The prediction is W(λ)·Y, with the same
weights W for every curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlflow_soup.search.space import distances

Array = NDArray[np.float64]

LENGTHS = (0.25, 0.4, 0.6, 0.9, 1.4, 2.2)  # the grid of l
NUGGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # the grid of τ
# l and τ when there are too few points to estimate them
LENGTH, NUGGET = 0.9, 0.01


def _matern(distance: Array, length: Array) -> Array:
    scaled = math.sqrt(5.0) * distance / length
    out: Array = (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)
    return out


def _trends(points: Array) -> list[Array]:
    """The bases of the trend, each wider than the one before: constant, linear, curved, quadratic.

    They are Scheffé's polynomials (1958, J. R. Stat. Soc. B 20): λ_i, then also Σ λ_i·λ_j, then
    each λ_i·λ_j. For a pair they span the ordinary polynomials in λ.
    """
    first, second = np.triu_indices(points.shape[1], k=1)
    products = points[:, first] * points[:, second]
    bases = [
        np.ones((len(points), 1)),
        points,
        np.column_stack([points, products.sum(axis=1)]),
        np.column_stack([points, products]),
    ]
    return bases if points.shape[1] > 2 else bases[:3]


class _Solution(NamedTuple):
    """The matrices that predictions and likelihoods share; the leading axes are those of l and τ.

    H is the trend's basis at the n points, with p columns; K is the Matérn correlation.
    """

    inverse: Array  # V⁻¹, shape (…, n, n), with V = K + τ²I
    projection: Array  # (HᵀV⁻¹H)⁻¹HᵀV⁻¹, shape (…, p, n): curve → coefficients of its trend
    covariance: Array  # (HᵀV⁻¹H)⁻¹, shape (…, p, p)
    log_determinants: Array  # log|V| + log|HᵀV⁻¹H|, shape (…)


def _solve(points: Array, basis: Array, length: Array, nugget: Array) -> _Solution:
    """Solve the equations of universal kriging, for arrays of hyper-parameters of any shape."""
    correlation = _matern(distances(points, points), length[..., None, None])
    covariance = correlation + nugget[..., None, None] ** 2 * np.eye(len(points))
    inverse = np.asarray(np.linalg.inv(covariance), np.float64)
    information = basis.T @ inverse @ basis
    solved = np.asarray(np.linalg.inv(information), np.float64)
    determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
    return _Solution(inverse, solved @ (basis.T @ inverse), solved, np.asarray(determinants))


def _left_over(solution: _Solution, basis: Array, gram: Array) -> Array:
    """The mean of yᵀPy over M curves y: how large the curves are apart from their trend.

    tr(P·Y·Yᵀ/M),   P = V⁻¹ − V⁻¹H(HᵀV⁻¹H)⁻¹HᵀV⁻¹
    """
    residual = solution.inverse @ (gram - basis @ (solution.projection @ gram))
    out: Array = np.trace(residual, axis1=-2, axis2=-1)
    return out


@dataclass(frozen=True)
class Kriging:
    """The best linear unbiased prediction of curves that were measured at n points."""

    points: Array  # merge weights, shape (n, count)
    order: int  # the order of the trend: an index of `_trends`
    length: float  # l
    nugget: float  # τ

    @cached_property
    def _basis(self) -> Array:
        return _trends(self.points)[self.order]

    @cached_property
    def _solution(self) -> _Solution:
        length, nugget = np.array(self.length), np.array(self.nugget)
        return _solve(self.points, self._basis, length, nugget)

    @property
    def freedom(self) -> int:
        """Degrees of freedom, n − p: the number of points minus the terms of the trend."""
        return len(self.points) - int(self._basis.shape[1])

    def scale(self, gram: Array) -> float:
        """The REML estimate of σ². If n = p, the next narrower trend gives it.

        Args:
            gram: Y·Yᵀ/M of M curves, shape (n, n).
        """
        if self.freedom == 0 and self.order > 0:
            return replace(self, order=self.order - 1).scale(gram)
        return max(float(_left_over(self._solution, self._basis, gram)) / max(self.freedom, 1), 0.0)

    def weights(self, points: Array) -> tuple[Array, Array]:
        """The weights W of the prediction W·y, shape (m, n), and its variance, shape (m,).

        The variance is that of h(λ)ᵀβ + σ·z(λ) in units of σ², without the nugget τ².

        Args:
            points: the m points to predict at, shape (m, count).
        """
        inverse, projection, covariance, _ = self._solution
        cross = _matern(distances(points, self.points), np.array(self.length))
        lack = _trends(points)[self.order] - cross @ inverse @ self._basis
        known = np.einsum("ij,jk,ik->i", cross, inverse, cross)
        variance = 1.0 - known + np.einsum("ij,jk,ik->i", lack, covariance, lack)
        return cross @ inverse + lack @ projection, np.maximum(variance, 1e-12)


def _order(points: Array) -> int:
    """The widest trend that the points determine; the quadratic one needs one more point."""
    bases = _trends(points)
    carried = [
        basis.shape[1] + (order == 3) <= len(points)
        and np.linalg.matrix_rank(basis) == basis.shape[1]
        for order, basis in enumerate(bases)
    ]
    return max(order for order, carries in enumerate(carried) if carries)


def at(points: Array, like: Kriging) -> Kriging:
    """Kriging from other points, with the hyper-parameters of `like` and the widest trend."""
    return replace(like, points=points, order=_order(points))


def estimate(points: Array, grams: Sequence[Array], counts: Sequence[int]) -> Kriging:
    """The kriging with the largest restricted log-likelihood, pooled over groups k of curves.

        −½ Σ_k M_k·(log|V| + log|HᵀV⁻¹H| + (n − p)·log σ_k²),   σ_k² = tr(P·Y_kY_kᵀ)/(M_k·(n − p))

    Args:
        points: merge weights, shape (n, count), n ≥ 2.
        grams: Y·Yᵀ/M of each group, shape (n, n).
        counts: the number M of curves in each group.
    """
    default = Kriging(points, _order(points), LENGTH, NUGGET)
    if default.freedom < 2:  # one degree of freedom gives the scale, but not the smoothness
        return default
    basis = _trends(points)[default.order]
    length, nugget = np.meshgrid(LENGTHS, NUGGETS, indexing="ij")
    solution = _solve(points, basis, length, nugget)
    likelihood = np.zeros(length.shape)
    for gram, count in zip(grams, counts, strict=True):
        scale = np.maximum(_left_over(solution, basis, gram) / default.freedom, 1e-300)
        likelihood -= 0.5 * count * (solution.log_determinants + default.freedom * np.log(scale))
    best = np.unravel_index(np.argmax(likelihood), length.shape)
    return replace(default, length=float(length[best]), nugget=float(nugget[best]))
