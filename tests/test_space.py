"""Recipes as points and points as recipes."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.records import Recipe
from mlflow_soup.space import GRID, Space


@given(space=s.spaces(), recipe=s.recipes())
def test_recipe_and_point_are_inverse(space, recipe):
    assert space.recipe(space.point(recipe)) == recipe


@given(space=s.spaces(), point=st.floats(0, 1))
def test_a_recipe_is_its_point_to_four_decimals(space, point):
    lam = space.recipe(point).lam
    assert abs(lam[1] - point) <= 0.5e-4 + 1e-12
    assert lam[1] == float(f"{lam[1]:.4f}")


@given(recipe=s.recipes())
def test_merge_weights_are_shares_and_sum_to_one(recipe):
    assert all(0.0 <= lam <= 1.0 for lam in recipe.lam)
    assert sum(recipe.lam) == pytest.approx(1.0, abs=1e-15)


def test_the_point_weighs_the_newer_parent():
    assert Space.pair(0.5).recipe(0.88) == Recipe("linear", (0.12, 0.88))
    assert Space.pair(0.5).parents() == (
        Recipe("linear", (1.0, 0.0)),
        Recipe("linear", (0.0, 1.0)),
    )
    assert Space.pair(0.5).uniform() == Recipe("linear", (0.5, 0.5))


@pytest.mark.parametrize(
    ("alpha", "points"),
    [(0.0, [0.0, 1.0, 0.5]), (0.5, [0.0, 1.0, 0.5]), (0.7, [0.0, 1.0, 0.5, 0.7])],
)
def test_the_start_is_parents_uniform_soup_and_the_lower_end_each_once(alpha, points):
    space = Space.pair(alpha)
    assert [space.point(recipe) for recipe in space.start()] == points


@given(space=s.spaces())
def test_candidates_reach_from_alpha_to_the_newer_parent(space):
    points = space.candidates()
    assert (points[0], points[-1]) == (space.alpha, 1.0)
    assert (np.diff(points) > 0).all()
    # evenly: no gap is wider than a step of the grid and its rounding
    assert np.diff(points).max() <= (1.0 - space.alpha) / (GRID - 1) + 1.001e-4


@given(space=s.spaces())
def test_a_candidate_is_exactly_the_point_of_its_recipe(space):
    points = [float(point) for point in space.candidates()]
    assert [space.point(space.recipe(point)) for point in points] == points


@example(alpha=1 / 3)
@given(alpha=st.floats(0, 1, exclude_max=True))
def test_whatever_alpha_is_all_that_is_searched_may_be_recommended(alpha):
    space = Space.pair(alpha)
    searched = [space.recipe(point) for point in (space.alpha, *space.candidates())]
    # 0.29 · 1e4 is 2900.0000000000005: rounding up has to overlook that much
    assert all(alpha - 1e-9 <= space.point(recipe) <= 1.0 for recipe in searched)
    assert all(space.feasible(recipe) for recipe in searched)


@given(space=s.spaces(), recipe=s.recipes())
def test_feasible_means_the_newer_parent_weighs_at_least_alpha(space, recipe):
    assert space.feasible(recipe) is (recipe.lam[1] >= space.alpha)


@given(space=s.spaces())
def test_the_newer_parent_is_always_feasible_and_the_older_only_without_alpha(space):
    old, new = space.parents()
    assert space.feasible(new)
    assert space.feasible(old) is (space.alpha == 0.0)
