"""The paper's pilot experiments on registered versions (Liu et al. 2024, arXiv:2403.19390).

They show which pairs to merge, how many parents, which λ, how many held-out items, and which search
space. A recipe that any request has scored before is not scored again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import fsum
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from mlflow_soup.decision import pairing
from mlflow_soup.errors import ObjectiveError, SpecError
from mlflow_soup.records import Cell, Difference, Found, Items, Recipe, Score, Table, Trial, Version
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.evaluations import score_metrics
from mlflow_soup.reporting import charts, windows
from mlflow_soup.search import schedule as schedules
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Space
from mlflow_soup.weights import distance
from mlflow_soup.workflows.job import Job, Session
from mlflow_soup.workflows.trials import (
    expect,
    explore,
    find_recipe,
    in_turn,
    look,
    scored,
    search_tags,
    trusted,
)

DRAWS = 10  # random draws for each share of the held-out items


@dataclass(frozen=True)
class Result:
    """What a study measured, as a table and a figure, and its conclusions.

    Attributes:
        title: one line.
        table: the numbers.
        figure: a chart of the numbers.
        notes: the conclusions, one sentence or two each.
    """

    title: str
    table: Table
    figure: Figure
    notes: Sequence[str]


def run_search(job: Job, run_id: str, name: str = "") -> Found:
    """Run a method's search as a child run of the study, and return its result."""
    title = name or f"{job.spec.method} of {names_of(job.versions)}"
    with tracking.open_child(job.client, run_id, title, search_tags(job, title, run_id)) as child:
        found = find_recipe(job, child, alone=False)
        gain = gain_of(found)
        numbers = {
            naming.GAIN: gain.value,
            naming.GAIN_STDERR: gain.stderr,
            naming.CHOSEN_LAMBDA: found.recipe.lam[-1],
        }
        metrics = [tracking.metric(key, value) for key, value in numbers.items()]
        tracking.log(
            job.client, child, metrics=metrics + score_metrics(found.score, naming.HELD_OUT)
        )
    return found


def names_of(versions: Sequence[Version]) -> str:
    """The versions' numbers, such as `v12,v13`."""
    return ",".join(version.short for version in versions)


def _both(versions: Sequence[Version]) -> tuple[str, str]:
    older, newer = (f"v{version.number}" for version in versions)
    return older, newer


def gain_of(found: Found) -> Difference:
    """The score of the soup minus that of the better parent, paired over items."""
    return pairing.paired(found.score, found.alone[pairing.better(found.alone)])


def span(difference: Difference) -> tuple[float, float, float]:
    """A difference with its 95 % interval."""
    return difference.value, *pairing.interval(difference, 0.95)


def says(difference: Difference) -> str:
    """A difference with its 95 % interval, in words."""
    value, low, high = span(difference)
    return f"{value:+z.4f} (95 % interval {low:+z.4f} to {high:+z.4f})"


def outside_of(session: Session) -> dict[str, Session]:
    """Name of each out-of-domain task → the session that scores on this task only."""
    suite = session.bench.suites.ood
    terms = [str(term) for term in suite.terms] if suite is not None else []
    return {term: session.on(term) for term in terms}


def label_of(score: Score) -> str:
    """A label for a score that names its tasks."""
    return "held-out score: " + ", ".join(dict.fromkeys(m.task for m in score.metrics))


def luck(found: Iterable[Found]) -> str:
    """A sentence on how much too high the best score of some searches is expected to be."""
    scores = [t.held_out for one in found for t in one.trials if t.held_out is not None]
    # parents and recipes that several searches scored count once
    return _luck(list({(s.value, *(i.values for i in s.items)): s for s in scores}.values()))


def _luck(scores: Sequence[Score]) -> str:
    return (
        f"The best of {len(scores)} scores on the same items is expected to look "
        f"{pairing.optimism(scores):.4f} better than it is; the intervals ignore this bias."
    )


# -- which pairs, how many -------------------------------------------------------------------------


def pair_jobs(session: Session, versions: Sequence[Version]) -> list[Job]:
    """One job for each pair, with its versions in order of age."""
    spec = replace(session.spec, space="simplex")  # both are scored alone
    return [session.job(pair, spec) for pair in combinations(versions, 2)]


