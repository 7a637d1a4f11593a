"""Draw one figure for each pilot experiment (Liu et al. 2024, arXiv:2403.19390).

Scores and their differences have the metric's unit, and larger is better. A failed evaluation is
NaN and is not drawn. λ is the weight of the newer of two versions. The colours suit colour-blind
readers, and no information is in colour alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike, NDArray

from mlflow_soup.decision.pairing import ROUNDING
from mlflow_soup.reporting.report import BLUE, GREEN, GREY, ORANGE, bounds, literally

Grid = NDArray[np.float64]
WIDTH, HEIGHT = 7.5, 4.5  # inches; larger where the content needs it
ROW = 0.3  # inches, height of one line in a panel
LEGIBLE = 14  # most versions for which a heat map prints the score in each cell


@literally
def pairs(names: Sequence[str], scores: Mapping[tuple[int, int], float], label: str) -> Figure:
    """A heat map that shows which two versions make a good soup (Fig. 1 and 6).

    Args:
        names: the names of n versions, oldest first.
        scores: (i, j) with i < j → the score of the soup of i and j; (i, i) → the score of version
            i alone. A missing score leaves its cell blank.
        label: the name of the score, for the colour bar.
    """
    n = len(names)
    grid = np.full((n, n), np.nan)
    for cell, score in scores.items():
        grid[cell] = score
    soups = {(i, j): s for (i, j), s in np.ndenumerate(grid) if i < j and np.isfinite(s)}
    parent = np.maximum.outer(grid.diagonal(), grid.diagonal())
    above = [cell for cell, score in soups.items() if score > parent[cell] + ROUNDING]

    side = max(4.0, n * (0.56 if n <= LEGIBLE else 0.34))
    title = f"{len(above)} of {len(soups)} soups of two versions score above both parents"
    figure = _figure(title, side + 2.5, side + 1.5)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(grid), cmap="cividis")
    bar = figure.colorbar(image, shrink=0.9, label=_short(label))
    bar.ax.ticklabel_format(useOffset=False)
    inks = _inks(image.to_rgba(grid))
    if n <= LEGIBLE:
        _print_scores(axes, grid, inks)
    rows, columns = np.array(above, int).reshape(-1, 2).T
    axes.scatter(columns + 0.35, rows - 0.33, 14, inks[rows, columns], marker="^")
    handles: list[Artist] = [
        Patch(fill=False, edgecolor="black", label="a version alone"),
        Line2D([], [], color="black", marker="^", ls="", ms=4, label="above both parents"),
    ]
    for i in range(n):
        _outline(axes, i, i, edgecolor="black")
    if soups:
        i, j = max(soups, key=soups.__getitem__)
        text = f"best soup: {names[i]} + {names[j]}, {soups[i, j]:.4f}"
        handles.append(_outline(axes, i, j, edgecolor=ORANGE, lw=3, ls=(0, (2, 1)), label=text))
    long = max(len(name) for name in names) > 4
    axes.set_xticks(range(n), names, rotation=90 if long else 0)
    axes.set_yticks(range(n), names)
    axes.set_xlabel("newer version")
    axes.set_ylabel("older version")
    _legend(figure, handles)
    return figure


@literally
def count(
    newest: str,
    counts: Sequence[int],
    scores: ArrayLike,
    *,
    lows: ArrayLike,
    highs: ArrayLike,
    best_parent: ArrayLike,
    label: str,
) -> Figure:
    """The scores of soups of the last k versions, beside the best of these versions alone (Fig. 3).

    Args:
        newest: the name of the last version.
        counts: n values of k.
        scores: the scores of the soups, shape (n,).
        lows: the best parent's score plus the lower bound of the 95 % interval of the paired
            difference, soup minus best parent, shape (n,).
        highs: the same with the upper bound, shape (n,).
        best_parent: the score of the best parent of each soup, shape (n,).
        label: the name of the score, for the axis.
    """
    y, low, high = (np.asarray(values, float) for values in (scores, lows, highs))
    figure = _figure(f"Soups of the last k versions up to {newest}", max(WIDTH, len(counts) / 2))
    axes = figure.subplots()
    axes.plot(counts, best_parent, "s--", color=GREEN, label="best of these versions alone")
    axes.errorbar(
        counts,
        y,
        np.maximum([y - low, high - y], 0.0),  # rounding can move a bound past the score
        fmt="o-",
        color=BLUE,
        capsize=4,
        label="soup, 95 % paired interval against the best version",
    )
    axes.set_xticks(counts)
    axes.margins(x=0.1)
    axes.set_xlabel("k, versions in the soup")
    axes.set_ylabel(_short(label))
    axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


@literally
def track(
    steps: Sequence[int],
    *,
    raw: ArrayLike,
    merged: ArrayLike,
    lows: ArrayLike,
    highs: ArrayLike,
    unit: str,
    label: str,
) -> Figure:
    """The scores of the checkpoints of a run, and of the windows that end there.

    Args:
        steps: when the n checkpoints were saved.
        raw: the scores of the checkpoints alone, shape (n,).
        merged: the scores of the merged windows, shape (n,).
        lows: raw plus the lower bound of the 95 % interval of the paired difference, merged minus
            raw, shape (n,).
        highs: the same with the upper bound.
        unit: what the steps count.
        label: the name of the score, for the axis.
    """
    figure = _figure("Each checkpoint, and the merge of the window that ends there")
    axes = figure.subplots()
    axes.plot(steps, raw, "s--", color=GREY, markersize=4, label="checkpoint alone")
    axes.plot(
        steps, np.asarray(merged, float), "o-", color=BLUE, markersize=4, label="merged window"
    )
    words = "95 % paired interval against the checkpoint"
    axes.fill_between(
        steps, np.asarray(lows), np.asarray(highs), color=BLUE, alpha=0.15, lw=0, label=words
    )
    axes.set_xlabel(unit)
    axes.set_ylabel(_short(label))
    axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


@literally
def schedule(
    durations: Sequence[float],
    powers: Sequence[float],
    scores: ArrayLike,
    *,
    newest: float,
    unit: str,
    label: str,
) -> Figure:
    """A heat map of the score over the length of the window and the power of its decay.

    Args:
        durations: n lengths, ascending.
        powers: m powers p, ascending.
        scores: the scores, shape (m, n); NaN where the evaluation failed.
        newest: the score of the newest version alone.
        unit: what the lengths count.
        label: the name of the score, for the colour bar.
    """
    grid = np.asarray(scores, float)
    figure = _figure(
        "Which window, and which decay?", 2.5 + 0.75 * len(durations), 2.2 + 0.5 * len(powers)
    )
    axes = figure.subplots()
    limits = bounds(np.append(grid, newest))
    norm = BoundaryNorm(limits, 256)
    cells = np.ma.masked_invalid(grid)
    image = axes.imshow(cells, cmap="cividis", norm=norm, aspect="auto", origin="lower")
    bar = figure.colorbar(image, label=_short(label), format="%.4f", ticks=limits)
    bar.ax.axhline(newest, color=ORANGE, lw=2)
    _print_scores(axes, grid, _inks(image.to_rgba(grid)))
    handles: list[Artist] = [Line2D([], [], color=ORANGE, lw=2, label="newest version alone")]
    if np.isfinite(grid).any():
        i, j = divmod(int(np.nanargmax(grid)), len(durations))
        text = f"best: {durations[j]:g}, p = {powers[i]:g}, {grid[i, j]:.4f}"
        style = {"edgecolor": ORANGE, "lw": 3, "ls": (0, (2, 1)), "label": text}
        handles.append(_outline(axes, i, j, **style))
    axes.set_xticks(range(len(durations)), [f"{duration:g}" for duration in durations])
    axes.set_yticks(range(len(powers)), [f"{p:g}" for p in powers])
    axes.set_xlabel(f"length of the window, {unit}")
    axes.set_ylabel("power p of the decay 1 − x^p")
    _legend(figure, handles)
    return figure


@literally
def landscape(
    names: tuple[str, str],
    lam: ArrayLike,
    scores: ArrayLike,
    *,
    stderr: ArrayLike,
    better: float,
    label: str,
) -> Figure:
    """The scores over λ, with marks at each λ that beats the better parent (Fig. 2 and 7).

    Args:
        names: the names of the two versions, older first.
        lam: n values of λ in [0, 1], in any order.
        scores: the scores of the soups, shape (n,).
        stderr: the paired standard error of the difference between each score and the better
            parent's score, shape (n,).
        better: the score of the better parent.
        label: the name of the score, for the axis.
    """
    order = np.argsort(lam)
    x, y, half = (np.asarray(values, float)[order] for values in (lam, scores, stderr))
    half *= 1.96
    measured = np.isfinite(y)
    above = y > better + ROUNDING
    below = measured & ~above
    share = 100 * above.sum() / max(measured.sum(), 1)
    figure = _figure(
        f"Soup of {_pair(names)}: {above.sum()} of {measured.sum()} λ ({share:.0f} %) beat the "
        "better parent"
    )
    axes = figure.subplots()
    low, high = y - half, y + half
    axes.fill_between(x, low, high, color=BLUE, alpha=0.15, lw=0, label="95 % paired band")
    axes.plot(x, y, color=BLUE, label="soup")
    size = 6 if len(x) <= 50 else 4
    axes.plot(
        x[above], y[above], "o", color=ORANGE, ms=size, label="λ that beats the better parent"
    )
    axes.plot(
        x[below], y[below], "o", color=BLUE, mfc="white", ms=size, label="λ that does not beat it"
    )
    axes.axhline(better, ls="--", color=GREEN, label=f"better parent, {better:.4f}")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(_weight(names), wrap=True)
    axes.set_ylabel(_short(label))
    axes.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


@literally
def heldout(
    names: tuple[str, str],
    shares: Sequence[float],
    lam: ArrayLike,
    scores: ArrayLike,
    *,
    full_best: float,
    label: str,
) -> Figure:
    """The λ chosen on a share of the held-out items, and its score on all items (Table 4).

    Args:
        names: the names of the two versions, older first.
        shares: m shares of the held-out items, in (0, 1].
        lam: the λ chosen on each of d random draws of each share, shape (m, d).
        scores: the score of each of these λ on all held-out items, shape (m, d).
        full_best: the best score of any λ on all held-out items.
        label: the name of the score, for the axis.
    """
    title = f"Soup of {_pair(names)}: λ chosen on a share of the held-out items"
    figure = _figure(title, max(WIDTH, 1.2 * len(shares)))
    chosen, worth = figure.subplots(1, 2)
    for axes, values in ((chosen, lam), (worth, scores)):
        for place, row in enumerate(np.asarray(values, float)):
            draws = row[np.isfinite(row)]
            beside = place + np.linspace(-0.25, 0.25, len(draws) + 2)[1:-1]
            style = {"mfc": "none", "color": BLUE, "ms": 5, "label": "one random draw of items"}
            axes.plot(beside, draws, "o", **style)
            if len(draws):
                level = [np.median(draws)] * 2
                axes.plot([place - 0.3, place + 0.3], level, color=ORANGE, lw=3, label="median")
        axes.set_xticks(range(len(shares)), [f"{100 * share:.3g}" for share in shares])
        axes.set_xlim(-0.5, len(shares) - 0.5)
        axes.set_xlabel("share of the held-out items, %")
    worth.axhline(full_best, ls="--", color=GREEN, label="best λ on all items")
    chosen.set_ylim(-0.03, 1.03)
    chosen.set_ylabel("chosen λ, weight of the newer version")
    worth.set_ylabel(_short(f"{label}, all items"))
    worth.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


@literally
def alpha(
    names: tuple[str, str],
    lam: ArrayLike,
    scores: ArrayLike,
    *,
    spaces: Mapping[float, tuple[float, float]],
    label: str,
) -> Figure:
    """The λ that a search chooses in [α, 1], for several α (Fig. 5).

    Args:
        names: the names of the two versions, older first.
        lam: n values of λ that were evaluated, in any order.
        scores: the scores of the soups, shape (n,).
        spaces: α → the chosen λ and its score; at least one entry.
        label: the name of the score, for the axis.
    """
    order = np.argsort(lam)
    x, y = (np.asarray(values, float)[order] for values in (lam, scores))
    lines = ROW * len(spaces)
    figure = _figure(f"Soup of {_pair(names)}: λ chosen in [α, 1]", height=HEIGHT + lines)
    above, below = figure.subplots(2, sharex=True, height_ratios=[3.0, lines])
    above.plot(x, y, "o-", color=BLUE, mfc="white", ms=5, label="evaluated λ")
    mark = {"marker": "D", "ls": "", "color": ORANGE, "ms": 7}
    above.plot(*np.transpose(list(spaces.values())), label="chosen λ", **mark)
    for row, (start, (best, score)) in enumerate(spaces.items()):
        below.plot([start, 1.0], [row, row], color=GREY, lw=2, label="searched range")
        below.plot(best, row, **mark)
        place = (1.01, row)
        text = f"λ = {best:.4g}: {score:.4f}"
        below.annotate(text, place, xycoords=("axes fraction", "data"), va="center", size=9)
    below.set_yticks(range(len(spaces)), [f"[{start:g}, 1]" for start in spaces])
    below.set_ylim(len(spaces) - 0.5, -0.5)
    below.set_xlim(-0.02, 1.02)
    below.set_xlabel(_weight(names), wrap=True)
    below.set_ylabel("search space")
    above.set_ylabel(_short(label))
    above.ticklabel_format(axis="y", useOffset=False)
    _legend(figure)
    return figure


@literally
def ood(
    methods: Sequence[str], tasks: Sequence[str], *, ind: ArrayLike, ood: ArrayLike, label: str
) -> Figure:
    """The scores on each task with λ found on that task, beside λ found on other tasks (Table 3).

    Args:
        methods: the names of m methods.
        tasks: the names of t tasks.
        ind: the scores with λ found on the task itself, shape (m, t).
        ood: the scores with λ found on the held-out tasks, shape (m, t).
        label: the name of the score, for the axis.
    """
    title = "Is λ from other tasks as good as λ from the task itself?"
    figure, panels = _forest(title, dict.fromkeys(tasks, methods), sharex=False)
    own, other = np.asarray(ind, float), np.asarray(ood, float)
    rows = np.arange(len(methods))
    for column, axes in enumerate(panels):
        x, there = own[:, column], other[:, column]
        axes.hlines(rows, x, there, color=GREY, lw=2, zorder=1)
        axes.plot(x, rows, "o", color=BLUE, ms=6, label="λ found on this task (IND)")
        hollow: dict[str, Any] = {"mfc": "none", "mew": 1.8, "ms": 9}
        axes.plot(there, rows, "D", color=ORANGE, label="λ found on other tasks (OOD)", **hollow)
        axes.ticklabel_format(axis="x", useOffset=False)
    panels[-1].set_xlabel(label, wrap=True)
    _legend(figure)
    return figure


@literally
def methods(groups: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str) -> Figure:
    """A forest plot of each method's soups against their better parent (Tables 1 and 2).

    Args:
        groups: pair → method → the paired difference, soup minus better parent, and the lower and
            upper bound of its 95 % interval.
        label: the name of the score, for the axis.
    """
    figure, panels = _forest("Soups against their better parent", groups, sharex=True)
    for axes, results in zip(panels, groups.values(), strict=True):
        x, low, high = np.reshape(list(results.values()), (-1, 3)).T
        rows = np.arange(len(x))
        clear = (low > 0) | (high < 0)
        axes.axvline(0.0, ls="--", color=GREEN, label="better parent")
        for some, face, word in ((clear, BLUE, "excludes"), (~clear, "white", "includes")):
            axes.errorbar(
                x[some],
                rows[some],
                xerr=[(x - low)[some], (high - x)[some]],
                fmt="o",
                color=BLUE,
                mfc=face,
                capsize=3,
                label=f"gain, 95 % interval {word} 0",
            )
    panels[-1].set_xlabel(f"gain over the better parent: {label}", wrap=True)
    _legend(figure)
    return figure


def _figure(title: str, width: float = WIDTH, height: float = HEIGHT) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure


def _forest(
    title: str, panels: Mapping[str, Collection[str]], *, sharex: bool
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per title, one below the other, and one line per name in a panel."""
    lines = [len(names) + 1 for names in panels.values()]
    height = ROW * sum(lines) + 0.6 * len(lines) + 1.2
    figure = _figure(title, height=max(3.0, height))
    grid = figure.subplots(len(lines), squeeze=False, sharex=sharex, height_ratios=lines)
    for axes, (name, names) in zip(grid[:, 0], panels.items(), strict=True):
        axes.set_title(name, loc="left", size="medium", wrap=True)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
    return figure, list(grid[:, 0])


