"""The whole held-out curve from a few evaluations, reconstructed from the items' log-likelihoods.

Accuracy is a step function of the merge weights λ, but the log-likelihoods that decide it are
smooth. Each evaluation gives one log-likelihood per item and choice. Kriging predicts all of these
curves, and

    accuracy(λ) = mean over items of P(the right choice has the largest log-likelihood).

Scores that are sums of log-likelihoods, such as bits per byte, are predicted directly.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from mlflow_soup.decision.pairing import paired
from mlflow_soup.records import Items, Score, Trial
from mlflow_soup.search.kriging import Kriging, at, estimate
from mlflow_soup.search.space import Space

Array = NDArray[np.float64]

# numbers in memory at a time while a curve is predicted: 32 MB
CHUNK = 4_000_000
# Silverman's rule gives the bandwidth for the height of a curve; finding its peak needs more
BROADER = 3.0
LEAST = 3  # fewest λ with a score
FLOOR = 1e-3  # smallest variance of an item's answer: no prediction is quite certain
ROUNDING = 1e-9  # relative difference below which scores are equal
DISAGREE = 0.01  # share of items whose answer may differ from the largest log-likelihood


class NoLandscape(Exception):
    """The items do not determine the score at other λ; the message says why."""


class _Scales(NamedTuple):
    """The variances of a task's curves around their trend."""

    curve: float  # σ² of a single curve
    common: float  # σ² of the part that all curves of the task share
    nugget: float  # τ², in units of σ²


class _Part(Protocol):
    """One task's part of the score."""

    @property
    def gram(self) -> Array:
        """Y·Yᵀ/M of the task's curves, shape (n, n)."""

    @property
    def count(self) -> int:
        """M, the number of the task's curves."""

    @property
    def common(self) -> tuple[Array, float]:
        """The part that all curves share, shape (n,), and its σ² if the curves were independent.

        That σ² is for curves with σ² = 1. In fact the curves of one model bend together, so the
        errors of their predictions are correlated.
        """

    def predict(
        self, weights: Array, variance: Array, scales: _Scales, *, soften: bool = False
    ) -> tuple[Array, Array, Array]:
        """The predicted part of the score, its variance, and the extra variance of a measurement.

        Each has shape (m,).

        Args:
            weights: the weights W of the kriging, shape (m, n).
            variance: the kriging's variance in units of σ², shape (m,).
            scales: the variances of the task's curves.
            soften: if True, count each item by Φ(margin/h) instead of 0 or 1.
        """


