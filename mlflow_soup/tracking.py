"""Runs, params and metrics: what a search leaves in MLflow, and how it is read back.

MLflow is the only state. A FINISHED trial run with a score is a committed evaluation; everything
else about it can be lost.
"""

import contextlib
import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _get_experiment_id

from mlflow_soup import lineage, scores
from mlflow_soup.errors import OvertakenError, SoupError, SpecError
from mlflow_soup.records import Evidence, Recipe, Score, Trial, Version
from mlflow_soup.redaction import redact
from mlflow_soup.scores import Scores
from mlflow_soup.store import Store, pages, where

NOTE_LIMIT = 8000  # MLflow's, of a run tag, on databases that enforce it
_RUN_ENV = "MLFLOW_RUN_ID"
_HELD_OUT = "held-out"
# artifacts that are lost or damaged
_UNREADABLE = (MlflowException, OSError, ValueError, KeyError, TypeError, AttributeError)


@contextlib.contextmanager
def open_run(
    client: Store,
    experiment: str,
    tags: Mapping[str, str],
    *,
    params: Mapping[str, str] | None = None,
    resumable: Sequence[Run] = (),
) -> Iterator[str]:
    """The run the work is logged to; FINISHED when the block ends well, else FAILED or KILLED.

    It is the one that `mlflow run` made; or the newest of those that may be resumed; or a new one,
    below the active run if there is one. Yields its id.

    Args:
        client: of the store.
        experiment: by name; empty for MLflow's choice.
        tags: set on the run.
        params: under `cfg.`, of the request: a run that has others is not gone on with.
        resumable: runs of the same request that were cut short; those elsewhere do not count.

    Raises:
        SpecError: the run that `mlflow run` was given has other params; it is left as it is.
    """
    run_id = os.environ.pop(_RUN_ENV, "")
    if run_id and params is not None:
        _check_begun(client.get_run(run_id), params)
    if not run_id:
        if experiment:
            client.persist(lambda: mlflow.set_experiment(experiment), "choose the experiment")
        if mlflow.active_run() is None:
            here = client.persist(_get_experiment_id, "choose the experiment")
            cut_short = [r.info.run_id for r in resumable if r.info.experiment_id == here]
            run_id = "".join(cut_short[-1:])
    attempt = {lineage.ATTEMPT: uuid.uuid4().hex}

    def look() -> Any:
        found = run_id or "".join(run.info.run_id for run in find_runs(client, attempt))
        return mlflow.start_run(found, tags=dict(tags), nested=nested()) if found else None

    def create() -> Any:
        return mlflow.start_run(tags={**tags, **attempt}, nested=nested())

    def nested() -> bool:
        return mlflow.active_run() is not None

    run_id = str(client.once(look, create, "create a run").info.run_id)
    with _ending(client, run_id, mlflow.end_run):
        yield run_id


def differing(run: Run, params: Mapping[str, str]) -> list[str]:
    """Under `cfg.`, which params a run was begun with and a request has otherwise; in words."""
    begun = {key: value for key, value in run.data.params.items() if key.startswith("cfg.")}
    if not begun:
        return []
    names = sorted({*begun, *params})
    return [
        f"{name} {begun.get(name, 'not set')}, now {params.get(name, 'not set')}"
        for name in names
        if begun.get(name) != params.get(name)
    ]


def _check_begun(run: Run, params: Mapping[str, str]) -> None:
    if other := differing(run, params):
        raise SpecError(
            f"run {run.info.run_id} was begun with another request: {'; '.join(other)}",
            where="the run that `mlflow run` was given",
            fix="ask for the same again, or leave out --run-id",
        )


def unfinished(client: Store, key: str) -> list[Run]:
    """The search runs of a key that were cut short, oldest first; not those within studies."""
    found = find_runs(client, {lineage.KEY: key, lineage.ROLE: "search"})
    return [
        run
        for run in found
        if run.info.status != RunStatus.to_string(RunStatus.FINISHED)
        and not {lineage.STUDY, lineage.ORPHANED_BY} & run.data.tags.keys()
    ]


