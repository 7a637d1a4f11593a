"""Write scores and evidence with their items to MLflow runs, and read them back.

An evaluation is committed when its trial run is FINISHED and has a score.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException

from mlflow_soup.records import Evidence, Recipe, Score, Trial, Version
from mlflow_soup.registry import naming, scores
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.tracking import fetch, find_runs, log, metric

_HELD_OUT = "held-out"
# what reading a lost or damaged artifact raises
_UNREADABLE = (MlflowException, OSError, ValueError, KeyError, TypeError, AttributeError)


def score_metrics(score: Score, prefix: str, **about: Any) -> list[MlflowMetric]:
    """A score as metrics under a prefix: its mean, and each task's metric as lm-eval prints it."""
    numbers = {f"{prefix}/objective": score.value}
    numbers |= {f"{prefix}/{m.key}": m.value for m in score.metrics}
    return [metric(key, value, **about) for key, value in numbers.items()]


def log_scores(client: Store, run_id: str, measured: Scores, file: str) -> None:
    """Log scores with their item rows as an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(file).name)
        scores.write(measured, path)
        parent = str(PurePosixPath(file).parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)


@dataclass(frozen=True)
class Known:
    """Scores that a trial measured, and the run of that trial."""

    run_id: str
    scores: Scores


def find_score(client: Store, measured: str) -> Known | None:
    """The scores of any trial that evaluated the same weights in the same way, or None."""
    for run in find_runs(client, {naming.MEASURED: measured}):
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            score = _read_items(client, run)
            if score is not None:
                source = run.data.tags.get(naming.ITEMS_RUN, run.info.run_id)
                truncated = run.data.metrics.get(naming.TRUNCATED, 0.0)
                return Known(source, Scores({"": score}, {naming.TRUNCATED: truncated}))
    return None


def _read_items(client: Store, run: Run) -> Score | None:
    """A trial's score, from its own items or those of the run it reuses; None if they are gone."""
    source = run.data.tags.get(naming.ITEMS_RUN, run.info.run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return scores.read(fetch(client, source, naming.ITEMS, Path(folder))).mean
        except _UNREADABLE:
            return None


def read_trials(client: Store, key: str) -> list[Trial]:
    """The committed trials of a search, by number: those with a score and those that failed."""
    trials: dict[int, Trial] = {}
    for run in find_runs(client, {naming.KEY: key, naming.ROLE: "trial"}):
        tags, number = run.data.tags, int(run.data.tags[naming.NUMBER])
        weights = run.data.params.get("weights")
        if weights is None or number in trials:
            continue
        recipe = Recipe(run.data.params["method"], tuple(json.loads(weights)))
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            score = _read_items(client, run)
            if score is not None:
                trials[number] = Trial(number, recipe, score, run.info.run_id)
        elif naming.FAILED in tags:
            trials[number] = Trial(number, recipe, None, run.info.run_id)
    return [trials[number] for number in sorted(trials)]


def log_evidence(
    client: Store,
    run_id: str,
    roles: Mapping[str, Evidence],
    model_ids: Mapping[str, str | None],
    datasets: Mapping[str, str],
) -> None:
    """Log the evidence that the gate reads, and show it on MLflow's Models page.

    Each model has one Parquet file, and metrics that name its logged model and the dataset.

    Args:
        client: the store's client.
        run_id: the OOD run.
        roles: `soup`, `parent 0`, `parent 1` …, `champion` → evidence.
        model_ids: role → logged model; a parent without one gets no metrics, since the run would
            show them as the soup's.
        datasets: `dev` and `ood` → digest of the items.
    """
    index: dict[str, Any] = {}
    metrics: list[MlflowMetric] = []
    for role, evidence in roles.items():
        file = f"{role.replace(' ', '-')}.parquet"
        of = {_HELD_OUT: evidence.held_out, **dict(evidence.ood)}
        log_scores(client, run_id, Scores(of), file)
        for position, score in enumerate(of.values()):
            prefix = naming.OOD if position else naming.HELD_OUT
            if model_ids[role] is not None or role == "soup":
                metrics += [
                    metric(
                        f"{prefix}/{m.key}",
                        m.value,
                        step=int(role == "soup"),  # a run shows its last step: the soup
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
    client.log_text(run_id, json.dumps(index, indent=2), naming.EVIDENCE)


def read_evidence(client: Store, run_id: str) -> dict[str, Evidence]:
    """Role → evidence, as `log_evidence` wrote it; empty if any of it is lost or damaged."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        roles = {}
        try:
            index = json.loads(fetch(client, run_id, naming.EVIDENCE, folder).read_text())
            for role, entry in index.items():
                of = dict(scores.read(fetch(client, run_id, entry["scores"], folder)).of)
                held_out = of.pop(_HELD_OUT)
                version = Version(entry["model"], entry["version"])
                roles[role] = Evidence(version, entry["digest"], held_out, tuple(of.items()))
        except _UNREADABLE:
            return {}
    return roles
