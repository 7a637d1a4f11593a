"""Landscapes to search λ on: item by item, as checkpoints of one pretraining behave.

An item is a question with choices (or a document), and each of its log-likelihoods is a smooth
function of the merge weights w,

    ll(w) = Σ_b coefficient_b · φ_b(w) + jitter,    φ: 1, w_k, w_j w_k, w_j w_k (w_k − w_j), …

What a family says of the whole curve (how far apart the parents are, how high the dome between them
is) is added to the right choice, more to some items than to others. Everything else is particular
to the item: each parent errs in its own way, so mixing two also cancels errors. The jitter stands
for the rounding of merged weights to bf16: as good as random, but the same whenever the same λ is
evaluated. Accuracy is then what lm-eval makes of it, a staircase.

The held-out items are a small sample, the population a large one of the same kind. The constants
are set so that the curves look as published ones do (Liu et al. 2024, figures 2 and 7); `python
benchmarks/search.py --describe` prints what came out. `load` reads recorded items instead.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from mlflow_soup.records import Items, Score

Array = NDArray[np.float64]

POPULATION = 100_000  # items; documents, whose mean is linear in them, a tenth
POINT = 0.01  # of accuracy
BYTES_POINT = 0.005  # bits per byte that count as much as a point of accuracy
LN2 = math.log(2)
JITTER = (0.0005, 0.01)  # nats of a choice: weights in F32, and all arithmetic in BF16
PASSAGE = 10  # items that belong together where a family has passages


@dataclass(frozen=True)
class Shape:
    """What the curve of a whole task is like, in points.

    Attributes:
        levels: one per parent, only their differences matter.
        domes: height of the parabola between each pair of parents, at its middle.
        skews: the same for the cubic, which is positive near the later parent of a pair.
        late: height of a bump near λ = 0.9, pairs only, as all below.
        late_power: p of the bump λ^p (1 − λ).
        peaks: height of each Gaussian bump, where it is, and its standard deviation.
        waves: amplitude of each of the `periods`.
        periods: how often a wave goes round between λ = 0 and 1.
    """

    levels: tuple[float, ...]
    domes: tuple[float, ...]
    skews: tuple[float, ...] = ()
    late: float = 0.0
    late_power: int = 7
    peaks: tuple[tuple[float, float, float], ...] = ()
    waves: tuple[float, ...] = ()
    periods: tuple[float, ...] = ()

    @property
    def parents(self) -> int:
        """K, how many checkpoints are merged."""
        return len(self.levels)

    def features(self, weights: Array) -> Array:
        """φ(w), shape (n, B), for merge weights of shape (n, K)."""
        columns = [np.ones(len(weights)), *weights.T]
        pairs = list(combinations(weights.T, 2))
        columns += [4 * a * b for a, b in pairs]
        columns += [6 * math.sqrt(3) * a * b * (b - a) for a, b in pairs]
        if self.parents == 2:
            lam, p = weights[:, 1], self.late_power
            peak = p / (p + 1)
            columns.append(lam**p * (1 - lam) / (peak**p * (1 - peak)))
            columns += [np.sin(2 * np.pi * f * lam) for f in self.periods]
            columns += [np.cos(2 * np.pi * f * lam) for f in self.periods]
            columns += [np.exp(-0.5 * ((lam - at) / sd) ** 2) for _, at, sd in self.peaks]
        return np.stack(columns, axis=1)

    def mean(self, rng: np.random.Generator) -> Array:
        """Coefficients of φ that give the curve, in points."""
        parts: list[float] = [0.0, *self.levels, *self.domes]
        parts += self.skews or [0.0] * len(self.domes)
        if self.parents == 2:
            phases = rng.uniform(0, 2 * np.pi, len(self.waves))
            parts += [self.late, *(self.waves * np.sin(phases)), *(self.waves * np.cos(phases))]
            parts += [height for height, _, _ in self.peaks]
        return np.array(parts)

    def spread(self, common: float, parent: float, bend: float) -> Array:
        """Standard deviations of an item's own coefficients: of its level, slopes and bends."""
        pairs = len(self.domes)
        parts = [common, *[parent] * len(self.levels), *[bend] * pairs, *[bend / 2] * pairs]
        if self.parents == 2:
            parts += [bend / 3, *[bend / 8] * 2 * len(self.periods), *[bend / 3] * len(self.peaks)]
        return np.array(parts)


