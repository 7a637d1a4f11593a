"""Paired statistics: two models that were scored on the same items are compared item by item.

The paired standard error is about a third of the one that ignores the pairing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import t as student

from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Difference, Items, Score

Array = np.ndarray[Any, Any]
# equal scores that are sums over different items may differ in their last digits
ROUNDING = 1e-12


def _paired_task(ours: Items, theirs: Items, loss: float) -> tuple[Difference, Array]:
    """The difference on one task: Σ s_i·d_i, with the standard error of this weighted mean.

    Args:
        ours: the items of one model.
        theirs: those of the other, the same ones.
        loss: a loss that the difference is compared with: for right-or-wrong items, the standard
            error is that of a model that loses so much. 0 for the error of the difference itself.

    Returns:
        The difference, and the share of each item in its deviation, s_i·(d_i − Δ).
    """
    difference = np.array(ours.values) - np.array(theirs.values)
    shares = np.array(ours.shares)
    count = len(difference)
    value = math.fsum(shares * difference)
    deviations = shares * (difference - value)
    said = [(items.values, items.log_likelihoods) for items in (ours, theirs)]
    if any(ours.log_likelihoods) and said[0] == said[1]:
        variance = 0.0  # all values and log-likelihoods are equal: it is the same model
    elif {*ours.values, *theirs.values} <= {0.0, 1.0}:
        # each item is right or wrong. Count one more won and one more lost item: otherwise a few
        # items without a difference would look like certainty (Bonett & Price 2012, J. Educ. Behav.
        # Stat. 37)
        better = difference * math.copysign(1.0, ours.weight)
        won, lost = (better > 0).sum() + 1.0, (better < 0).sum() + 1.0
        variance = _variance(float(won), float(lost), count + 2.0, loss if loss < 1.0 else 0.0)
    elif count > 1:
        variance = float(deviations @ deviations) * count / (count - 1)
    else:
        variance = float("inf")
    return Difference(value, float(np.sqrt(variance)), count), deviations


def _variance(won: float, lost: float, total: float, loss: float) -> float:
    """The variance of (won − lost)/total, for items of which one model loses a share.

    If the loss is not 0, it is that of the most likely model with just this loss, given how many
    items were won and lost (Tango 1998, Stat. Med. 17). The variance of the items as they are
    is too small if few of them were lost by luck: a soup that is worse by the margin would pass in
    up to 9 %.
    """
    if not loss:
        return (won + lost - (won - lost) ** 2 / total) / total**2
    # the share of lost items, q, solves a·q² + b·q + c = 0; that of won items is q − loss
    a, b = 2.0 * total, -won - lost - (2.0 * total - won + lost) * loss
    c = lost * loss * (1.0 + loss)
    q = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    return (2.0 * q - loss * (1.0 + loss)) / total


def paired(ours: Score, theirs: Score, losses: Sequence[float] = ()) -> Difference:
    """The paired difference of two scores on the same items; positive if `ours` is better.

        Δ = Σ_k w_k·Δ_k,   se² = Σ_k w_k²·se_k² + Σ_k (G_k/(G_k − 1))²·Σ_{i≠j} u_i·u_j

    with k over tasks. The last sum is over pairs of items of one cluster, G_k the number of
    clusters, and u_i = w_k·s_i·(d_i − Δ_k): errors of such items go together (Liang & Zeger 1986,
    Biometrika 73; the square, as in the jackknife, is for few clusters). So do those of one item
    that several tasks ask. Each sum counts if it widens the standard error. With clusters, the
    degrees of freedom are Satterthwaite's.

    Args:
        ours: the score of one model.
        theirs: that of the other.
        losses: for each task, the loss that the difference is compared with, as a share of the
            items where these are right or wrong. Empty if it is compared with none.

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
    pairs = zip(ours.items, theirs.items, losses or [0.0] * len(ours.items), strict=True)
    tasks = [(a.weight, *_paired_task(a, b, loss)) for a, b, loss in pairs]
    value, count = math.fsum(w * d.value for w, d, _ in tasks), sum(d.count for _, d, _ in tasks)
    variances = [(w * d.stderr) ** 2 for w, d, _ in tasks]
    labels = [its.clusters for its in ours.items]
    every = [label for own in labels for label in own]
    if len({*every}) == len(every):
        return Difference(value, math.sqrt(sum(variances)), count)
    deviations = [w * u for w, _, u in tasks]
    more = [_together(own, u) for own, u in zip(labels, deviations, strict=True)]
    wide = [v + m for v, m in zip(variances, more, strict=True)]
    across = _together(every, np.concatenate(deviations), among=labels)
    total = sum(wide) + across
    clusters, freedom = len({*every}), 1.0
    if 0.0 < total < math.inf:
        # Satterthwaite 1946, Biom. Bull. 2
        parts = [(v, max(len({*own}) - 1, 1)) for v, own in zip(wide, labels, strict=True)]
        freedom = total**2 / (sum(v**2 / f for v, f in parts) + across**2 / max(clusters - 1, 1))
    effect = total / sum(variances) if 0.0 < sum(variances) < math.inf else 1.0
    return Difference(value, math.sqrt(total), count, clusters, effect, max(freedom, 1.0))


