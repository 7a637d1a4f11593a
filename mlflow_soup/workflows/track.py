"""Score every checkpoint of a run, and the merge of the window that ends there.

A checkpoint of a run at a constant rate is noisy, and the merge of a window is not (Li et al. 2025,
PMA, arXiv:2505.12082): so the second curve shows earlier whether training still gets on, and what
a decay of the learning rate would give. One MLflow run holds both curves. Nothing is registered.

A later call adds the checkpoints that are new. What the curve holds decides nothing, so it is read
from the runs of the experiment as they are.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Run
from tqdm import tqdm

from mlflow_soup.decision import pairing
from mlflow_soup.errors import NonFiniteError, SpecError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.files.durable import check_writable
from mlflow_soup.records import Cell, Recipe, Score, Table, Version
from mlflow_soup.redaction import redacting
from mlflow_soup.registry import lease, naming, tracking, versions
from mlflow_soup.registry.alone import alone
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.trust import Trust
from mlflow_soup.reporting import charts, windows
from mlflow_soup.reporting.progress import ends_by
from mlflow_soup.request.spec import Spec
from mlflow_soup.search import schedule
from mlflow_soup.search.space import Array, Space
from mlflow_soup.workflows.bench import (
    Opened,
    Suites,
    check_machine,
    load_suites,
    open_version,
    set_up,
)
from mlflow_soup.workflows.job import Job, Session, settle
from mlflow_soup.workflows.pilots import Result, span
from mlflow_soup.workflows.study import Report, tell
from mlflow_soup.workflows.trials import expect, measure, score_of, trusted

logger = logging.getLogger("mlflow_soup")

Point = tuple[int, str]  # a checkpoint's place in the trajectory, and the curve
RAW, MERGED = "raw", "merged"
_GAIN = (naming.GAIN, naming.GAIN_LOW, naming.GAIN_HIGH)  # of a point of the merged curve
WINDOW = 5  # checkpoints, if neither the user nor a search says another number


@dataclass(frozen=True)
class Window:
    """How the window that ends at a checkpoint is merged.

    Attributes:
        words: what it is, in words.
        weights: times of all checkpoints so far → their merge weights.
        params: what another call needs to merge alike.
    """

    words: str
    weights: Callable[[Sequence[float]], Array]
    params: Mapping[str, str]


def _last(count: int, decay: str) -> Window:
    """The window of the last checkpoints, by a decay of `schedule.DECAYS`."""

    def weights(times: Sequence[float]) -> Array:
        last = times[-count:]
        found = schedule.weights(last, schedule.longest(last), schedule.decay_of(decay))
        return np.concatenate([np.zeros(len(times) - len(last)), found])

    return Window(f"the last {count} checkpoints, decay {decay}", weights, {})


def _as_chosen(duration: float, p: float, tag: str) -> Window:
    """The schedule that a search chose."""

    def weights(times: Sequence[float]) -> Array:
        shown = min(duration, schedule.longest(times))
        return schedule.weights(times, shown, schedule.power(p))

    words = f"{schedule.amount(duration)} {windows.unit(tag)}, p = {p:.3g}, as a search chose"
    return Window(words, weights, {"duration": repr(duration), "power": repr(p)})


def _read_chosen(numbers: Mapping[str, Any], keys: Sequence[str], tag: str) -> Window | None:
    """The schedule that a run names; None if it names none that a search could choose."""
    try:
        duration, p = (float(numbers[key]) for key in keys)
    except (KeyError, ValueError):
        return None
    if not (0.0 < duration < math.inf and schedule.POWERS[0] <= p <= schedule.POWERS[-1]):
        return None
    return _as_chosen(duration, p, tag)


def window_of(client: Store, spec: Spec, name: str, tag: str, earlier: Sequence[Run]) -> Window:
    """The window of the request, or that of the curves so far, or else what a search chose last.

    Args:
        client: the store's client.
        spec: a settled spec.
        name: the registered model.
        tag: the version tag with the times; empty if the versions count as equally spaced.
        earlier: the track runs that the request may continue, oldest first.
    """
    if _is_fixed(spec):
        return _last(spec.window or WINDOW, spec.decay)
    if earlier:
        params = earlier[-1].data.params
        return _read_chosen(params, ("duration", "power"), tag) or _last(WINDOW, spec.decay)
    tags = {naming.ROLE: "search", naming.MODEL: name}
    here = [tracking.here(client, spec.experiment)]
    for run in reversed(tracking.find_runs(client, tags, experiments=here)):
        if run.data.tags.get(naming.TIME_TAG, "") == tag:
            found = _read_chosen(run.data.metrics, (naming.DURATION, naming.POWER), tag)
            if found is not None:
                return found
    return _last(WINDOW, spec.decay)


def _is_fixed(spec: Spec) -> bool:
    """Whether the user or the policy named the window."""
    return spec.window is not None or "decay" in spec.stated


@dataclass(frozen=True)
class Trajectory:
    """The checkpoints of a run, and how their windows are merged.

    Attributes:
        versions: the checkpoints, oldest first.
        times: when they were saved, ascending.
        tag: the version tag with the times; empty if the versions count as equally spaced.
        window: how a window is merged.
        first: the place of the first checkpoint that is scored; windows reach back past it.
    """

    versions: tuple[Version, ...]
    times: tuple[float, ...]
    tag: str
    window: Window
    first: int = 0

    @property
    def _counts(self) -> bool:
        """Whether the times are whole numbers, as MLflow's steps are."""
        return bool(self.tag) and all(time.is_integer() for time in self.times)

    @property
    def unit(self) -> str:
        """What the steps of the curves count."""
        return windows.unit(self.tag) if self._counts else "version"

    def step(self, place: int) -> int:
        """The step of a checkpoint's metrics: the tokens seen, or else the version's number."""
        return round(self.times[place]) if self._counts else self.versions[place].number

    def weights(self, point: Point) -> dict[int, float]:
        """Place → merge weight of a point; of the first checkpoint, nothing can be merged."""
        place, curve = point
        if curve == RAW:
            return {place: 1.0}
        if place == 0:
            return {}
        merged = self.window.weights(self.times[: place + 1])
        lam = Space(place + 1, 0.0).recipe(merged).lam
        return {i: weight for i, weight in enumerate(lam) if weight}

    @property
    def points(self) -> list[Point]:
        """All points of both curves, in the order of the checkpoints."""
        places = range(self.first, len(self.versions))
        both = [(place, curve) for place in places for curve in (RAW, MERGED)]
        return [point for point in both if self.weights(point)]


