"""Compare all methods, on the tasks that chose the soups, on out-of-domain tasks and a test set."""

from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from typing import Any

import numpy as np
from tqdm import tqdm

from mlflow_soup.decision import pairing
from mlflow_soup.records import Cell, Difference, Found, Recipe, Score, Table, Version
from mlflow_soup.reporting import charts
from mlflow_soup.workflows.job import Job, Session
from mlflow_soup.workflows.pilots import (
    Result,
    gain_of,
    label_of,
    luck,
    names_of,
    outside_of,
    run_search,
    says,
    span,
)
from mlflow_soup.workflows.trials import in_turn, look


def _jobs(session: Session, pair: Sequence[Version]) -> dict[str, Job]:
    """Name of a method → the job that merges the pair by this method."""
    spec = replace(session.spec, space="simplex")  # both are scored alone
    return {name: session.job(pair, replace(spec, method=name)) for name in spec.compared}


def method_jobs(session: Session, pairs: Sequence[Sequence[Version]]) -> list[Job]:
    """One job for each pair and method."""
    return [job for pair in pairs for job in _jobs(session, pair).values()]


def _compare(
    session: Session, pair: Sequence[Version], run_id: str
) -> dict[str, tuple[Job, Found]]:
    """Name of a method → its job for the pair, and the result of its search."""
    jobs = _jobs(session, pair)
    bar = tqdm(jobs, desc=f"methods on {names_of(pair)}", unit="method", disable=None)
    turns = zip(bar, in_turn([*jobs.values()], run_id), strict=True)
    return {name: (job, run_search(job, run_id)) for name, job in turns}


def ood(session: Session, pairs: Sequence[Sequence[Version]], run_id: str) -> Result:
    """Score each method's soups on the out-of-domain tasks (Table 3).

    IND soups are found on the task itself, OOD soups on the held-out tasks.
    """
    outside = outside_of(session)
    rows: list[tuple[Any, ...]] = []
    ind, beside = [], []
    for pair in pairs:
        for name, (job, found) in _compare(session, pair, run_id).items():
            here, there = [], []
            for task, on in outside.items():
                own = on.job(pair, replace(on.spec, method=name))
                title = f"{name} of {names_of(pair)} on {task}"
                here.append(run_search(own, run_id, title).score.metrics[0].value)
                score = look(job, run_id, found.recipe, on.bench.held_out)
                there.append(score.metrics[0].value)
            gaps = [abs(a - b) for a, b in zip(here, there, strict=True)]
            cells = [cell for triple in zip(here, there, gaps, strict=True) for cell in triple]
            rows.append((names_of(pair), name, *cells, fsum(gaps)))
            ind.append(here)
            beside.append(there)
    columns = ["pair", "method"]
    for task in outside:
        columns += [f"{task} IND", f"{task} OOD", f"{task} |Δ|"]
    table = Table((*columns, "total |Δ|"), tuple(rows), {"total |Δ|": False}, group="pair")
    totals: dict[str, list[float]] = {}
    for row in rows:
        totals.setdefault(row[1], []).append(row[-1])
    notes = [f"{name}: total |IND − OOD| {np.mean(gaps):.4f}." for name, gaps in totals.items()]
    notes.append(
        "IND and OOD are equal for methods that read no items, such as uniform; "
        "|Δ| has the units of its task."
    )
    notes.append(
        "IND soups were found on the out-of-domain items, so they are no evidence for a gate."
    )
    labels = [f"{row[1]} {row[0]}" if len(pairs) > 1 else row[1] for row in rows]
    figure = charts.ood(labels, list(outside), ind=ind, ood=beside, label="score")
    return Result("In domain and out of domain", table, figure, notes)


def methods(session: Session, pairs: Sequence[Sequence[Version]], run_id: str) -> Result:
    """Score all methods on all tasks (Tables 1, 2 and 5).

    With test tasks, the table also has each soup's gain on these, which no method read.
    """
    outside, test = outside_of(session), session.bench.test
    rows: list[tuple[Cell, ...]] = []
    forest: dict[str, dict[str, tuple[float, float, float]]] = {}
    notes = []
    larger: dict[str, bool] = {"held-out": True}
    for pair in pairs:
        name_of_pair = names_of(pair)
        compared = _compare(session, pair, run_id)
        job, first = next(iter(compared.values()))
        entries: list[tuple[str, Recipe, Score, Difference | None, int | None]] = [
            (f"v{v.number} alone", recipe, score, None, None)
            for v, recipe, score in zip(pair, job.space.alone(), first.alone, strict=True)
        ]
        entries += [
            (name, found.recipe, found.score, gain_of(found), len(found.trials))
            for name, (_, found) in compared.items()
        ]
        alone: list[Score] = []  # each parent on the test set
        for name, recipe, score, gain, evaluations in entries:
            at = compared[name][0] if name in compared else job
            there = [look(at, run_id, recipe, on.bench.held_out) for on in outside.values()]
            own = score.metrics if len(score.metrics) > 1 else ()
            shown = [*own, *(metric for other in there for metric in other.metrics)]
            larger |= {metric.key: metric.higher_is_better for metric in shown}
            spread = span(gain) if gain is not None else (None, None, None)
            values = (metric.value for metric in shown)
            unbiased: tuple[Cell, ...] = ()
            if test is not None:
                tested = look(at, run_id, recipe, test)
                unbiased = (tested.value, None, None, None)
                if gain is None:
                    alone.append(tested)
                else:
                    # the parent that the held-out items call better, as for the other gain
                    parent = alone[pairing.better(first.alone)]
                    unbiased = (tested.value, *span(pairing.paired(tested, parent)))
            about = (name_of_pair, name, str(recipe), score.value)
            rows.append((*about, *values, *spread, *unbiased, evaluations))
        forest[name_of_pair] = {
            name: span(gain) for name, _, _, gain, _ in entries if gain is not None
        }
        searches = [search for _, search in compared.values()]
        notes += _standing(name_of_pair, [(f.method, f.score) for f in searches])
        notes.append(f"{name_of_pair}: {luck(searches)}")
    columns = ("pair", "model", "λ", *larger, "Δ better parent", "low", "high")
    if test is not None:
        columns += ("test", "Δ test", "test low", "test high")
        larger["test"] = True
        notes.append("No method read the test items, so each Δ test is unbiased.")
    figure = charts.methods(forest, label_of(first.score))
    table = Table((*columns, "evaluations"), tuple(rows), larger, group="pair")
    return Result("Methods", table, figure, notes)


def _standing(pair: str, scores: Sequence[tuple[str, Score]]) -> list[str]:
    """Which methods score highest on a pair, and the paired difference of bayesopt to the first."""
    best = max((score for _, score in scores), key=lambda score: score.value)
    first = [name for name, score in scores if score.value >= best.value - pairing.ROUNDING]
    lines = [f"{pair}: the highest score is {best.value:.4f}, by {', '.join(first)}."]
    own = dict(scores).get("bayesopt")
    if own is not None and "bayesopt" not in first:
        lines.append(f"{pair}: bayesopt against {first[0]} {says(pairing.paired(own, best))}.")
    return lines
