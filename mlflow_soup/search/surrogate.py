"""A Gaussian process over merge weights, with maximum a posteriori hyper-parameters.

    f ~ GP(0, s²·Matérn_5/2(|λ−λ'| / l)),   y = f + ε,  ε ~ N(0, n²),  y standardised

Liu et al. (2024, eq. 4-7) fit by maximum likelihood. With four to ten points that gives absurd
length-scales, so log-normal priors regularise the fit. The noise n² is fitted and small: every λ is
scored on the same items, so the binomial standard error shifts the whole curve and is not noise.
Answers that a model samples differ at every λ: this noise is told to `fit`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

Array = NDArray[np.float64]

# log-normal priors of (signal variance s², length-scale l, noise variance n²), in kernel order.
# With these values the search matches the best published ones on landscapes like the paper's
MEDIAN = np.log([1.0, 0.4, 5e-3])
LOG_SD = np.array([1.0, 0.6, 1.5])
# scales the simplex to edges of length 1, so that the distance of a pair is |λ − λ'|
EDGE = math.sqrt(0.5)
BOUNDS = ((1e-2, 1e3), (0.05, 5.0), (1e-6, 1.0))


def _maximise_posterior(
    objective: Callable[..., tuple[float, Array]],
    start: Array,
    bounds: Array,
    *,
    median: Array = MEDIAN,
) -> tuple[Array, float]:
    """Minimise the negative log-likelihood plus the negative log-prior, for scikit-learn."""

    def loss(theta: Array) -> tuple[float, Array]:
        value, gradient = objective(theta, eval_gradient=True)
        z = (theta - median) / LOG_SD
        return value + 0.5 * float(z @ z), gradient + z / LOG_SD

    shift = np.array([0.0, 1.0, 0.0])  # also start from a longer and a shorter length-scale
    starts = (median, median + shift, median - shift)
    fits = [minimize(loss, s, jac=True, method="L-BFGS-B", bounds=bounds) for s in starts]
    best = min(fits, key=lambda fit: float(fit.fun))
    return best.x, float(best.fun)


@dataclass(frozen=True)
class Surrogate:
    """The posterior of the score, fitted to the trials."""

    regressor: GaussianProcessRegressor
    mean: float  # mean of the fitted scores
    scale: float  # standard deviation of the fitted scores, or 1 if they are all equal

    @property
    def misses(self) -> Array:
        """The leave-one-out error of each score, in score units, shape (n,).

        The hyper-parameters stay fixed (Rasmussen & Williams 2006, eq. 5.12).
        """
        inverse = cho_solve((self.regressor.L_, True), np.eye(len(self.regressor.L_)))
        misses: Array = self.scale * self.regressor.alpha_ / np.diag(inverse)
        return misses

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation, without the noise term.

        Args:
            points: merge weights, shape (m, count).

        Returns:
            Mean and standard deviation, each of shape (m,), in score units; the second is > 0.
        """
        mean, std = self.regressor.predict(points * EDGE, return_std=True)
        noise = self.regressor.kernel_.k2.noise_level
        latent = np.sqrt(np.maximum(std**2 - noise, 1e-12))
        return self.mean + self.scale * mean, self.scale * latent


@lru_cache(maxsize=256)
def _fit(
    points: tuple[tuple[float, ...], ...], scores: tuple[float, ...], noise: float
) -> Surrogate:
    y = np.array(scores)
    mean, scale = float(y.mean()), float(y.std())
    if not scale > 1e-12 * max(1.0, abs(mean)):  # all scores are equal
        scale = 1.0
    # `noise` is an upper bound: in the middle, the variance is half of it
    variance = min(max(math.exp(MEDIAN[2]), 0.5 * min(noise / scale, 2.0) ** 2), BOUNDS[2][1])
    median = np.array([*MEDIAN[:2], math.log(variance)])
    kernel = ConstantKernel(1.0, BOUNDS[0]) * Matern(0.4, BOUNDS[1], nu=2.5) + WhiteKernel(
        variance, BOUNDS[2]
    )
    # alpha is a jitter for duplicate points, far below the smallest noise
    regressor = GaussianProcessRegressor(
        kernel, alpha=1e-10, optimizer=partial(_maximise_posterior, median=median)
    )
    with warnings.catch_warnings():
        # for a flat curve, the noise ends at its lower bound, which is not an error
        warnings.simplefilter("ignore", ConvergenceWarning)
        regressor.fit(np.array(points) * EDGE, (y - mean) / scale)
    return Surrogate(regressor, mean, scale)


def fit(points: Array, scores: Array, *, noise: float = 0.0) -> Surrogate:
    """The posterior given the scores; a pure function of its arguments.

    Args:
        points: merge weights of the trials, shape (n, count), n ≥ 1; duplicates are allowed.
        scores: the scores, finite, shape (n,); larger is better.
        noise: an upper bound of the standard deviation by which a score varies when it is measured
            again, in score units.
    """
    return _fit(tuple(map(tuple, points.tolist())), tuple(map(float, scores)), noise)