def _legend(figure: Figure, handles: Iterable[Artist] = ()) -> None:
    """Draw the legend below the figure, where it covers nothing; each label appears once."""
    found = {str(handle.get_label()): handle for handle in handles}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(handles=list(found.values()), loc="outside lower center", ncols=3, frameon=False)


def _inks(colours: ArrayLike) -> NDArray[np.str_]:
    """The colour of the text in each cell of a heat map, for contrast with the cell's RGBA.

    Above a relative luminance of 0.18, black text has the better contrast (WCAG 2.2).
    """
    luminance = np.asarray(colours)[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    return np.where(luminance > 0.18, "black", "white")


def _print_scores(axes: Axes, grid: Grid, inks: NDArray[np.str_]) -> None:
    """Print each score of a heat map in its cell."""
    for i, j in np.argwhere(np.isfinite(grid)):
        text = f"{grid[i, j]:.4f}"
        axes.text(j, i, text, color=inks[i, j], ha="center", va="center", size=8)


def _outline(axes: Axes, row: int, column: int, **style: Any) -> Artist:
    """Draw a frame around a cell of a heat map."""
    corner = (column - 0.5, row - 0.5)
    frame = Rectangle(corner, 1, 1, fill=False, clip_on=False, zorder=3, **style)
    return axes.add_patch(frame)


def _short(label: str) -> str:
    """The label broken into lines that fit beside an axis.

    matplotlib itself only wraps at the edge of the whole figure.
    """
    return fill(label, 32)


def _pair(names: tuple[str, str]) -> str:
    return " and ".join(names)


def _weight(names: tuple[str, str]) -> str:
    older, newer = names
    return f"λ, weight of {newer} (rest: {older})"