@dataclass(frozen=True)
class Recorded:
    """Cubic splines through what was recorded at each λ of a pair: coefficients are the values.

    Attributes:
        lam: the λ, ascending.
    """

    lam: Array
    parents: int = 2

    def features(self, weights: Array) -> Array:
        """φ(w), shape (n, L), for merge weights of shape (n, 2)."""
        return np.asarray(CubicSpline(self.lam, np.eye(len(self.lam)))(weights[:, 1]))


@dataclass(frozen=True)
class Choices:
    """N questions with C choices each.

    Attributes:
        coefficients: of φ, shape (N, C, B).
        gold: index of the right choice, shape (N,).
        sizes: what log-likelihoods are divided by, shape (N, C); None for 1.
        jitter: by which a log-likelihood per size wavers between neighbouring λ, in nats.
    """

    coefficients: NDArray[np.float32]
    gold: NDArray[np.int64]
    sizes: Array | None
    jitter: float

    def values(self, features: Array) -> Array:
        """Accuracy at each of n weights; `features` has shape (n, B)."""
        right = np.zeros(len(features))
        for begin in range(0, len(self.gold), 2000):
            part = slice(begin, begin + 2000)
            likelihoods = self.coefficients[part] @ features.T.astype(np.float32)
            best = likelihoods.argmax(axis=1)  # (items, n)
            right += (best == self.gold[part, None]).sum(axis=0)
        return right / len(self.gold)

    def answers(self, features: Array, noise: Array) -> tuple[Array, Array]:
        """Per-item values and log-likelihoods at one λ; `noise` has shape (N, C)."""
        likelihoods = self.coefficients @ features + noise
        right = (likelihoods.argmax(axis=1) == self.gold).astype(float)
        return right, likelihoods if self.sizes is None else likelihoods * self.sizes

    @cached_property
    def shares(self) -> Array:
        """Shares of the items in the accuracy."""
        return np.full(len(self.gold), 1 / len(self.gold))

    def items(self, values: Array, likelihoods: Array, weight: float) -> Items:
        """The record of what `answers` said."""
        return Items(
            "choices",
            "acc,none" if self.sizes is None else "acc_norm,none",
            weight,
            tuple(map(str, range(len(values)))),
            tuple(values.tolist()),
            tuple(self.shares.tolist()),
            tuple(map(tuple, likelihoods.tolist())),
            tuple(self.gold.tolist()),
            () if self.sizes is None else tuple(map(tuple, self.sizes.tolist())),
        )


@dataclass(frozen=True)
class Documents:
    """N documents, scored by bits per byte.

    Attributes:
        coefficients: of φ, of each document's bits per byte, shape (N, 1, B).
        sizes: bytes, shape (N,).
        jitter: by which the log-likelihood of a document of 1 kB wavers, in nats.
    """

    coefficients: NDArray[np.float32]
    sizes: Array
    jitter: float

    def values(self, features: Array) -> Array:
        """Bits per byte at each of n weights; `features` has shape (n, B)."""
        return np.asarray(features @ (self.shares @ self.coefficients[:, 0]))

    def answers(self, features: Array, noise: Array) -> tuple[Array, Array]:
        """Per-item values and log-likelihoods at one λ; `noise`, (N, 1), is of a text of 1 kB."""
        bits = self.coefficients[:, 0] @ features + noise[:, 0] / np.sqrt(1000 * self.sizes)
        return bits, -LN2 * (bits * self.sizes)[:, None]

    @cached_property
    def shares(self) -> Array:
        """Shares of the documents in the bits per byte."""
        return self.sizes / self.sizes.sum()

    def items(self, values: Array, likelihoods: Array, weight: float) -> Items:
        """The record of what `answers` said."""
        return Items(
            "documents",
            "bits_per_byte,none",
            weight,
            tuple(map(str, range(len(values)))),
            tuple(values.tolist()),
            tuple(self.shares.tolist()),
            tuple(map(tuple, likelihoods.tolist())),
        )


