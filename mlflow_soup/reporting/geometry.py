"""Whether parents lie near enough to be merged: the theory's ratio, sentences and a figure.

Checkpoints of one run that lie close together share a basin, and their mean is as good as they are
or better. Distant ones collapse: merging Baichuan2-7B's at 220B and 2200B tokens left chance level
(Liu et al. 2024, arXiv:2403.19390, fig. 1).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mlflow_soup.decision import pairing
from mlflow_soup.records import Distance, LayerDistance, Recipe, Table, Trial
from mlflow_soup.reporting import report
from mlflow_soup.search.space import Space

COLOURS = (report.BLUE, report.ORANGE, report.GREEN, report.GREY)
# Relative L2 from which on parents look too far apart to merge. It was set on one run of one small
# model, all 78 pairs of the quickstart's 13 checkpoints (1.3 million weights, a constant learning
# rate), and held against 46 pairs of another seed at a quarter of that rate:
#
#     pairs                        farther: 42 and 17    nearer: 36 and 29
#     soup beats better parent             0 and 0            29 and 17
#     soup loses more than a point        36 and 17            1 and 8
#
# so no pair was warned of that gained, and some lost without a warning, from 0.52 on: what splits
# the losses best is 0.89 in one run and 0.52 in the other. Relative L2 ranks them a little better
# (AUC 0.98 and 0.99) than the cosine (0.97 and 0.98). Far parents are unequal parents there, which
# alone makes a mean worse than the better one, and no soup was worse than both. But the last
# checkpoint and itself with units of its MLPs swapped about, equal in every answer, lose as well:
# 0.3 points at 0.49, 1.2 at 0.63, 2.2 at 0.77 and 6.0 at 0.89. Larger models may differ.
FAR = 0.75


def kl_ratio(distance: LayerDistance, lam: Sequence[float]) -> float:
    """KL(Q‖P) of the soup as a share of the newest parent's (Liu et al., arXiv:2403.19390 v2).

    With the prior P = N(Θ_old, σ²·I) and posteriors Q = N(Θ, σ²·I) around the soup and around the
    newest parent, KL(Q‖P) = ‖Θ − Θ_old‖² / 2σ², and the share is

        ‖Θ(λ) − Θ_old‖² / ‖Θ_new − Θ_old‖²

    the smaller, the tighter the PAC-Bayes bound. (Another variance of Q adds one term to both.) For
    a pair it is λ² whatever the parents are; for more, with δ_i = Θ_i − Θ_old, it is
    Σ λ_i·λ_j·⟨δ_i, δ_j⟩ / ‖δ_new‖² and may exceed 1.

    Args:
        distance: of the parents, `Distance.whole` as a rule.
        lam: merge weights λ, one per parent, oldest first; they sum to 1.

    Returns:
        ≥ 0; for more than two parents NaN where the newest equals the oldest.
    """
    if len(lam) == 2:
        return lam[1] ** 2
    squares, count = distance.squares, len(lam)
    moved = sum(
        lam[i] * lam[j] * (squares[0][i] + squares[0][j] - squares[i][j]) / 2.0
        for i, j in itertools.product(range(1, count), repeat=2)
    )
    return max(moved, 0.0) / squares[0][-1] if squares[0][-1] else float("nan")


def table(distance: Distance, names: Sequence[str]) -> Table:
    """Each layer's distances, from each parent to the next, and those of all layers together.

    Args:
        distance: of all parents.
        names: theirs, oldest first.
    """
    rows = [
        (
            *(f"{names[i]} → {names[i + 1]}", layer.name, layer.relative(i, i + 1)),
            *(layer.cosine(i, i + 1), layer.delta_cosine(i, i + 1)),
        )
        for i in range(len(names) - 1)
        for layer in (*distance.layers, distance.whole)
    ]
    return Table(
        ("parents", "layer", "relative L2", "cosine", "cosine of the delta with the older"),
        tuple(rows),
    )


def _farthest(distance: LayerDistance) -> tuple[int, int]:
    """The two parents, older first, that are farthest apart for the older one's size."""
    pairs = itertools.combinations(range(len(distance.norms)), 2)
    return max(pairs, key=lambda pair: distance.relative(*pair))


def _share(value: float) -> str:
    """`12.3 %`, `0.0123 %`, `1230 %`."""
    return f"{100 * value:{'.3g' if value < 10 else '.0f'}} %"


