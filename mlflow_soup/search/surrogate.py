"""A Gaussian process over merge weights, its hyper-parameters by maximum a posteriori.

    f ~ GP(0, s²·Matérn_5/2(|λ−λ'| / l)),   y = f + ε,  ε ~ N(0, n²),  y standardised

Liu et al. (2024, eq. 4-7) fit by maximum likelihood; with four to ten points that picks absurd
length-scales, so log-normal priors regularise it. The noise is learnt and small: every λ is scored
on the same items, so the binomial standard error is common to the whole curve and is not noise.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

Array = NDArray[np.float64]

# log-normal priors of (signal variance s², length-scale l, noise variance n²), in kernel order;
# medians and log-sds that matched the best published searchers on landscapes like the paper's
MEDIAN = np.log([1.0, 0.4, 5e-3])
LOG_SD = np.array([1.0, 0.6, 1.5])
# brings the simplex to edges of length 1, so that distances are |λ − λ'| for a pair
EDGE = math.sqrt(0.5)
BOUNDS = ((1e-2, 1e3), (0.05, 5.0), (1e-6, 1.0))


def _maximise_posterior(
    objective: Callable[..., tuple[float, Array]], start: Array, bounds: Array
) -> tuple[Array, float]:
    """scikit-learn's optimiser hook: its negative log-likelihood plus the negative log-prior."""

    def loss(theta: Array) -> tuple[float, Array]:
        value, gradient = objective(theta, eval_gradient=True)
        z = (theta - MEDIAN) / LOG_SD
        return value + 0.5 * float(z @ z), gradient + z / LOG_SD

    shift = np.array([0.0, 1.0, 0.0])  # in log length-scale: a longer and a shorter start
    starts = (MEDIAN, MEDIAN + shift, MEDIAN - shift)
    fits = [minimize(loss, s, jac=True, method="L-BFGS-B", bounds=bounds) for s in starts]
    best = min(fits, key=lambda fit: float(fit.fun))
    return best.x, float(best.fun)


@dataclass(frozen=True)
class Surrogate:
    """A fitted posterior over scores."""

    regressor: GaussianProcessRegressor
    mean: float  # of the scores it was fitted to
    scale: float  # their standard deviation, or 1 when they are all equal

    @property
    def misses(self) -> Array:
        """Each score less what the others predict of it, in score units, shape (n,).

        Leave-one-out at fixed hyper-parameters (Rasmussen & Williams 2006, eq. 5.12).
        """
        inverse = cho_solve((self.regressor.L_, True), np.eye(len(self.regressor.L_)))
        misses: Array = self.scale * self.regressor.alpha_ / np.diag(inverse)
        return misses

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Posterior mean and latent standard deviation, without the noise term.

        Args:
            points: weights, shape (n, count).

        Returns:
            Mean and standard deviation, shape (n,), in score units; the second is > 0.
        """
        mean, std = self.regressor.predict(points * EDGE, return_std=True)
        noise = self.regressor.kernel_.k2.noise_level
        latent = np.sqrt(np.maximum(std**2 - noise, 1e-12))
        return self.mean + self.scale * mean, self.scale * latent


@lru_cache(maxsize=256)
def _fit(points: tuple[tuple[float, ...], ...], scores: tuple[float, ...]) -> Surrogate:
    y = np.array(scores)
    mean, scale = float(y.mean()), float(y.std())
    if not scale > 1e-12 * max(1.0, abs(mean)):  # all equal: nothing to scale by
        scale = 1.0
    kernel = ConstantKernel(1.0, BOUNDS[0]) * Matern(0.4, BOUNDS[1], nu=2.5) + WhiteKernel(
        math.exp(MEDIAN[2]), BOUNDS[2]
    )
    # alpha: jitter for duplicated points, far below the smallest noise
    regressor = GaussianProcessRegressor(kernel, alpha=1e-10, optimizer=_maximise_posterior)
    with warnings.catch_warnings():
        # of a flat curve the noise ends at its lower bound, which is what bounds are for
        warnings.simplefilter("ignore", ConvergenceWarning)
        regressor.fit(np.array(points) * EDGE, (y - mean) / scale)
    return Surrogate(regressor, mean, scale)


def fit(points: Array, scores: Array) -> Surrogate:
    """The posterior given scores; a function of its arguments alone.

    Args:
        points: weights of the trials, shape (n, count), n ≥ 1; duplicates are welcome.
        scores: their finite scores, shape (n,), larger is better.
    """
    return _fit(tuple(map(tuple, points.tolist())), tuple(map(float, scores)))