Task = Choices | Documents


def make_choices(
    rng: np.random.Generator, shape: Shape, count: int, bend: float, alike: float
) -> tuple[Choices, Choices]:
    """A held-out sample of `count` questions, and the population.

    `alike` is the correlation, of two questions about one passage, between how far the right choice
    is ahead of another one.
    """
    choices = int(rng.choice([2, 4], p=[0.25, 0.75]))
    normalised = rng.random() < 0.3
    skill = rng.uniform(0.4, 1.6)  # nats by which the right choice is ahead, on average
    mean = shape.mean(rng)
    noise = rng.lognormal(0, 0.25, 2)

    total = count + POPULATION
    gold = rng.integers(choices, size=total)
    spread = shape.spread(1.5, 0.35 * noise[0], bend * noise[1])
    drawn = rng.standard_normal((total, choices, len(mean)), np.float32)
    rows = np.arange(total)
    if alike:
        passages = rng.standard_normal((total // PASSAGE + 1, choices, len(mean)), np.float32)
        after_gold = (np.arange(choices) - gold[:, None]) % choices  # 0 is the right choice
        shared = passages[rows[:, None] // PASSAGE, after_gold]
        drawn = math.sqrt(1 - alike) * drawn + math.sqrt(alike) * shared
    coefficients = drawn * spread.astype(np.float32)
    coefficients[rows, gold, 0] += skill
    # points per nat, where the parents are in the middle
    levels = coefficients[:20_000, :, 0].copy()
    accuracies = []
    for shift in (-0.1, 0.1):
        levels[rows[:20_000], gold[:20_000]] += shift
        accuracies.append((levels.argmax(axis=1) == gold[:20_000]).mean())
        levels[rows[:20_000], gold[:20_000]] -= shift
    slope = (accuracies[1] - accuracies[0]) / 0.2 / POINT
    sensitivity = rng.gamma(2, 0.5, total)[:, None]
    coefficients[rows, gold] += sensitivity * mean / slope
    # how fluent a model finds the question, which does not decide between its choices
    fluency = shape.spread(12, 1.0, 0.5)
    coefficients += (rng.standard_normal((total, 1, len(mean))) * fluency).astype(np.float32)
    coefficients[:, :, 0] -= 40
    sizes = rng.integers(8, 60, (total, choices)).astype(float) if normalised else None
    jitter = math.exp(rng.uniform(*np.log(JITTER)))
    if sizes is not None:  # the same differences per byte, only smaller
        coefficients /= 30
        jitter /= 30
    return tuple(
        Choices(coefficients[part], gold[part], None if sizes is None else sizes[part], jitter)
        for part in (slice(count), slice(count, None))
    )


def make_documents(
    rng: np.random.Generator, shape: Shape, count: int, bend: float, alike: float
) -> tuple[Documents, Documents]:
    """A held-out sample of `count` documents, and the population; no two of them are `alike`."""
    total = count + POPULATION // 10
    mean = shape.mean(rng)
    spread = shape.spread(0.25, 0.015, 0.03 * bend)
    coefficients = rng.standard_normal((total, 1, len(mean))) * spread
    coefficients[:, 0] -= rng.gamma(2, 0.5, total)[:, None] * mean * BYTES_POINT
    coefficients[:, 0, 0] += rng.uniform(0.8, 1.2)
    sizes = np.round(rng.lognormal(7, 0.8, total)) + 50
    jitter = 10 * math.exp(rng.uniform(*np.log(JITTER)))  # a document is longer than a choice
    return tuple(
        Documents(coefficients[part].astype(np.float32), sizes[part], jitter)
        for part in (slice(count), slice(count, None))
    )


@dataclass(frozen=True)
class Landscape:
    """What a searcher can evaluate, and what only the judge sees.

    Attributes:
        alpha: least weight of the newest parent.
        shape: of the basis φ.
        held_out, population: the same tasks, few items and many.
        weights: of the tasks in the score.
        point: score units that are called a point in tables.
        with_items: whether a score comes with its items.
        seed: of the jitter.
    """

    alpha: float
    shape: Shape | Recorded
    held_out: tuple[Task, ...]
    population: tuple[Task, ...]
    weights: tuple[float, ...]
    point: float
    with_items: bool
    seed: int

    @property
    def parents(self) -> int:
        """K, how many checkpoints are merged."""
        return self.shape.parents

    @cached_property
    def grid(self) -> Array:
        """Merge weights all over the simplex, shape (n, K); of pairs twice as many as published."""
        return lattice(self.parents, {2: 200, 3: 32, 4: 16}[self.parents])

    def feasible(self, weights: Array) -> NDArray[np.bool_]:
        """Which of the n weights may be recommended, shape (n,)."""
        return weights[:, -1] >= self.alpha - 1e-9

    @cached_property
    def held_out_values(self) -> Array:
        """Score of every point of the grid as the search would see it."""
        return np.array([self._answers(w)[0] for w in self.grid])

    @cached_property
    def population_values(self) -> Array:
        """The true score of every point of the grid."""
        return self.truth(self.grid)

    def truth(self, weights: Array) -> Array:
        """Score on the population, shape (n,)."""
        features = self.shape.features(weights)
        values = [task.values(features) for task in self.population]
        return np.asarray(np.array(self.weights) @ values)

    def score(self, lam: Sequence[float]) -> Score:
        """What an evaluation at merge weights λ says."""
        value, answers = self._answers(np.array(lam))
        tasks = list(zip(self.weights, self.held_out, answers, strict=True))
        variance = sum(
            (w * np.linalg.norm(task.shares * (values - task.shares @ values))) ** 2
            for w, task, (values, _) in tasks
        )
        items = tuple(task.items(*answer, weight) for weight, task, answer in tasks)
        return Score(value, math.sqrt(variance), items if self.with_items else ())

    def _answers(self, lam: Array) -> tuple[float, list[tuple[Array, Array]]]:
        """The score, and the values and log-likelihoods of each task."""
        features = self.shape.features(lam[None])[0]
        rng = np.random.default_rng([self.seed, *np.round(lam * 1e4).astype(int)])
        answers = [
            task.answers(features, task.jitter * rng.standard_normal(task.coefficients.shape[:2]))
            for task in self.held_out
        ]
        parts = zip(self.weights, self.held_out, answers, strict=True)
        return sum(w * float(task.shares @ values) for w, task, (values, _) in parts), answers


def lattice(parents: int, steps: int) -> Array:
    """All merge weights in multiples of 1 / steps, shape (n, parents), the last one ascending."""
    if parents == 1:
        return np.ones((1, 1))
    rows = [
        np.hstack([lattice(parents - 1, steps - i) * (1 - i / steps), np.full((n, 1), i / steps)])
        for i in range(steps)
        for n in [math.comb(steps - i + parents - 2, parents - 2)]
    ]
    return np.vstack([*rows, np.eye(parents)[-1:]])


Rng = np.random.Generator


def _pair(gap: float, dome: float, skew: float = 0.0, **more: object) -> Shape:
    return Shape((0.0, gap), (dome,), (skew,), **more)  # type: ignore[arg-type]


def _gap(rng: Rng) -> Shape:
    return _pair(
        rng.uniform(4, 9), rng.uniform(0, 1), late=rng.uniform(0.5, 1.4),
        late_power=int(rng.integers(6, 10)),
    )  # fmt: skip


def _dome(rng: Rng) -> Shape:
    return _pair(rng.normal(0, 0.9), rng.uniform(1.0, 2.0), rng.normal(0, 0.15))


def _cubic(rng: Rng) -> Shape:
    return _pair(rng.normal(0, 2), rng.normal(0.8, 1.2), rng.normal(0, 1.2))


def _bytes(rng: Rng) -> Shape:
    return _pair(rng.normal(0, 1.5), rng.uniform(0.3, 2.5), rng.normal(0, 0.3))


def _wiggle(rng: Rng) -> Shape:
    periods = tuple(rng.uniform(1.5, 4, 2))
    return _pair(
        rng.normal(0, 1), rng.uniform(0.3, 1.5), waves=tuple(rng.uniform(0.2, 0.5, 2)),
        periods=periods,
    )  # fmt: skip


def _barrier(rng: Rng) -> Shape:
    return _pair(rng.uniform(0.5, 4), rng.uniform(-20, -6), rng.normal(0, 2))


def _tiny(rng: Rng) -> Shape:
    return _pair(rng.normal(0, 0.15), rng.uniform(0.0, 0.25))


def _peaks(rng: Rng) -> Shape:
    places = (rng.uniform(0.12, 0.38), rng.uniform(0.62, 0.88))
    return _pair(
        rng.normal(0, 0.5), rng.uniform(0.0, 0.5),
        peaks=tuple((rng.uniform(1.5, 3.5), at, rng.uniform(0.04, 0.07)) for at in places),
    )  # fmt: skip


def _collapse(alpha: float) -> Callable[[Rng], Shape]:
    """The scores of a dome collapse around the middle of [α, 1]."""
    width = 1 - alpha

    def draw(rng: Rng) -> Shape:
        place = alpha + width * rng.uniform(0.4, 0.6)
        hole = (rng.uniform(-40, -20), place, width * rng.uniform(0.1, 0.2))
        return _pair(rng.normal(0, 1), rng.uniform(1, 3), peaks=(hole,))

    return draw


def _domes(parents: int) -> Callable[[Rng], Shape]:
    pairs = parents * (parents - 1) // 2

    def draw(rng: Rng) -> Shape:
        return Shape(
            tuple(rng.normal(0, 0.8, parents)),
            tuple(rng.uniform(0.5, 2, pairs)),
            tuple(rng.normal(0, 0.2, pairs)),
        )

    return draw


def _edge(parents: int) -> Callable[[Rng], Shape]:
    """One parent, any of them, is much worse than the others and spoils what it is mixed into."""

    def draw(rng: Rng) -> Shape:
        bad = int(rng.integers(parents))
        levels = rng.normal(0, 0.8, parents)
        levels[bad] -= rng.uniform(4, 9)
        domes = [
            rng.uniform(-2, 1) if bad in pair else rng.uniform(0.7, 2)
            for pair in combinations(range(parents), 2)
        ]
        return Shape(tuple(levels), tuple(domes))

    return draw


@dataclass(frozen=True)
class Family:
    """A kind of landscape.

    Attributes:
        what: it is like, in words.
        draw: a random shape of the kind.
        tasks: `choices`, `documents` or both.
        alpha: least weight of the newest parent.
        bend: standard deviation of an item's own curvature, in nats.
        with_items: whether scores come with items.
        alike: correlation of the items of one passage.
        counts: held-out items of each task, which then has a curve of its own; else all tasks have
            the same curve and a random number of items.
        scales: of each task's metric, where they differ.
    """

    what: str
    draw: Callable[[Rng], Shape]
    tasks: tuple[str, ...] = ("choices",)
    alpha: float = 0.0
    bend: float = 0.25
    with_items: bool = True
    alike: float = 0.0
    counts: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def point(self) -> float:
        """Score units that are called a point."""
        if self.scales:
            points = [BYTES_POINT if task == "documents" else POINT for task in self.tasks]
            return float(np.mean(np.multiply(points, self.scales)))
        return BYTES_POINT if self.tasks == ("documents",) else POINT


FAMILIES = {
    "A": Family("large gap, best near 0.9, α = 0.5", _gap, alpha=0.5),
    "A0": Family("the same, α = 0", _gap),
    "B": Family("equal parents, a dome between them", _dome),
    "C": Family("cubic log-likelihoods, mixed", _cubic, bend=0.6),
    "D": Family("bits per byte", _bytes, ("documents",)),
    "E": Family("wiggles", _wiggle),
    "F": Family("a barrier, best at λ = 1", _barrier, bend=0.5),
    "G": Family("a tiny gain", _tiny, bend=0.15),
    "S": Family("a dome, scores without items", _dome, with_items=False),
    "M": Family("accuracy and bits per byte, averaged", _dome, ("choices", "documents")),
    "H": Family("passages, correlation 0.1", _dome, alike=0.1),
    "I": Family("passages, correlation 0.5", _dome, alike=0.5),
    "P": Family("two narrow peaks", _peaks),
    "X": Family("a collapse in the middle, α = 0.5", _collapse(0.5), alpha=0.5),
    "Y": Family("a collapse in the middle, α = 0", _collapse(0.0)),
    "U": Family(
        "2,000 questions, and 40 documents on a scale ten times as wide, averaged",
        _dome,
        ("choices", "documents"),
        counts=(2000, 40),
        scales=(1.0, 10.0),
    ),
    "3-dome": Family("three parents, domes between them", _domes(3)),
    "3-edge": Family("three, best without one of them", _edge(3)),
    "3-bytes": Family("three, bits per byte", _domes(3), ("documents",)),
    "4-dome": Family("four parents, domes between them", _domes(4)),
    "4-edge": Family("four, best without one of them", _edge(4)),
    "4-bytes": Family("four, bits per byte", _domes(4), ("documents",)),
}

MAKE = {"choices": make_choices, "documents": make_documents}


def make(name: str, seed: int) -> Landscape:
    """The landscape of a family for a seed, always the same."""
    family = FAMILIES[name]
    # A and A0 share their curves: what differs is where the search may go
    rng = np.random.default_rng([seed, *b"A"] if name == "A0" else [seed, *name.encode()])
    shape = family.draw(rng)
    drawn = [
        MAKE[task](rng, family.draw(rng), count, family.bend, family.alike)
        for task, count in zip(family.tasks, family.counts, strict=False)
    ] or [
        MAKE[task](rng, shape, int(rng.integers(500, 1501) // (5 if task == "documents" else 1)),
                   family.bend, family.alike)
        for task in family.tasks
    ]  # fmt: skip
    signs = [-1.0 if task == "documents" else 1.0 for task in family.tasks]
    scales = family.scales or [1.0] * len(signs)
    return Landscape(
        alpha=family.alpha,
        shape=shape,
        held_out=tuple(held_out for held_out, _ in drawn),
        population=tuple(population for _, population in drawn),
        weights=tuple(sign * scale / len(signs) for sign, scale in zip(signs, scales, strict=True)),
        point=family.point,
        with_items=family.with_items,
        seed=seed,
    )


def load(file: Path, seed: int) -> Landscape:
    """A recorded pair (see record.py), its items split at random: held out, and the population."""
    with np.load(file) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    likelihoods = data["log_likelihoods"].cumsum(axis=-1) * float(data["step"])
    order = np.random.default_rng(seed).permutation(len(likelihoods))
    halves = np.array_split(order, 2)
    sizes = data.get("sizes")
    tasks: list[Task] = []
    if "gold" in data:
        curves = likelihoods if sizes is None else likelihoods / sizes[..., None]
        for half in halves:
            chosen = None if sizes is None else sizes[half].astype(float)
            tasks.append(Choices(curves[half].astype(np.float32), data["gold"][half], chosen, 0.0))
    else:
        bits = -likelihoods / LN2 / data["sizes"][:, None, None]
        for half in halves:
            size = data["sizes"][half].astype(float)
            tasks.append(Documents(bits[half].astype(np.float32), size, 0.0))
    return Landscape(
        alpha=0.0,
        shape=Recorded(data["lam"]),
        held_out=(tasks[0],),
        population=(tasks[1],),
        weights=(1.0 if "gold" in data else -1.0,),
        point=POINT if "gold" in data else BYTES_POINT,
        with_items=True,
        seed=seed,
    )


def describe(drawn: Iterable[Landscape]) -> dict[str, float]:
    """Medians over landscapes of what their curves are like, in points."""
    rows = []
    for landscape in drawn:
        row = {}
        for what in ("held_out", "population"):
            values = getattr(landscape, f"{what}_values") / landscape.point
            corners = values[landscape.grid.max(axis=1) == 1]
            row |= {
                f"{what} gap": np.ptp(corners),
                f"{what} gain": values.max() - corners.max(),
                f"{what} share that beats": (values > corners.max()).mean(),
                f"{what} weight of the newest": landscape.grid[values.argmax(), -1],
            }
        rows.append(row)
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}
