"""The posterior against formulas written out again, and the laws any fit must keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

import strategies as s
from mlflow_soup import surrogate
from mlflow_soup.surrogate import fit

POINTS = np.array([0.0, 0.31, 0.5, 0.64, 0.72, 0.88, 1.0])
SCORES = np.array([0.412, 0.455, 0.478, 0.486, 0.489, 0.481, 0.470])
GRID = np.linspace(0.0, 1.0, 101)


def matern(first, second, length):
    """Matérn correlation of smoothness 5/2 (Rasmussen & Williams 2006, eq. 4.17)."""
    r = np.sqrt(5.0) * np.abs(first[:, None] - second[None, :]) / length
    return (1.0 + r + r**2 / 3.0) * np.exp(-r)


def log_posterior(points, y, variance, length, noise):
    """Log density of standardised scores and hyper-parameters, up to a constant."""
    covariance = variance * matern(points, points, length) + noise * np.eye(len(points))
    prior = (
        norm.logpdf(np.log(variance), np.log(1.0), 1.0)
        + norm.logpdf(np.log(length), np.log(0.4), 0.6)
        + norm.logpdf(np.log(noise), np.log(5e-3), 1.5)
    )
    return multivariate_normal.logpdf(y, cov=covariance) + prior


def learnt(posterior):
    """Signal variance, length-scale, noise variance."""
    return np.exp(posterior.regressor.kernel_.theta)


def test_the_posterior_is_that_of_the_textbook():
    posterior = fit(POINTS, SCORES)
    variance, length, noise = learnt(posterior)
    y = (SCORES - SCORES.mean()) / SCORES.std()
    prior = variance * matern(POINTS, POINTS, length)
    cross = variance * matern(GRID, POINTS, length)
    gain = cross @ np.linalg.inv(prior + noise * np.eye(len(POINTS)))
    mean, std = posterior.predict(GRID)
    np.testing.assert_allclose(mean, SCORES.mean() + SCORES.std() * (gain @ y), atol=1e-7)
    latent = variance - np.einsum("ij,ij->i", gain, cross)  # of f, not of y = f + ε
    np.testing.assert_allclose(std, SCORES.std() * np.sqrt(latent), atol=1e-6)


def test_no_other_hyper_parameters_are_more_probable():
    y = (SCORES - SCORES.mean()) / SCORES.std()
    found = log_posterior(POINTS, y, *learnt(fit(POINTS, SCORES)))
    others = [
        log_posterior(POINTS, y, variance, length, noise)
        for variance in np.geomspace(1e-2, 1e2, 17)
        for length in np.geomspace(0.05, 5.0, 17)
        for noise in np.geomspace(1e-6, 1.0, 17)
    ]
    assert found >= max(others)
    assert found - max(others) < 0.5  # the grid is fine enough to have come close


@pytest.mark.parametrize("curve", [np.sin, np.exp, lambda x: -((x - 0.7) ** 2)])
def test_a_smooth_curve_is_followed_through_its_points_and_between(curve):
    points = np.linspace(0.0, 1.0, 9)
    mean, std = fit(points, curve(points)).predict(GRID)
    spread = np.ptp(curve(GRID))
    assert np.abs(mean - curve(GRID)).max() < 0.01 * spread
    assert std.max() < 0.1 * spread


def test_doubt_grows_with_the_distance_from_what_was_measured():
    _, std = fit(np.array([0.0, 0.1, 0.2]), np.array([0.5, 0.6, 0.55])).predict(GRID)
    assert (np.diff(std[20:]) > 0).all()


@s.FEW
@given(observed=s.observations())
def test_the_posterior_is_finite_and_never_certain(observed):
    mean, std = fit(*observed).predict(GRID)
    assert mean.shape == std.shape == GRID.shape
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert (std > 0).all()


@pytest.mark.parametrize("score", [0.0, 0.1, -3.5, 1e6])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_constant_scores_have_that_constant_for_a_posterior_mean(score, count):
    mean, std = fit(POINTS[:count], np.full(count, score)).predict(GRID)
    np.testing.assert_allclose(mean, score, rtol=1e-9, atol=1e-12)
    assert (std > 0).all()


def test_one_point_says_nothing_of_what_is_far_from_it():
    mean, std = fit(np.array([1.0]), np.array([0.6])).predict(GRID)
    np.testing.assert_allclose(mean, 0.6)
    assert (np.diff(std) < 0).all()


def test_a_point_measured_twice_lies_between_its_measurements():
    points, scores = np.array([0.0, 0.5, 0.5, 1.0]), np.array([0.4, 0.5, 0.7, 0.4])
    mean, _ = fit(points, scores).predict(np.array([0.5]))
    assert mean[0] == pytest.approx(0.6, abs=0.05)


@s.FEW
@given(
    observed=s.observations(least=2),
    factor=st.sampled_from([1e-3, 0.3, 7.0, 100.0]),
    shift=st.sampled_from([-5.0, 0.0, 0.5]),
)
def test_the_unit_and_origin_of_scores_do_not_matter(observed, factor, shift):
    points, scores = observed
    if np.ptp(scores) == 0.0:
        return  # constants have a test of their own
    mean, std = fit(points, scores).predict(GRID)
    its_mean, its_std = fit(points, shift + factor * scores).predict(GRID)
    scale = factor * scores.std()
    np.testing.assert_allclose(its_mean, shift + factor * mean, atol=2e-3 * scale)
    np.testing.assert_allclose(its_std, factor * std, atol=2e-3 * scale)


@s.FEW
@given(observed=s.observations(least=2), seed=st.integers(0, 99))
def test_the_order_of_observations_does_not_matter(observed, seed):
    points, scores = observed
    order = np.random.default_rng(seed).permutation(len(points))
    mean, std = fit(points, scores).predict(GRID)
    its_mean, its_std = fit(points[order], scores[order]).predict(GRID)
    scale = max(scores.std(), 1e-3)
    np.testing.assert_allclose(its_mean, mean, atol=2e-3 * scale)
    np.testing.assert_allclose(its_std, std, atol=2e-3 * scale)


def test_what_happens_to_the_arguments_later_does_not_matter():
    points, scores = POINTS.copy(), SCORES.copy()
    posterior = fit(points, scores)
    before = posterior.predict(GRID)
    points[:], scores[:] = 0.5, 9.0
    np.testing.assert_array_equal(posterior.predict(GRID), before)
    np.testing.assert_array_equal(fit(POINTS, SCORES).predict(GRID), before)


def test_the_global_random_state_is_neither_read_nor_moved():
    np.random.seed(8)
    before = np.random.get_state()[1].copy()
    scores = SCORES + 1e-3  # not fitted by any other test, so not remembered
    first = fit(POINTS, scores).predict(GRID)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    surrogate._fit.cache_clear()
    np.random.seed(9)
    np.testing.assert_array_equal(fit(POINTS, scores).predict(GRID), first)
