"""The whole held-out curve from a handful of evaluations, through the items' log-likelihoods.

Accuracy is a staircase of the merge weights; the log-likelihoods that it counts are smooth. Each
evaluation gives one per item and choice: all of these curves are predicted by kriging, and

    accuracy(λ) = mean over items of P(the right choice wins).

Scores that are sums of log-likelihoods, as bits per byte, are predicted as they are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from mlflow_soup.records import Items, Score, Trial
from mlflow_soup.search.kriging import Kriging, at, estimate

Array = NDArray[np.float64]

# numbers held at once while a curve is predicted, 32 MB
CHUNK = 4_000_000
# Silverman's rule is for the height of a curve; to see where it peaks takes more smoothing
BROADER = 3.0
LEAST = 3  # weights
FLOOR = 1e-3  # of an item's variance: an item is never quite certain
ROUNDING = 1e-9  # of a score: what is closer is equal
DISAGREE = 0.01  # share of items that may be right or wrong for another reason


class NoLandscape(Exception):
    """The items say too little about other weights; the message says why."""


class _Scales(NamedTuple):
    """How far a task's curves are from their trend: variances, for one of kriging's units."""

    curve: float  # σ² of one curve
    common: float  # σ² of what the curves have in common
    nugget: float  # τ²


class _Part(Protocol):
    """One task's part of the score."""

    @property
    def gram(self) -> Array:
        """Y·Yᵀ/M of its curves, shape (n, n)."""

    @property
    def count(self) -> int:
        """M, how many curves it has."""

    @property
    def common(self) -> tuple[Array, float]:
        """What its curves have in common, shape (n,); and its σ² for σ² = 1, were they independent.

        Curves of one model bend alike: what is wrong with the prediction of one is wrong with all.
        """

    def predict(
        self, weights: Array, variance: Array, scales: _Scales, *, soften: bool = False
    ) -> tuple[Array, Array, Array]:
        """Its part of the score, the variance of that, and what a measurement adds; shape (m,).

        Args:
            weights: W of the kriging, shape (m, n).
            variance: its variance in units of σ², shape (m,).
            scales: of its curves.
            soften: count each item by Φ(margin/h) instead of 0 or 1.
        """


@dataclass(frozen=True)
class _Choices:
    """A task whose items are right when the right choice has the largest log-likelihood per size.

    Attributes:
        levels: those, shape (n, N, C), each item's with mean 0; −inf where it has fewer choices.
        rows: which item, shape (R,), R ≥ N: one whose right choice is not known stands in several.
        gold: its right choice, shape (R,).
        shares: what it adds to the score when it is right, shape (R,).
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
        # the mean margin over the mean of the other choices
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
        # what all margins have in common moves the items on the edge together
        density /= math.sqrt(2.0 * math.pi) * scale[:, 0]
        together = density**2 * variance * scales.common
        known = alone * variance / total
        return mean, known + together, alone - known + FLOOR * float(self.shares @ self.shares)

    def _margins(self, weights: Array, part: slice) -> Array:
        """How far the right choice is ahead of the best other one, shape (m, rows of `part`)."""
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
        """Levels, shape (C, n, R); far below all others where an item has fewer choices."""
        levels = np.where(np.isfinite(self.levels), self.levels, -1e6)[:, self.rows]
        return np.ascontiguousarray(np.moveaxis(levels, 2, 0))

    @cached_property
    def _bandwidth(self) -> float:
        """`BROADER` times Silverman's rule (1986, eq. 3.31), from each margin's mean over λ."""
        count = len(self.levels)
        margins = self._margins(np.full((1, count), 1.0 / count), slice(None))[0]
        low, high = np.quantile(margins, [0.25, 0.75])
        spread = min(float(margins.std()), float(high - low) / 1.34)
        return float(BROADER * 0.9 * spread * self.levels.shape[1] ** -0.2)


@dataclass(frozen=True)
class _Sums:
    """A task whose score is a sum of smooth curves, one per document.

    Attributes:
        curves: what each document adds to the score, shape (n, N).
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
    """Per task its items at every weight.

    Raises:
        NoLandscape: the scores have no items, or not the same ones.
    """
    if len(scores) < LEAST:
        raise NoLandscape(f"fewer than {LEAST} weights were scored")
    if not scores[0].items:
        raise NoLandscape("the scores come without items")
    names = [[(i.task, i.metric, i.weight, i.ids) for i in score.items] for score in scores]
    if any(name != names[0] for name in names):
        raise NoLandscape("not every weight was scored on the same items")
    for score in scores:
        total = math.fsum(i.weight * float(np.dot(i.shares, i.values)) for i in score.items)
        if not math.isclose(score.value, total, rel_tol=1e-6, abs_tol=1e-9):
            raise NoLandscape("the items do not add up to the score")
    return [list(task) for task in zip(*(score.items for score in scores), strict=True)]


