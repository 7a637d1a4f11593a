"""Recipes, feasible weights and candidates."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import kstest

import strategies as s
from mlflow_soup.records import Recipe
from mlflow_soup.search.space import GRID, INSIDE, Space, distances

counts = pytest.mark.parametrize("count", [2, 3, 4, 5])


@given(drawn=st.data(), count=st.integers(2, 6))
def test_a_recipe_is_its_weights_to_four_decimals_and_sums_to_one(drawn, count):
    weights = drawn.draw(s.weights(count))
    lam = Space.simplex(count, 0.0).recipe(weights).lam
    steps = [round(1e4 * weight) for weight in lam]
    assert lam == tuple(step / 1e4 for step in steps)
    assert sum(steps) == 10_000
    assert min(steps) >= 0
    # one of the largest weights gets the rest: at most half a step per weight
    *off, most = sorted(abs(np.array(lam) - weights))
    assert max(off) <= 0.5e-4 + 1e-12
    assert most <= 0.5e-4 * count + 1e-12
    if most > 0.51e-4:
        taker = int(np.argmax(abs(np.array(lam) - weights)))
        # if the sum is too large, the rest is taken from an older parent
        among = weights if lam[taker] > weights[taker] else weights[:-1]
        assert weights[taker] >= among.max() - 1e-4


@given(drawn=st.data(), count=st.integers(2, 6))
def test_the_recipe_of_a_recipes_weights_is_the_same_recipe(drawn, count):
    space = Space.simplex(count, 0.0)
    recipe = space.recipe(drawn.draw(s.weights(count)))
    assert space.recipe(recipe.lam) == recipe
    assert space.recipe(list(recipe.lam)) == recipe
    assert space.recipe(np.array(recipe.lam)) == recipe


@given(space=s.spaces(), lam=st.floats(0, 1))
def test_a_single_number_is_the_weight_of_the_newer_parent(space, lam):
    recipe = space.recipe(lam)
    assert recipe == space.recipe((1.0 - lam, lam))
    assert abs(recipe.lam[1] - lam) <= 0.5e-4 + 1e-12
    assert recipe.lam[1] == float(f"{recipe.lam[1]:.4f}")


def test_a_missing_rest_goes_to_the_largest_weight_and_among_equals_to_the_newest():
    space = Space.simplex(3, 0.0)
    assert space.recipe((1 / 3, 1 / 3, 1 / 3)).lam == (0.3333, 0.3333, 0.3334)
    # 0.66666 and 0.16667 twice would be 1.0001 together
    assert space.recipe((0.66666, 0.16667, 0.16667)).lam == (0.6666, 0.1667, 0.1667)


def test_an_excess_is_taken_from_an_older_parent():
    space = Space.simplex(4, 0.5)
    # 0.1667 three times and 0.5 would be 1.0001 together
    assert space.recipe((1 / 6, 1 / 6, 1 / 6, 0.5)).lam == (0.1667, 0.1667, 0.1666, 0.5)
    assert space.feasible(space.recipe((1 / 6, 1 / 6, 1 / 6, 0.5)))
    # no older parent has a large enough weight
    tiny = (*[0.00006] * 7, 1.0 - 0.00042)
    assert Space.simplex(8, 0.0).recipe(tiny).lam == (*[0.0001] * 7, 0.9993)


@pytest.mark.parametrize("count", range(2, 51))
def test_the_plain_average_is_feasible_if_alpha_is_its_weight(count):
    space = Space.simplex(count, 1 / count)
    assert space.feasible(space.uniform())
    assert sum(round(1e4 * weight) for weight in space.uniform().lam) == 10_000


@given(recipe=s.recipes())
def test_merge_weights_are_between_0_and_1_and_sum_to_1(recipe):
    assert all(0.0 <= lam <= 1.0 for lam in recipe.lam)
    assert sum(recipe.lam) == pytest.approx(1.0, abs=1e-15)


def test_the_last_weight_is_that_of_the_newest_parent():
    pair, three = Space.pair(0.5), Space.simplex(3, 0.5)
    assert pair.recipe(0.88) == Recipe("linear", (0.12, 0.88))
    assert pair.alone() == (Recipe("linear", (1.0, 0.0)), Recipe("linear", (0.0, 1.0)))
    assert pair.uniform() == Recipe("linear", (0.5, 0.5))
    assert [recipe.lam for recipe in three.alone()] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert three.uniform() == Recipe("linear", (0.3333, 0.3333, 0.3334))


@counts
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7])
def test_the_start_is_the_parents_and_the_uniform_soup(count, alpha):
    space = Space.simplex(count, alpha)
    assert space.start() == (*space.alone(), space.uniform())
    assert len(set(space.start())) == count + 1


def test_a_pair_has_two_ends_and_more_parents_have_none():
    assert [recipe.lam[-1] for recipe in Space.pair(0.7).ends()] == [0.7, 1.0]
    assert [recipe.lam[-1] for recipe in Space.pair(0.0).ends()] == [0.0, 1.0]
    assert Space.simplex(3, 0.7).ends() == ()


@given(space=s.spaces())
def test_candidates_of_a_pair_reach_from_alpha_to_the_newer_parent(space):
    points = np.sort(space.candidates()[:, 1])
    assert (points[0], points[-1]) == (space.alpha, 1.0)
    assert (np.diff(points) > 0).all()
    # no gap is wider than a step of the grid plus rounding
    assert np.diff(points).max() <= (1.0 - space.alpha) / (GRID - 1) + 1.001e-4


@s.FEW
@given(space=s.spaces(5))
def test_a_candidate_is_exactly_the_weights_of_its_recipe(space):
    recipes = [space.recipe(point) for point in space.candidates()]
    assert [recipe.lam for recipe in recipes] == list(map(tuple, space.candidates().tolist()))


@s.FEW
@given(space=s.spaces(5))
def test_candidates_are_feasible_and_on_the_simplex(space):
    points = space.candidates()
    assert points.shape[1] == space.count
    assert points.min() >= 0.0
    assert np.abs(points.sum(axis=1) - 1.0).max() < 1e-15 * space.count
    assert all(space.feasible(space.recipe(point)) for point in points)


@counts
@pytest.mark.parametrize("alpha", [0.0, 0.2929, 0.5, 0.9])
def test_candidates_are_distinct_and_include_all_corners_of_the_feasible_simplex(count, alpha):
    space = Space.simplex(count, alpha)
    points = list(map(tuple, space.candidates().tolist()))
    assert len(set(points)) == len(points)
    others = [1.0 - alpha] * (count - 1)
    corners = [*(np.diag(others).round(4).tolist()), [0.0] * (count - 1)]
    for corner, newest in zip(corners, [*[alpha] * (count - 1), 1.0], strict=True):
        assert (*corner, newest) in points
    assert set(space.alone()) & set(map(space.recipe, points)) == {
        recipe for recipe in space.alone() if space.feasible(recipe)
    }


@pytest.mark.parametrize("count", [3, 4, 5])
def test_candidates_reach_every_face(count):
    points = Space.simplex(count, 0.0).candidates()
    for corners in range(2, count):
        for face in itertools.combinations(range(count), corners):
            inside = (points[:, face] > 0).all(axis=1) & ((points > 0).sum(axis=1) == corners)
            assert inside.sum() >= 20, face


def test_candidates_are_spread_evenly_along_the_edges_of_three():
    points = Space.simplex(3, 0.0).candidates()
    for first, second in itertools.combinations(range(3), 2):
        edge = points[(points[:, [first, second]] > 0).all(axis=1) & (points.min(axis=1) == 0)]
        gaps = np.diff(np.sort(edge[:, second]), prepend=0.0, append=1.0)
        assert gaps.max() < 4.0 / len(edge)


def interior(count, alpha=0.0):
    """The candidates inside the feasible simplex, mapped to the whole simplex."""
    points = Space.simplex(count, alpha).candidates()
    newest = np.eye(count)[-1]
    scaled = (points - alpha * newest) / (1.0 - alpha)
    return scaled[(scaled > 1e-9).all(axis=1)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_inside_candidates_are_uniform_on_the_simplex(count, alpha):
    points = interior(count, alpha)
    assert 0.95 * INSIDE < len(points) < 1.02 * INSIDE  # rounding α moves some points off the edge
    # Dirichlet(1, …, 1): means 1/n, variances (n−1)/(n²(n+1)), covariances −1/(n²(n+1))
    scale = 1.0 / (count**2 * (count + 1))
    expected = scale * (count * np.eye(count) - 1.0)
    np.testing.assert_allclose(points.mean(axis=0), 1.0 / count, atol=0.005)
    np.testing.assert_allclose(np.cov(points.T), expected, atol=0.1 * scale * (count - 1))
    # each weight has the distribution Beta(1, n−1)
    for weight in points.T:
        assert kstest(weight, "beta", (1, count - 1)).statistic < 0.03


@pytest.mark.parametrize("count", [4, 5])
def test_candidates_on_every_face_are_spread_evenly(count):
    points = Space.simplex(count, 0.0).candidates()
    for corners in range(2, count):
        for face in itertools.combinations(range(count), corners):
            off = np.delete(points, face, axis=1).sum(axis=1)
            on = points[(off == 0.0) & (points[:, face] > 0.0).all(axis=1)][:, face]
            assert len(on) > 40
            np.testing.assert_allclose(on.mean(axis=0), 1.0 / corners, atol=0.04)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_candidate_occurs_twice(count, alpha):
    points = Space.simplex(count, alpha).candidates()
    assert len(np.unique(points, axis=0)) == len(points)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_no_parent_is_preferred_to_another(count):
    points = interior(count)
    near = (distances(points, np.eye(count)) < 0.4).mean(axis=0)
    assert near.max() < 1.15 * near.min()
    for first, second in itertools.combinations(range(count), 2):
        heavier = (points[:, first] > points[:, second]).mean()
        assert heavier == pytest.approx(0.5, abs=0.02)


@example(alpha=0.29)
@example(alpha=1 / 3)
@given(alpha=st.floats(0, 1, exclude_max=True))
def test_for_any_alpha_every_candidate_is_feasible(alpha):
    space = Space.pair(alpha)
    searched = [*space.ends(), *map(space.recipe, space.candidates())]
    # 0.29 · 1e4 is 2900.0000000000005, which must not be rounded up to 2901
    assert all(alpha - 1e-9 <= recipe.lam[-1] <= 1.0 for recipe in searched)
    assert all(space.feasible(recipe) for recipe in searched)


@pytest.mark.parametrize(
    ("alpha", "rounded"), [(0.0, 0.0), (0.29, 0.29), (1 / 3, 0.3334), (0.50001, 0.5001), (0.7, 0.7)]
)
@counts
def test_alpha_is_rounded_up_to_a_step_of_the_weights(count, alpha, rounded):
    assert Space.simplex(count, alpha).alpha == rounded
    assert Space.simplex(count, alpha).candidates()[:, -1].min() == rounded


@given(drawn=st.data(), space=s.spaces(4))
def test_a_recipe_is_feasible_if_the_newest_parent_weighs_at_least_alpha(drawn, space):
    recipe = space.recipe(drawn.draw(s.weights(space.count)))
    assert space.feasible(recipe) is (recipe.lam[-1] >= space.alpha)


@given(space=s.spaces(5))
def test_the_newest_parent_is_always_feasible_and_older_ones_only_if_alpha_is_0(space):
    *older, newest = space.alone()
    assert space.feasible(newest)
    assert {space.feasible(old) for old in older} == {space.alpha == 0.0}


@given(a=s.lams(), b=s.lams())
def test_the_distance_for_a_pair_is_the_difference_of_the_lambdas(a, b):
    there = distances(np.array([[1.0 - a, a]]), np.array([[1.0 - b, b]]))
    assert there == pytest.approx(np.array([[abs(a - b)]]), abs=1e-12)


@counts
def test_the_simplex_has_edges_of_length_one(count):
    corners = np.eye(count)
    np.testing.assert_allclose(distances(corners, corners), 1.0 - corners, atol=1e-15)
    # from a corner to the centre: the radius of the circumscribed sphere, √((n−1)/2n)
    middle = np.full((1, count), 1.0 / count)
    np.testing.assert_allclose(distances(corners, middle), math.sqrt((count - 1) / (2 * count)))


@s.FEW
@given(drawn=st.data(), count=st.integers(2, 5), seed=st.integers(0, 99))
def test_distances_do_not_depend_on_the_order_of_the_parents(drawn, count, seed):
    a, b = (np.array([drawn.draw(s.weights(count)) for _ in range(size)]) for size in (2, 3))
    order = np.random.default_rng(seed).permutation(count)
    assert distances(a, b).shape == (2, 3)
    np.testing.assert_allclose(distances(a[:, order], b[:, order]), distances(a, b), atol=1e-12)
    np.testing.assert_array_equal(distances(a, b), distances(b, a).T)


def test_the_cached_candidates_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        Space.pair(0.0).candidates()[0] = 0.5
