"""Tell whether parents are close enough to merge, with the theory's ratio, sentences and a figure.

Checkpoints of one run that are close together lie in the same basin of the loss, and their mean is
as good as they are or better. The mean of distant checkpoints can fail: the merge of Baichuan2-7B
at 220B and 2200B tokens scores at chance level (Liu et al. 2024, arXiv:2403.19390, fig. 1).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mlflow_soup.decision import pairing
from mlflow_soup.records import Distance, LayerDistance, Table, Trial
from mlflow_soup.reporting import report
from mlflow_soup.search.space import Space

COLOURS = (report.BLUE, report.ORANGE, report.GREEN, report.GREY)
# Parents with a larger relative L2 look too far apart to merge. The value comes from one run of one
# small model: all 78 pairs of the quickstart's 13 checkpoints (1.3 million weights, a constant
# learning rate). It was then tested on 46 pairs of a run with another seed and a quarter of that
# learning rate. The first number of each cell is from the first run, the second from the other run:
#
#     pairs                                farther than FAR    nearer
#     all                                  42 and 17           36 and 29
#     soup beats the better parent          0 and 0            29 and 17
#     soup loses more than a point         36 and 17            1 and 8
#
# No pair with a gain got a warning. Some pairs with a loss got none, from a relative L2 of 0.52 on.
# The best threshold for the losses is 0.89 in the first run and 0.52 in the other. Relative L2
# ranks the losses a little better (AUC 0.98 and 0.99) than the cosine does (0.97 and 0.98).
#
# In these runs, parents that are far apart also have unequal scores. That alone makes the mean
# worse than the better parent, and no soup was worse than both parents. But distance alone costs
# score too: the last checkpoint and a copy with permuted MLP units give equal answers, and their
# soup loses 0.3 points at a relative L2 of 0.49, 1.2 at 0.63, 2.2 at 0.77 and 6.0 at 0.89. Larger
# models may behave differently.
FAR = 0.75


def kl_ratio(distance: LayerDistance, lam: Sequence[float]) -> float:
    """The ratio KL(soup‖prior) / KL(newest parent‖prior) (Liu et al., arXiv:2403.19390 v2).

    The prior is P = N(Θ_old, σ²·I). The posterior around Θ, the soup or the newest parent, is
    Q = N(Θ, σ²·I). Then KL(Q‖P) = ‖Θ − Θ_old‖² / 2σ², and the ratio is

        ‖Θ(λ) − Θ_old‖² / ‖Θ_new − Θ_old‖²

    A smaller ratio gives a tighter PAC-Bayes bound. (Another variance of Q adds the same term to
    both divergences.) For a pair the ratio is λ², independent of the parents. For more parents,
    with δ_i = Θ_i − Θ_old, it is Σ λ_i·λ_j·⟨δ_i, δ_j⟩ / ‖δ_new‖² and can exceed 1.

    Args:
        distance: the distances of the parents, usually `Distance.whole`.
        lam: merge weights λ, one per parent, oldest first; they sum to 1.

    Returns:
        The ratio, ≥ 0. It is NaN if there are more than two parents and the newest equals the
        oldest.
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
    """The distances from each parent to the next, for each layer and for all layers together.

    Args:
        distance: the distance of all parents.
        names: the names of the parents, oldest first.
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
        ("parents", "layer", "relative L2", "cosine", "cosine of the older and (newer − older)"),
        tuple(rows),
    )


def _farthest(distance: LayerDistance) -> tuple[int, int]:
    """The two parents with the largest relative L2, older first."""
    pairs = itertools.combinations(range(len(distance.norms)), 2)
    return max(pairs, key=lambda pair: distance.relative(*pair))


def _share(value: float) -> str:
    """A share as a percentage of three digits: `12.3 %`, `0.0123 %`, `1230 %`."""
    return f"{100 * value:{'.3g' if value < 10 else '.0f'}} %"


def words(distance: Distance, names: Sequence[str]) -> str:
    """One sentence that says how far apart the parents are; of more than two, the farthest pair.

    Args:
        distance: the distance of all parents.
        names: the names of the parents, oldest first.
    """
    whole = distance.whole
    i, j = _farthest(whole)
    layers = [layer for layer in distance.layers if layer.norms[i]] or distance.layers
    most = max(layers, key=lambda layer: layer.relative(i, j))
    who = "The parents differ by"
    if len(names) > 2:
        who = f"The parents farthest apart, {names[i]} and {names[j]}, differ by"
    return (
        f"{who} {_share(whole.relative(i, j))} of the older one's norm (relative L2); their "
        f"cosine is {whole.cosine(i, j):.4f}. They differ most in {most.name} "
        f"({_share(most.relative(i, j))})."
    )


def theory(distance: Distance, lam: Sequence[float]) -> str:
    """Sentences that say what the theory predicts for the soup: its KL ratio, λ² for a pair."""
    ratio = kl_ratio(distance.whole, lam)
    symbol = "KL ratio λ²" if len(lam) == 2 else "KL ratio"
    return (
        f"{symbol} = {ratio:.4g}: the soup's divergence from the oldest parent is {_share(ratio)} "
        "of the newest parent's. A PAC-Bayes bound of the loss grows with this divergence (Liu et "
        "al., arXiv:2403.19390 v2)."
    )


def caution(distance: Distance, names: Sequence[str]) -> str:
    """A warning when parents are equal, or look too far apart to merge; empty otherwise.

    It is a warning and not an error, because `FAR` was measured on one small model.

    Args:
        distance: the distance of all parents.
        names: the names of the parents, oldest first.
    """
    whole = distance.whole
    for i, j in itertools.combinations(range(len(names)), 2):
        if whole.relative(i, j) == 0.0:
            return (
                f"{names[i]} and {names[j]} have the same weights: a mixture of them is the same "
                "model again. Name versions that were saved at different steps."
            )
    i, j = _farthest(whole)
    apart = whole.relative(i, j)
    if apart <= FAR:
        return ""
    return (
        f"{names[i]} and {names[j]} look too far apart to merge: they differ by {_share(apart)} of "
        f"the older one's norm. In our experiments with a small model, no uniform soup of two "
        f"versions that differ by more than {_share(FAR)} beat its better parent. Merge "
        f"neighbours: {names[-1]} and the versions saved shortly before it."
    )


def barrier(space: Space, trials: Sequence[Trial], *, confidence: float = 0.95) -> str:
    """A warning when the uniform soup is certainly worse than every parent; empty otherwise.

    A search measures these scores first, so the check costs nothing. If the mean of the parents is
    worse than every parent, it lies outside their basin (Frankle et al. 2020, arXiv:1912.05671).

    Args:
        space: the space of merge weights that is searched.
        trials: the history. There is no warning until all parents and the uniform soup have scores.
        confidence: the confidence of the two-sided intervals. The warning needs every interval of
            a paired difference, uniform soup minus parent, to lie below 0.
    """
    scores = {trial.recipe: trial.held_out for trial in trials if trial.held_out is not None}
    if not {*space.start(), space.uniform()} <= {*scores}:
        return ""
    uniform = scores[space.uniform()]
    losses = [pairing.paired(uniform, scores[parent]) for parent in space.alone()]
    if any(pairing.interval(loss, confidence)[1] >= 0.0 for loss in losses):
        return ""
    least = max(losses, key=lambda loss: loss.value)
    return (
        "There is a barrier between the parents: their uniform soup scores "
        f"{report.format_difference(least, confidence)} against the worst of them. Merge closer "
        "neighbours: for these parents, a search can only find weights close to one parent."
    )


@report.literally
def distances(distance: Distance, names: Sequence[str]) -> Figure:
    """The figure of each layer's relative L2, from each parent to the next.

    A dashed line shows the relative L2 of all layers together.

    Args:
        distance: the distance of all parents.
        names: the names of the parents, oldest first.
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
    """The width of a layer's bars, wider for a label that is a word if there are many layers."""
    return 1.0 if layer.name.startswith("layer ") else max(1.0, count / 14)