@redacting()
@asking("track the checkpoints")
@alone()
def track(spec: Spec) -> Report:
    """Score every checkpoint, and the merge of the window that ends there; nothing is registered.

    Args:
        spec: the model, its versions, tasks and the window; without versions, all that are no
            soups.

    Raises:
        SpecError: the request is wrong; nothing was changed.
        ParentError: a version is missing, damaged, or does not match another.
        StoreError: a store did not answer for too long; the same command continues.
    """
    tagged = "time_tag" in spec.named
    client, name, spec = settle(spec, spec.parents)
    if spec.out:
        check_writable(Path(spec.out))
    found, first, times, tag = _checkpoints(client, name, spec, tagged=tagged)
    fixed = _is_fixed(spec)
    check_machine(spec)
    suites = Suites(load_suites(spec).held_out)
    newest = open_version(client, found[-1])
    settled = replace(spec, ood_tasks="", test_tasks="", method="wsm", space="simplex")
    bench = set_up(settled, newest, suites)
    session = Session(client, settled, name, {found[-1]: newest}, bench)
    request = {
        "track": name,
        "evaluator": bench.held_out.fingerprint,
        "times": tag,
        "window": [spec.window or WINDOW, spec.decay] if fixed else [],
    }
    tags = {
        "mlflow.runName": naming.run_name(f"track {name}"),
        naming.ROLE: "track",
        naming.KEY: naming.key_of(request),
        naming.MODEL: name,
    }
    with lease.hold(client, name, tags[naming.KEY], lease_folder()) as check:
        ours = {key: tags[key] for key in (naming.ROLE, naming.KEY)}
        here = [tracking.here(client, spec.experiment)]
        earlier = tracking.find_runs(client, ours, experiments=here)
        earlier = [run for run in earlier if tracking.is_ours(run)]
        window = window_of(client, spec, name, tag, earlier)
        trajectory = Trajectory(found, times, tag, window, first)
        with (
            tracking.open_run(client, spec.experiment, tags, resumable=earlier) as run_id,
            bench.engine,
        ):
            _log_request(client, run_id, spec, window)
            _extend(session, trajectory, run_id, check)
            scored = _scored(client, run_id, trajectory)
            result = _result(session, trajectory, scored)
            return Report(result, run_id, tell(session, run_id, "track", result))