def _together(
    labels: Sequence[str], deviations: Array, among: Sequence[Sequence[str]] = ()
) -> float:
    """By how much a variance is larger because the items of a cluster go together, ≥ 0.

    Args:
        labels: the cluster of each item.
        deviations: the share of each item in the deviation.
        among: the clusters of each task, to count only what items of two tasks share; empty to
            count what the items of one task share.
    """
    if len({*labels}) == len(labels):
        return 0.0
    own = [f"{task} {label}" for task, some in enumerate(among) for label in some]
    where = np.unique(labels, return_inverse=True)[1]
    sums = np.bincount(where, weights=deviations)
    if not among:
        if len(sums) == 1:
            return math.inf
        more = float(sums @ sums - deviations @ deviations)
        return max(more, 0.0) * (len(sums) / (len(sums) - 1)) ** 2
    inner = np.bincount(np.unique(own, return_inverse=True)[1], weights=deviations)
    return max(float(sums @ sums - inner @ inner), 0.0)


def pool(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """The weighted sum of several scores, as a score with the items of all."""
    items = [
        replace(its, weight=weight * its.weight)
        for score, weight in zip(scores, weights, strict=True)
        for its in score.items
    ]
    value = math.fsum(w * score.value for score, w in zip(scores, weights, strict=True))
    return Score(value, math.nan, tuple(items))


def optimism(scores: Sequence[Score], *, seed: int = 0, draws: int = 200) -> float:
    """How much the score of the best of several models overstates its quality, in score units, ≥ 0.

    The bootstrap estimate (Efron 1983, J. Am. Stat. Assoc. 78). In each resample of the items, a
    model's luck is its score on the resample minus its score on all items. The estimate is the mean
    luck of the resample's winner, minus the luck of the model that wins on all items, which is zero
    on average. Clusters of items are drawn whole.

    Args:
        scores: the scores of all models that were compared, at least one, each with its items.
        seed: the seed of the resamples.
        draws: the number of resamples.
    """
    random = np.random.default_rng(seed)
    resampled = np.zeros((draws, len(scores)))
    for task in zip(*(score.items for score in scores), strict=True):
        clusters, where = np.unique(task[0].clusters, return_inverse=True)
        count, shares = len(clusters), np.array(task[0].shares)
        sums = [np.bincount(where, weights=shares * np.array(items.values)) for items in task]
        drawn = random.multinomial(count, np.full(count, 1.0 / count), size=draws)
        sizes = drawn @ np.bincount(where, weights=shares)
        resampled += task[0].weight * (drawn @ np.array(sums).T) / sizes[:, None]
    luck = resampled - np.array([score.value for score in scores])
    winner = resampled.argmax(axis=1)
    return float(np.mean(luck[np.arange(draws), winner] - luck[:, better(scores)]))


def interval(difference: Difference, confidence: float) -> tuple[float, float]:
    """Two-sided confidence interval of a paired difference, by Student's t.

    Args:
        difference: the paired difference.
        confidence: the confidence, in (0, 1).
    """
    half = difference.stderr * float(student.ppf(0.5 + confidence / 2, difference.freedom))
    return difference.value - half, difference.value + half


def better(scores: Sequence[Score]) -> int:
    """The index of the largest score; among equal scores the last, which is the newest model."""
    return max(range(len(scores)), key=lambda i: (scores[i].value, i))


def lower_bound(difference: Difference, confidence: float) -> float:
    """One-sided lower confidence bound of a paired difference, by Student's t."""
    return difference.value - quantile(confidence, difference.freedom) * difference.stderr


def upper_bound(difference: Difference, confidence: float) -> float:
    """One-sided upper confidence bound of a paired difference, by Student's t."""
    return difference.value + quantile(confidence, difference.freedom) * difference.stderr


def quantile(confidence: float, freedom: float) -> float:
    """The quantile of Student's t for a one-sided bound."""
    return float(student.ppf(confidence, freedom))
