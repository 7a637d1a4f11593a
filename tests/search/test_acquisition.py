"""Acquisition functions against integrals and numbers computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from mlflow_soup.search.acquisition import ACQUISITIONS, BETA, XI, log_ei, log_pi, ucb


def one(utility, mean, std, best, scale=1.0):
    """A utility at a single point."""
    (value,) = utility(np.array([mean]), np.array([std]), best, scale)
    return float(value)


def integrated_log_ei(mean, std, best):
    """log ∫ max(f − best, 0) N(f; mean, std²) df, with the Gaussian outside the integral.

    With z = (mean − best)/std and t = (f − best)/std, φ(t − z) = φ(z)·exp(tz − t²/2), so

        EI = std·φ(z)·∫₀^∞ t·exp(tz − t²/2) dt

    For z < 0 it is scaled by u = −tz, so that no part of it is tiny.
    """
    z = (mean - best) / std
    if z < -1:
        inner, _ = quad(lambda u: u * np.exp(-u - 0.5 * (u / z) ** 2), 0, 60, epsabs=0, limit=200)
        return np.log(std) + norm.logpdf(z) + np.log(inner) - 2 * np.log(-z)
    inner, _ = quad(lambda t: t * norm.pdf(t - z), 0, max(z, 0) + 40, points=[max(z, 0)], limit=200)
    return np.log(std) + np.log(inner)


@pytest.mark.parametrize(
    "z", [-1e4, -1e3, -300.0, -38.0, -10.0, -3.0, -1.001, -1.0, -0.999, -0.3, 0.0, 0.5, 2.0, 8.0]
)
@pytest.mark.parametrize("std", [1e-4, 1.0, 30.0])
def test_log_ei_is_the_log_of_the_integral(z, std):
    best = 0.4
    expected = integrated_log_ei(best + z * std, std, best)
    assert one(log_ei, best + z * std, std, best) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_log_ei_by_hand():
    # mean = best: E max(N(0, 1), 0) = φ(0) = 1/√(2π)
    assert one(log_ei, 0.3, 1.0, 0.3) == pytest.approx(-0.5 * np.log(2 * np.pi))
    # hardly any uncertainty: EI is the difference
    assert one(log_ei, 0.8, 1e-6, 0.3) == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("u", [1e5, 1e6, 1e7, 1e8])
def test_log_ei_keeps_its_digits_far_below_the_incumbent(u):
    # EI/std = φ(u)·(u⁻² − 3u⁻⁴ + …) at u standard deviations (Abramowitz & Stegun 26.2.12)
    expected = -0.5 * u * u - 0.5 * np.log(2 * np.pi) - 2 * np.log(u)
    precision = max(1e-3, 2 * np.spacing(0.5 * u * u))
    assert one(log_ei, -u, 1.0, 0.0) == pytest.approx(expected, abs=precision, rel=0)


def test_log_ei_is_finite_and_rises_where_ei_itself_is_zero():
    z = -np.concatenate([np.geomspace(1e8, 1e2, 4001), np.linspace(99.0, -9.0, 4001)])
    value = log_ei(z, np.ones_like(z), 0.0, 1.0)
    assert np.isfinite(value).all()
    assert (np.diff(value) > 0).all()
    assert norm.pdf(z[0]) == 0.0  # float64 has no such number


sixteenths = st.integers(-16, 16).map(lambda n: n / 16)  # sums of them are exact
stds = st.floats(1e-6, 10)


@given(mean=sixteenths, std=stds, best=sixteenths, more=st.floats(1e-3, 1))
def test_a_larger_mean_never_lowers_the_utility(mean, std, best, more):
    for utility in ACQUISITIONS.values():
        assert one(utility, mean + more, std, best) >= one(utility, mean, std, best)


@given(mean=sixteenths, std=stds, short=st.floats(0, 2), factor=st.floats(1.01, 10))
def test_below_the_incumbent_a_larger_std_raises_the_utility(mean, std, short, factor):
    for utility in (log_ei, log_pi, ucb):
        assert one(utility, mean, factor * std, mean + short) > one(
            utility, mean, std, mean + short
        )


@given(mean=sixteenths, std=stds, best=sixteenths, shift=sixteenths)
def test_only_the_distance_to_the_incumbent_matters(mean, std, best, shift):
    assert one(log_ei, mean + shift, std, best + shift) == one(log_ei, mean, std, best)
    its_log_pi = one(log_pi, mean + shift, std, best + shift, scale=0.0)
    assert its_log_pi == one(log_pi, mean, std, best, scale=0.0)


def test_log_pi_by_hand():
    # the probability of passing best + ξ·scale is one half if the mean is exactly there
    assert one(log_pi, 0.3 + XI * 2.0, 0.1, 0.3, scale=2.0) == pytest.approx(np.log(0.5))
    # one standard deviation above and below: Φ(1) = 0.8413447, Φ(−1) = 0.1586553
    assert np.exp(one(log_pi, 0.4, 0.1, 0.3, scale=0.0)) == pytest.approx(0.8413447)
    assert np.exp(one(log_pi, 0.2, 0.1, 0.3, scale=0.0)) == pytest.approx(0.1586553)
    assert XI == 0.01


def test_log_pi_is_finite_and_rises_where_the_probability_itself_is_zero():
    z = -np.geomspace(1e8, 1e-3, 2001)
    value = log_pi(z, np.ones_like(z), 0.0, 0.0)
    assert np.isfinite(value).all()
    assert (np.diff(value) > 0).all()


def test_ucb_by_hand():
    assert one(ucb, 0.5, 0.1, 0.9, scale=7.0) == pytest.approx(0.696)  # 0.5 + 1.96 · 0.1
    assert BETA == 1.96


@pytest.mark.parametrize("name", sorted(ACQUISITIONS))
def test_acquisition_functions_do_not_change_their_arguments(name):
    mean, std = np.linspace(-1, 1, 5), np.linspace(0.1, 2, 5)
    before = mean.copy(), std.copy()
    assert ACQUISITIONS[name](mean, std, 0.2, 0.5).shape == (5,)
    np.testing.assert_array_equal((mean, std), before)
