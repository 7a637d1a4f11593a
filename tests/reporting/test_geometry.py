import io
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlflow_soup.records import Distance, LayerDistance, Score, Trial
from mlflow_soup.reporting import geometry
from mlflow_soup.reporting.geometry import barrier, caution, distances, kl_ratio, theory, words
from mlflow_soup.search.space import Space
from strategies import FEW, apart, choices, lams, scored, weights

PAIR = Space.pair(0.0)


def layer(name, *parents):
    """A layer whose parents are the given points."""
    at = np.array(parents, float)
    squares = ((at[:, None] - at[None]) ** 2).sum(axis=2)
    norms = tuple((at**2).sum(axis=1).tolist())
    return LayerDistance(name, norms, tuple(map(tuple, squares.tolist())))


def line(*places):
    """The distance of parents along a line, at the points (1, place)."""
    return Distance((layer("layer 0", *((1.0, place) for place in places)),))


@FEW
@given(measured=apart(most=2), lam=lams())
def test_the_kl_ratio_of_a_pair_is_lambda_squared(measured, lam):
    assert kl_ratio(measured.whole, (1 - lam, lam)) == lam**2


def test_the_kl_ratio_of_three_by_hand():
    whole = layer("whole", (1.0, 1.0), (3.0, 1.0), (1.0, 5.0))
    # the deltas are (2, 0) and (0, 4): the soup moves by (1/2)·(2, 0) + (1/4)·(0, 4) = (1, 1)
    assert kl_ratio(whole, (0.25, 0.5, 0.25)) == pytest.approx(2 / 16)
    assert kl_ratio(whole, (0.0, 0.0, 1.0)) == 1.0
    assert kl_ratio(whole, (1.0, 0.0, 0.0)) == 0.0
    assert kl_ratio(whole, (0.0, 1.0, 0.0)) == 4 / 16


def test_the_kl_ratio_has_no_meaning_where_the_newest_is_the_oldest():
    assert math.isnan(kl_ratio(layer("whole", (1.0,), (2.0,), (1.0,)), (0.2, 0.4, 0.4)))


@FEW
@given(st.data())
def test_the_kl_ratio_is_that_of_the_soup_itself(data):
    count = data.draw(st.integers(3, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    at, lam = rng.normal(size=(count, 5)), data.draw(weights(count))
    moved = np.sum((lam @ at - at[0]) ** 2) / np.sum((at[-1] - at[0]) ** 2)
    assert kl_ratio(layer("whole", *at), tuple(lam)) == pytest.approx(moved, abs=1e-12)


@FEW
@given(measured=apart(least=3), data=st.data())
def test_the_kl_ratio_of_a_pair_among_more_is_that_of_the_pair(measured, data):
    whole, lam = measured.whole, data.draw(lams())
    assume(whole.squares[0][-1] > 0)
    between = [0.0] * (len(whole.norms) - 2)
    assert kl_ratio(whole, (1 - lam, *between, lam)) == pytest.approx(lam**2)


def test_the_theory_is_told_with_its_number():
    assert theory(line(0, 1), (0.2, 0.8)).startswith("KL ratio λ² = 0.64: ")
    told = theory(line(0, 1, 2), (0.0, 0.5, 0.5))
    assert told.startswith("KL ratio = 0.5625: ")
    assert "is 56.2 % of the newest parent's" in told


def test_the_distance_of_a_pair_is_told_with_every_number():
    measured = Distance((layer("layer 2", (3, 0), (3, 0)), layer("layer 3", (0, 4), (3, 4))))
    assert words(measured, ["llm v1", "llm v2"]) == (
        "The parents differ by 60 % of the older one's norm (relative L2); their cosine is 0.8575. "
        "They differ most in layer 3 (75 %)."
    )


def test_of_more_parents_those_farthest_apart_are_told():
    assert words(line(0, 0.1, 0.3), ["v1", "v2", "v3"]).startswith(
        "The parents farthest apart, v1 and v3, differ by 30 % of"
    )


def test_a_layer_that_began_as_zeros_is_not_the_farthest():
    measured = Distance((layer("layer 0", (1,), (1.5,)), layer("other", (0,), (1,))))
    assert words(measured, ["v1", "v2"]).endswith("They differ most in layer 0 (50 %).")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.1234, "12.3 %"), (0.000123, "0.0123 %"), (2.77, "277 %"), (12.3, "1230 %"), (0.0, "0 %")],
)
def test_shares_are_told_in_three_digits(share, text):
    assert geometry._share(share) == text


def test_near_parents_are_not_warned_of():
    assert caution(line(0, geometry.FAR), ["v1", "v2"]) == ""


