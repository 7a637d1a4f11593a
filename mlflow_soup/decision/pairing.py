"""Paired statistics: two models that were scored on the same items are compared item by item.

The paired standard error is about a third of the one that ignores the pairing.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Difference, Items, Score

# equal scores that are sums over different items may differ in their last digits
ROUNDING = 1e-12


def _paired_task(ours: Items, theirs: Items) -> Difference:
    """The difference on one task: Σ s_i·d_i, with the standard error of this weighted mean."""
    difference = np.array(ours.values) - np.array(theirs.values)
    shares = np.array(ours.shares)
    count = len(difference)
    value = math.fsum(shares * difference)
    said = [(items.values, items.log_likelihoods) for items in (ours, theirs)]
    if any(ours.log_likelihoods) and said[0] == said[1]:
        variance = 0.0  # all values and log-likelihoods are equal: it is the same model
    elif {*ours.values, *theirs.values} <= {0.0, 1.0}:
        # each item is right or wrong. Count one more won and one more lost item: otherwise a few
        # items without a difference would look like certainty (Bonett & Price 2012, J. Educ. Behav.
        # Stat. 37)
        won, lost = (difference > 0).sum() + 1.0, (difference < 0).sum() + 1.0
        total = count + 2.0
        variance = (won + lost - (won - lost) ** 2 / total) / total**2
    elif count > 1:
        variance = float(shares**2 @ (difference - value) ** 2) * count / (count - 1)
    else:
        variance = float("inf")
    return Difference(value, float(np.sqrt(variance)), count)


def paired(ours: Score, theirs: Score) -> Difference:
    """The paired difference of two scores on the same items; positive if `ours` is better.

        Δ = Σ_k w_k·Δ_k,   se² = Σ_k w_k²·se_k²,   k over tasks

    Raises:
        ObjectiveError: the two were not scored on the same items.
    """
    ours_on, theirs_on = ([(i.task, i.metric, i.ids) for i in s.items] for s in (ours, theirs))
    if ours_on != theirs_on:
        unlike = [f"{a[0]} {a[1]}" for a, b in zip(ours_on, theirs_on, strict=False) if a != b]
        raise ObjectiveError(
            "two models were not scored on the same items",
            where=", ".join(unlike) or "their lists of tasks, of which one is longer",
            fix="evaluate both models again with the same tasks and settings",
        )
    tasks = [(a.weight, _paired_task(a, b)) for a, b in zip(ours.items, theirs.items, strict=True)]
    return Difference(
        value=math.fsum(w * d.value for w, d in tasks),
        stderr=float(np.sqrt(sum((w * d.stderr) ** 2 for w, d in tasks))),
        count=sum(d.count for _, d in tasks),
    )


def optimism(scores: Sequence[Score], *, seed: int = 0, draws: int = 200) -> float:
    """How much the score of the best of several models overstates its quality, in score units, ≥ 0.

    The bootstrap estimate (Efron 1983, J. Am. Stat. Assoc. 78). In each resample of the items, a
    model's luck is its score on the resample minus its score on all items. The estimate is the mean
    luck of the resample's winner, minus the luck of the model that wins on all items, which is zero
    on average.

    Args:
        scores: the scores of all models that were compared, at least one, each with its items.
        seed: the seed of the resamples.
        draws: the number of resamples.
    """
    random = np.random.default_rng(seed)
    resampled = np.zeros((draws, len(scores)))
    for task in zip(*(score.items for score in scores), strict=True):
        count = len(task[0].ids)
        values = np.array([items.values for items in task]) * np.array(task[0].shares)
        drawn = random.multinomial(count, np.full(count, 1.0 / count), size=draws)
        resampled += task[0].weight * drawn @ values.T
    luck = resampled - np.array([score.value for score in scores])
    winner = resampled.argmax(axis=1)
    return float(np.mean(luck[np.arange(draws), winner] - luck[:, better(scores)]))


def interval(difference: Difference, confidence: float) -> tuple[float, float]:
    """Two-sided confidence interval of a paired difference: Student's t, n − 1 degrees of freedom.

    Args:
        difference: the paired difference.
        confidence: the confidence, in (0, 1).
    """
    half = difference.stderr * float(
        student.ppf(0.5 + confidence / 2, max(difference.count - 1, 1))
    )
    return difference.value - half, difference.value + half


def better(scores: Sequence[Score]) -> int:
    """The index of the largest score; among equal scores the last, which is the newest model."""
    return max(range(len(scores)), key=lambda i: (scores[i].value, i))


def lower_bound(difference: Difference, confidence: float) -> float:
    """One-sided lower confidence bound of a paired difference, by Student's t."""
    quantile = float(student.ppf(confidence, max(difference.count - 1, 1)))
    return difference.value - quantile * difference.stderr
