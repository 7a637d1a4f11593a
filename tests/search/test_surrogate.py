"""The posterior against textbook formulas, and laws that hold for any fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

import strategies as s
from mlflow_soup.search import surrogate
from mlflow_soup.search.surrogate import fit


def pairs(lams):
    """The merge weights of two parents for given λ."""
    return np.column_stack([1.0 - np.array(lams), lams])


POINTS = pairs([0.0, 0.31, 0.5, 0.64, 0.72, 0.88, 1.0])
SCORES = np.array([0.412, 0.455, 0.478, 0.486, 0.489, 0.481, 0.470])
LAMS = np.linspace(0.0, 1.0, 101)
GRID = pairs(LAMS)
# weights of three parents: each parent alone, the uniform soup, and others
THREE = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.3333, 0.3333, 0.3334], [0.1, 0.3, 0.6], [0, 0.5, 0.5]]
)
INSIDE = np.random.default_rng(5).dirichlet(np.ones(3), 40)


def matern(first, second, length):
    """Matérn correlation of smoothness 5/2 (Rasmussen & Williams 2006, eq. 4.17).

    For a pair the distance is |λ − λ'|; in general the edges of the simplex have length 1.
    """
    if first.shape[1] == 2:
        distance = np.abs(first[:, None, 1] - second[None, :, 1])
    else:
        distance = np.linalg.norm(first[:, None] - second[None, :], axis=2) / np.sqrt(2.0)
    r = np.sqrt(5.0) * distance / length
    return (1.0 + r + r**2 / 3.0) * np.exp(-r)


def log_posterior(points, y, variance, length, noise):
    """The log density of standardised scores and hyper-parameters, up to a constant."""
    covariance = variance * matern(points, points, length) + noise * np.eye(len(points))
    prior = (
        norm.logpdf(np.log(variance), np.log(1.0), 1.0)
        + norm.logpdf(np.log(length), np.log(0.4), 0.6)
        + norm.logpdf(np.log(noise), np.log(5e-3), 1.5)
    )
    return multivariate_normal.logpdf(y, cov=covariance) + prior


def everywhere(points):
    """Merge weights in the whole space, for the number of parents in `points`."""
    count = points.shape[1]
    return np.concatenate([np.eye(count), np.random.default_rng(5).dirichlet(np.ones(count), 60)])


def learnt(posterior):
    """The fitted signal variance, length-scale and noise variance."""
    return np.exp(posterior.regressor.kernel_.theta)


@pytest.mark.parametrize(
    ("points", "grid"), [(POINTS, GRID), (THREE, INSIDE)], ids=["pair", "three"]
)
def test_the_posterior_equals_the_textbook_formula(points, grid):
    scores = SCORES[: len(points)]
    posterior = fit(points, scores)
    variance, length, noise = learnt(posterior)
    y = (scores - scores.mean()) / scores.std()
    prior = variance * matern(points, points, length)
    cross = variance * matern(grid, points, length)
    gain = cross @ np.linalg.inv(prior + noise * np.eye(len(points)))
    mean, std = posterior.predict(grid)
    np.testing.assert_allclose(mean, scores.mean() + scores.std() * (gain @ y), atol=1e-7)
    latent = variance - np.einsum("ij,ij->i", gain, cross)  # of f, not of y = f + ε
    np.testing.assert_allclose(std, scores.std() * np.sqrt(latent), atol=1e-6)


@pytest.mark.parametrize("points", [POINTS, THREE], ids=["pair", "three"])
def test_a_miss_is_a_leave_one_out_error(points):
    scores = SCORES[: len(points)]
    posterior = fit(points, scores)
    variance, length, noise = learnt(posterior)
    y = (scores - posterior.mean) / posterior.scale
    for i, miss in enumerate(posterior.misses):
        rest = np.delete(np.arange(len(points)), i)
        prior = variance * matern(points[rest], points[rest], length)
        cross = variance * matern(points[[i]], points[rest], length)
        (predicted,) = cross @ np.linalg.solve(prior + noise * np.eye(len(rest)), y[rest])
        assert miss == pytest.approx(posterior.scale * (y[i] - predicted), abs=1e-8)


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
    assert found - max(others) < 0.5  # the grid is fine enough to come close


@pytest.mark.parametrize("curve", [np.sin, np.exp, lambda x: -((x - 0.7) ** 2)])
def test_a_smooth_curve_is_followed_at_and_between_its_points(curve):
    lams = np.linspace(0.0, 1.0, 9)
    mean, std = fit(pairs(lams), curve(lams)).predict(GRID)
    spread = np.ptp(curve(LAMS))
    assert np.abs(mean - curve(LAMS)).max() < 0.01 * spread
    assert std.max() < 0.1 * spread


def test_uncertainty_grows_with_the_distance_from_the_measured_points():
    _, std = fit(pairs([0.0, 0.1, 0.2]), np.array([0.5, 0.6, 0.55])).predict(GRID)
    assert (np.diff(std[20:]) > 0).all()


@s.FEW
@given(observed=s.observations())
def test_the_posterior_is_finite_and_never_certain(observed):
    grid = everywhere(observed[0])
    mean, std = fit(*observed).predict(grid)
    assert mean.shape == std.shape == (len(grid),)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert (std > 0).all()


@pytest.mark.parametrize("score", [0.0, 0.1, -3.5, 1e6])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_constant_scores_have_a_constant_posterior_mean(score, count):
    mean, std = fit(POINTS[:count], np.full(count, score)).predict(GRID)
    np.testing.assert_allclose(mean, score, rtol=1e-9, atol=1e-12)
    assert (std > 0).all()


def test_one_point_does_not_determine_points_far_from_it():
    mean, std = fit(pairs([1.0]), np.array([0.6])).predict(GRID)
    np.testing.assert_allclose(mean, 0.6)
    assert (np.diff(std) < 0).all()


def test_a_point_measured_twice_lies_between_its_measurements():
    points, scores = pairs([0.0, 0.5, 0.5, 1.0]), np.array([0.4, 0.5, 0.7, 0.4])
    mean, _ = fit(points, scores).predict(pairs([0.5]))
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
        return  # constant scores have their own test
    grid = everywhere(points)
    mean, std = fit(points, scores).predict(grid)
    its_mean, its_std = fit(points, shift + factor * scores).predict(grid)
    scale = factor * scores.std()
    np.testing.assert_allclose(its_mean, shift + factor * mean, atol=2e-3 * scale)
    np.testing.assert_allclose(its_std, factor * std, atol=2e-3 * scale)


@s.FEW
@given(observed=s.observations(least=2), seed=st.integers(0, 99))
def test_the_order_of_observations_does_not_matter(observed, seed):
    points, scores = observed
    order = np.random.default_rng(seed).permutation(len(points))
    grid = everywhere(points)
    mean, std = fit(points, scores).predict(grid)
    its_mean, its_std = fit(points[order], scores[order]).predict(grid)
    scale = max(scores.std(), 1e-3)
    np.testing.assert_allclose(its_mean, mean, atol=2e-3 * scale)
    np.testing.assert_allclose(its_std, std, atol=2e-3 * scale)


@s.FEW
@given(observed=s.observations(least=2), seed=st.integers(0, 99))
def test_the_order_of_the_parents_does_not_matter(observed, seed):
    points, scores = observed
    order = np.random.default_rng(seed).permutation(points.shape[1])
    grid = everywhere(points)
    mean, std = fit(points, scores).predict(grid)
    its_mean, its_std = fit(points[:, order], scores).predict(grid[:, order])
    scale = max(scores.std(), 1e-3)
    np.testing.assert_allclose(its_mean, mean, atol=2e-3 * scale)
    np.testing.assert_allclose(its_std, std, atol=2e-3 * scale)


def test_later_changes_of_the_arguments_do_not_matter():
    points, scores = POINTS.copy(), SCORES.copy()
    posterior = fit(points, scores)
    before = posterior.predict(GRID)
    points[:], scores[:] = 0.5, 9.0
    np.testing.assert_array_equal(posterior.predict(GRID), before)
    np.testing.assert_array_equal(fit(POINTS, SCORES).predict(GRID), before)


def test_the_global_random_state_is_neither_read_nor_changed():
    np.random.seed(8)
    before = np.random.get_state()[1].copy()
    scores = SCORES + 1e-3  # no other test fits these scores, so they are not cached
    first = fit(POINTS, scores).predict(GRID)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    surrogate._fit.cache_clear()
    np.random.seed(9)
    np.testing.assert_array_equal(fit(POINTS, scores).predict(GRID), first)


def test_a_flat_curve_is_fitted_without_a_warning(recwarn):
    points = np.array([[1.0 - lam, lam] for lam in np.linspace(0.5, 0.6, 30)])
    scores = np.full(30, 0.98)
    scores[0] = 0.845
    surrogate.fit(points, scores)
    assert [str(warning.message) for warning in recwarn] == []


def test_noise_that_is_told_is_not_taken_for_the_curve():
    rng = np.random.default_rng(3)
    noisy = SCORES + rng.normal(0.0, 0.03, len(SCORES))
    misses, levels = [], []
    for noise in (0.0, 0.04):
        posterior = fit(POINTS, noisy, noise=noise)
        misses.append(np.abs(posterior.predict(POINTS)[0] - noisy).mean())
        levels.append(posterior.regressor.kernel_.k2.noise_level)
    assert misses[0] < misses[1]
    assert levels[0] < levels[1] <= 1.0
    # as large as it is: all variation may be noise, and the mean is the best guess
    flat, _ = fit(POINTS, noisy, noise=10.0).predict(GRID)
    assert np.ptp(flat) < 0.5 * np.ptp(noisy)