def _checkpoints(
    client: Store, name: str, spec: Spec, *, tagged: bool
) -> tuple[tuple[Version, ...], int, tuple[float, ...], str]:
    """The checkpoints of the run, which is the first to be scored, when they were saved, the tag.

    The newest k have windows that reach back to older ones, so all belong to the run. Versions
    that the user names are the run.

    Args:
        client: the store's client.
        name: the registered model.
        spec: a settled spec.
        tagged: whether the user named the tag with the times.

    Raises:
        SpecError: there are fewer than two, or they have no times in ascending order.
    """
    if spec.parents:
        found = [versions.resolve(client, name, ref) for ref in spec.parents]
    else:
        found = versions.checkpoints(client, name)
    first = 0
    if spec.last:
        first = found.index(versions.newest(name, found, spec.last)[0])
    if len(found) < 2:
        raise SpecError(
            f"{name} has only {len(found)} versions that are not soups",
            where="--model",
            fix="register the checkpoints of a run, each as a version",
        )
    texts = [versions.tags_of(client, version).get(spec.time_tag) for version in found]
    start = _same_run(texts, first)
    found, texts, first = found[start:], texts[start:], first - start
    times = versions.read_times(found, texts, spec.time_tag)
    if tagged and times is None:
        versions.tell_untimed(spec.time_tag)
    named = spec.time_tag if times else ""
    return tuple(found), first, times or schedule.evenly(len(found)), named


def _same_run(texts: Sequence[str | None], first: int) -> int:
    """The place of the oldest checkpoint up to `first` that is of the same run, by its time.

    Older versions may have no time, or those of a run before.

    Args:
        texts: the times of all checkpoints, as their tags have them.
        first: the first checkpoint that is scored.
    """
    if not texts[first]:
        return 0  # nothing has a time: the versions count as equally spaced
    place = first
    while place and _number_of(texts[place - 1]) < _number_of(texts[place]):
        place -= 1
    return place


def _number_of(text: str | None) -> float:
    """A time as its tag has it; infinite if it is none."""
    try:
        return float(text or "")
    except ValueError:
        return math.inf


def _log_request(client: Store, run_id: str, spec: Spec, window: Window) -> None:
    """Log the request as params, which can be written only once."""
    if not client.get_run(run_id).data.params:
        said = {f"cfg.{f.name}": getattr(spec, f.name) for f in fields(Spec)}
        params = {k: v for k, v in said.items() if v not in ("", None) and v is not False}
        tracking.log(client, run_id, params={**params, **window.params, "window": window.words})


def _scored(client: Store, run_id: str, trajectory: Trajectory) -> dict[Point, Run]:
    """Point → the child of the track run that holds its score, or says why it has none."""
    places = {f"{v.name}/{v.number}": place for place, v in enumerate(trajectory.versions)}
    found = {}
    for run in tracking.find_runs(client, {"mlflow.parentRunId": run_id}):
        tags = run.data.tags
        place, curve = places.get(tags.get(naming.VERSION, "")), tags.get(naming.POINT_OF, "")
        if place is not None and (run.info.status == "FINISHED" or naming.FAILED in tags):
            found[place, curve] = run
    return found


