"""Merge schedules: the weights of many checkpoints of one run from two numbers.

Merging the checkpoints of a run that trains at a constant rate has the effect of a decay of the
learning rate (Tian et al. 2025, WSM, arXiv:2507.17634, theorem 3.1). If the decay 1 ≥ w(x) ≥ 0
weights the gradients of a window of duration D, x ∈ [0, 1] from its begin to its end, the
checkpoint at time t_j has the merge weight

    c_j = w(x_{j−1}) − w(x_j),   x_j = max(t_j − (t_n − D), 0) / D,   oldest first

The search takes w(x) = 1 − x^p. There, p = 1 is the plain average of the window (LAWA, Sanyal et
al. 2023, arXiv:2306.03241; SMA in PMA, Li et al. 2025, arXiv:2505.12082), p = 2 gives weights that
grow linearly with time (1, 3, 5 …; WMA in PMA), and p = 1/2 is the minus-sqrt schedule of
Nemotron 3 Super (arXiv:2604.12374). A large p leaves the newest checkpoint alone. For two
checkpoints and the longest D, λ = 1 − 2^−p.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mlflow_soup.records import Recipe
from mlflow_soup.search.space import Array, Space

Decay = Callable[[Array], Array]

# the exponents p that are searched
POWERS = 2.0 ** (np.arange(-4, 13) / 4.0)
PARTS = 4  # candidates for the begin of the window, from each checkpoint to the next
# weights are rounded here first, so that rounding errors do not decide a tie of the 1e-4 steps
DIGITS = 10


def power(p: float) -> Decay:
    """The decay w(x) = 1 − x^p, for p > 0."""
    return lambda x: 1.0 - x**p


def _cosine(x: Array) -> Array:
    decay: Array = 0.5 * (1.0 + np.cos(np.pi * x))
    return decay


DECAYS: Mapping[str, Decay] = {
    "linear": power(1.0),
    "cosine": _cosine,
    "minus-sqrt": power(0.5),
}


def decay_of(name: str) -> Decay:
    """The decay with this name in `DECAYS`, or 1 − x^p for a number p."""
    return DECAYS[name] if name in DECAYS else power(float(name))


def evenly(count: int) -> tuple[float, ...]:
    """The times of checkpoints that are only known by their order, 1, 2, 3 and so on."""
    return tuple(map(float, range(1, count + 1)))


def amount(duration: float) -> str:
    """A duration for people: every digit of its whole units, and parts of small ones."""
    return f"{duration:,.0f}" if duration >= 1000.0 else f"{duration:.4g}"


def longest(times: Sequence[float]) -> float:
    """The longest duration D. It begins one interval before the first of two or more times."""
    return times[-1] - (2.0 * times[0] - times[1])


def weights(times: Sequence[float], duration: float, decay: Decay) -> Array:
    """The merge weights c of a schedule, oldest checkpoint first; they sum to 1.

    Args:
        times: when the checkpoints were saved, ascending; in any unit, such as tokens.
        duration: D in the same unit, 0 < D ≤ `longest(times)`; the window ends at the newest.
        decay: w, with w(0) = 1 and w(1) = 0.

    Returns:
        Shape (len(times),); 0 for checkpoints before the window.
    """
    at = np.array([times[-1] - longest(times), *times])
    x = np.maximum(at - (times[-1] - duration), 0.0) / duration
    share: Array = np.round(-np.diff(decay(x)), DIGITS)
    return share


@dataclass(frozen=True)
class Schedule(Space):
    """The schedules 1 − x^p of each duration D and power p, for checkpoints saved at `times`.

    Only the newest checkpoint is scored alone: a soup would replace it.

    The surrogates see a soup as a point in a plane. Let W_j = Σ_{i≤j} c_i: the share of a soup that
    lacks what was learnt from t_j to t_{j+1}. If training moves the weights like a random walk, two
    soups are this far apart:

        (Σ_j (t_{j+1} − t_j)/D_longest · (W_j − W'_j)²)^½

    The two directions of the plane are those in which the candidates differ most by this distance,
    their principal components.
    """

    def alone(self) -> tuple[Recipe, ...]:
        """The newest checkpoint, with which all soups are compared."""
        return (self.recipe(np.eye(self.count)[-1]),)

    def start(self) -> tuple[Recipe, ...]:
        """The recipes that are evaluated first: the newest checkpoint, and half of all, p = 2."""
        half = weights(self.times, longest(self.times) / 2.0, power(2.0))
        return tuple(dict.fromkeys((*self.alone(), self.recipe(half))))

    def ends(self) -> tuple[Recipe, ...]:
        """Nothing: only a pair has ends."""
        return ()

    def candidates(self) -> Array:
        """Schedules of all durations and powers, shape (m, count), distinct, read-only."""
        return _rows(self)

    def points(self, weights: Sequence[Sequence[float]] | Array) -> Array:
        """Where the surrogates see merge weights of shape (m, count): in a plane, shape (m, 3).

        The coordinates of a point sum to 1.
        """
        return 1.0 / 3.0 + np.asarray(weights, np.float64) @ _plane(self)

    def label(self, recipe: Recipe) -> str:
        """A recipe as a label: its window and power, such as `window 614,400, p = 2`."""
        if recipe in self.alone():
            return "newest alone"
        if (found := self.shape_of(recipe)) is None:
            return recipe.label
        return f"window {amount(found[0])}, p = {found[1]:.3g}"

    def window_of(self, recipe: Recipe) -> tuple[float, float] | None:
        """As `shape_of`; None also for the newest alone, which has no window."""
        return None if recipe in self.alone() else self.shape_of(recipe)

    def shape_of(self, recipe: Recipe) -> tuple[float, float] | None:
        """Duration D and power p of a recipe; None if it is no candidate."""
        return _candidates(self).get(recipe.lam)


@lru_cache(maxsize=32)
def _candidates(space: Schedule) -> dict[tuple[float, ...], tuple[float, float]]:
    """The weights of each schedule → its duration and power; of equal weights, the shortest."""
    at = [space.times[-1] - longest(space.times), *space.times]
    steps = [np.linspace(*step, PARTS, endpoint=False) for step in pairwise(at[:-1])]
    half = space.times[-1] - longest(space.times) / 2.0  # where the search begins
    begins = sorted({*np.concatenate(steps), at[-2], half})
    found: dict[tuple[float, ...], tuple[float, float]] = {}
    for duration in (space.times[-1] - begin for begin in reversed(begins)):
        for p in POWERS:
            recipe = space.recipe(weights(space.times, duration, power(p)))
            if space.feasible(recipe):
                found.setdefault(recipe.lam, (float(duration), float(p)))
    return found


@lru_cache(maxsize=32)
def _rows(space: Schedule) -> Array:
    """The weights of the candidates as one array, which nobody may change."""
    rows = np.array([*_candidates(space)])
    rows.flags.writeable = False
    return rows


@lru_cache(maxsize=32)
def _plane(space: Schedule) -> Array:
    """The matrix that takes merge weights to points, shape (count, 3)."""
    count, gaps = space.count, np.diff(space.times) / longest(space.times)
    cumulate = np.triu(np.ones((count, count)))[:, :-1] * np.sqrt(gaps)
    spread = space.candidates() @ cumulate
    directions = np.linalg.svd(spread - spread.mean(axis=0), full_matrices=False)[2][:2]
    directions *= np.sign(directions.sum(axis=1))[:, None]  # a singular vector has either sign
    # the plane of coordinates that sum to 0, where `distances` is the ordinary distance
    plane = np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / [[1.0], [np.sqrt(3.0)]]
    matrix: Array = cumulate @ directions.T @ plane[: len(directions)]
    return matrix