@dataclass(frozen=True)
class _Choices:
    """A task where an item is right if its right choice has the largest log-likelihood per size.

    Attributes:
        levels: the log-likelihoods per size, shape (n, N, C) for n points, N items and C choices;
            their mean over an item's choices is 0; −inf where an item has fewer choices.
        rows: the item of each row, shape (R,), R ≥ N. An item with an unknown right choice has one
            row for each choice that may be right.
        gold: the right choice of each row, shape (R,).
        shares: how much each row adds to the score if its right choice wins, shape (R,).
    """

    levels: Array
    rows: NDArray[np.intp]
    gold: NDArray[np.intp]
    shares: Array

    @cached_property
    def _present(self) -> NDArray[np.bool_]:
        present: NDArray[np.bool_] = np.isfinite(self.levels[0])
        return present

    @property
    def count(self) -> int:
        return int(self._present.sum())

    @cached_property
    def gram(self) -> Array:
        curves = self.levels[:, self._present]
        out: Array = curves @ curves.T / self.count
        return out

    @cached_property
    def common(self) -> tuple[Array, float]:
        # the mean over items of the margin of the right choice over the mean of the other choices
        choices = self._present.sum(axis=1)[self.rows]
        margins = self.levels[:, self.rows, self.gold] * choices / np.maximum(choices - 1, 1)
        return margins.mean(axis=1), 2.0 / len(self.rows)

    def predict(
        self, weights: Array, variance: Array, scales: _Scales, *, soften: bool = False
    ) -> tuple[Array, Array, Array]:
        total = variance + scales.nugget
        spread = 2.0 * scales.curve * total  # a margin is the difference of two curves
        if soften:
            spread = spread + self._bandwidth**2
        scale = np.sqrt(np.maximum(spread, 1e-24))[:, None]
        mean, alone, density = np.zeros((3, len(weights)))
        step = max(1, CHUNK // (len(weights) * self.levels.shape[2]))
        for begin in range(0, len(self.rows), step):
            part = slice(begin, begin + step)
            margins = self._margins(weights, part) / scale
            chance = ndtr(margins)
            mean += chance @ self.shares[part]
            alone += (chance * (1.0 - chance)) @ self.shares[part] ** 2
            density += np.exp(-0.5 * margins**2) @ self.shares[part]
        # the part that all margins share moves the undecided items together
        density /= math.sqrt(2.0 * math.pi) * scale[:, 0]
        together = density**2 * variance * scales.common
        known = alone * variance / total
        return mean, known + together, alone - known + FLOOR * float(self.shares @ self.shares)

    def _margins(self, weights: Array, part: slice) -> Array:
        """Margins, shape (m, rows of `part`): the right choice minus the best other choice."""
        gold = self.gold[part]
        right = np.zeros((len(weights), len(gold)))
        other = np.full_like(right, -np.inf)
        for choice, levels in enumerate(self._by_choice):
            there = weights @ levels[:, part]
            np.copyto(right, there, where=gold == choice)
            np.maximum(other, there, out=other, where=gold != choice)
        return right - other

    @cached_property
    def _by_choice(self) -> Array:
        """Levels, shape (C, n, R); −1e6 where an item has fewer choices."""
        levels = np.where(np.isfinite(self.levels), self.levels, -1e6)[:, self.rows]
        return np.ascontiguousarray(np.moveaxis(levels, 2, 0))

    @cached_property
    def _bandwidth(self) -> float:
        """The bandwidth h: Silverman's rule (1986, eq. 3.31), times `BROADER`, for mean margins."""
        count = len(self.levels)
        margins = self._margins(np.full((1, count), 1.0 / count), slice(None))[0]
        low, high = np.quantile(margins, [0.25, 0.75])
        spread = min(float(margins.std()), float(high - low) / 1.34)
        return float(BROADER * 0.9 * spread * self.levels.shape[1] ** -0.2)


@dataclass(frozen=True)
class _Sums:
    """A task whose score is a sum of smooth curves, one per document.

    Attributes:
        curves: how much each document adds to the score, shape (n, N).
    """

    curves: Array

    @property
    def count(self) -> int:
        return int(self.curves.shape[1])

    @cached_property
    def gram(self) -> Array:
        out: Array = self.curves @ self.curves.T / self.count
        return out

    @cached_property
    def common(self) -> tuple[Array, float]:
        return self.curves.sum(axis=1), self.count

    def predict(
        self, weights: Array, variance: Array, scales: _Scales, *, soften: bool = False
    ) -> tuple[Array, Array, Array]:
        measured = np.full(len(weights), scales.nugget * scales.common)
        return weights @ self.common[0], variance * scales.common, measured


def _stack(scores: Sequence[Score]) -> list[list[Items]]:
    """For each task, its items at every λ.

    Raises:
        NoLandscape: there are too few scores, or they have no items or different items.
    """
    if len(scores) < LEAST:
        raise NoLandscape(f"fewer than {LEAST} values of λ have a score")
    if not scores[0].items:
        raise NoLandscape("the scores have no items")
    names = [[(i.task, i.metric, i.weight, i.ids) for i in score.items] for score in scores]
    if any(name != names[0] for name in names):
        raise NoLandscape("not every λ was scored on the same items")
    for score in scores:
        total = math.fsum(i.weight * float(np.dot(i.shares, i.values)) for i in score.items)
        if not math.isclose(score.value, total, rel_tol=1e-6, abs_tol=1e-9):
            raise NoLandscape("the items do not add up to the score")
    return [list(task) for task in zip(*(score.items for score in scores), strict=True)]


def _part(task: Sequence[Items]) -> _Part:
    """The part of the score for a task of any kind, given its items at every λ.

    Raises:
        NoLandscape: the task's score is not a known function of log-likelihoods.
    """
    first = task[0]
    values = np.array([items.values for items in task])
    shares = first.weight * np.array(first.shares)
    counts = [len(row) for row in first.log_likelihoods]
    same = all([len(row) for row in items.log_likelihoods] == counts for items in task)
    if not counts or not same or 0 in counts:
        raise NoLandscape(f"the items of {first.task} have no log-likelihoods")
    alone = set(counts) == {1} and set(first.gold) == {0}  # one choice each, always right
    if not np.isin(values, (0.0, 1.0)).all() or (alone and values.all()):
        return _Sums(values * shares)
    if set(counts) == {1}:
        raise NoLandscape(f"{first.metric} of {first.task} does not compare choices")
    if first.sizes and [len(row) for row in first.sizes] != counts:
        raise NoLandscape(f"{first.metric} of {first.task} compares more than log-likelihoods")
    levels = _levels(task, counts)
    if (np.isfinite(levels) != np.isfinite(levels[0])).any() or np.isnan(levels).any():
        raise NoLandscape(f"log-likelihoods of {first.task} are not finite")
    winner = levels.argmax(axis=2)
    rows, gold, parts = _rows(first, winner, values == 1.0, np.isfinite(levels[0]))
    predicted = np.zeros_like(values)
    np.add.at(predicted.T, rows, (winner[:, rows] == gold).T)
    if np.abs(predicted - values).mean() > DISAGREE:
        raise NoLandscape(f"{first.task} does not take the largest log-likelihood as the answer")
    finite = np.where(np.isfinite(levels), levels, 0.0)
    levels = levels - (finite.sum(axis=2) / np.array(counts))[:, :, None]
    return _Choices(levels, rows, gold, shares[rows] * parts)


def _levels(task: Sequence[Items], counts: Sequence[int]) -> Array:
    """Log-likelihoods per size, shape (n, N, C); −inf where an item has fewer choices."""
    present = np.arange(max(counts)) < np.array(counts)[:, None]
    out = np.full((len(task), *present.shape), -np.inf)
    for trial, items in enumerate(task):
        out[trial, present] = list(itertools.chain.from_iterable(items.log_likelihoods))
    if task[0].sizes:
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty choice: ±∞, as for lm-eval
            out[:, present] /= list(itertools.chain.from_iterable(task[0].sizes))
    return out


def _rows(
    first: Items, winner: NDArray[np.intp], right: NDArray[np.bool_], present: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
    """The rows of `_Choices`: item, right choice, and the part of the item's share.

    If the right choice of an item is not known, each choice is right that won while the item was
    right. If the item was never right, any choice that never won may be right, with equal parts.
    """
    known = np.array(first.gold or [-1] * len(first.ids), dtype=np.intp)
    rows = [np.flatnonzero(known >= 0)]
    gold, parts = [known[rows[0]]], [np.ones(len(rows[0]))]
    for item in np.flatnonzero(known < 0):
        seen = np.unique(winner[right[:, item], item])
        found = seen if seen.size else np.setdiff1d(present[item].nonzero()[0], winner[:, item])
        rows.append(np.full(len(found), item))
        gold.append(found)
        parts.append(np.full(len(found), 1.0 if seen.size else 1.0 / max(len(found), 1)))
    return np.concatenate(rows), np.concatenate(gold), np.concatenate(parts)


@dataclass(frozen=True)
class Landscape:
    """The reconstructed curve of the held-out score over the merge weights.

    Attributes:
        points: the measured points, shape (n, count).
        values: the scores at these points, shape (n,).
        parts: the parts of the score, one per task.
        model: the kriging that all curves share.
        doubt: factor ≥ 1 on the standard deviation, from the leave-one-out errors and the design
            effect of clusters.
        misses: leave-one-out errors (measured minus predicted), one per point that is not a parent.
        pending: points that are being measured now: they narrow the band but do not move the mean.
    """

    points: Array
    values: Array
    parts: tuple[_Part, ...]
    model: Kriging
    doubt: float = 1.0
    misses: tuple[float, ...] = ()
    pending: tuple[tuple[float, ...], ...] = ()

    @property
    def scale(self) -> float:
        """Standard deviation of the measured scores, or 1 if they are all equal."""
        spread, size = float(self.values.std()), float(np.abs(self.values).max())
        return spread if spread > ROUNDING * max(1.0, size) else 1.0

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the smooth curve behind the scores, each of shape (m,).

        Args:
            points: merge weights, shape (m, count).
        """
        weights, variance = self.model.weights(points)
        mean, square, _ = self._add_up(self.model, weights, variance)
        if self.pending:
            known = np.concatenate([self.model.points, self.pending])
            narrower = replace(self.model, points=known).weights(points)[1]
            square = self._add_up(self.model, weights, narrower)[1]
        return mean, self.doubt * np.sqrt(np.maximum(square, 1e-24))

    def population(self, points: Array) -> Array:
        """The curve for the population that the held-out items are a sample of, shape (m,).

        It is luck how many of these held-out items change between right and wrong at one λ. The
        curve counts each item by Φ(margin/h) instead of 0 or 1, so that items close to a change
        count too (Azzalini 1981, Biometrika 68: the kernel estimate of a distribution function).
        The smoothing shifts the level, so use the curve only to compare points with each other.

        Args:
            points: merge weights, shape (m, count).
        """
        mean: Array = self._add_up(self.model, *self.model.weights(points), soften=True)[0]
        return mean

    def miss(self, trial: int) -> tuple[float, float]:
        """The leave-one-out error of one trial, in score units and in standard deviations."""
        rest = np.delete(np.arange(len(self.points)), trial)
        model = at(self.points[rest], self.model)
        weights, variance = model.weights(self.points[trial : trial + 1])
        there = np.zeros((1, len(self.points)))
        there[:, rest] = weights
        mean, square, measured = self._add_up(model, there, variance, among=rest)[:, 0]
        miss = float(self.values[trial] - mean)
        rounding = ROUNDING * max(1.0, abs(float(self.values[trial])))
        return miss, miss / math.sqrt(square + measured + rounding**2)

    def _add_up(
        self,
        model: Kriging,
        weights: Array,
        variance: Array,
        *,
        among: NDArray[np.intp] | slice = slice(None),
        soften: bool = False,
    ) -> Array:
        """Mean, variance, and extra variance of a measurement, summed over all parts: shape (3, m).

        `among` are the trials that `model` uses; `weights` has a column for every trial.
        """
        total = np.zeros((3, len(weights)))
        for part in self.parts:
            curve = model.scale(part.gram[among][:, among])
            alike, alone = part.common
            own = model.scale(np.outer(alike[among], alike[among]))
            # average of one estimate of σ² per degree of freedom, and one more for independence
            freedom = max(model.freedom, 1)
            common = (freedom * own + alone * curve) / (freedom + 1)
            scales = _Scales(curve, common, model.nugget**2)
            total += np.array(part.predict(weights, variance, scales, soften=soften))
        return total


def fit(space: Space, trials: Sequence[Trial]) -> Landscape:
    """The landscape reconstructed from the trials with a score.

    Raises:
        NoLandscape: their items do not determine it.
    """
    scored = [(trial.recipe, trial.held_out) for trial in trials if trial.held_out is not None]
    parts = tuple(_part(task) for task in _stack([score for _, score in scored]))
    points = space.points_of([recipe for recipe, _ in scored])
    values = np.array([score.value for _, score in scored])
    model = estimate(points, [part.gram for part in parts], [part.count for part in parts])
    landscape = Landscape(points, values, parts, model, _spread([s for _, s in scored]))
    if len(points) == LEAST:
        return landscape
    misses = [landscape.miss(int(trial)) for trial in np.flatnonzero(mixed(trials))]
    square = math.fsum(z * z for _, z in misses)
    doubt = max(1.0, math.sqrt((1.0 + square) / (1.0 + len(misses))))
    return replace(
        landscape, doubt=doubt * landscape.doubt, misses=tuple(miss for miss, _ in misses)
    )


def mixed(trials: Sequence[Trial]) -> NDArray[np.bool_]:
    """Which trials with a score mix two parents or more, shape (n,); the others check no curve."""
    return np.array([max(t.recipe.lam) < 1.0 for t in trials if t.held_out is not None])


def _spread(scores: Sequence[Score]) -> float:
    """The root of the design effect: the items of one cluster err together, at every λ.

    It is the median over pairs of trials that follow each other; 1 without clusters.
    """
    if all(
        label == name
        for i in scores[0].items
        for label, name in zip(i.clusters, i.ids, strict=True)
    ):
        return 1.0
    effects = [paired(one, other).effect for one, other in itertools.pairwise(scores)]
    return math.sqrt(statistics.median(effects))
