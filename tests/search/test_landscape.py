"""The reconstructed curve: exact for polynomial log-likelihoods, with a fair error elsewhere."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

import strategies as s
from mlflow_soup.decision.pairing import paired
from mlflow_soup.records import Items, Recipe, Score, Trial
from mlflow_soup.search import landscape
from mlflow_soup.search.kriging import at
from mlflow_soup.search.landscape import NoLandscape
from mlflow_soup.search.space import Space

GRID = np.column_stack([1.0 - np.linspace(0.0, 1.0, 51), np.linspace(0.0, 1.0, 51)])


def fit(trials):
    """The landscape of some trials. A simplex shows the weights as they are, however many."""
    return landscape.fit(Space.pair(0.0), trials)


def pairs(*lams):
    return [(1.0 - lam, lam) for lam in lams]


def grid(count):
    inside = np.random.default_rng(7).dirichlet(np.ones(count), 40)
    return GRID if count == 2 else np.concatenate([np.eye(count), inside])


def start(count, *more):
    """The parents, the uniform soup, and other points."""
    return [*(recipe.lam for recipe in Space.simplex(count, 0.0).start()), *more]


def history(points, score):
    """Trials at the given points; `score` is a function of the weights."""
    space = Space.simplex(len(points[0]), 0.0)
    recipes = [space.recipe(point) for point in points]
    return [Trial(i, recipe, score(np.array(recipe.lam))) for i, recipe in enumerate(recipes)]


def five(count):
    """One point more than the quadratic trend needs."""
    return start(count, np.eye(count)[-1] * 0.6 + 0.4 / count)


# --- exact if the trend is exact


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("items", [5, 200])
def test_quadratic_curves_give_the_whole_staircase_of_the_accuracy(count, items):
    quiz = s.Quiz(1, count=count, items=items)
    found = fit(quiz.trials(five(count)))
    mean, std = found.predict(grid(count))
    truth = quiz.accuracy(grid(count))
    np.testing.assert_allclose(mean, truth, atol=1e-9)
    assert std.max() < 1e-6
    assert len(set(truth)) > 2  # the curve is not flat


@pytest.mark.parametrize("count", [2, 3, 4])
def test_parents_and_uniform_soup_are_enough_for_straight_curves(count):
    quiz = s.Quiz(2, count=count, bend=0.0)
    mean, std = fit(quiz.trials(start(count))).predict(grid(count))
    np.testing.assert_allclose(mean, quiz.accuracy(grid(count)), atol=1e-9)
    assert std.max() < 1e-6


@pytest.mark.parametrize("count", [2, 3])
def test_parents_and_uniform_soup_determine_every_bent_curve(count):
    # only its uncertainty is unknown: at an edge, the probability is one half on either side
    for seed in range(20):
        quiz = s.Quiz(seed, count=count, items=1)
        mean, _ = fit(quiz.trials(start(count))).predict(grid(count))
        np.testing.assert_array_equal(mean > 0.5, quiz.accuracy(grid(count)) > 0.5)


def test_margins_are_counted_by_the_formula():
    """The formulas once more, item by item, for curves that no trend explains."""
    quiz = s.Quiz(4, items=30, wild=0.4)
    trials = quiz.trials(start(2, *pairs(0.7, 0.85, 0.2)))
    found = replace(fit(trials), doubt=1.0)
    mean, std = found.predict(GRID)

    levels = np.array([quiz.levels(trial.recipe.lam) for trial in trials])
    levels -= levels.mean(axis=2, keepdims=True)
    weights, variance = found.model.weights(GRID)
    nugget = found.model.nugget**2
    curves = levels.reshape(len(trials), -1)
    square = found.model.scale(curves @ curves.T / curves.shape[1])
    # the part that all margins over the other choices' mean share, and one pseudo-observation
    ahead = np.mean([levels[:, i, g] * 4.0 / 3.0 for i, g in enumerate(quiz.right)], axis=0)
    freedom = found.model.freedom
    common = freedom * found.model.scale(np.outer(ahead, ahead)) + square * 2.0 / 30
    common /= freedom + 1
    for m in range(len(GRID)):
        scale = math.sqrt(2.0 * square * (variance[m] + nugget))
        chances, densities = [], []
        for i, gold in enumerate(quiz.right):
            predicted = weights[m] @ levels[:, i]
            margin = predicted[gold] - np.delete(predicted, gold).max()
            chances.append(norm.cdf(margin / scale))
            densities.append(norm.pdf(margin, scale=scale))
        assert mean[m] == pytest.approx(np.mean(chances), abs=1e-9)
        alone = sum(p * (1 - p) for p in chances) / 30**2 * variance[m] / (variance[m] + nugget)
        together = np.mean(densities) ** 2 * variance[m] * common
        assert std[m] == pytest.approx(math.sqrt(alone + together), rel=1e-6)


# --- kinds of items


def test_lengths_divide_the_log_likelihoods():
    quiz, rng = s.Quiz(5), np.random.default_rng(5)
    sizes = rng.integers(1, 30, size=(200, 4)).astype(float)
    plain = quiz.trials(five(2))
    longer = history(
        five(2), lambda lam: s.scored(s.choices(quiz.levels(lam) * sizes, quiz.right, sizes=sizes))
    )
    for one, other in zip(plain, longer, strict=True):
        assert one.held_out.value == other.held_out.value
    np.testing.assert_allclose(fit(longer).predict(GRID)[0], fit(plain).predict(GRID)[0], atol=1e-9)
    # the lengths matter: without them another choice wins
    raw = [np.argmax(quiz.levels((0.5, 0.5)) * sizes, axis=1) == quiz.right]
    assert np.mean(raw) != quiz.accuracy([(0.5, 0.5)])


def ragged(quiz, counts):
    """The quiz with the given number of choices per item; the right choice is always there."""

    def rows(lam):
        levels = quiz.levels(lam)
        return [
            np.concatenate([[levels[i, right]], np.delete(levels[i], right)])[:count]
            for i, (right, count) in enumerate(zip(quiz.right, counts, strict=True))
        ]

    return rows


@pytest.mark.parametrize("sized", [False, True])
def test_items_may_have_different_numbers_of_choices(sized):
    quiz = s.Quiz(6, items=60)
    counts = np.tile([1, 2, 3, 4], 15)
    rows = ragged(quiz, counts)
    sizes = [np.arange(2.0, 2.0 + count) for count in counts] if sized else ()

    def score(lam):
        levels = rows(lam)
        if sized:
            levels = [row * size for row, size in zip(levels, sizes, strict=True)]
        return s.scored(s.choices(levels, [0] * 60, sizes=sizes))

    truth = np.array([np.mean([row.argmax() == 0 for row in rows(lam)]) for lam in GRID])
    found = fit(history(five(2), score))
    np.testing.assert_allclose(found.predict(GRID)[0], truth, atol=1e-9)
    assert np.isfinite(found.population(GRID)).all()


def ever_right(quiz, points):
    """Only the items that are right at some λ."""
    right = [quiz.levels(lam).argmax(axis=1) == quiz.right for lam in points]
    keep = np.any(right, axis=0)
    for name in ("ends", "bend", "wild", "phase"):
        setattr(quiz, name, getattr(quiz, name)[keep])
    quiz.right = [one for one, its in zip(quiz.right, keep, strict=True) if its]
    return quiz


@pytest.mark.parametrize("unknown", [(), "none", "half"])
def test_unknown_right_choices_are_inferred_from_the_answers(unknown):
    quiz = ever_right(s.Quiz(7, wild=0.3), five(2))
    count = len(quiz.right)
    gold = {
        (): (),
        "none": (-1,) * count,
        "half": tuple(g if i % 2 else -1 for i, g in enumerate(quiz.right)),
    }[unknown]
    known = fit(quiz.trials(five(2)))
    learnt = fit(history(five(2), lambda lam: quiz.score(lam, gold=gold)))
    assert learnt.doubt == pytest.approx(known.doubt)
    np.testing.assert_allclose(learnt.predict(GRID), known.predict(GRID), atol=1e-9)
    np.testing.assert_allclose(learnt.population(GRID), known.population(GRID), atol=1e-9)


def test_an_item_that_was_never_right_may_be_right_where_a_new_choice_wins():
    # choice 0 wins at all measured λ; choice 1 or 2 may be right, and 1 would win beyond 0.8
    def score(lam):
        x = lam[1]
        return s.scored(s.choices([[0.0, 5 * (x - 0.8), -9.0]], [1], gold=[-1]))

    found = fit(history(pairs(0.0, 0.3, 0.5, 0.7), score))
    truth = np.where(GRID[:, 1] > 0.8, 0.5, 0.0)
    away = abs(GRID[:, 1] - 0.8) > 0.01
    np.testing.assert_allclose(found.predict(GRID)[0][away], truth[away], atol=1e-6)


def test_several_choices_may_be_right():
    # choice 0 wins first, then 1, then 2; choices 0 and 2 are right
    def levels(lam):
        x = lam[1]
        return [[1.0 - 3 * x, 0.2, 3 * x - 2.0], [0.51 - x, x - 0.51, -4.0]]

    def truth(lam):
        return np.mean([np.argmax(levels(lam)[0]) != 1, np.argmax(levels(lam)[1]) == 1])

    score = history(
        pairs(0.0, 1.0, 0.5, 0.7), lambda lam: s.scored(s.choices(levels(lam), [{0, 2}, 1]))
    )
    found = fit(score)
    np.testing.assert_allclose(
        found.predict(GRID)[0][1::2], [truth(lam) for lam in GRID[1::2]], atol=1e-9
    )


def test_a_single_choice_that_is_always_right_is_flat():
    def score(lam):
        return s.scored(s.choices([[-lam[1]], [-3.0 * lam[0]]], [0, 0]))

    found = fit(history(start(2), score))
    np.testing.assert_allclose(found.predict(GRID)[0], 1.0)
    np.testing.assert_allclose(found.population(GRID), 1.0)


def documents(curve, weight=1.0, shares=(0.5, 0.3, 0.2), task="rolling"):
    """A task with log-likelihoods of whole documents, like bits per byte."""

    def task_at(lam):
        values = tuple(map(float, curve(lam)))
        return Items(
            task,
            "bits_per_byte,none",
            weight,
            ("a", "b", "c"),
            values,
            shares,
            log_likelihoods=tuple((-value,) for value in values),
        )

    return task_at


def bits(lam):
    """Three quadratic curves."""
    x = lam[1]
    return np.array([1.0 - x + x * x, 0.9 + 0.1 * x, 2.0 - 1.5 * x + 0.5 * x * x])


def test_a_sum_of_quadratic_curves_is_known_after_parents_and_uniform_soup():
    task = documents(bits, weight=-1.0)  # smaller is better
    found = fit(history(start(2), lambda lam: s.scored(task(lam))))
    truth = [-np.dot((0.5, 0.3, 0.2), bits(lam)) for lam in GRID]
    np.testing.assert_allclose(found.predict(GRID)[0], truth, atol=1e-9)
    np.testing.assert_allclose(found.population(GRID), truth, atol=1e-9)


def test_a_sum_is_predicted_like_the_score_itself():
    task = documents(lambda lam: np.sin([3 * lam[1], 7 * lam[1], 11 * lam[1]]))
    found = fit(history(pairs(0.0, 1.0, 0.5, 0.3, 0.75, 0.9), lambda lam: s.scored(task(lam))))
    weights, _ = found.model.weights(GRID)
    np.testing.assert_allclose(found.predict(GRID)[0], weights @ found.values, atol=1e-9)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, -0.1), (-1.0, 2.0)])
def test_tasks_add_up_with_their_weights_also_if_smaller_is_better(weights):
    quiz = s.Quiz(8)
    task = documents(bits, weights[1])

    def score(lam):
        accuracy = s.choices(quiz.levels(lam).tolist(), quiz.right, weight=weights[0])
        return s.scored(accuracy, task(lam))

    mean, _ = fit(history(five(2), score)).predict(GRID)
    sums = np.array([np.dot((0.5, 0.3, 0.2), bits(lam)) for lam in GRID])
    expected = weights[0] * quiz.accuracy(GRID) + weights[1] * sums
    np.testing.assert_allclose(mean, expected, atol=1e-9)


def test_groups_of_two_quizzes_are_a_quiz_of_unequal_shares():
    one, other = s.Quiz(9, items=40, wild=0.3), s.Quiz(10, items=10, wild=0.3)

    def apart(lam):
        return s.scored(
            s.choices(one.levels(lam).tolist(), one.right, weight=0.5, task="one"),
            s.choices(other.levels(lam).tolist(), other.right, weight=0.5, task="other"),
        )

    def together(lam):
        levels = np.concatenate([one.levels(lam), other.levels(lam)]).tolist()
        shares = [0.5 / 40] * 40 + [0.5 / 10] * 10
        return s.scored(s.choices(levels, one.right + other.right, shares=shares))

    points = start(2, *pairs(0.7, 0.9))
    for first, second in zip(history(points, apart), history(points, together), strict=True):
        assert first.held_out.value == pytest.approx(second.held_out.value)
    # each task has its own scale, so the two are close but not equal
    first, second = (fit(history(points, score)).predict(GRID)[0] for score in (apart, together))
    np.testing.assert_allclose(first, second, atol=0.03)
    np.testing.assert_allclose(first[[0, 25, 35, 50]], second[[0, 25, 35, 50]], atol=0.02)


# --- little information


def test_if_all_scores_are_equal_the_curve_is_flat_and_certain():
    quiz = s.Quiz(11)
    quiz.ends[np.arange(200), quiz.right] += 50.0  # every item is right, by far
    found = fit(quiz.trials(start(2, *pairs(0.7, 0.2))))
    mean, std = found.predict(GRID)
    np.testing.assert_allclose(mean, 1.0, atol=1e-9)
    assert (found.scale, found.doubt) == (1.0, 1.0)
    assert np.isfinite(std).all()
    np.testing.assert_allclose(found.population(GRID), 1.0, atol=1e-9)


def test_equal_scores_count_as_equal_though_their_mean_is_rounded():
    items = s.choices([[0.0] * 4] * 5, [0, 0, 1, 2, 3])
    found = fit(history(start(2), lambda _: s.scored(items)))
    assert found.values.std() > 0.0  # (0.4 + 0.4 + 0.4) / 3 is not 0.4 in float64
    assert found.scale == 1.0


@pytest.mark.parametrize("level", [-3.0, 0.0])
@pytest.mark.parametrize("count", [2, 3])
def test_nothing_is_nan_where_curves_are_constant(level, count):
    same = [[level] * 4] * 5

    def score(lam):
        return s.scored(s.choices(same, [0, 0, 1, 2, 3]))

    for points in (start(count), five(count), five(count) * 2):
        found = fit(history(points, score))
        for value in (*found.predict(grid(count)), found.population(grid(count)), found.doubt):
            assert np.isfinite(value).all()


@s.FEW
@given(drawn=st.data(), seed=st.integers(0, 99), wild=st.sampled_from([0.0, 0.3, 3.0]))
def test_predictions_are_finite_and_between_zero_and_one(drawn, seed, wild):
    count = drawn.draw(st.integers(2, 4))
    quiz = s.Quiz(seed, count=count, items=drawn.draw(st.integers(1, 12)), wild=wild)
    points = drawn.draw(st.lists(s.weights(count), min_size=3, max_size=8))
    found = fit(quiz.trials(points))
    mean, std = found.predict(grid(count))
    for curve in (mean, found.population(grid(count))):
        assert (curve >= -1e-9).all()
        assert (curve <= 1.0 + 1e-9).all()
    assert (std > 0).all()
    assert np.isfinite(std).all()
    assert 1.0 <= found.doubt < math.inf


# --- refusals


def refused(trials):
    with pytest.raises(NoLandscape) as refusal:
        fit(trials)
    return str(refusal.value)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_weights_are_refused(count):
    trials = s.Quiz(12).trials(five(2))
    failed = [replace(trial, held_out=None) for trial in trials[count:]]
    assert refused([*trials[:count], *failed]) == "fewer than 3 values of λ have a score"


def test_scores_without_items_are_refused():
    reason = refused(history(five(2), lambda lam: Score(0.5, 0.01)))
    assert reason == "the scores have no items"


@pytest.mark.parametrize(
    "change",
    [
        lambda items: replace(items, ids=items.ids[::-1]),
        lambda items: replace(items, task="another"),
        lambda items: replace(items, weight=2.0),
        lambda items: None,
    ],
    ids=["items", "task", "weight", "none"],
)
def test_other_items_at_one_lambda_are_refused(change):
    trials = s.Quiz(13).trials(five(2))
    other = change(trials[2].held_out.items[0])
    trials[2] = replace(trials[2], held_out=s.scored(*filter(None, [other])))
    assert refused(trials) == "not every λ was scored on the same items"


def test_items_that_do_not_add_up_to_the_score_are_refused():
    trials = s.Quiz(14).trials(five(2))
    score = trials[3].held_out
    trials[3] = replace(trials[3], held_out=replace(score, value=score.value + 1e-4))
    assert refused(trials) == "the items do not add up to the score"


@pytest.mark.parametrize("empty", [(), ((),) * 200], ids=["none", "generation"])
def test_items_without_log_likelihoods_are_refused(empty):
    trials = [
        replace(t, held_out=s.scored(replace(t.held_out.items[0], log_likelihoods=empty)))
        for t in s.Quiz(15).trials(five(2))
    ]
    assert refused(trials) == "the items of quiz have no log-likelihoods"


def test_sizes_that_do_not_fit_the_choices_are_refused():
    def score(lam):
        items = s.choices([[0.0, lam[1]]] * 3, [1, 1, 0])
        return s.scored(replace(items, sizes=((1.0,),) * 3))

    assert "acc,none of quiz compares more" in refused(history(five(2), score))


def flipped(quiz, lam, share):
    """The quiz; for some items, the answer is the opposite of what the log-likelihoods say."""
    items = quiz.score(lam).items[0]
    contrary = int(share * len(items.values))
    values = [1.0 - v if i < contrary else v for i, v in enumerate(items.values)]
    return s.scored(replace(items, values=tuple(values)))


def test_answers_that_are_not_the_largest_log_likelihood_are_refused():
    quiz = s.Quiz(16)
    reason = refused(history(five(2), lambda lam: flipped(quiz, lam, 0.05)))
    assert reason == "quiz does not take the largest log-likelihood as the answer"
    fit(history(five(2), lambda lam: flipped(quiz, lam, 0.005)))  # one of 200 items is allowed


def test_answers_that_are_right_or_wrong_for_another_reason_are_refused():
    # `acc` of a task like lambada: one log-likelihood per item, right if greedy decoding gives it
    def score(lam):
        items = s.choices([[-lam[1]]] * 4, [0] * 4)
        return s.scored(replace(items, values=(1.0, 0.0, float(lam[1] > 0.5), 0.0)))

    assert "does not compare choices" in refused(history(five(2), score))


def test_one_such_answer_in_many_is_refused_as_well():
    def score(lam):
        items = s.choices([[-0.1 * lam[1]]] * 200, [0] * 200)
        return s.scored(replace(items, values=(float(lam[1] > 0.6), *items.values[1:])))

    assert "does not compare choices" in refused(history(five(2), score))


def test_a_log_likelihood_that_is_infinite_at_one_weight_is_refused():
    def score(lam):
        worst = -np.inf if lam[1] == 0.5 else -2.0
        return s.scored(s.choices([[-1.0, worst], [-lam[1], -1.0]], [0, 0]))

    assert "not finite" in refused(history(five(2), score))


@pytest.mark.parametrize("count", range(4, 10))
@pytest.mark.parametrize("power", [0, 1, 2])
def test_curves_that_the_trend_explains_are_certain(count, power):
    curve = documents(lambda lam: np.array([1.0, 2.0, 3.0]) * lam[1] ** power)
    points = pairs(*np.linspace(0.0, 1.0, count))
    landscape = fit(history(points, lambda lam: s.scored(curve(lam))))
    assert landscape.doubt == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(landscape.misses, 0.0, atol=1e-9)


def test_trials_that_failed_do_not_matter():
    quiz = s.Quiz(17, wild=0.3)
    trials = quiz.trials(start(2, *pairs(0.7, 0.9)))
    failed = Trial(9, Space.pair(0.0).recipe(0.3), None)
    with_failure = fit([*trials[:2], failed, *trials[2:]])
    np.testing.assert_array_equal(with_failure.predict(GRID), fit(trials).predict(GRID))


# --- doubt


@pytest.mark.parametrize("count", [2, 3])
def test_a_miss_is_the_error_of_a_landscape_without_the_trial(count):
    quiz = s.Quiz(18, count=count, wild=0.4)
    trials = quiz.trials([*five(count), *np.random.default_rng(1).dirichlet(np.ones(count), 4)])
    found = fit(trials)
    for i, trial in enumerate(trials):
        rest = fit(trials[:i] + trials[i + 1 :])
        rest = replace(rest, model=at(rest.points, found.model), doubt=1.0)
        mean, std = rest.predict(np.array([trial.recipe.lam]))
        miss, deviations = found.miss(i)
        assert miss == pytest.approx(trial.held_out.value - mean[0], abs=1e-9)
        # a measurement adds the variance of single items, so the standard deviation is larger
        assert 0 < abs(deviations) <= abs(miss) / std[0] * (1 + 1e-9)


def test_a_miss_of_a_sum_is_divided_by_the_deviation_of_its_measurement():
    task = documents(lambda lam: np.sin([3 * lam[1], 7 * lam[1], 11 * lam[1]]))
    trials = history(pairs(0.0, 1.0, 0.5, 0.3, 0.75, 0.9), lambda lam: s.scored(task(lam)))
    found = fit(trials)
    rest = np.array([0, 1, 2, 3, 5])
    model = at(found.points[rest], found.model)
    curves = np.array([t.held_out.items[0].values for t in trials])[rest] * [0.5, 0.3, 0.2]
    _, variance = model.weights(found.points[[4]])
    # σ² of the sum, and that of three independent curves as one more observation
    own, apart = model.scale(np.outer(curves.sum(1), curves.sum(1))), model.scale(curves @ curves.T)
    square = (model.freedom * own + apart) / (model.freedom + 1)
    square *= variance[0] + model.nugget**2
    miss, deviations = found.miss(4)
    assert deviations == pytest.approx(miss / math.sqrt(square))


def test_doubt_is_the_size_of_the_misses_in_deviations():
    quiz = s.Quiz(19, wild=2.0)
    found = fit(quiz.trials(start(2, *pairs(0.1, 0.3, 0.65, 0.8, 0.9))))
    inside = range(2, 8)  # all but the parents
    assert found.misses == tuple(found.miss(i)[0] for i in inside)
    square = sum(found.miss(i)[1] ** 2 for i in inside)
    assert found.doubt == pytest.approx(max(1.0, math.sqrt((1 + square) / (1 + 6))))


def shaken(quiz, by):
    """A quiz where all right choices gain or lose together, and not smoothly."""

    def score(lam):
        levels = quiz.levels(lam)
        levels[np.arange(len(levels)), quiz.right] += by * math.cos(40.0 * lam[1])
        return s.scored(s.choices(levels.tolist(), quiz.right))

    return score


def test_doubt_is_one_for_smooth_curves_and_grows_where_they_are_wild_together():
    quiz = s.Quiz(20, items=400)
    points = start(2, *pairs(0.7, 0.8, 0.25))
    doubts = [fit(history(points, shaken(quiz, by))).doubt for by in (0.0, 0.1, 1.0)]
    assert doubts[0] == 1.0
    assert doubts[0] < doubts[1] < doubts[2]


def test_doubt_widens_the_band_and_leaves_the_mean():
    found = fit(s.Quiz(21, wild=0.3).trials(start(2, *pairs(0.7, 0.9))))
    mean, std = replace(found, doubt=1.0).predict(GRID)
    its_mean, its_std = replace(found, doubt=3.0).predict(GRID)
    np.testing.assert_array_equal(its_mean, mean)
    np.testing.assert_allclose(its_std, 3.0 * std)


# --- the population


def test_the_population_equals_the_held_out_set_if_no_item_is_near_the_edge():
    # 90 % are right with a margin of 100, the others wrong with a margin of −100
    def score(lam):
        rows = [[0.0, (-100.0 if i % 10 else 100.0) + 0.01 * i * lam[1]] for i in range(50)]
        return s.scored(s.choices(rows, [0] * 50))

    found = fit(history(five(2), score))
    np.testing.assert_allclose(found.population(GRID), 0.9, atol=1e-9)
    np.testing.assert_allclose(found.population(GRID), found.predict(GRID)[0], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_population_is_smoother_than_the_held_out_set_and_close_to_it(seed):
    found = fit(s.Quiz(seed, items=100).trials(five(2)))
    held_out, population = found.predict(GRID)[0], found.population(GRID)
    assert np.abs(np.diff(population, 2)).sum() < 0.3 * np.abs(np.diff(held_out, 2)).sum()
    assert np.abs(population - held_out).max() < 0.12


def test_the_population_predicts_more_items_better_than_the_held_out_set():
    off = {"held out": [], "population": []}
    for seed in range(12):
        large = s.Quiz(seed, items=4000)
        small = s.Quiz(0, items=1)
        for name in ("ends", "bend", "wild", "phase"):
            setattr(small, name, getattr(large, name)[:100])
        small.right = large.right[:100]
        found, truth = fit(small.trials(five(2))), large.accuracy(GRID)
        curves = {"held out": found.predict(GRID)[0], "population": found.population(GRID)}
        for name, curve in curves.items():  # compare shapes: the level is the sample's luck
            off[name].append(np.std(curve - truth))
    assert np.mean(off["population"]) < np.mean(off["held out"])


# --- pending


def test_pending_points_narrow_the_band():
    found = fit(s.Quiz(22, wild=0.3).trials(start(2, *pairs(0.75))))
    waiting = replace(found, pending=((0.75, 0.25), (0.1, 0.9)))
    there = np.array(waiting.pending)
    assert (waiting.predict(there)[1] < 0.5 * found.predict(there)[1]).all()
    assert (waiting.predict(GRID)[1] <= found.predict(GRID)[1]).all()
    np.testing.assert_array_equal(waiting.population(GRID), found.population(GRID))


def test_pending_points_do_not_move_the_mean_of_choices():
    landscape = fit(s.Quiz(22, wild=0.3).trials(start(2, *pairs(0.75))))
    pending = replace(landscape, pending=((0.75, 0.25), (0.1, 0.9)))
    points = np.array(pairs(0.25, 0.6, 0.9))
    np.testing.assert_array_equal(pending.predict(points)[0], landscape.predict(points)[0])


def test_pending_points_do_not_move_the_mean_of_a_sum():
    task = documents(lambda lam: np.sin([3 * lam[1], 7 * lam[1], 11 * lam[1]]))
    found = fit(history(pairs(0.0, 1.0, 0.5, 0.3), lambda lam: s.scored(task(lam))))
    waiting = replace(found, pending=((0.25, 0.75),))
    (mean, std), (its_mean, its_std) = found.predict(GRID), waiting.predict(GRID)
    np.testing.assert_array_equal(its_mean, mean)
    assert (its_std <= std * (1 + 1e-9)).all()
    assert its_std[37] < 0.5 * std[37]


# --- invariances


def shuffled(items, rng_seed, *, rows=True, columns=True):
    """The same task with its items, and the choices of each item, in another order."""
    rng = np.random.default_rng(rng_seed)
    size = len(items.ids)
    order = rng.permutation(size) if rows else np.arange(size)
    across = [
        rng.permutation(len(row)) if columns else np.arange(len(row))
        for row in items.log_likelihoods
    ]

    def pick(values):
        return tuple(values[i] for i in order)

    levels = [
        tuple(row[j] for j in its) for row, its in zip(items.log_likelihoods, across, strict=True)
    ]
    gold = [int(np.flatnonzero(its == g)[0]) for g, its in zip(items.gold, across, strict=True)]
    return replace(
        items,
        ids=pick(items.ids),
        values=pick(items.values),
        shares=pick(items.shares),
        log_likelihoods=pick(levels),
        gold=pick(gold),
    )


@pytest.mark.parametrize("which", ["items", "choices", "trials", "parents"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_order_does_not_matter(which, count):
    quiz = s.Quiz(23, count=count, items=40, wild=0.3)
    points = [*five(count), *np.random.default_rng(2).dirichlet(np.ones(count), 3)]
    trials = quiz.trials(points)
    rng = np.random.default_rng(3)
    look = grid(count)
    if which == "trials":
        other = [trials[i] for i in rng.permutation(len(trials))]
    elif which == "parents":
        order = rng.permutation(count)
        other = [
            replace(t, recipe=replace(t.recipe, lam=tuple(t.recipe.lam[i] for i in order)))
            for t in trials
        ]
        look = look[:, order]
    else:
        flags = {"rows": which == "items", "columns": which == "choices"}
        other = [
            replace(t, held_out=s.scored(shuffled(t.held_out.items[0], 5, **flags))) for t in trials
        ]
    found, again = fit(trials), fit(other)
    assert again.doubt == pytest.approx(found.doubt)
    np.testing.assert_allclose(again.predict(look), found.predict(grid(count)), atol=1e-7)
    np.testing.assert_allclose(again.population(look), found.population(grid(count)), atol=1e-7)


def test_a_term_that_all_choices_of_an_item_share_does_not_matter():
    quiz = s.Quiz(26, items=40, wild=0.3)
    rows = ragged(quiz, np.tile([2, 3, 4, 4], 10))

    def noisy(lam):
        shifts = np.random.default_rng(round(1e4 * lam[1])).normal(scale=5.0, size=40)
        levels = [row + shift for row, shift in zip(rows(lam), shifts, strict=True)]
        return s.scored(s.choices(levels, [0] * 40))

    points = start(2, *pairs(0.7, 0.9, 0.2))
    found = fit(history(points, lambda lam: s.scored(s.choices(rows(lam), [0] * 40))))
    other = fit(history(points, noisy))
    assert other.doubt == pytest.approx(found.doubt)
    np.testing.assert_allclose(other.predict(GRID), found.predict(GRID), atol=1e-7)
    np.testing.assert_allclose(other.population(GRID), found.population(GRID), atol=1e-7)


@pytest.mark.parametrize("known", [True, False])
def test_the_size_of_the_chunks_does_not_matter(known, monkeypatch):
    quiz = s.Quiz(24, items=60, wild=0.3)
    gold = None if known else ()
    trials = history(start(2, *pairs(0.7, 0.9)), lambda lam: quiz.score(lam, gold=gold))
    whole = fit(trials)
    expected = (whole.doubt, *whole.predict(GRID), whole.population(GRID))
    for chunk in (1, 7, 4 * len(GRID) * 17):
        monkeypatch.setattr(landscape, "CHUNK", chunk)
        parts = fit(trials)
        got = (parts.doubt, *parts.predict(GRID), parts.population(GRID))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)


def test_the_unit_of_log_likelihoods_does_not_matter():
    quiz = s.Quiz(25, wild=0.3)
    points = start(2, *pairs(0.7, 0.9, 0.2))

    def scaled(lam):
        return s.scored(s.choices((7.0 * quiz.levels(lam) - 3.0).tolist(), quiz.right))

    found, other = fit(quiz.trials(points)), fit(history(points, scaled))
    np.testing.assert_allclose(other.predict(GRID), found.predict(GRID), atol=1e-7)
    np.testing.assert_allclose(other.population(GRID), found.population(GRID), atol=1e-7)


def test_one_log_likelihood_that_is_always_right_is_not_a_single_choice():
    # as for `acc` of lambada: the right answer is not known, and may be wrong at another λ
    def score(lam):
        items = s.choices([[-lam[1]]] * 4, [0] * 4)
        return s.scored(replace(items, values=(0.0,) * 4, gold=()))

    assert "does not compare choices" in refused(history(five(2), score))


def test_the_band_is_wider_where_items_go_together():
    quiz = s.Quiz(5, items=300)
    points = [(1.0 - lam, lam) for lam in (0.0, 0.4, 0.7, 1.0)]
    scores = [quiz.score(point) for point in points]

    def named(score, cluster):
        ids = tuple(f"{i}:p:{cluster(i)}" for i in range(300))
        return replace(score, items=tuple(replace(items, ids=ids) for items in score.items))

    def band(scores):
        pairs = enumerate(zip(points, scores, strict=True))
        trials = [Trial(i, Recipe("linear", lam), score) for i, (lam, score) in pairs]
        return fit(trials).predict(np.array([(0.45, 0.55)]))[1].item()

    # sorted by what changes between two trials, items of one cluster change together
    changes = np.array(scores[0].items[0].values) - np.array(scores[-1].items[0].values)
    order = np.argsort(np.argsort(changes, kind="stable"), kind="stable")
    alone = band(scores)
    assert band([named(score, lambda i: i) for score in scores]) == alone
    together = [named(score, lambda i: order[i] // 10) for score in scores]
    effects = [paired(a, b).effect for a, b in itertools.pairwise(together)]
    assert band(together) == pytest.approx(alone * math.sqrt(np.median(effects)))
    assert band(together) > 1.2 * alone