@contextlib.contextmanager
def open_child(client: Store, parent: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A run below another one; FINISHED when the block ends well, else FAILED or KILLED."""
    run_id = begin_child(client, parent, name, tags)
    with _ending(client, run_id):
        yield run_id


def begin_child(
    client: Store, parent: str, name: str, tags: Mapping[str, str], start_time: int | None = None
) -> str:
    """A new run below another one; its id."""
    experiment = client.get_run(parent).info.experiment_id
    return client.begin_run(experiment, name, {"mlflow.parentRunId": parent, **tags}, start_time)


@contextlib.contextmanager
def _ending(
    client: Store, run_id: str, forget: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """End a run as the block ends; `forget` is told how, and may do it again."""
    status = "FINISHED"
    try:
        yield
        client.set_terminated(run_id, status)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with contextlib.suppress(MlflowException, SoupError):  # what happened is said first
            found = client.hasty.get_run(run_id).info.status
            if isinstance(error, OvertakenError) and found != "RUNNING":
                status = found  # whoever took over has ended it
            client.hasty.set_terminated(run_id, status)
            _end_below(client.hasty, run_id)
        raise
    finally:
        # once, and without MLflow's own retries: a server that is away would hold us up for minutes
        with contextlib.suppress(MlflowException, SoupError):
            client.hasty.persist(lambda: forget(status), "end the run")


def orphan(client: Store, runs: Sequence[Run], heir: str) -> None:
    """End runs that nobody works on any more, and what is running below them.

    Args:
        client: of the store.
        runs: were cut short.
        heir: the run that goes on; it is left alone.
    """
    for run in runs:
        if run.info.run_id != heir:
            log(client, run.info.run_id, tags={lineage.ORPHANED_BY: heir})
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
        _end_below(client, run.info.run_id, but=heir)


def _end_below(client: Store, run_id: str, *, but: str = "") -> None:
    """End what is running below a run that was cut short; one of them is left alone."""
    for left in find_runs(client, {"mlflow.parentRunId": run_id}, status="RUNNING"):
        if left.info.run_id != but:
            client.set_terminated(left.info.run_id, "KILLED")


def log(
    client: Store,
    run_id: str,
    *,
    params: Mapping[str, object] | None = None,
    metrics: Sequence[MlflowMetric] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log everything at once: one round trip. Numbers that are not finite stay out of MLflow."""
    client.log_batch(
        run_id,
        metrics=[m for m in metrics if math.isfinite(m.value)],
        params=[Param(key, redact(str(value))) for key, value in (params or {}).items()],
        tags=[RunTag(key, redact(value)) for key, value in (tags or {}).items()],
    )


def metric(key: str, value: float, step: int = 0, **about: Any) -> MlflowMetric:
    """A metric of now; `about` may name a model_id and a dataset."""
    return MlflowMetric(redact(key), float(value), int(time.time() * 1000), step, **about)


def score_metrics(score: Score, prefix: str, **about: Any) -> list[MlflowMetric]:
    """A score's numbers under a prefix: its mean and each task's metric as lm-eval prints it."""
    numbers = {f"{prefix}/objective": score.value}
    numbers |= {f"{prefix}/{m.key}": m.value for m in score.metrics}
    return [metric(key, value, **about) for key, value in numbers.items()]


def log_scores(client: Store, run_id: str, measured: Scores, file: str) -> None:
    """Keep scores with their item rows as an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(file).name)
        scores.write(measured, path)
        parent = str(PurePosixPath(file).parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)


def fetch(client: Store, run_id: str, file: str, folder: Path) -> Path:
    """One artifact of a run, on this machine.

    Raises:
        MlflowException, OSError: it is not there.
        StoreError: the store is away.
    """
    parent = str(PurePosixPath(file).parent)

    def there() -> bool:
        listed = client.list_artifacts(run_id, None if parent == "." else parent)
        return file in {info.path for info in listed}

    def download() -> Path:
        return Path(MlflowClient.download_artifacts(client, run_id, file, str(folder)))

    return client.download(download, there, f"fetch {file} of run {run_id}")


def find_runs(client: Store, tags: Mapping[str, str], *, status: str = "") -> list[Run]:
    """All runs with these tags, in any experiment, oldest first.

    Args:
        client: of the store.
        tags: to be equal; none of ours holds a quote or a backslash, so that no run has what does.
        status: RUNNING, FINISHED …; empty for any.
    """
    if any(mark in value for value in tags.values() for mark in "'\\"):
        return []
    clauses = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
    clauses += [f"attributes.status = '{status}'"] if status else []
    experiments = [e.experiment_id for e in pages(client.search_experiments)]
    order = ["attributes.start_time ASC"]
    found = pages(client.search_runs, experiments, " and ".join(clauses), order_by=order)
    return [run for run in found if tags.items() <= run.data.tags.items()]  # some take `A` for `a`


@dataclass(frozen=True)
class Known:
    """A score that some trial measured, and the run of that trial."""

    run_id: str
    scores: Scores


def find_score(client: Store, measured: str) -> Known | None:
    """What any trial has measured of the same weights in the same way; None if there is none."""
    for run in find_runs(client, {lineage.MEASURED: measured}):
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            score = _read_items(client, run)
            if score is not None:
                source = run.data.tags.get(lineage.ITEMS_RUN, run.info.run_id)
                truncated = run.data.metrics.get(lineage.TRUNCATED, 0.0)
                return Known(source, Scores({"": score}, {lineage.TRUNCATED: truncated}))
    return None


def _read_items(client: Store, run: Run) -> Score | None:
    """A trial's score; None where its items are gone, or the run that it took them over from."""
    source = run.data.tags.get(lineage.ITEMS_RUN, run.info.run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return scores.read(fetch(client, source, lineage.ITEMS, Path(folder))).mean
        except _UNREADABLE:
            return None


def read_trials(client: Store, key: str) -> list[Trial]:
    """The committed trials of a search, in order: those with a score and those that failed."""
    trials: dict[int, Trial] = {}
    for run in find_runs(client, {lineage.KEY: key, lineage.ROLE: "trial"}):
        tags, number = run.data.tags, int(run.data.tags[lineage.NUMBER])
        weights = run.data.params.get("weights")
        if weights is None or number in trials:
            continue
        recipe = Recipe(run.data.params["method"], tuple(json.loads(weights)))
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            score = _read_items(client, run)
            if score is not None:
                trials[number] = Trial(number, recipe, score, run.info.run_id)
        elif lineage.FAILED in tags:
            trials[number] = Trial(number, recipe, None, run.info.run_id)
    return [trials[number] for number in sorted(trials)]


def log_evidence(
    client: Store,
    run_id: str,
    roles: Mapping[str, Evidence],
    model_ids: Mapping[str, str | None],
    datasets: Mapping[str, str],
) -> None:
    """Keep what the gate will read, and show it on MLflow's Models page.

    One Parquet file per model, and metrics that name their logged model and dataset.

    Args:
        client: of the store.
        run_id: the OOD run.
        roles: `soup`, `parent 0`, `parent 1` …, `champion` → evidence.
        model_ids: role → logged model; a parent without one has no metrics, since they would pass
            for the soup's.
        datasets: `dev` and `ood` → digest of the items.
    """
    index: dict[str, Any] = {}
    metrics: list[MlflowMetric] = []
    for role, evidence in roles.items():
        file = f"{role.replace(' ', '-')}.parquet"
        of = {_HELD_OUT: evidence.held_out, **dict(evidence.ood)}
        log_scores(client, run_id, Scores(of), file)
        for position, score in enumerate(of.values()):
            prefix = "ood" if position else "dev"
            if model_ids[role] is not None or role == "soup":
                metrics += [
                    metric(
                        f"{prefix}/{m.key}",
                        m.value,
                        step=int(role == "soup"),  # a run shows its last step: the soup's
                        model_id=model_ids[role],
                        dataset_name="out-of-domain" if position else "held-out",
                        dataset_digest=datasets[prefix][:12],
                    )
                    for m in score.metrics
                ]
        index[role] = {
            "model": evidence.version.name,
            "version": evidence.version.number,
            "digest": evidence.digest,
            "scores": file,
        }
    log(client, run_id, metrics=metrics)
    client.log_text(run_id, json.dumps(index, indent=2), lineage.EVIDENCE)


def read_evidence(client: Store, run_id: str) -> dict[str, Evidence]:
    """What `log_evidence` kept, by role; nothing where any of it is lost or damaged."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        roles = {}
        try:
            index = json.loads(fetch(client, run_id, lineage.EVIDENCE, folder).read_text())
            for role, entry in index.items():
                of = dict(scores.read(fetch(client, run_id, entry["scores"], folder)).of)
                held_out = of.pop(_HELD_OUT)
                version = Version(entry["model"], entry["version"])
                roles[role] = Evidence(version, entry["digest"], held_out, tuple(of.items()))
        except _UNREADABLE:
            return {}
    return roles


def link(path: str) -> str:
    """Where the UI shows something: on the tracking server, else where `mlflow ui` starts one."""
    server = where().rstrip("/") if _on_server() else "http://127.0.0.1:5000"
    return f"{server}/#{path}"


def how_to_look() -> str:
    """The command that opens the UI on the store at hand; empty where it is a server already."""
    return "" if _on_server() else f"mlflow ui --backend-store-uri {where()}"


def _on_server() -> bool:
    return str(mlflow.get_tracking_uri()).startswith(("http://", "https://"))


def run_path(client: Store, run_id: str) -> str:
    """The UI's path of a run, in the mode that shows models and metrics."""
    experiment = client.get_run(run_id).info.experiment_id
    return f"/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def share_view(client: Store, run_id: str) -> str:
    """Prepare the UI's comparison of a search's trials; its path.

    A table of λ and scores, a scatter of score over λ and parallel coordinates. How MLflow stores a
    shared view is not documented; where a UI does not know it, the link shows the plain run list.
    """
    run = client.get_run(run_id)
    key, experiment = run.data.tags[lineage.KEY], run.info.experiment_id
    lam = {"key": "lambda", "type": "PARAM"}
    score = {"key": lineage.OBJECTIVE, "type": "METRIC"}
    chart = {"runsCountToCompare": 100, "metricSectionId": "soup", "deleted": False}
    state = {
        "searchFilter": f"tags.`{lineage.KEY}` = '{key}' and tags.`{lineage.ROLE}` = 'trial'",
        "orderByKey": f"metrics.`{lineage.OBJECTIVE}`",
        "orderByAsc": False,
        "selectedColumns": ["params.`lambda`", f"metrics.`{lineage.OBJECTIVE}`"],
        "compareRunSections": [
            {"uuid": "soup", "name": "0 Soup", "display": True, "isReordered": False}
        ],
        "compareRunCharts": [
            {**chart, "type": "SCATTER", "uuid": "scatter", "xaxis": lam, "yaxis": score},
            {
                **chart,
                "type": "PARALLEL",
                "uuid": "parallel",
                "selectedParams": ["lambda"],
                "selectedMetrics": [lineage.OBJECTIVE],
                "showAllRuns": False,
            },
        ],
    }
    share = key[:16]
    with contextlib.suppress(MlflowException):  # who may not tag the experiment has no view
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{share}", json.dumps(state))
    return (
        f"/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        f"&viewStateShareKey={share}"
    )