def _extend(
    session: Session, trajectory: Trajectory, run_id: str, check: Callable[[], None]
) -> None:
    """Score the points that are missing, in order; each joins the curves at once.

    Args:
        session: the session; further versions are opened as they are needed.
        trajectory: the checkpoints.
        run_id: the track run.
        check: raises if another process took over.
    """
    client, known = session.client, _scored(session.client, run_id, trajectory)
    shown = {
        curve: {m.step for m in client.get_metric_history(run_id, f"{curve}/objective")}
        for curve in (RAW, MERGED)
    }
    for point, child in known.items():
        if trajectory.step(point[0]) not in shown[point[1]]:
            _show(client, run_id, trajectory, point, child)  # an earlier call was cut short here
    missing = [point for point in trajectory.points if point not in known]
    pool = _Pool(session, trajectory, dict(session.opened))
    trust: Trust | None = None
    took: list[float] = []  # the seconds of each point
    with tqdm(missing, desc="track", unit="model", disable=None) as bar:
        for number, point in enumerate(bar, 1):
            check()
            for later in missing[number - 1 :][: session.bench.engine.most]:
                job, recipe = pool.job(later)
                trust = trust or trusted(job, run_id)
                expect(job, trust, [recipe])
            place, curve = point
            clock = time.monotonic()
            try:
                known[point] = client.get_run(_score(pool, run_id, point))
            except NonFiniteError as error:
                logger.warning(
                    "%s of %s is left out: %s", curve, trajectory.versions[place], error.what
                )
            else:
                _show(client, run_id, trajectory, point, known[point])
            took.append(time.monotonic() - clock)
            if bar.disable and missing[number : number + 1] != [(place, MERGED)]:
                left = len(missing) - number
                tqdm.write(_line(trajectory, place, known, left, took), file=sys.stderr)


def _line(
    trajectory: Trajectory, place: int, known: Mapping[Point, Run], left: int, took: Sequence[float]
) -> str:
    """A line about a checkpoint for a log file, where no progress bar is shown.

    Args:
        trajectory: the checkpoints.
        place: the checkpoint.
        known: the points that have a run.
        left: how many points are left to score.
        took: the seconds of each point that this process scored.
    """
    scores = {curve: _metrics(known.get((place, curve))) for curve in (RAW, MERGED)}
    told = [
        f"{curve} {its[naming.OBJECTIVE]:.4f}"
        for curve, its in scores.items()
        if naming.OBJECTIVE in its
    ]
    count = f"{place - trajectory.first + 1}/{len(trajectory.versions) - trajectory.first}"
    line = f"{trajectory.versions[place].short} ({count}): {', '.join(told) or 'no score'}"
    if left:
        line += f"; {ends_by(left, took)}"
    return line


@dataclass(frozen=True)
class _Pool:
    """A session, and the versions of the trajectory that are open already."""

    session: Session
    trajectory: Trajectory
    opened: dict[Version, Opened]

    def job(self, point: Point) -> tuple[Job, Recipe]:
        """The job that merges the versions of a point, and the recipe."""
        lam, place = self.trajectory.weights(point), point[0]
        if len(lam) == 1:  # a job has two versions or more
            lam = {place - 1: 0.0, place: 1.0} if place else {0: 1.0, 1: 0.0}
        chosen = [self.trajectory.versions[place] for place in lam]
        for version in chosen:
            if version not in self.opened:
                opened = open_version(self.session.client, version)
                newest = self.opened[self.trajectory.versions[-1]]
                check_compatible([opened.checkpoint, newest.checkpoint])
                self.opened[version] = opened
        job = replace(self.session, opened=self.opened).job(chosen)
        return job, Recipe("linear", tuple(lam.values()))


