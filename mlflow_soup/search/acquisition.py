"""Acquisition functions: they turn a posterior into the utility of the next evaluation.

The table `ACQUISITIONS` holds the base functions; GP-Hedge, in `ask`, draws among them. All
arguments are in score units; `best` is the incumbent's posterior mean.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr, ndtr

Array = NDArray[np.float64]
Acquisition = Callable[[Array, Array, float, float], Array]

XI = 0.01  # ξ: PI's required improvement, in standard deviations of the scores
BETA = 1.96  # β: UCB's optimism, in posterior standard deviations


def _log_h(z: Array) -> Array:
    """log(φ(z) + z·Φ(z)), stable for z → −∞ (Ament et al. 2023, arXiv:2310.20708, eq. 9)."""
    out = np.empty_like(z)
    near = z > -1.0
    u = z[near]
    out[near] = np.log(np.exp(-0.5 * u * u) / np.sqrt(2 * np.pi) + u * ndtr(u))
    u = -z[~near]
    mills = u * np.sqrt(np.pi / 2) * erfcx(u / np.sqrt(2))
    # beyond 1e5 the difference 1 − mills is lost to rounding; its limit is u⁻²
    tail = np.where(u < 1e5, np.log(np.maximum(1.0 - mills, 1e-300)), -2.0 * np.log(u))
    out[~near] = -0.5 * u * u - 0.5 * np.log(2 * np.pi) + tail
    return out


def log_ei(mean: Array, std: Array, best: float, scale: float) -> Array:
    """Log expected improvement, larger is better (Jones et al. 1998; Liu et al. 2024, eq. 8-9).

        log E[max(f − best, 0)],   f ~ N(mean, std²)

    Args:
        mean: posterior mean, shape (n,).
        std: posterior standard deviation without noise, shape (n,), > 0.
        best: the incumbent's posterior mean.
        scale: standard deviation of the scores; unused here.

    Returns:
        Shape (n,), finite even where EI itself underflows to 0.0.
    """
    return np.log(std) + _log_h((mean - best) / std)


def log_pi(mean: Array, std: Array, best: float, scale: float) -> Array:
    """Log probability of an improvement by ξ·scale (Kushner 1964), shape (n,), as for `log_ei`."""
    out: Array = log_ndtr((mean - best - XI * scale) / std)
    return out


def ucb(mean: Array, std: Array, best: float, scale: float) -> Array:
    """Upper confidence bound μ + β·σ (Srinivas et al. 2009; Liu et al., eq. 10), shape (n,)."""
    return mean + BETA * std


ACQUISITIONS: dict[str, Acquisition] = {"ei": log_ei, "pi": log_pi, "ucb": ucb}
