"""Universal kriging against textbook equations, and laws that hold for any prediction.

The trend here uses ordinary monomials of all weights but the first. This is another basis than the
package's, for the same polynomials.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.stats import multivariate_normal

import strategies as s
from mlflow_soup.search.kriging import LENGTH, LENGTHS, NUGGET, NUGGETS, Kriging, at, estimate
from mlflow_soup.search.space import Space, distances

LIKE = Kriging(np.zeros((0, 2)), 0, 0.6, 0.03)
PAIR, TRIPLE, QUADRUPLE = 2, 3, 4


def scattered(count, size, seed=0):
    """The start of a search, and more points that are well apart."""
    points = [recipe.lam for recipe in Space.simplex(count, 0.0).start()]
    for point in np.random.default_rng(seed).dirichlet(np.ones(count), 200):
        if distances(point[None], np.array(points)).min() > 0.04:
            points.append(point)
    return np.array(points[:size])


def grid(count, size=40):
    return np.concatenate([np.eye(count), np.random.default_rng(7).dirichlet(np.ones(count), size)])


def monomials(points, order):
    """1, the weights, the sum of their squares, and all products of two weights."""
    free = points[:, 1:]
    columns = [np.ones((len(points), 1))]
    if order >= 1:
        columns.append(free)
    if order == 2:
        columns.append((points**2).sum(axis=1, keepdims=True))
    if order == 3:
        first, second = np.triu_indices(free.shape[1])
        columns.append(free[:, first] * free[:, second])
    return np.column_stack(columns)


def correlation(first, second, length):
    """Matérn correlation of smoothness 5/2, for distances on a simplex with edges of length 1."""
    distance = np.linalg.norm(first[:, None] - second[None, :], axis=2) / math.sqrt(2.0)
    r = math.sqrt(5.0) * distance / length
    return (1.0 + r + r * r / 3.0) * np.exp(-r)


def textbook(model, points):
    """Weights and variance by the kriging system with Lagrange multipliers (Cressie 1993, 3.4)."""
    basis = monomials(model.points, model.order)
    size, terms = basis.shape
    covariance = correlation(model.points, model.points, model.length)
    covariance += model.nugget**2 * np.eye(size)
    system = np.block([[covariance, basis], [basis.T, np.zeros((terms, terms))]])
    cross = correlation(model.points, points, model.length)
    right = np.concatenate([cross, monomials(points, model.order).T])
    solution = np.linalg.solve(system, right)
    return solution[:size].T, 1.0 - np.einsum("ij,ij->j", right, solution)


def least_squares(model, points, curve):
    """Generalised least squares, then simple kriging of the residuals."""
    covariance = correlation(model.points, model.points, model.length)
    root = np.linalg.cholesky(covariance + model.nugget**2 * np.eye(len(curve)))
    basis = monomials(model.points, model.order)
    white = np.linalg.solve(root, np.column_stack([basis, curve]))
    trend = np.linalg.lstsq(white[:, :-1], white[:, -1], rcond=None)[0]
    rest = np.linalg.solve(root.T, np.linalg.solve(root, curve - basis @ trend))
    cross = correlation(points, model.points, model.length)
    return monomials(points, model.order) @ trend + cross @ rest


def contrasts(model):
    """An orthonormal basis of the contrasts, which are orthogonal to the trend; its covariance."""
    free = null_space(monomials(model.points, model.order).T)
    covariance = correlation(model.points, model.points, model.length)
    return free, free.T @ (covariance + model.nugget**2 * np.eye(len(free))) @ free


def gram(curves):
    return curves @ curves.T / curves.shape[1]


SHAPES = [(2, 4), (2, 6), (2, 9), (3, 5), (3, 7), (3, 9), (4, 6), (4, 12)]
shapes = pytest.mark.parametrize(("count", "size"), SHAPES)


@shapes
@pytest.mark.parametrize(("length", "nugget"), [(0.25, 0.3), (0.9, 0.01), (2.2, 0.1)])
def test_weights_and_variance_are_those_of_the_textbook(count, size, length, nugget):
    points = scattered(count, size)
    model = at(points, Kriging(points, 0, length, nugget))
    weights, variance = model.weights(grid(count))
    expected, square = textbook(model, grid(count))
    np.testing.assert_allclose(weights, expected, atol=1e-7)
    np.testing.assert_allclose(variance, square, atol=1e-7)
    curve = np.random.default_rng(1).normal(size=size)
    np.testing.assert_allclose(weights @ curve, least_squares(model, grid(count), curve), atol=1e-6)


@shapes
def test_the_scale_is_that_of_the_contrasts(count, size):
    points = scattered(count, size)
    model = at(points, LIKE)
    curves = np.random.default_rng(2).normal(size=(size, 30))
    free, covariance = contrasts(model)
    parts = free.T @ curves
    expected = np.einsum("ij,ij->", parts, np.linalg.solve(covariance, parts)) / parts.size
    assert model.freedom == free.shape[1]
    assert model.scale(gram(curves)) == pytest.approx(expected, rel=1e-8)


def test_without_freedom_the_scale_comes_from_the_next_narrower_trend():
    # three points of a pair: the part that is not a line is one contrast, (y₀ − 2·y½ + y₁)/√6
    points = scattered(2, 3)
    model = at(points, LIKE)
    assert (model.order, model.freedom) == (2, 0)
    curves = np.array([[0.0, 1.0], [1.0, 5.0], [4.0, 1.0]])
    contrast = np.array([1.0, 1.0, -2.0]) / math.sqrt(6.0)  # parents first, then the middle
    covariance = correlation(points, points, 0.6) + 0.03**2 * np.eye(3)
    expected = np.mean((contrast @ curves) ** 2) / (contrast @ covariance @ contrast)
    assert model.scale(gram(curves)) == pytest.approx(expected)


def test_a_single_point_gives_no_scale():
    assert at(scattered(2, 1), LIKE).scale(np.array([[4.0]])) == pytest.approx(0.0, abs=1e-12)


def likelihood(points, order, groups, length, nugget):
    """The density of all curves' contrasts, at the most likely variance of each group."""
    free, covariance = contrasts(Kriging(points, order, length, nugget))
    total = 0.0
    for curves in groups:
        parts = (free.T @ curves).T
        square = np.mean(np.einsum("ij,ji->i", parts, np.linalg.solve(covariance, parts.T)))
        square /= free.shape[1]
        total += multivariate_normal.logpdf(parts, cov=square * covariance).sum()
    return total