def _part(task: Sequence[Items]) -> _Part:
    """What kind of task it is, given its items at every weight.

    Raises:
        NoLandscape: its score is no function of log-likelihoods that is known here.
    """
    first = task[0]
    values = np.array([items.values for items in task])
    shares = first.weight * np.array(first.shares)
    counts = [len(row) for row in first.log_likelihoods]
    same = all([len(row) for row in items.log_likelihoods] == counts for items in task)
    if not counts or not same or 0 in counts:
        raise NoLandscape(f"the items of {first.task} come without log-likelihoods")
    alone = set(counts) == {1} and set(first.gold) == {0}  # a single choice is always right
    if not np.isin(values, (0.0, 1.0)).all() or (alone and values.all()):
        return _Sums(values * shares)
    if set(counts) == {1}:
        raise NoLandscape(f"{first.metric} of {first.task} compares no choices")
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
        raise NoLandscape(f"in {first.task} not the largest log-likelihood decides what is right")
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
        out[:, present] /= list(itertools.chain.from_iterable(task[0].sizes))
    return out


def _rows(
    first: Items, winner: NDArray[np.intp], right: NDArray[np.bool_], present: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
    """Items, their right choices, and which part of an item's share each such row has.

    Where the right choices are not known, those that won and were right are; and of an item that
    was never right, any choice may be that never won.
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
        points: where it was measured, shape (n, count).
        values: what was measured there, shape (n,).
        parts: one per task.
        model: the kriging that all curves share.
        doubt: by what the standard deviation is multiplied, ≥ 1: how far off it was where it
            could be checked.
        misses: what was measured less what was predicted without it, one per point that is no
            parent.
        pending: points that are being measured: they narrow the band, but tell nothing new.
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
        """Standard deviation of the measured scores, or 1 when they are all equal."""
        spread, size = float(self.values.std()), float(np.abs(self.values).max())
        return spread if spread > ROUNDING * max(1.0, size) else 1.0

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the smooth curve below the measured scores, shape (m,).

        Args:
            points: shape (m, count).
        """
        weights, variance = self.model.weights(points)
        mean, square, _ = self._add_up(self.model, weights, variance)
        if self.pending:
            known = np.concatenate([self.model.points, self.pending])
            narrower = replace(self.model, points=known).weights(points)[1]
            square = self._add_up(self.model, weights, narrower)[1]
        return mean, self.doubt * np.sqrt(np.maximum(square, 1e-24))

    def population(self, points: Array) -> Array:
        """How the score goes on items like these rather than on just these, shape (m,).

        How many held-out items lie exactly between right and wrong is luck. Counting each by
        Φ(margin/h) instead of 0 or 1 lets those beside them vote as well (Azzalini 1981, Biometrika
        68: the kernel estimate of a distribution function). So much smoothing shifts the level; it
        is for comparing points with each other.
        """
        mean: Array = self._add_up(self.model, *self.model.weights(points), soften=True)[0]
        return mean

    def miss(self, trial: int) -> tuple[float, float]:
        """A score less what the others predict of it, and the same in standard deviations."""
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
        """Mean, variance, and what a measurement adds to that, of all parts: shape (3, m).

        `among` are the trials that `model` knows; `weights` has columns for all.
        """
        total = np.zeros((3, len(weights)))
        for part in self.parts:
            curve = model.scale(part.gram[among][:, among])
            alike, alone = part.common
            own = model.scale(np.outer(alike[among], alike[among]))
            # one observation of σ² per degree of freedom, and independence as one more
            freedom = max(model.freedom, 1)
            common = (freedom * own + alone * curve) / (freedom + 1)
            scales = _Scales(curve, common, model.nugget**2)
            total += np.array(part.predict(weights, variance, scales, soften=soften))
        return total


def fit(trials: Sequence[Trial]) -> Landscape:
    """The landscape that the trials with a score tell of.

    Raises:
        NoLandscape: their items do not say enough.
    """
    scored = [(trial.recipe, trial.held_out) for trial in trials if trial.held_out is not None]
    parts = tuple(_part(task) for task in _stack([score for _, score in scored]))
    points = np.array([recipe.lam for recipe, _ in scored])
    values = np.array([score.value for _, score in scored])
    model = estimate(points, [part.gram for part in parts], [part.count for part in parts])
    landscape = Landscape(points, values, parts, model)
    if len(points) == LEAST:
        return landscape
    inside = map(int, np.flatnonzero(points.max(axis=1) < 1.0))
    misses = [landscape.miss(trial) for trial in inside]
    square = math.fsum(z * z for _, z in misses)
    doubt = math.sqrt((1.0 + square) / (1.0 + len(misses)))
    return replace(landscape, doubt=max(1.0, doubt), misses=tuple(miss for miss, _ in misses))
