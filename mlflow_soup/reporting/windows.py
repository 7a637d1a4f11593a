"""Tell which window of a run was merged: the duration and the power of the schedule, the weights.

`search.schedule` explains both numbers.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from mlflow_soup.records import Recipe, Soup, Window, listed
from mlflow_soup.reporting import report
from mlflow_soup.reporting.report import BLUE, GREY, ORANGE, Story
from mlflow_soup.search.methods import METHODS
from mlflow_soup.search.recommend import expected
from mlflow_soup.search.schedule import Schedule, amount, longest
from mlflow_soup.search.space import Space

UNTIMED = "No version has the tag of --time-tag, so they count as equally spaced."


def shape(space: Schedule, recipe: Recipe) -> tuple[str, str]:
    """The duration and the power of a recipe in words; empty if it is none of the searched ones.

    Args:
        space: the schedules.
        recipe: the recipe.
    """
    found = space.shape_of(recipe)
    if found is None:
        return "", ""
    if max(recipe.lam) == 1.0:
        return "newest alone", ""
    duration, power = found
    return amount(duration), f"{power:.3g}"


def words(space: Space, soup: Soup, time_tag: str, *, searched: bool) -> list[str]:
    """Sentences about the window that was merged.

    Args:
        space: the space, with times.
        soup: the soup.
        time_tag: the version tag with the times; empty if the versions count as equally spaced.
        searched: whether the window was searched, and not named.
    """
    told = []
    if not time_tag:
        told.append(UNTIMED)
    if not isinstance(space, Schedule) or (found := space.shape_of(soup.recipe)) is None:
        return told
    if len(soup.parents) == 1:
        return [*told, "No window is expected to be better than the newest version alone."]
    duration, power = found
    steps = np.diff([weight for weight in soup.recipe.lam if weight])
    how = ""  # the oldest version may be at the end of the window, and have less than its share
    if power == 1.0:
        how = ": as in a plain average"
    elif (steps > 0.0).all() or (steps < 0.0).all():
        how = f": the {'newer' if steps[0] > 0.0 else 'older'} a version, the larger its weight"
    told.append(
        f"The merged window is {amount(duration)} {unit(time_tag)} long and holds "
        f"{len(soup.parents)} of the {space.count} versions. Its power p is {power:.3g}{how}."
    )
    if searched and duration >= longest(space.times) * (1.0 - 1e-9):
        told.append(
            "No longer window was searched: with more versions, a longer one may be better."
        )
    return told


def window(story: Story) -> Window | None:
    """The window that a soup merges; None if nobody asked for one, or it is the newest alone."""
    space, recipe = story.space, story.soup.recipe
    if not space.times or len(story.soup.parents) == 1:
        return None
    shape = Schedule(space.count, 0.0, space.times).window_of(recipe)
    if shape is None and METHODS[story.method].searches:
        return None  # it chose none of its windows
    duration, power = shape or (longest(space.times), None)  # a fixed rule merges all versions
    found = report.trial_of(story.trials, report.plain(space, recipe))
    return Window(duration, power, story.time_tag, found.held_out if found is not None else None)


def unit(time_tag: str) -> str:
    """What times are counted in."""
    return (time_tag or "checkpoints").replace("_", " ")


def trials_table(story: Story) -> str:
    """All trials of a search for a schedule, in order, as a Markdown section."""
    space, rows = story.space, []
    assert isinstance(space, Schedule)
    for trial in story.trials:
        score = f"{trial.held_out.value:.4f}" if trial.held_out else "failed"
        window = shape(space, trial.recipe)
        row = [str(trial.number), *window, str(trial.recipe), score]
        chosen = trial.recipe == story.soup.recipe
        rows.append([f"**{cell}**" if cell else "" for cell in row] if chosen else row)
    head = ["trial", f"length of the window, {unit(story.time_tag)}", "p", "λ", "held-out"]
    table = report.rows_table(head, rows)
    return f"\n## Trials\n\nThe chosen one is bold.\n\n{table}\n"


@report.literally
def figure(story: Story) -> Figure:
    """The weights of the checkpoints over time; of a search, also the map of expected scores."""
    space = story.space
    searched = isinstance(space, Schedule) and METHODS[story.method].searches
    figure = Figure(figsize=(11.0 if searched else 7.5, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if searched else 1, squeeze=False)[0]
    if isinstance(space, Schedule) and searched:
        _draw_map(figure, axes[0], story, space)
    _draw_weights(axes[-1], story)
    figure.suptitle(f"Soup of {listed([p.version for p in story.soup.parents])}", wrap=True)
    return figure


def _draw_weights(axes: Axes, story: Story) -> None:
    """Draw the merge weight of each checkpoint as a bar over its time."""
    times = np.array(story.space.times)
    axes.bar(times, story.soup.recipe.lam, 0.7 * np.diff(times).min(), color=BLUE)
    axes.set_xlabel(unit(story.time_tag))
    axes.set_ylabel("merge weight λ")
    if story.time_tag:
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_map(figure: Figure, axes: Axes, story: Story, space: Schedule) -> None:
    """Draw the expected score over duration and power, with the trials."""
    found = [(row, space.shape_of(space.recipe(row))) for row in space.candidates()]
    shapes = np.array([known for _, known in found if known is not None])
    scores = expected(space, story.trials, np.array([row for row, known in found if known]))
    scores -= expected(space, story.trials, np.array([space.alone()[-1].lam]))
    x, y = shapes[:, 0], np.log2(shapes[:, 1])
    levels = report.bounds(scores)
    norm = BoundaryNorm(levels, 256)
    image = axes.tricontourf(x, y, scores, levels=levels, cmap="cividis", norm=norm)
    label = "expected score against the newest version"
    figure.colorbar(image, ax=axes, label=label, format="%+.4f", ticks=levels)
    known = [space.shape_of(trial.recipe) for trial in story.trials if trial.held_out]
    there = np.array([found for found in known if found is not None])
    axes.plot(there[:, 0], np.log2(there[:, 1]), "o", color="white", mec=GREY, label="trial")
    if (chosen := space.shape_of(story.soup.recipe)) is not None:
        axes.plot(
            chosen[0],
            np.log2(chosen[1]),
            "o",
            color=ORANGE,
            markersize=14,
            markeredgewidth=2.5,
            fillstyle="none",
            label="chosen",
        )
    axes.set_yticks(range(-1, 4), ["1/2", "1", "2", "4", "8"])
    axes.set_xlabel(f"length of the window, {unit(story.time_tag)}")
    axes.set_ylabel("power p")
    if story.time_tag:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")
