"""Schedules: the weights are the decay's, the fixed rules lie among them, and the plane is true."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_soup.request import spec
from mlflow_soup.search.schedule import (
    DECAYS,
    POWERS,
    Schedule,
    amount,
    decay_of,
    longest,
    power,
    weights,
)
from mlflow_soup.search.space import Space, distances

TOKENS = 153_600.0
few = settings(max_examples=25)  # each makes all candidates
powers = st.floats(0.25, 16.0)
names = pytest.mark.parametrize("name", [*DECAYS, "0.3", "2", "5.5"])


@st.composite
def times(draw, least=2, most=12):
    """Ascending times in tokens, unequally spaced."""
    gaps = draw(st.lists(st.integers(1, 40), min_size=least, max_size=most))
    begin = draw(st.integers(0, 50))
    return tuple(TOKENS * (begin + t) for t in itertools.accumulate(gaps))


def even(count):
    """Equally spaced times, as a training loop saves checkpoints."""
    return tuple(TOKENS * t for t in range(1, count + 1))


def schedule(times, alpha=0.0):
    return Schedule(len(times), alpha, times)


def test_the_command_line_knows_the_same_decays():
    assert tuple(DECAYS) == spec.DECAYS


# --- weights


@names
@given(times(), st.floats(0.01, 1.0))
def test_the_merge_is_what_the_decayed_gradients_give(name, times, part):
    """WSM, theorem 3.1: Σ c_j Θ_j = Θ_begin + Σ w_i g_i, for steps g of any kind."""
    decay, count = decay_of(name), len(times)
    whole = longest(times)
    duration = max(part * whole, times[-1] - times[-2])
    steps = np.random.default_rng(count).normal(size=(count + 1, 3))
    theta = np.cumsum(steps, axis=0)  # theta[0] is one interval before the first checkpoint
    at = np.array([times[-1] - whole, *times])
    x = np.clip((at - (times[-1] - duration)) / duration, 0.0, 1.0)
    decayed = theta[0] + decay(x[:-1]) @ steps[1:]
    np.testing.assert_allclose(weights(times, duration, decay) @ theta[1:], decayed, atol=1e-8)


@names
@given(times())
def test_the_weights_are_a_mean_of_the_checkpoints(name, times):
    found = weights(times, longest(times), decay_of(name))
    assert found.sum() == pytest.approx(1.0, abs=1e-8)
    assert (found >= 0.0).all()
    assert found[-1] > 0.0


@pytest.mark.parametrize("count", range(2, 65))
def test_power_one_over_the_last_k_is_their_plain_average_bit_for_bit(count):
    space = schedule(even(64))
    found = space.recipe(weights(space.times, count * TOKENS, power(1.0)))
    assert found.lam[64 - count :] == Space.simplex(count, 0.0).uniform().lam
    assert not any(found.lam[: 64 - count])


def test_power_two_weighs_by_age_one_three_five():
    np.testing.assert_allclose(weights(even(4), 3 * TOKENS, power(2.0)) * 9, [0, 1, 3, 5])


def test_power_one_weighs_unequally_spaced_checkpoints_by_what_was_trained_before_each():
    found = weights((10.0, 20.0, 50.0, 60.0), 60.0, power(1.0))
    np.testing.assert_allclose(found * 6, [1, 1, 3, 1])


def test_a_window_that_begins_between_two_checkpoints_takes_a_part_of_the_older_one():
    np.testing.assert_allclose(weights(even(4), 2.5 * TOKENS, power(1.0)), [0, 0.2, 0.4, 0.4])


def test_a_duration_is_told_in_every_digit():
    assert amount(37_037_034_000.0) == "37,037,034,000"
    assert amount(4.75) == "4.75"


def test_minus_sqrt_weighs_the_oldest_most_and_cosine_the_middle():
    root, middle = (weights(even(4), 4 * TOKENS, DECAYS[n]) for n in ("minus-sqrt", "cosine"))
    np.testing.assert_allclose(root, np.sqrt([0.25, 0.5, 0.75, 1]) - np.sqrt([0, 0.25, 0.5, 0.75]))
    cosines = [1.0, math.sqrt(0.5), 0.0, -math.sqrt(0.5), -1.0]
    np.testing.assert_allclose(middle, -0.5 * np.diff(cosines), atol=1e-9)


@given(powers)
def test_two_checkpoints_are_a_pair_bit_for_bit(p):
    space = schedule(even(2))
    found = space.recipe(weights(space.times, 2 * TOKENS, power(p)))
    assert found == Space.pair(0.0).recipe(1.0 - 2.0**-p)


@given(times(), powers, st.sampled_from([1e-9, 1e-3, 7.0, 1e9]))
def test_the_unit_of_time_does_not_matter(times, p, unit):
    other = tuple(unit * t for t in times)
    found, again = schedule(times), schedule(other)
    assert found.recipe(weights(times, longest(times), power(p))) == again.recipe(
        weights(other, longest(other), power(p))
    )


# --- the space


@few
@given(times())
def test_candidates_are_distinct_recipes_and_hold_the_fixed_rules(times):
    space = schedule(times)
    found = [space.recipe(row) for row in space.candidates()]
    assert len({*found}) == len(found)
    assert all(sum(recipe.lam) == pytest.approx(1.0, abs=1e-9) for recipe in found)
    at = [times[-1] - longest(times), *times]
    for begin, p in itertools.product(at[:-1], (0.5, 1.0, 2.0)):
        assert space.recipe(weights(times, times[-1] - begin, power(p))) in found
    assert {*space.start()} <= {*found}


@few
@given(times(), st.floats(0.0, 0.9))
def test_no_candidate_gives_the_newest_less_than_alpha(times, alpha):
    space = schedule(times, Space.simplex(2, alpha).alpha)
    assert space.candidates()[:, -1].min() >= space.alpha
    assert all(map(space.feasible, space.alone()))


@few
@given(times(least=3))
def test_a_candidate_tells_its_duration_and_power(times):
    space = schedule(times)
    for row in space.candidates()[::7]:
        recipe = space.recipe(row)
        duration, p = space.shape_of(recipe)
        assert space.recipe(weights(times, duration, power(p))) == recipe
        assert 0.0 < duration <= longest(times)
        assert p in POWERS
    odd = np.zeros(len(times))
    odd[0] = 1.0
    assert space.shape_of(space.recipe(odd)) is None  # the oldest alone is no schedule


@few
@given(times())
def test_points_lie_in_a_plane_no_farther_apart_than_the_walk_takes_the_soups(times):
    space = schedule(times)
    rows = space.candidates()[::5]
    points = space.points(rows)
    np.testing.assert_allclose(points.sum(axis=1), 1.0)
    gaps = np.diff(times) / longest(times)
    behind = np.cumsum(rows, axis=1)[:, :-1]
    walked = np.sqrt(((behind[:, None] - behind[None]) ** 2 * gaps).sum(axis=2))
    seen = distances(points, points)
    assert (seen <= walked + 1e-9).all()
    if len(times) < 4:  # two directions are all there are
        np.testing.assert_allclose(seen, walked, atol=1e-9)
    elif len(rows) > 2:
        assert np.corrcoef(seen.ravel(), walked.ravel())[0, 1] > 0.95


@few
@given(times(), st.integers(0, 99))
def test_a_mixture_of_soups_lies_between_their_points(times, seed):
    space, random = schedule(times), np.random.default_rng(seed)
    rows = random.dirichlet(np.ones(len(times)), size=2)
    middle = space.points(rows.mean(axis=0)[None])
    np.testing.assert_allclose(middle, space.points(rows).mean(axis=0)[None], atol=1e-12)
