"""Universal kriging of many curves at once (Matheron 1969), with shared hyper-parameters.

    y_j(λ) = h(λ)ᵀβ_j + σ·z_j(λ),   z_j ~ GP(0, Matérn_5/2(|λ−λ'|/l) + τ²)

Thousands of curves measured at the same few points say how smooth they are: l and τ by restricted
maximum likelihood (Patterson & Thompson 1971, Biometrika 58) pooled over all curves j, σ² profiled
out per group of them. The prediction is W(λ)·Y with the same weights W for every curve.
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

LENGTHS = (0.25, 0.4, 0.6, 0.9, 1.4, 2.2)
NUGGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# what is assumed while there are too few points to learn it
LENGTH, NUGGET = 0.9, 0.01


def _matern(distance: Array, length: Array) -> Array:
    scaled = math.sqrt(5.0) * distance / length
    out: Array = (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)
    return out


def _trends(points: Array) -> list[Array]:
    """Bases of the trend, each wider than the one before: constant, linear, curved, quadratic.

    Scheffé's polynomials (1958, J. R. Stat. Soc. B 20): λ_i, then Σ λ_i·λ_j, then each λ_i·λ_j. For
    a pair they are the ordinary ones in λ.
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
    """What every prediction and likelihood is made of; leading axes are those of l and τ."""

    inverse: Array  # V⁻¹, shape (…, n, n), with V = K + τ²I
    projection: Array  # (HᵀV⁻¹H)⁻¹HᵀV⁻¹, shape (…, p, n): the trend's coefficients of a curve
    covariance: Array  # (HᵀV⁻¹H)⁻¹, shape (…, p, p)
    log_determinants: Array  # log|V| + log|HᵀV⁻¹H|, shape (…)


def _solve(points: Array, basis: Array, length: Array, nugget: Array) -> _Solution:
    """The equations of universal kriging, for hyper-parameters of any shape."""
    correlation = _matern(distances(points, points), length[..., None, None])
    covariance = correlation + nugget[..., None, None] ** 2 * np.eye(len(points))
    inverse = np.asarray(np.linalg.inv(covariance), np.float64)
    information = basis.T @ inverse @ basis
    solved = np.asarray(np.linalg.inv(information), np.float64)
    determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
    return _Solution(inverse, solved @ (basis.T @ inverse), solved, np.asarray(determinants))


def _left_over(solution: _Solution, basis: Array, gram: Array) -> Array:
    """What curves are besides their trend, tr(P·Y·Yᵀ/M) with P = V⁻¹ − V⁻¹H(HᵀV⁻¹H)⁻¹HᵀV⁻¹."""
    residual = solution.inverse @ (gram - basis @ (solution.projection @ gram))
    out: Array = np.trace(residual, axis1=-2, axis2=-1)
    return out


@dataclass(frozen=True)
class Kriging:
    """Best linear unbiased prediction of any curve measured at some points."""

    points: Array  # (n, count)
    order: int  # of the trend, an index of `_trends`
    length: float
    nugget: float

    @cached_property
    def _basis(self) -> Array:
        return _trends(self.points)[self.order]

    @cached_property
    def _solution(self) -> _Solution:
        length, nugget = np.array(self.length), np.array(self.nugget)
        return _solve(self.points, self._basis, length, nugget)

    @property
    def freedom(self) -> int:
        """How many more points than terms of the trend, n − p."""
        return len(self.points) - int(self._basis.shape[1])

    def scale(self, gram: Array) -> float:
        """σ² of curves, REML's; where the trend takes all freedom, by the next narrower trend.

        Args:
            gram: Y·Yᵀ/M of M curves, shape (n, n).
        """
        if self.freedom == 0 and self.order > 0:
            return replace(self, order=self.order - 1).scale(gram)
        return max(float(_left_over(self._solution, self._basis, gram)) / max(self.freedom, 1), 0.0)

    def weights(self, points: Array) -> tuple[Array, Array]:
        """W of the prediction W·y, shape (m, n), and the variance of h(λ)ᵀβ + σ·z(λ), shape (m,).

        The variance is in units of σ² and without the nugget τ².
        """
        inverse, projection, covariance, _ = self._solution
        cross = _matern(distances(points, self.points), np.array(self.length))
        lack = _trends(points)[self.order] - cross @ inverse @ self._basis
        known = np.einsum("ij,jk,ik->i", cross, inverse, cross)
        variance = 1.0 - known + np.einsum("ij,jk,ik->i", lack, covariance, lack)
        return cross @ inverse + lack @ projection, np.maximum(variance, 1e-12)


def _order(points: Array) -> int:
    """The widest trend that the points carry; the last one only with a point to spare."""
    bases = _trends(points)
    carried = [
        basis.shape[1] + (order == 3) <= len(points)
        and np.linalg.matrix_rank(basis) == basis.shape[1]
        for order, basis in enumerate(bases)
    ]
    return max(order for order, carries in enumerate(carried) if carries)


def at(points: Array, like: Kriging) -> Kriging:
    """Kriging from other points with the same hyper-parameters, as wide a trend as they carry."""
    return replace(like, points=points, order=_order(points))


def estimate(points: Array, grams: Sequence[Array], counts: Sequence[int]) -> Kriging:
    """The kriging with the largest pooled restricted likelihood, σ² of each group profiled out.

        −½ Σ_k M_k·(log|V| + log|HᵀV⁻¹H| + (n − p)·log σ_k²),   σ_k² = tr(P·Y_kY_kᵀ)/(M_k·(n − p))

    Args:
        points: shape (n, count), n ≥ 2.
        grams: one Y·Yᵀ/M per group of curves, shape (n, n).
        counts: its number of curves M.
    """
    default = Kriging(points, _order(points), LENGTH, NUGGET)
    if default.freedom < 2:  # one contrast says how large it is, not how smooth
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
