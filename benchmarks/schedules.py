"""Merge weights of windows of checkpoints, and records of how they score.

`mlflow_soup.search.schedule` has the formula of the weights. EMA is no decay of two numbers; it is
here, as teams write it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlflow_soup.search import schedule

Array = NDArray[np.float64]

DURATIONS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12)  # gaps between versions
POWERS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6)
EMA = 0.7
STEP = 2e-3  # nats, of the records; an item in twenty thousand changes sides


def decayed(times: Sequence[float], duration: float, power: float) -> Array:
    """The merge weights of the decay 1 − x^p, shape (n,); they sum to 1 if the window fits."""
    return schedule.weights(times, duration, schedule.power(power))


def cosine(times: Sequence[float], duration: float) -> Array:
    """The merge weights of the decay ½ (1 + cos πx), shape (n,)."""
    return schedule.weights(times, duration, schedule.DECAYS["cosine"])


def exponential(times: Sequence[float], duration: float) -> Array:
    """EMA: the newest weighs most, each version before it `EMA` times as much; shape (n,)."""
    t = np.array([2 * times[0] - times[1], *times], float)
    inside = t[:-1] >= t[-1] - duration - 1e-6 * duration
    age = (t[-1] - t[1:]) / (t[-1] - t[-2])
    weights = np.where(inside, EMA**age, 0.0)
    return np.asarray(weights / weights.sum())


# what teams do by hand: name → the weights for times and duration
SCHEMES: dict[str, Callable[[Sequence[float], float], Array]] = {
    "SMA": lambda times, duration: decayed(times, duration, 1),
    "WMA": lambda times, duration: decayed(times, duration, 2),
    "EMA": exponential,
    "minus-sqrt": lambda times, duration: decayed(times, duration, 0.5),
    "cosine": cosine,
}


def grid(gaps: float) -> list[tuple[float, float]]:
    """The cells (duration in gaps, p) of windows no longer than `gaps`.

    Neighbours in the list are neighbours in the grid. A duration of one gap is the newest alone,
    whatever p.
    """
    cells = [(1.0, 1.0)]
    for row, duration in enumerate(d for d in DURATIONS if 1 < d <= gaps):
        cells += [(float(duration), float(p)) for p in POWERS[:: 1 if row % 2 else -1]]
    return cells


def save(
    path: Path,
    cells: Sequence[tuple[float, float]],
    weights: Sequence[Sequence[float]],
    items: dict[str, tuple[Array, NDArray[np.int64]]],
) -> None:
    """Write what items said at each cell.

    Args:
        path: of the file; `load` reads it.
        cells: G pairs (duration, p), neighbours one after the other.
        weights: the merge weights of each, shape (G, n).
        items: name of the items → log-likelihoods (N, C, G) and right choices (N,).
    """
    arrays: dict[str, Any] = {
        "cells": np.array(cells),
        "weights": np.array(weights),
        "step": np.array(STEP),
    }
    for name, (likelihoods, gold) in items.items():
        whole = np.round(likelihoods / STEP).astype(np.int64)
        # second differences along the grid, low bytes apart from high bytes: they compress best
        rest = np.diff(np.diff(whole, axis=-1), axis=-1, prepend=0)
        rest = np.moveaxis(rest, -1, 0).astype(np.int16)
        arrays[f"{name}_first"] = whole[..., 0].astype(np.int32)
        arrays[f"{name}_low"] = (rest & 255).astype(np.uint8)
        arrays[f"{name}_high"] = (rest >> 8).astype(np.int8)
        arrays[f"{name}_gold"] = np.asarray(gold, np.int8)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Array]:
    """What `save` wrote: `cells`, `weights`, and for each name `NAME` (N, C, G) and `NAME_gold`."""
    with np.load(path) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    loaded = {"cells": data["cells"], "weights": data["weights"]}
    for name in (key.removesuffix("_gold") for key in data if key.endswith("_gold")):
        rest = data[f"{name}_low"].astype(np.int64) | (data[f"{name}_high"].astype(np.int64) << 8)
        steps = np.moveaxis(rest.cumsum(axis=0), 0, -1)
        steps = np.concatenate([data[f"{name}_first"][..., None], steps], axis=-1)
        loaded[name] = steps.cumsum(axis=-1) * float(data["step"])
        loaded[f"{name}_gold"] = data[f"{name}_gold"]
    return loaded