def pairs(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """Merge all pairs by one method (Fig. 1 and 6)."""
    places = combinations(range(len(versions)), 2)
    jobs = dict(zip(places, pair_jobs(session, versions), strict=True))
    near = distance.measure([session.opened[version].checkpoint for version in versions]).whole
    found: dict[tuple[int, int], Found] = {}
    failed: list[ObjectiveError] = []
    turns = in_turn([*jobs.values()], run_id)
    bar = tqdm(jobs, desc="pairs", unit="pair", disable=None)
    for place, job in zip(bar, turns, strict=True):
        try:
            found[place] = run_search(job, run_id)
        except ObjectiveError as error:  # one version fails; pairs without it are still valid
            failed.append(error)
    if not found:
        raise failed[0]
    gains = {place: gain_of(one) for place, one in found.items()}
    best, *_ = order = sorted(  # the newest first among equal scores
        found, key=lambda place: (found[place].score.value, place[1]), reverse=True
    )
    rows: list[tuple[Cell, ...]] = [
        (
            *(f"v{v.number}" for v in found[place].versions),
            *(str(found[place].recipe), found[place].score.value),
            *(score.value for score in found[place].alone),
            *(*span(gains[place]), place[1] - place[0], near.relative(*place)),
        )
        for place in order
    ]
    columns = ("older", "newer", "λ", "soup", "older alone", "newer alone", "Δ better parent")
    table = Table((*columns, "low", "high", "apart", "relative L2"), tuple(rows), {"soup": True})
    alone = {place[i]: one.alone[i].value for place, one in found.items() for i in (0, 1)}
    scores = {(i, i): value for i, value in alone.items()}
    scores |= {place: one.score.value for place, one in found.items()}
    singles = [score for one in found.values() for score in one.alone]
    single = singles[pairing.better(singles)]
    ahead = pairing.paired(found[best].score, single)
    verdict = (
        "Recommended"
        if ahead.value > pairing.ROUNDING
        else "Highest, but not better than the best version"
    )
    notes = [
        f"{verdict}: {names_of(found[best].versions)}, {found[best].score.value:.4f}; "
        f"{says(gains[best])} against its better parent, {says(ahead)} against the best version.",
        luck(found.values()),
        *dict.fromkeys(f"Left out: {error.what}, {error.where}." for error in failed),
    ]
    for apart in range(1, len(versions)):
        those = [gain.value for (i, j), gain in gains.items() if j - i == apart]
        if not those:
            continue
        notes.append(
            f"{apart} apart: the average gain is {fsum(those) / len(those):+z.4f}; "
            f"{sum(value > pairing.ROUNDING for value in those)} of {len(those)} pairs gain."
        )
    label = label_of(found[best].score)
    figure = charts.pairs([f"v{v.number}" for v in versions], scores, label)
    return Result(f"Pairs by {session.spec.method}", table, figure, notes)


def count_jobs(session: Session, versions: Sequence[Version]) -> list[Job]:
    """One job each for the last 2, 3, 4 … versions."""
    return [session.job(versions[-count:]) for count in range(2, len(versions) + 1)]


def count(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """Merge the last 2, 3, 4 … versions by one method (Fig. 3)."""
    jobs = count_jobs(session, versions)
    bar = tqdm(in_turn(jobs, run_id), desc="count", unit="soup", total=len(jobs), disable=None)
    found = [run_search(job, run_id) for job in bar]
    rows: list[tuple[Cell, ...]] = []
    spans = []
    for one in found:
        spans.append(span(gain_of(one)))
        best = one.references[pairing.better(one.alone)]
        rows.append(
            (
                *(len(one.versions), names_of(one.versions), str(one.recipe), one.score.value),
                *(f"v{best.number}", *spans[-1], len(one.trials)),
            )
        )
    columns = ("parents", "versions", "λ", "soup", "best parent", "Δ best parent", "low", "high")
    table = Table((*columns, "evaluations"), tuple(rows), {"soup": True})
    parents = [max(score.value for score in one.alone) for one in found]
    figure = charts.count(
        f"v{versions[-1].number}",
        [len(one.versions) for one in found],
        [one.score.value for one in found],
        lows=[parent + low for parent, (_, low, _) in zip(parents, spans, strict=True)],
        highs=[parent + high for parent, (_, _, high) in zip(parents, spans, strict=True)],
        best_parent=parents,
        label=label_of(found[0].score),
    )
    notes = [
        f"{len(one.versions)} instead of {len(found[0].versions)} parents: "
        f"{says(pairing.paired(one.score, found[0].score))}."
        for one in found[1:]
    ]
    notes.append(luck(found))
    return Result(f"How many parents, by {session.spec.method}", table, figure, notes)


def schedule_jobs(session: Session, versions: Sequence[Version]) -> list[Job]:
    """The job whose space holds all windows of the versions."""
    spec = replace(session.spec, method="wsm", space="schedule", alpha=0.0)
    if not any(length <= len(versions) for length in spec.lengths):
        raise SpecError(
            f"no window fits: there are {len(versions)} versions",
            where=f"--windows {spec.windows}",
            fix=f"name windows of 2 to {len(versions)} checkpoints, or more versions",
        )
    return [session.job(versions, spec)]


def schedule(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """Merge windows of several lengths that end at the newest version, by several decays.

    The decay is w(x) = 1 − x^p, as in `search.schedule`.
    """
    (job,) = schedule_jobs(session, versions)
    space, times = job.space, job.times
    begins = (times[-1] - schedules.longest(times), *times)
    lengths = [k for k in session.spec.lengths if k <= len(versions)]
    durations, powers = [times[-1] - begins[-1 - k] for k in lengths], session.spec.exponents
    recipes = {
        (k, p): space.recipe(schedules.weights(times, duration, schedules.power(p)))
        for k, duration in zip(lengths, durations, strict=True)
        for p in powers
    }
    (alone,) = space.alone()
    scores: dict[Recipe, Score] = {}
    trust = trusted(job, run_id)
    wanted = list(dict.fromkeys([alone, *recipes.values()]))
    for number, recipe in enumerate(tqdm(wanted, desc="schedule", unit="window", disable=None)):
        expect(job, trust, wanted[number:])
        scores[recipe] = look(job, run_id, recipe, job.bench.held_out)
    against = {cell: pairing.paired(scores[r], scores[alone]) for cell, r in recipes.items()}
    order = sorted(recipes, key=lambda cell: scores[recipes[cell]].value, reverse=True)
    rows: list[tuple[Cell, ...]] = [
        (k, f"{p:g}", scores[recipes[k, p]].value, *span(against[k, p])) for k, p in order
    ]
    columns = ("checkpoints", "p", "score", "Δ newest version", "low", "high")
    table = Table(columns, tuple(rows), {"score": True})
    best = recipes[order[0]]

    def compare(what: str, cells: Sequence[tuple[int, float]]) -> str:
        rival = max(cells, key=lambda cell: scores[recipes[cell]].value)
        difference = pairing.paired(scores[best], scores[recipes[rival]])
        return f"Against {what} ({rival[0]} checkpoints, p = {rival[1]:g}): {says(difference)}."

    notes = [
        f"The best of {len(recipes)} is the window of {order[0][0]} checkpoints with p = "
        f"{order[0][1]:g}: {says(against[order[0]])} against the newest version, {versions[-1]}."
    ]
    if pairs := [cell for cell in recipes if cell[0] == 2]:
        notes.append(compare("the best pair", pairs))
    if averages := [cell for cell in recipes if cell[1] == 1.0]:
        notes.append(compare("the best plain average", averages))
    notes.append(_luck([scores[recipe] for recipe in wanted]))
    if not job.time_tag:
        notes.append(windows.UNTIMED)
    figure = charts.schedule(
        lengths,
        powers,
        [[scores[recipes[k, p]].value for k in lengths] for p in powers],
        newest=scores[alone].value,
        unit="checkpoints",
        label=label_of(scores[alone]),
    )
    return Result(f"Windows that end at {versions[-1]}", table, figure, notes)


# -- which λ ---------------------------------------------------------------------------------------


def grid_jobs(session: Session, versions: Sequence[Version]) -> list[Job]:
    """The job that scores equally spaced λ from 0 to 1."""
    spec = session.spec
    return [session.job(versions, replace(spec, method="grid", alpha=0.0, trials=spec.points))]


def _measure(session: Session, versions: Sequence[Version], run_id: str) -> list[Trial]:
    """The trials of equally spaced λ, in the order of λ, without failed ones.

    Raises:
        ObjectiveError: a parent has no finite score.
    """
    (job,) = grid_jobs(session, versions)
    title = f"{session.spec.points} λ of {names_of(versions)}"
    with tracking.open_child(job.client, run_id, title, search_tags(job, title, run_id)) as child:
        trials = explore(job, child)
        for recipe, version in zip(job.space.alone(), versions, strict=True):
            scored(trials, recipe, str(version))
    return sorted(
        (trial for trial in trials if trial.held_out is not None),
        key=lambda trial: trial.recipe.lam[-1],
    )


def _scores(trials: Sequence[Trial]) -> list[Score]:
    return [trial.held_out for trial in trials if trial.held_out is not None]


def landscape(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """The score as a function of λ, with a paired interval (Fig. 2 and 7)."""
    trials = _measure(session, versions, run_id)
    lam, scores = [trial.recipe.lam[-1] for trial in trials], _scores(trials)
    parents = [scores[0], scores[-1]]
    better = pairing.better(parents)
    against = [pairing.paired(score, parents[better]) for score in scores]
    rows = [
        (weight, score.value, *span(difference))
        for weight, score, difference in zip(lam, scores, against, strict=True)
    ]
    columns = ("λ", "score", "Δ better parent", "low", "high")
    table = Table(columns, tuple(rows), {"score": True})
    won = sum(difference.value > pairing.ROUNDING for difference in against)
    sure = sum(span(difference)[1] > 0 for difference in against)
    best = max(range(len(scores)), key=lambda i: scores[i].value)
    notes = [
        f"{100 * won / len(lam):.0f} % of λ from 0 to 1 ({won} of {len(lam)}) beat the better "
        f"parent, v{versions[better].number}; {sure} of them with 95 % confidence each.",
        f"λ = {lam[best]:g} scores highest: {says(against[best])} against the better parent.",
        _luck(scores),
    ]
    figure = charts.landscape(
        _both(versions),
        lam,
        [score.value for score in scores],
        stderr=[difference.stderr for difference in against],
        better=parents[better].value,
        label=label_of(scores[0]),
    )
    return Result(f"Landscape of {names_of(versions)}", table, figure, notes)


def _part(score: Score, share: float, seed: int) -> Score:
    """The score on a random share of the items of each task.

    With the same seed, a smaller share is a subset of a larger one. The value of a task stays the
    weighted mean of its items' values: the weights (`shares`) of the drawn items sum to 1.
    """
    kept = []
    for position, items in enumerate(score.items):
        order = np.random.default_rng([seed, position]).permutation(len(items.ids))
        rows = np.sort(order[: max(round(share * len(order)), 1)])
        total = fsum(items.shares[i] for i in rows)
        part: dict[str, Any] = {
            field.name: tuple(getattr(items, field.name)[i] for i in rows)
            for field in fields(Items)
            if isinstance(getattr(items, field.name), tuple) and getattr(items, field.name)
        }
        part["shares"] = tuple(share / total for share in part["shares"])
        kept.append(replace(items, **part))
    value = fsum(i.weight * fsum(np.multiply(i.shares, i.values)) for i in kept)
    return Score(value, score.stderr, tuple(kept))


def heldout(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """Which λ a share of the held-out items would choose, and how that λ scores (Table 4)."""
    spec, space = session.spec, Space.pair(0.0)
    trials = _measure(session, versions, run_id)
    shares = spec.shares
    whole = {trial.recipe: score for trial, score in zip(trials, _scores(trials), strict=True)}
    chosen: list[list[Recipe]] = []
    draws = [(share, seed) for share in shares for seed in range(DRAWS)]
    for share, seed in tqdm(draws, desc="held-out shares", unit="draw", disable=None):
        if seed == 0:
            chosen.append([])
        seen = [
            replace(trial, held_out=_part(whole[trial.recipe], share, spec.seed + seed))
            for trial in trials
        ]
        if share == 1.0 and seed:
            chosen[-1].append(chosen[-1][0])  # a share of 1 draws all items each time
        else:
            chosen[-1].append(recommend(space, seen, measured=True))
    outside = outside_of(session)
    job = session.job(versions, replace(spec, method="uniform"))
    of = {
        recipe: [look(job, run_id, recipe, on.bench.held_out) for on in outside.values()]
        for recipe in dict.fromkeys(row[0] for row in chosen)
    }
    rows: list[tuple[Cell, ...]] = []
    for share, row in zip(shares, chosen, strict=True):
        first, full = row[0], [whole[recipe].value for recipe in row]
        items = sum(max(round(share * len(i.ids)), 1) for i in whole[first].items)
        partial = _part(whole[first], share, spec.seed).value
        lam = [recipe.lam[-1] for recipe in row]
        rows.append(
            (
                *(f"{share:g}", items, first.lam[-1], partial, whole[first].value),
                *(score.metrics[0].value for score in of[first]),
                *(float(np.median(lam)), float(np.std(lam)), float(np.mean(full))),
            )
        )
    names = tuple(outside)
    columns = ("share", "items", "λ", "score on the share", "score on all", *names)
    columns += (f"median λ of {DRAWS} draws", "s.d. of λ", "mean score on all")
    best = max(score.value for score in whole.values())
    lams = [[recipe.lam[-1] for recipe in row] for row in chosen]
    fulls = [[whole[recipe].value for recipe in row] for row in chosen]
    notes = [
        f"Share {share:g}: the chosen λ scores {best - float(np.mean(full)):z.4f} below the best "
        f"of {len(whole)} λ on all items, on average over {DRAWS} draws."
        for share, full in zip(shares, fulls, strict=True)
    ]
    label = label_of(whole[trials[0].recipe])
    figure = charts.heldout(_both(versions), shares, lams, fulls, full_best=best, label=label)
    table = Table(columns, tuple(rows), {})
    return Result(f"Held-out shares, {names_of(versions)}", table, figure, notes)


def alpha_jobs(session: Session, versions: Sequence[Version]) -> list[Job]:
    """One search job for each search space."""
    spec = session.spec
    specs = [replace(spec, method="bayesopt", space="simplex", alpha=end) for end in spec.ends]
    return [session.job(versions, spec) for spec in specs]


def alpha(session: Session, versions: Sequence[Version], run_id: str) -> Result:
    """Search in several spaces [α, 1] (Fig. 5)."""
    jobs = alpha_jobs(session, versions)
    ends = [job.space.alpha for job in jobs]
    bar = tqdm(in_turn(jobs, run_id), desc="alpha", unit="space", total=len(jobs), disable=None)
    found = [run_search(job, run_id, f"[{job.space.alpha:g}, 1]") for job in bar]
    rows = [
        (f"{end:g}", one.recipe.lam[-1], one.score.value, *span(gain_of(one)), len(one.trials))
        for end, one in zip(ends, found, strict=True)
    ]
    columns = ("α", "λ", "soup", "Δ better parent", "low", "high", "evaluations")
    points = {t.recipe.lam[-1]: t.held_out.value for f in found for t in f.trials if t.held_out}
    best = max(range(len(ends)), key=lambda i: found[i].score.value)
    notes = [
        f"[{ends[i]:g}, 1] instead of [{ends[best]:g}, 1]: "
        f"{says(pairing.paired(found[i].score, found[best].score))}."
        for i in range(len(ends))
        if i != best
    ]
    notes.append(luck(found))
    figure = charts.alpha(
        _both(versions),
        sorted(points),
        [points[lam] for lam in sorted(points)],
        spaces={
            end: (one.recipe.lam[-1], one.score.value) for end, one in zip(ends, found, strict=True)
        },
        label=label_of(found[0].score),
    )
    table = Table(columns, tuple(rows), {"soup": True})
    return Result(f"Search spaces, {names_of(versions)}", table, figure, notes)