def words(distance: Distance, names: Sequence[str]) -> str:
    """How far apart the parents are, in a sentence; of more than two, those farthest apart.

    Args:
        distance: of all parents.
        names: theirs, oldest first.
    """
    whole = distance.whole
    i, j = _farthest(whole)
    layers = [layer for layer in distance.layers if layer.norms[i]] or distance.layers
    most = max(layers, key=lambda layer: layer.relative(i, j))
    who = "The parents differ by"
    if len(names) > 2:
        who = f"The parents farthest apart, {names[i]} and {names[j]}, differ by"
    return (
        f"{who} {_share(whole.relative(i, j))} of the older one's norm (relative L2), cosine "
        f"{whole.cosine(i, j):.4f}; most in {most.name} ({_share(most.relative(i, j))})."
    )


def theory(distance: Distance, recipe: Recipe) -> str:
    """What the theory says of the soup, in a sentence: its KL ratio, λ² for a pair."""
    ratio = kl_ratio(distance.whole, recipe.lam)
    symbol = "KL ratio λ²" if len(recipe.lam) == 2 else "KL ratio"
    return (
        f"{symbol} = {ratio:.4g}: the divergence from the oldest parent, which a PAC-Bayes bound "
        f"of the loss grows with, is {_share(ratio)} of the newest parent's (Liu et al., "
        "arXiv:2403.19390 v2)."
    )


def caution(distance: Distance, names: Sequence[str]) -> str:
    """A warning when parents look too far apart to merge, empty when they do not.

    Nothing is forbidden: `FAR` rests on one small model.

    Args:
        distance: of all parents.
        names: theirs, oldest first.
    """
    whole = distance.whole
    i, j = _farthest(whole)
    apart = whole.relative(i, j)
    if apart <= FAR:
        return ""
    return (
        f"{names[i]} and {names[j]} look too far apart to merge: they differ by {_share(apart)} of "
        f"the older one's norm, and beyond {_share(FAR)} no uniform soup of a pair beat its better "
        "parent in our trials on a small model. Merge neighbours: versions that were saved shortly "
        f"one after the other, the last of them {names[-1]}."
    )


def barrier(space: Space, trials: Sequence[Trial], *, confidence: float = 0.95) -> str:
    """A warning when the uniform soup is worse than every parent, empty when that is not certain.

    These scores are what a search measures first, so this costs nothing. A mean that is worse than
    what it is the mean of has left the basin (Frankle et al. 2020, arXiv:1912.05671).

    Args:
        space: what is searched.
        trials: the history; there is no warning while parents or uniform soup have no score.
        confidence: of the two-sided intervals of the paired differences, all below 0.
    """
    scores = {trial.recipe: trial.held_out for trial in trials if trial.held_out is not None}
    if not {*space.start()} <= {*scores}:
        return ""
    uniform = scores[space.uniform()]
    losses = [pairing.paired(uniform, scores[parent]) for parent in space.parents()]
    if any(pairing.interval(loss, confidence)[1] >= 0.0 for loss in losses):
        return ""
    least = max(losses, key=lambda loss: loss.value)
    return (
        "There is a barrier between the parents: against the worst of them their uniform soup "
        f"scores {report.format_difference(least, confidence)}. Merge nearer neighbours; a search "
        "can only find weights close to one parent here."
    )


def distances(distance: Distance, names: Sequence[str]) -> Figure:
    """Relative L2 of each layer, from each parent to the next; dashed, of all layers together.

    Args:
        distance: of all parents.
        names: theirs, oldest first.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    layers, whole, steps = distance.layers, distance.whole, len(names) - 1
    widths = np.array([_width(layer, len(layers)) for layer in layers])
    places = np.cumsum(widths) - widths / 2.0
    for i, colour in zip(range(steps), itertools.cycle(COLOURS), strict=False):
        heights = [100.0 * layer.relative(i, i + 1) for layer in layers]
        apart = whole.relative(i, i + 1)
        axes.bar(
            places + widths * (0.8 * (i + 0.5) / steps - 0.4),
            np.where(np.isfinite(heights), heights, 0.0),
            0.8 * widths / steps,
            color=colour,
            label=f"{names[i]} → {names[i + 1]}, all layers {_share(apart)}",
        )
        axes.axhline(100.0 * apart, color=colour, linestyle="--", linewidth=1.2)
    numbers = [layer.name.removeprefix("layer ") for layer in layers]
    every = 1 + len(layers) // 20
    shown = [k for k, text in enumerate(numbers) if not text.isdecimal() or int(text) % every == 0]
    axes.set_xticks(places[shown], [numbers[k] for k in shown])
    for tick in axes.get_xticklabels():
        if not tick.get_text().isdecimal():
            tick.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative L2 (% of the older one's norm)")
    axes.set_title("How far apart the parents are")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _width(layer: LayerDistance, count: int) -> float:
    """Room for a layer's bars; for what has a word for a label in deep networks that of several."""
    return 1.0 if layer.name.startswith("layer ") else max(1.0, count / 14)