@pytest.mark.parametrize(("count", "size"), [(2, 5), (2, 8), (3, 6), (3, 10), (4, 7)])
@pytest.mark.parametrize(("length", "nugget"), [(0.25, 0.01), (0.6, 0.3), (1.4, 0.003)])
def test_the_smoothness_maximises_the_likelihood_of_the_contrasts(count, size, length, nugget):
    points = scattered(count, size)
    rng = np.random.default_rng(3)
    covariance = correlation(points, points, length) + nugget**2 * np.eye(size)
    curves = np.linalg.cholesky(covariance) @ rng.normal(size=(size, 60))
    groups = [curves[:, :40], 100.0 * curves[:, 40:]]  # each group has its own σ²
    found = estimate(points, [gram(g) for g in groups], [g.shape[1] for g in groups])
    table = {
        (a, b): likelihood(points, found.order, groups, a, b) for a in LENGTHS for b in NUGGETS
    }
    assert table[found.length, found.nugget] == pytest.approx(max(table.values()), abs=1e-6)


def test_groups_count_by_their_number_of_curves():
    points = scattered(2, 7)
    rng = np.random.default_rng(4)
    rough = rng.normal(size=(7, 50))
    smooth = np.linalg.cholesky(correlation(points, points, 1.4)) @ rng.normal(size=(7, 50))
    grams = [gram(rough), gram(smooth)]
    assert estimate(points, grams, [1000, 1]).nugget > estimate(points, grams, [1, 1000]).nugget


@pytest.mark.parametrize(("count", "size"), [(2, 2), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5)])
def test_fewer_than_two_contrasts_do_not_determine_the_smoothness(count, size):
    curves = np.random.default_rng(5).normal(size=(size, 50))
    found = estimate(scattered(count, size), [gram(curves)], [50])
    assert (found.length, found.nugget) == (LENGTH, NUGGET)


@pytest.mark.parametrize(
    ("count", "orders"),
    [
        # number of points → order of the trend; the comment gives the number of terms of each order
        (PAIR, {1: 0, 2: 1, 3: 2, 9: 2}),  # 1, 2, 3
        (TRIPLE, {1: 0, 2: 0, 3: 1, 4: 2, 6: 2, 7: 3, 12: 3}),  # 1, 3, 4, 6 + 1 spare point
        (QUADRUPLE, {3: 0, 4: 1, 5: 2, 10: 2, 11: 3}),  # 1, 4, 5, 10 + 1 spare point
    ],
)
def test_the_trend_is_as_wide_as_the_points_determine(count, orders):
    for size, order in orders.items():
        assert at(scattered(count, size), LIKE).order == order, size


def test_redundant_points_do_not_widen_the_trend():
    two = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert at(np.repeat(two, 4, axis=0), LIKE).order == 1
    edge = np.column_stack([scattered(2, 8), np.zeros(8)])  # the third parent has no weight
    assert at(edge, LIKE).order == 0


