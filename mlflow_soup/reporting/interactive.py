"""One page with the landscape of a search, to explore: hover a λ to see the score of every task.

The page is self-contained, so it opens where there is no network. Bokeh draws it: its script has
1.3 MB, that of Plotly 4.8 MB, and Altair needs a 34 MB compiler to write a page without network.

Names of tasks and items come from others: they reach the page only as text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.palettes import Colorblind8
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.transform import linear_cmap

from mlflow_soup.records import Items, Score, Trial
from mlflow_soup.redaction import redact
from mlflow_soup.reporting import answers
from mlflow_soup.reporting.report import BLUE, GREEN, GREY, ORANGE, Story, estimate
from mlflow_soup.search.belief import Array, believe
from mlflow_soup.search.methods import METHODS
from mlflow_soup.search.schedule import Schedule

_GRID = np.linspace(0.0, 1.0, 201)
_POINTS = np.column_stack([1.0 - _GRID, _GRID])
_MOST_CURVES = 8  # tasks; each curve is a fit
_MOST_NAMES = 12  # items that flip, for each trial

# fills blocks of Bokeh's page; `e` makes text of everything that it is given
_TEMPLATE = """
{% block postamble %}
<style>
body { font: 14px sans-serif; margin: 1.5em; color: #222; }
table { border-collapse: collapse; } td, th { padding: 3px 10px; text-align: right; }
th { border-bottom: 1px solid #888; } tr.chosen { font-weight: bold; background: #fbe9dd; }
th:last-child, td.names { text-align: left; }
td.names { max-width: 40em; font-family: monospace; overflow-wrap: anywhere; }
</style>
{% endblock %}
{% block contents %}
<h1>{{ heading|e }}</h1>
<p>{% for line in lines %}{{ line|e }}<br>{% endfor %}</p>
{{ super() }}
<h2>Trials, and the items that flip against {{ rival|e }}</h2>
<p>An item flips to right if {{ rival|e }} has it wrong, and to wrong the other way round.
Only tasks whose items are right or wrong count.</p>
<table><tr>{% for cell in head %}<th>{{ cell|e }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row.chosen %} class="chosen"{% endif %}>
{% for cell in row.cells %}<td>{{ cell|e }}</td>{% endfor %}
<td class="names">{{ row.names|e }}</td></tr>{% endfor %}
</table>
{% endblock %}
"""


@dataclass(frozen=True)
class Flips:
    """The items that a trial has right and its rival wrong, and the other way round.

    Attributes:
        right: the names of those that become right.
        wrong: the names of those that become wrong.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def names(self) -> str:
        """All names, each with the sign of what it does; the number of those that are too many."""
        told = [*(f"+{name}" for name in self.right), *(f"−{name}" for name in self.wrong)]
        more = f", and {len(told) - _MOST_NAMES} more" if len(told) > _MOST_NAMES else ""
        return ", ".join(told[:_MOST_NAMES]) + more


def flips(score: Score, rival: Score) -> Flips:
    """The items that flip between two scores of the same items."""
    right, wrong = list[str](), list[str]()
    for ours, theirs in zip(score.items, rival.items, strict=True):
        if not {*ours.values, *theirs.values} <= {0.0, 1.0}:
            continue
        better = 1.0 if ours.weight > 0.0 else -1.0
        for name, now, then in zip(ours.ids, ours.values, theirs.values, strict=True):
            if now != then:
                to = right if (now - then) * better > 0.0 else wrong
                to.append(f"{redact(ours.task)}:{name[:10]}")
    return Flips(tuple(right), tuple(wrong))


def page(story: Story) -> str:
    """The page, in HTML."""
    trials = [trial for trial in story.trials if trial.held_out is not None]
    rival, version = _rival(story, trials), str(story.references[story.better])
    tasks = [_name(items) for items in rival.items]
    at = {trial.number: flips(_score(trial), rival) for trial in trials}
    curves = _task_curves(story, trials) if _has_curve(story) else []
    plots = [_main(story, trials, tasks, curves)]
    if _is_pair(story) and tasks:
        plots.append(_tasks(story, trials, rival, tasks, curves))
    if any(f.right or f.wrong for f in at.values()):
        plots.append(_bars(story, trials, at, version))
    rows = [
        {
            "chosen": trial.recipe == story.soup.recipe,
            "cells": [
                str(trial.number),
                story.space.label(trial.recipe),
                f"{_score(trial).value:.4f}",
                *(f"{value:.4f}" for value in _values(_score(trial))),
                f"+{len(at[trial.number].right)}",
                f"−{len(at[trial.number].wrong)}",
            ],
            "names": at[trial.number].names,
        }
        for trial in trials
    ]
    return file_html(
        column(plots, sizing_mode="stretch_width"),
        Resources(mode="inline"),
        title="mlflow-soup",
        template=_TEMPLATE,
        template_variables={
            "heading": redact(f"Soup {story.soup.version}"),
            "lines": redact(answers.first_lines(story)).splitlines(),
            "rival": redact(version),
            "head": ["trial", "λ", "score", *tasks, "to right", "to wrong", "items"],
            "rows": rows,
        },
    )


def _has_curve(story: Story) -> bool:
    """Whether the search estimated a curve over λ, as for `report.landscape`."""
    return _is_pair(story) and METHODS[story.method].searches


def _is_pair(story: Story) -> bool:
    """Whether λ is one number; also of two versions, a schedule has two."""
    return story.space.count == 2 and not isinstance(story.space, Schedule)


def _score(trial: Trial) -> Score:
    assert trial.held_out is not None
    return trial.held_out


def _rival(story: Story, trials: Sequence[Trial]) -> Score:
    """The score of the better parent."""
    recipe = list(story.space.alone())[story.better]
    return _score(next(trial for trial in trials if trial.recipe == recipe))


def _name(items: Items) -> str:
    return redact(f"{items.task} {items.metric.removesuffix(',none')}")


def _values(score: Score) -> list[float]:
    """The value of each task, as lm-eval prints it."""
    return [float(np.dot(items.shares, items.values)) for items in score.items]


def _figure(title: str, x: str, y: str, **more: Any) -> Any:
    return figure(
        title=title,
        x_axis_label=x,
        y_axis_label=y,
        height=360,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,reset,save",
        active_scroll=None,
        **more,
    )


def _tips(tasks: Sequence[str], score: str) -> list[tuple[str, str]]:
    """What a hover shows: λ, the score, and each task's value."""
    told = [("λ", "@label"), (score, "@score{0.0000}")]
    return told + [(name, f"@t{i}{{0.0000}}") for i, name in enumerate(tasks)]


def _source(story: Story, trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """The trials as columns."""
    values = [_values(_score(trial)) for trial in trials]
    columns: dict[str, list[Any]] = {
        "label": [story.space.label(trial.recipe) for trial in trials],
        "score": [_score(trial).value for trial in trials],
        "x": [trial.recipe.lam[-1] if _is_pair(story) else trial.number for trial in trials],
    }
    return columns | {f"t{i}": list(task) for i, task in enumerate(zip(*values, strict=True))}


def _main(
    story: Story, trials: Sequence[Trial], tasks: Sequence[str], curves: Sequence[Array]
) -> Any:
    """The score over λ of a pair, over duration and power of a schedule, or else trial by trial."""
    columns, space = _source(story, trials), story.space
    y, dots = "score", dict[str, Any]()
    if _is_pair(story):
        older, newer = (redact(str(story.references[end])) for end in (0, -1))
        plot = _figure("Held-out score over λ", f"λ, weight of {newer} (rest: {older})", "score")
        if _has_curve(story):
            _curve(plot, story, tasks, curves)
    elif isinstance(space, Schedule):
        plot = _figure(
            "Held-out score of each window", "length of the window", "power p", y_axis_type="log"
        )
        shapes = [space.shape_of(trial.recipe) or (np.nan, np.nan) for trial in trials]
        columns["x"], columns["power"] = (list(one) for one in zip(*shapes, strict=True))
        y = "power"
        low, high = min(columns["score"]), max(columns["score"])
        dots = {"fill_color": linear_cmap("score", "Cividis256", low, high)}
    else:
        plot = _figure("Held-out score of each trial", "trial", "score")
    source = ColumnDataSource(columns)
    found = plot.scatter(
        "x", y, source=source, size=10, line_color=GREY, **({"fill_color": GREY} | dots)
    )
    chosen = [i for i, trial in enumerate(trials) if trial.recipe == story.soup.recipe]
    ring = {name: [column[i] for i in chosen] for name, column in columns.items()}
    plot.scatter(
        "x",
        y,
        source=ColumnDataSource(ring),
        size=20,
        fill_color=None,
        line_color=ORANGE,
        line_width=3,
        legend_label="chosen",
    )
    plot.add_tools(HoverTool(renderers=[found], tooltips=_tips(tasks, "score")))
    plot.legend.background_fill_alpha = 0.5
    plot.legend.location = "bottom_center"
    return plot


def _curve(plot: Any, story: Story, tasks: Sequence[str], curves: Sequence[Array]) -> None:
    """Draw the estimated curve with its 95 % band; its hover shows every task at that λ."""
    mean, half, smooth = estimate(story, _POINTS)
    columns: dict[str, Any] = {"x": _GRID, "score": mean, "label": [f"λ = {x:g}" for x in _GRID]}
    columns |= {"low": mean - half, "high": mean + half}
    columns |= {f"t{i}": curve for i, curve in enumerate(curves)}
    source = ColumnDataSource(columns)
    plot.varea("x", "low", "high", source=source, fill_color=BLUE, fill_alpha=0.15)
    line = plot.line(
        "x", "score", source=source, color=BLUE, line_width=2, legend_label="expected, 95 % band"
    )
    if smooth is not None:
        label = "smoothed, chooses λ"
        plot.line(_GRID, smooth, color=ORANGE, line_dash="dashed", legend_label=label)
    tips = _tips(tasks if curves else (), "expected score")
    plot.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))


def _task_curves(story: Story, trials: Sequence[Trial]) -> list[Array]:
    """The estimated curve of each task in its own units; none if there are too many tasks."""
    curves = []
    count = len(_score(trials[0]).items)
    for i in range(count if count <= _MOST_CURVES else 0):
        alone = []
        for trial in trials:
            items = _score(trial).items[i]
            value = items.weight * float(np.dot(items.shares, items.values))
            only = replace(_score(trial), value=value, items=(items,), metrics=())
            alone.append(replace(trial, held_out=only))
        mean, _ = believe(story.space, alone).posterior.predict(_POINTS)
        curves.append(mean / _score(trials[0]).items[i].weight)
    return curves


def _tasks(
    story: Story,
    trials: Sequence[Trial],
    rival: Score,
    tasks: Sequence[str],
    curves: Sequence[Array],
) -> Any:
    """What each task gains over the better parent, over λ; a click in the legend hides a task."""
    against = redact(str(story.references[story.better]))
    plot = _figure(f"Gain of each task over {against}, positive where it is better", "λ", "gain")
    order = sorted(range(len(trials)), key=lambda n: trials[n].recipe.lam[-1])
    for i, (name, base) in enumerate(zip(tasks, _values(rival), strict=True)):
        sign, colour = np.sign(rival.items[i].weight), Colorblind8[i % 8]
        columns = _source(story, [trials[n] for n in order])
        columns["gain"] = [float(sign * (value - base)) for value in columns[f"t{i}"]]
        columns["task"] = [name] * len(order)
        source = ColumnDataSource(columns)
        if curves:
            plot.line(_GRID, sign * (curves[i] - base), color=colour, legend_label=name)
        else:
            plot.line("x", "gain", source=source, color=colour, legend_label=name)
        dots = plot.scatter("x", "gain", source=source, size=8, color=colour, legend_label=name)
        tips = [("task", "@task"), ("gain", "@gain{+0.0000}"), *_tips(tasks, "score")]
        plot.add_tools(HoverTool(renderers=[dots], tooltips=tips))
    plot.legend.click_policy = "hide"
    plot.legend.background_fill_alpha = 0.5
    return plot


def _bars(story: Story, trials: Sequence[Trial], at: Mapping[int, Flips], version: str) -> Any:
    """How many items each trial turns right, upwards, and wrong, downwards."""
    labels = [f"{story.space.label(t.recipe)} ({t.number})" for t in _in_order(story, trials)]
    found = [at[t.number] for t in _in_order(story, trials)]
    columns = {
        "label": labels,
        "right": [len(flip.right) for flip in found],
        "wrong": [-len(flip.wrong) for flip in found],
        "names": [flip.names for flip in found],
    }
    title = f"Items that flip against {redact(version)}: to right, and to wrong"
    plot = _figure(title, "trial", "items", x_range=labels)
    source = ColumnDataSource(columns)
    bars = [
        plot.vbar(
            "label", top=top, width=0.6, source=source, color=colour, legend_label=f"to {top}"
        )
        for top, colour in (("right", GREEN), ("wrong", ORANGE))
    ]
    tips = [("trial", "@label"), ("to right", "@right"), ("to wrong", "@wrong"), ("", "@names")]
    plot.add_tools(HoverTool(renderers=bars, tooltips=tips))
    plot.xaxis.major_label_orientation = 0.6
    return plot


def _in_order(story: Story, trials: Sequence[Trial]) -> list[Trial]:
    """The trials by λ for a pair, else as they came."""
    if not _is_pair(story):
        return list(trials)
    return sorted(trials, key=lambda trial: trial.recipe.lam[-1])
