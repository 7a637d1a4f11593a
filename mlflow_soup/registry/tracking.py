"""Begin, resume, find and end MLflow runs; log params and metrics, and fetch artifacts."""

import contextlib
import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags  # private door
from mlflow.tracking.fluent import _get_experiment_id  # private door

from mlflow_soup.errors import OvertakenError, SoupError, SpecError
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming
from mlflow_soup.registry.store import Store, equals, pages

NOTE_LIMIT = 8000  # MLflow's limit for a run's tag, which some databases enforce
RUN_ENV = "MLFLOW_RUN_ID"
_NOTE = "mlflow.note.content"  # a run's description


@contextlib.contextmanager
def open_run(
    client: Store,
    experiment: str,
    tags: Mapping[str, str],
    *,
    params: Mapping[str, str] | None = None,
    resumable: Sequence[Run] = (),
) -> Iterator[str]:
    """Open the run that logs the work, yield its id, and end it as FINISHED, FAILED or KILLED.

    It is the run that `mlflow run` made, or else the newest run that may be resumed, or else a new
    run, which is a child of the active run if there is one. A run that somebody else began, as
    `mlflow run` does, keeps its name, and whoever began it ends it.

    Args:
        client: the store's client.
        experiment: the experiment's name; empty for MLflow's choice.
        tags: set on the run.
        params: the request's params, under `cfg.`; a run with other params is not continued.
        resumable: runs of the same request that were cut short; only those of this experiment
            count.

    Raises:
        SpecError: the run that `mlflow run` was given has other params; it stays unchanged.
    """
    if begun := os.environ.pop(RUN_ENV, ""):
        if params is not None:
            _check_begun(client.get_run(begun), params)
        kept = ("mlflow.runName",)
        log(client, begun, tags={key: value for key, value in tags.items() if key not in kept})
        with _ending_below(client, begun):
            yield begun
        return
    run_id = ""
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

    made = client.once(look, create, "create a run", tried=bool(run_id))
    run_id = str(made.info.run_id)
    with _ending(client, run_id, mlflow.end_run):
        yield run_id


@contextlib.contextmanager
def _ending_below(client: Store, run_id: str) -> Iterator[None]:
    """End the running children of a run that somebody else ends, if the block fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(MlflowException, SoupError):  # the block's error matters more
            _end_below(client.hasty, run_id)
        raise


def is_ours(run: Run) -> bool:
    """Whether mlflow-soup began a run."""
    return naming.ATTEMPT in run.data.tags


def _described(client: Store, run_id: str, text: str) -> dict[str, str]:
    """The tags that describe a run; none if somebody else has described it."""
    tags = client.get_run(run_id).data.tags
    text = redact(text)[:NOTE_LIMIT]
    if _digest(tags.get(_NOTE, "")) in (_digest(""), tags.get(naming.NOTE)):
        return {_NOTE: text, naming.NOTE: _digest(text)}
    return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differing(run: Run, params: Mapping[str, str]) -> list[str]:
    """The params in which a run differs from a request, each as `cfg.margin 0.05, now 0.1`."""
    begun = {key: value for key, value in run.data.params.items() if key.startswith("cfg.")}
    if not begun:
        return []
    names = sorted({*begun, *params})
    return [
        f"{name} {begun.get(name, 'not set')}, now {params.get(name, 'not set')}"
        for name in names
        if begun.get(name) != params.get(name)
    ]


def params_of(client: Store, run_id: str, tags: Mapping[str, str]) -> Mapping[str, str]:
    """The params of a run that has these tags; none if there is no such run for this user."""
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return {}
    params: Mapping[str, str] = run.data.params
    return params if tags.items() <= run.data.tags.items() else {}


def _check_begun(run: Run, params: Mapping[str, str]) -> None:
    if other := differing(run, params):
        raise SpecError(
            f"run {run.info.run_id} began with another request: {'; '.join(other)}",
            where="the option --run-id of `mlflow run`",
            fix="repeat the request of that run, or leave out --run-id",
        )


def unfinished(client: Store, key: str) -> list[Run]:
    """The search runs of a key that were cut short, oldest first, except those of studies."""
    found = find_runs(client, {naming.KEY: key, naming.ROLE: "search"})
    return [
        run
        for run in found
        if run.info.status != RunStatus.to_string(RunStatus.FINISHED)
        and not {naming.STUDY, naming.ORPHANED_BY} & run.data.tags.keys()
    ]


@contextlib.contextmanager
def open_child(client: Store, parent: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Open a child run, yield its id, and end it as FINISHED, FAILED or KILLED."""
    run_id = begin_child(client, parent, name, tags)
    with _ending(client, run_id):
        yield run_id


def begin_child(
    client: Store,
    parent: str,
    name: str,
    tags: Mapping[str, str],
    start_time: int | None = None,
    *,
    tried: bool = False,
) -> str:
    """Create a child run and return its id. It has the tags that MLflow gives any run of a user.

    Args:
        client: the store's client.
        parent: the run that it is a child of.
        name: its name.
        tags: its tags.
        start_time: in milliseconds since 1970; None for now.
        tried: whether a call with the same attempt in the tags may have made it already.
    """
    experiment = client.experiment_of(parent)
    context = {key: redact(str(value)) for key, value in resolve_tags().items()}
    every = {**context, "mlflow.parentRunId": parent, **tags}
    return client.begin_run(experiment, name, every, start_time, tried=tried)