def _score(pool: _Pool, run_id: str, point: Point) -> str:
    """Score a point, and return the id of its run, a child of the track run.

    Raises:
        NonFiniteError: the score is not finite; the child says so.
    """
    place, curve = point
    job, recipe = pool.job(point)
    version = pool.trajectory.versions[place]

    def numbers(score: Score) -> dict[str, float]:
        if curve == RAW:
            return {}
        its, alone = pool.job((place, RAW))
        gain = pairing.paired(score, score_of(its, run_id, alone, its.bench.held_out))
        return dict(zip(_GAIN, span(gain), strict=True))

    words = f"{version}, {curve}"
    tags = {naming.POINT_OF: curve, naming.VERSION: f"{version.name}/{version.number}"}
    return measure(job, run_id, recipe, job.bench.held_out, name=words, tags=tags, more=numbers)[1]


def _show(client: Store, run_id: str, trajectory: Trajectory, point: Point, child: Run) -> None:
    """Log the metrics of a point on the track run, with its time as the step."""
    place, curve = point
    found = {
        key.removeprefix(f"{naming.HELD_OUT}/"): value
        for key, value in child.data.metrics.items()
        if key.startswith(f"{naming.HELD_OUT}/") and key not in (naming.STDERR, naming.TRUNCATED)
    }
    step = trajectory.step(place)
    metrics = [tracking.metric(f"{curve}/{key}", value, step) for key, value in found.items()]
    tracking.log(client, run_id, metrics=metrics)


def _result(session: Session, trajectory: Trajectory, known: Mapping[Point, Run]) -> Result:
    """Table, figure and words of both curves."""
    rows: list[tuple[Cell, ...]] = []
    gains: dict[int, tuple[float, ...]] = {}
    for place, version in enumerate(trajectory.versions):
        if place < trajectory.first:
            continue
        raw, merged = (_metrics(known.get((place, curve))) for curve in (RAW, MERGED))
        row: list[Cell] = [version.short, trajectory.step(place)]
        row += [raw.get(naming.OBJECTIVE), merged.get(naming.OBJECTIVE)]
        if merged.keys() >= {*_GAIN}:
            gains[place] = tuple(merged[key] for key in _GAIN)
        row += gains.get(place, (None, None, None))
        rows.append(tuple(row))
    columns = ("version", trajectory.unit, "raw", "merged", "Δ", "low", "high")
    table = Table(columns, tuple(rows), {"raw": True, "merged": True})
    figure = charts.track(
        [int(row[1] or 0) for row in rows],
        raw=[_number(row[2]) for row in rows],
        merged=[_number(row[3]) for row in rows],
        lows=[_number(row[2]) + _number(row[5]) for row in rows],
        highs=[_number(row[2]) + _number(row[6]) for row in rows],
        unit=trajectory.unit,
        label=f"held-out score: {', '.join(map(str, session.bench.suites.held_out.terms))}",
    )
    notes = [f"Merged: {trajectory.window.words}. The band is the 95 % paired interval of Δ."]
    if gains:
        last = max(gains)
        above = sum(gain > pairing.ROUNDING for gain, _, _ in gains.values())
        gain, low, high = gains[last]
        notes += [
            f"The newest window, at {trajectory.versions[last]}: {gain:+z.4f} (95 % interval "
            f"{low:+z.4f} to {high:+z.4f}) against this checkpoint alone.",
            f"{above} of {len(gains)} windows score above their newest checkpoint.",
        ]
    if not trajectory.tag:
        notes.append(windows.UNTIMED)
    return Result(f"Checkpoints of {session.name}, raw and merged", table, figure, notes)


def _metrics(run: Run | None) -> Mapping[str, float]:
    return {} if run is None else run.data.metrics


def _number(cell: Cell) -> float:
    return cell if isinstance(cell, float) else math.nan
