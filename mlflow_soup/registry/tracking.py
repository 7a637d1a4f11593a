"""MLflow runs: begin, resume and end them; their params, metrics and artifacts."""

import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _get_experiment_id  # private door

from mlflow_soup.errors import OvertakenError, SoupError, SpecError
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming
from mlflow_soup.registry.store import Store, pages

NOTE_LIMIT = 8000  # MLflow's, of a run tag, on databases that enforce it
_RUN_ENV = "MLFLOW_RUN_ID"


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
    attempt = {naming.ATTEMPT: uuid.uuid4().hex}

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
    found = find_runs(client, {naming.KEY: key, naming.ROLE: "search"})
    return [
        run
        for run in found
        if run.info.status != RunStatus.to_string(RunStatus.FINISHED)
        and not {naming.STUDY, naming.ORPHANED_BY} & run.data.tags.keys()
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
            log(client, run.info.run_id, tags={naming.ORPHANED_BY: heir})
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