@s.FEW
@given(drawn=st.data(), count=st.integers(2, 4), size=st.integers(1, 13), seed=st.integers(0, 99))
def test_weights_sum_to_one_and_every_trend_is_predicted_exactly(drawn, count, size, seed):
    points = scattered(count, size, seed)
    like = Kriging(
        points, 0, drawn.draw(st.sampled_from(LENGTHS)), drawn.draw(st.sampled_from(NUGGETS))
    )
    model = at(points, like)
    weights, variance = model.weights(grid(count))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-7)
    beta = np.random.default_rng(seed).normal(size=monomials(points, model.order).shape[1])
    np.testing.assert_allclose(
        weights @ monomials(points, model.order) @ beta,
        monomials(grid(count), model.order) @ beta,
        atol=1e-6,
    )
    assert np.isfinite(variance).all()
    assert (variance > 0).all()


@shapes
def test_with_a_tiny_nugget_every_curve_passes_through_its_points(count, size):
    points = scattered(count, size)
    weights, variance = at(points, Kriging(points, 0, 0.6, 1e-4)).weights(points)
    np.testing.assert_allclose(weights, np.eye(size), atol=1e-4)
    assert variance.max() < 1e-6


@shapes
def test_with_a_huge_nugget_nothing_but_the_trend_is_left(count, size):
    points = scattered(count, size)
    model = at(points, Kriging(points, 0, 0.25, 1e3))
    basis = monomials(points, model.order)
    expected = monomials(grid(count), model.order) @ np.linalg.pinv(basis)
    np.testing.assert_allclose(model.weights(grid(count))[0], expected, atol=1e-4)


def test_variance_grows_with_the_distance_from_the_measured_points():
    lams = np.linspace(0.3, 1.0, 50)
    points, away = (np.column_stack([1.0 - x, x]) for x in (np.array([0.0, 0.1, 0.2, 0.3]), lams))
    for order in (0, 1, 2):
        assert (np.diff(Kriging(points, order, 0.6, 0.03).weights(away)[1]) > 0).all()


@shapes
def test_another_measurement_never_raises_the_variance(count, size):
    points = scattered(count, size)
    model = at(points, LIKE)
    before = model.weights(grid(count))[1]
    for new in grid(count, 3):
        more = Kriging(np.vstack([points, new]), model.order, model.length, model.nugget)
        assert (more.weights(grid(count))[1] <= before + 1e-9).all()


@shapes
def test_the_order_of_points_and_of_parents_does_not_matter(count, size):
    points, rng = scattered(count, size), np.random.default_rng(6)
    rows, parents = rng.permutation(size), rng.permutation(count)
    curves = rng.normal(size=(size, 20))
    model = estimate(points, [gram(curves)], [20])
    other = estimate(points[rows][:, parents], [gram(curves[rows])], [20])
    assert (other.order, other.length, other.nugget) == (model.order, model.length, model.nugget)
    assert other.scale(gram(curves[rows])) == pytest.approx(model.scale(gram(curves)))
    weights, variance = model.weights(grid(count))
    its_weights, its_variance = other.weights(grid(count)[:, parents])
    np.testing.assert_allclose(its_weights, weights[:, rows], atol=1e-7)
    np.testing.assert_allclose(its_variance, variance, atol=1e-7)


@shapes
@pytest.mark.parametrize("nugget", [0.001, 0.1])
def test_two_measurements_of_one_point_have_equal_weights(count, size, nugget):
    points = scattered(count, size)
    twice = np.vstack([points, points[:1]])
    model = at(points, Kriging(points, 0, 0.9, nugget))
    weights, variance = at(twice, Kriging(twice, 0, 0.9, nugget)).weights(grid(count))
    assert np.isfinite(weights).all()
    assert np.isfinite(variance).all()
    np.testing.assert_allclose(weights[:, 0], weights[:, -1], atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-7)
    if nugget == 0.001 and at(twice, model).order == model.order:
        together = weights[:, :-1].copy()
        together[:, 0] += weights[:, -1]
        np.testing.assert_allclose(together, model.weights(grid(count))[0], atol=1e-3)


@shapes
def test_duplicates_do_not_break_the_choice_of_smoothness(count, size):
    points = np.vstack([scattered(count, size)] * 2)
    curves = np.random.default_rng(8).normal(size=(2 * size, 20))
    noisy = estimate(points, [gram(curves)], [20])
    curves[size:] = curves[:size]
    exact = estimate(points, [gram(curves)], [20])
    assert exact.nugget == min(NUGGETS) < noisy.nugget
    for found in (noisy, exact):
        weights, variance = found.weights(grid(count))
        assert np.isfinite(weights).all()
        assert np.isfinite(variance).all()
        assert np.isfinite(found.scale(gram(curves)))


@shapes
@pytest.mark.parametrize("value", [0.0, 1.0, -250.0])
def test_curves_without_any_deviation_have_no_scale(count, size, value):
    curves = np.full((size, 10), value)
    found = estimate(scattered(count, size), [gram(curves)], [10])
    assert 0.0 <= found.scale(gram(curves)) < 1e-6 * max(1.0, value**2)
    np.testing.assert_allclose(found.weights(grid(count))[0] @ curves, value, rtol=1e-6)