@contextlib.contextmanager
def _ending(
    client: Store, run_id: str, forget: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """End a run with the status of the block; `forget` gets that status, and may end it again."""
    status = "FINISHED"
    try:
        yield
        client.set_terminated(run_id, status)
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with contextlib.suppress(MlflowException, SoupError):  # the block's error matters more
            found = client.hasty.get_run(run_id).info.status
            if isinstance(error, OvertakenError) and found != "RUNNING":
                status = found  # the process that took over has ended the run
            client.hasty.set_terminated(run_id, status)
            _end_below(client.hasty, run_id)
        raise
    finally:
        # one attempt, without MLflow's retries: a server that is away would delay us for minutes
        with contextlib.suppress(MlflowException, SoupError):
            client.hasty.persist(lambda: forget(status), "end the run")


def orphan(client: Store, runs: Sequence[Run], heir: str) -> None:
    """End our runs that were cut short, and the running children of all that were.

    Args:
        client: the store's client.
        runs: the runs that were cut short.
        heir: the run that continues them; it stays unchanged.
    """
    for run in runs:
        if run.info.run_id != heir and is_ours(run):
            log(client, run.info.run_id, tags={naming.ORPHANED_BY: heir})
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
        _end_below(client, run.info.run_id, but=heir)


def _end_below(client: Store, run_id: str, *, but: str = "") -> None:
    """End the running children of a run that was cut short, except one."""
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
    description: str = "",
) -> None:
    """Log everything in one request.

    Args:
        client: the store's client.
        run_id: the run.
        params: its params.
        metrics: its metrics; those that are not finite are left out.
        tags: its tags.
        description: describes it, unless somebody else has; empty to leave it as it is.
    """
    every = {key: redact(value) for key, value in (tags or {}).items()}
    if description:
        every |= _described(client, run_id, description)
    client.log_batch(
        run_id,
        metrics=[m for m in metrics if math.isfinite(m.value)],
        params=[Param(key, redact(str(value))) for key, value in (params or {}).items()],
        tags=[RunTag(key, value) for key, value in every.items()],
    )


def metric(key: str, value: float, step: int = 0, **about: Any) -> MlflowMetric:
    """A metric with the current time; `about` may name a model_id and a dataset."""
    return MlflowMetric(redact(key), float(value), int(time.time() * 1000), step, **about)


def without_model(m: MlflowMetric) -> MlflowMetric:
    """The same metric, of the run only."""
    about = {"dataset_name": m.dataset_name, "dataset_digest": m.dataset_digest}
    return MlflowMetric(m.key, m.value, m.timestamp, m.step, **about)


def fetch(client: Store, run_id: str, file: str, folder: Path) -> Path:
    """Download one artifact of a run and return its path.

    Raises:
        MlflowException, OSError: the run has no such artifact.
        StoreError: the store is away.
    """
    parent = str(PurePosixPath(file).parent)

    def there() -> bool:
        listed = client.list_artifacts(run_id, None if parent == "." else parent)
        return file in {info.path for info in listed}

    def download() -> Path:
        # MLflow's client would also look for a logged model of this name, with more requests, and
        # put its file in the place of the run's
        artifacts = client.artifacts_of(run_id)
        try:
            return Path(artifacts.download_artifacts(file, str(folder)))
        except Exception as error:  # each artifact store raises errors of its own
            what = f"{file} of run {run_id} could not be downloaded: {error}"
            raise MlflowException(what) from error

    return client.download(download, there, f"fetch {file} of run {run_id}")


def here(client: Store, experiment: str) -> str:
    """The id of the experiment that a request writes to; empty if there is none of this name yet.

    Args:
        client: the store's client.
        experiment: the experiment's name; empty for MLflow's choice.
    """
    if not experiment:
        return str(client.persist(_get_experiment_id, "choose the experiment"))
    found = client.get_experiment_by_name(experiment)
    return "" if found is None else str(found.experiment_id)


def find_runs(
    client: Store,
    tags: Mapping[str, str],
    *,
    status: str = "",
    experiments: Sequence[str] | None = None,
) -> list[Run]:
    """All runs with these tags, oldest first.

    Args:
        client: the store's client.
        tags: must be equal.
        status: RUNNING, FINISHED …; empty for any.
        experiments: the ids of the experiments to search, as `here` gives them; None for all.
    """
    clauses = [equals(f"tags.`{key}`", value) for key, value in tags.items()]
    clauses += [f"attributes.status = '{status}'"] if status else []
    if experiments is None:
        experiments = [e.experiment_id for e in pages(client.search_experiments)]
    experiments = [experiment for experiment in experiments if experiment]
    if not experiments:
        return []
    order = ["attributes.start_time ASC"]
    found = pages(client.search_runs, experiments, " and ".join(clauses), order_by=order)
    return [run for run in found if tags.items() <= run.data.tags.items()]  # some ignore case