def test_equal_parents_are_warned_of():
    assert caution(line(0, 0.4, 0.4), ["v1", "v2", "v3"]).startswith("v2 and v3 have the same w")


def test_far_parents_are_warned_of_with_the_number_and_what_to_do():
    told = caution(line(0, 0.8), ["llm v1", "llm v9"])
    assert told.startswith("llm v1 and llm v9 look too far apart to merge: they differ by 80 % of")
    assert "by more than 75 %" in told
    assert "Merge neighbours" in told
    assert caution(line(0, 0.4, 0.8), ["v1", "v2", "v3"]).startswith("v1 and v3 look too far")


@FEW
@given(measured=apart(), factor=st.sampled_from([0.5, 4.0]))
def test_the_warning_has_no_scale(measured, factor):
    names = [f"v{i}" for i, _ in enumerate(measured.whole.norms)]
    grown = Distance(
        tuple(
            LayerDistance(
                layer.name,
                tuple(factor * norm for norm in layer.norms),
                tuple(tuple(factor * square for square in row) for row in layer.squares),
            )
            for layer in measured.layers
        )
    )
    assert caution(measured, names) == caution(grown, names)
    assert words(measured, names) == words(grown, names)


def answered(right, items=200):
    """A score with its items; the first `right` items are right."""
    return scored(choices([[1.0, 0.0]] * items, [0] * right + [1] * (items - right)))


def started(space, *right):
    """The first trials of a search: those of the parents, then that of the uniform soup."""
    recipes = space.start()
    return [Trial(i, r, answered(n)) for i, (r, n) in enumerate(zip(recipes, right, strict=True))]


def test_a_uniform_soup_far_below_both_parents_has_met_a_barrier():
    told = barrier(PAIR, started(PAIR, 120, 100, 60))
    assert "their uniform soup scores -0.2000 (95 % interval" in told
    assert "200 paired items) against the worst of them" in told
    assert "Merge closer neighbours" in told


@pytest.mark.parametrize(
    "uniform", [80, 99, 100, 130]
)  # 99 is below both parents, but may be chance
def test_a_uniform_soup_that_is_not_surely_below_both_has_met_none(uniform):
    assert barrier(PAIR, started(PAIR, 120, 80, uniform)) == ""


def test_one_item_fewer_may_be_chance():
    assert barrier(PAIR, started(PAIR, 100, 100, 99)) == ""


def test_a_barrier_between_three_is_against_every_one():
    space = Space.simplex(3, 0.0)
    assert barrier(space, started(space, 120, 100, 110, 60))
    assert barrier(space, started(space, 120, 60, 110, 60)) == ""


def test_without_all_of_the_first_scores_nothing_is_said():
    trials = started(PAIR, 120, 100, 60)
    assert barrier(PAIR, []) == barrier(PAIR, trials[:2]) == ""
    assert barrier(PAIR, [*trials[:2], Trial(2, trials[2].recipe, None)]) == ""
    bare = [Trial(t.number, t.recipe, Score(t.held_out.value, 0.01)) for t in trials]
    assert barrier(PAIR, bare) == ""  # without items there is no certainty


def test_the_figure_shows_each_layer_and_all_of_them():
    measured = Distance(
        (
            layer("embedding", (1, 0), (1, 0.5)),
            layer("layer 0", (1,), (1.2,)),
            layer("other", (0,), (1,)),  # its relative L2 is infinite: no bar
        )
    )
    (axes,) = distances(measured, ["v1", "v2"]).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 20, 0])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["embedding", "0", "other"]
    whole = 100 * measured.whole.relative(0, 1)
    assert axes.lines[0].get_ydata() == pytest.approx([whole, whole])
    assert "%" in axes.get_ylabel()


@pytest.mark.parametrize("depth", [1, 12, 80])
@pytest.mark.parametrize("count", [2, 6])
def test_the_figure_is_readable_at_any_depth(depth, count):
    parents = np.arange(count)[:, None] + 1.0
    names = ["embedding", *(f"layer {i}" for i in range(depth)), "head"]
    measured = Distance(tuple(layer(name, *parents) for name in names))
    figure = distances(measured, [f"llm v{i}" for i in range(count)])
    (axes,) = figure.axes
    figure.savefig(io.BytesIO())
    assert len(axes.patches) == (count - 1) * len(names)
    assert len(axes.get_xticklabels()) <= 22
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(edges))
    colours = {bar.get_facecolor() for bar in axes.patches}
    assert len(colours) == min(count - 1, 4)


def test_equal_parents_have_a_figure_too():
    figure = distances(line(1, 1), ["v1", "v2"])
    figure.savefig(io.BytesIO())
    assert words(line(1, 1), ["v1", "v2"]).startswith("The parents differ by 0 % of")
