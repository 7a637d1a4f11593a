"""Runs, params and metrics: what a search leaves in MLflow, and how it is read back.

MLflow is the only state. A FINISHED trial run with a score is a committed evaluation; everything
else about it can be lost.
"""

import contextlib
import errno
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from requests import RequestException

from mlflow_soup import lineage
from mlflow_soup.errors import RegistryError, StoreError, redact
from mlflow_soup.records import Evidence, Items, Metric, Recipe, Score, Trial, Version

_PROBE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
NOTE_LIMIT = 8000  # MLflow's, of a run tag, on databases that enforce it
_COLUMNS = pa.schema(
    [
        ("term", pa.int32()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("weight", pa.float64()),
        ("id", pa.string()),
        ("value", pa.float64()),
        ("share", pa.float64()),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("gold", pa.int32()),  # null where nothing is known
        ("sizes", pa.list_(pa.float64())),  # null for 1
    ]
)


def where() -> str:
    """The tracking store, for errors."""
    return redact(str(mlflow.get_tracking_uri()))


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn what MLflow raises into our errors, with what was being done; also a decorator.

    Raises:
        StoreError: the store went away, or the disk is full.
        RegistryError: MLflow refused.
    """
    try:
        yield
    except MlflowException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, RequestException) or error.error_code == "TEMPORARILY_UNAVAILABLE":
            raise StoreError(
                f"the MLflow store did not answer while trying to {what}",
                where=where(),
                fix="once it is back, run the same command again: it continues",
            ) from error
        raise RegistryError(
            f"MLflow refused to {what}: {error.message}",
            where=where(),
            fix="check the store and your permissions there, then run the same command again",
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StoreError(
            f"no space left while trying to {what}",
            where=str(error.filename or "the disk"),
            fix="make room, then run the same command again: it continues",
        ) from error


def connect() -> MlflowClient:
    """A client of the tracking store, which is asked once and quickly whether it is there.

    Raises:
        StoreError: it is not. (MLflow's own retries would take four minutes to say so.)
    """
    # no link to the run in MLflow's own words: they print a password the URI may hold
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    bars = "true" if sys.stderr.isatty() else "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", bars)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    added = {name: value for name, value in _PROBE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        client = MlflowClient()
        client.search_experiments(max_results=1)
    except (MlflowException, ImportError) as error:  # a database without its driver
        reason = str(error).splitlines()[0][:300]
        raise StoreError(
            f"the MLflow tracking store does not answer: {reason}",
            where=where(),
            fix="start it, or point MLFLOW_TRACKING_URI to the one you mean",
        ) from error
    finally:
        for name in added:
            del os.environ[name]
    return client


@contextlib.contextmanager
def open_run(experiment: str, tags: Mapping[str, str]) -> Iterator[str]:
    """The run the work is logged to: the one `mlflow run` made, or a new one. Yields its id."""
    if "MLFLOW_RUN_ID" not in os.environ and experiment:
        mlflow.set_experiment(experiment)
    with mlflow.start_run(tags=dict(tags), nested=mlflow.active_run() is not None) as run:
        yield run.info.run_id


@contextlib.contextmanager
def open_child(
    client: MlflowClient, parent: str, name: str, tags: Mapping[str, str]
) -> Iterator[str]:
    """A run below another one; FINISHED when the block ends well, else FAILED or KILLED."""
    experiment = client.get_run(parent).info.experiment_id
    all_tags = {"mlflow.parentRunId": parent, **tags}
    run_id = client.create_run(experiment, tags=all_tags, run_name=name).info.run_id
    status = "KILLED"
    try:
        yield run_id
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run_id, status)


def log(
    client: MlflowClient,
    run_id: str,
    *,
    params: Mapping[str, object] | None = None,
    metrics: Sequence[MlflowMetric] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log everything at once: one round trip."""
    client.log_batch(
        run_id,
        metrics=list(metrics),
        params=[Param(key, str(value)) for key, value in (params or {}).items()],
        tags=[RunTag(key, value) for key, value in (tags or {}).items()],
    )


def metric(key: str, value: float, step: int = 0, **about: Any) -> MlflowMetric:
    """A metric of now; `about` may name a model_id and a dataset."""
    return MlflowMetric(key, float(value), int(time.time() * 1000), step, **about)


def score_metrics(score: Score, prefix: str, **about: Any) -> list[MlflowMetric]:
    """A score's numbers under a prefix: its mean and each task's metric as lm-eval prints it."""
    numbers = {f"{prefix}/objective": score.value}
    numbers |= {f"{prefix}/{m.key}": m.value for m in score.metrics}
    return [metric(key, value, **about) for key, value in numbers.items()]


def write_score(score: Score, path: Path) -> None:
    """A score with its item rows as one Parquet file; `read_score` is its inverse."""
    rows = [
        (position, i.task, i.metric, i.weight, *row)
        for position, i in enumerate(score.items)
        for row in zip(
            i.ids,
            i.values,
            i.shares,
            i.log_likelihoods,
            i.gold or [None] * len(i.ids),
            i.sizes or [None] * len(i.ids),
            strict=True,
        )
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    head = {
        "value": score.value,
        "stderr": score.stderr,
        "metrics": [asdict(m) for m in score.metrics],
    }
    schema = _COLUMNS.with_metadata({"soup": json.dumps(head)})
    pq.write_table(pa.table([list(c) for c in columns], schema=schema), path)


def read_score(path: Path) -> Score:
    """A score as `write_score` wrote it."""
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"soup"])
    groups: dict[tuple[int, str, str, float], list[Any]] = {}
    for term, task, its_metric, weight, *row in zip(*table.to_pydict().values(), strict=True):
        groups.setdefault((term, task, its_metric, weight), []).append(row)
    items = []
    for group, rows in groups.items():
        ids, values, shares, likelihoods, gold, sizes = zip(*rows, strict=True)
        known = () if gold[0] is None else gold
        divisors = () if sizes[0] is None else tuple(map(tuple, sizes))
        likelihoods = tuple(map(tuple, likelihoods))
        items.append(Items(*group[1:], ids, values, shares, likelihoods, known, divisors))
    metrics = tuple(Metric(**m) for m in head["metrics"])
    return Score(head["value"], head["stderr"], tuple(items), metrics)


def log_score(client: MlflowClient, run_id: str, score: Score, file: str) -> None:
    """Keep a score's item rows as an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        write_score(score, Path(folder) / Path(file).name)
        parent = str(Path(file).parent)
        client.log_artifact(
            run_id, str(Path(folder) / Path(file).name), None if parent == "." else parent
        )


def fetch(client: MlflowClient, run_id: str, file: str, folder: Path) -> Path:
    """One artifact of a run, on this machine."""
    return Path(client.download_artifacts(run_id, file, str(folder)))


def find_runs(client: MlflowClient, tags: Mapping[str, str]) -> list[Run]:
    """All runs with these tags, in any experiment, oldest first."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    experiments = [e.experiment_id for e in pages(client.search_experiments)]
    order = ["attributes.start_time ASC"]
    return pages(client.search_runs, experiments, query, order_by=order)


def pages(search: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Everything that one of MLflow's paged searches finds."""
    page = search(*args, **kwargs)
    found = list(page)
    while page.token:
        page = search(*args, page_token=page.token, **kwargs)
        found += page
    return found


@dataclass(frozen=True)
class Known:
    """A score that some trial measured.

    Attributes:
        run_id: the trial that measured it.
        score: with its items.
        truncated: requests that were cut to the longest input.
    """

    run_id: str
    score: Score
    truncated: int


def find_score(client: MlflowClient, measured: str) -> Known | None:
    """What any trial has measured of the same weights in the same way; None if there is none."""
    for run in find_runs(client, {lineage.MEASURED: measured}):
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            score = _read_items(client, run)
            if score is not None:
                source = run.data.tags.get(lineage.ITEMS_RUN, run.info.run_id)
                return Known(source, score, int(run.data.metrics[lineage.TRUNCATED]))
    return None


def _read_items(client: MlflowClient, run: Run) -> Score | None:
    """A trial's score; None where its items are gone, or the run that it took them over from."""
    source = run.data.tags.get(lineage.ITEMS_RUN, run.info.run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return read_score(fetch(client, source, lineage.ITEMS, Path(folder)))
        except (MlflowException, OSError, ValueError, KeyError, TypeError):  # lost, or damaged
            return None


def read_trials(client: MlflowClient, key: str) -> list[Trial]:
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
    client: MlflowClient,
    run_id: str,
    roles: Mapping[str, Evidence],
    model_ids: Mapping[str, str | None],
    datasets: Mapping[str, str],
) -> None:
    """Keep what the gate will read, and show it on MLflow's Models page.

    One Parquet file per model and score, and metrics that name their logged model and dataset.

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
        folder = role.replace(" ", "-")
        scores = [("held-out", evidence.held_out), *evidence.ood]
        for position, (_, score) in enumerate(scores):
            log_score(client, run_id, score, f"{folder}/{position}.parquet")
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
            "scores": {name: f"{folder}/{i}.parquet" for i, (name, _) in enumerate(scores)},
        }
    log(client, run_id, metrics=metrics)
    client.log_text(run_id, json.dumps(index, indent=2), lineage.EVIDENCE)


def read_evidence(client: MlflowClient, run_id: str) -> dict[str, Evidence]:
    """What `log_evidence` kept, by role."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index = json.loads(fetch(client, run_id, lineage.EVIDENCE, folder).read_text())
        roles = {}
        for role, entry in index.items():
            scores = {
                name: read_score(fetch(client, run_id, file, folder))
                for name, file in entry["scores"].items()
            }
            roles[role] = Evidence(
                Version(entry["model"], entry["version"]),
                entry["digest"],
                scores.pop("held-out"),
                tuple(scores.items()),
            )
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


def run_path(client: MlflowClient, run_id: str) -> str:
    """The UI's path of a run, in the mode that shows models and metrics."""
    experiment = client.get_run(run_id).info.experiment_id
    return f"/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def share_view(client: MlflowClient, run_id: str) -> str:
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
