"""Write scores and evidence with their items to MLflow runs, and read back those that count.

An evaluation is committed when its trial run is FINISHED and has a score.
"""

import contextlib
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Metric as MlflowMetric
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException

from mlflow_soup.files.signing import sha256_of
from mlflow_soup.files.untrusted import LARGEST_JSON, parse_json, read_regular
from mlflow_soup.records import (
    Dataset,
    Evidence,
    Examination,
    Recipe,
    Score,
    Trial,
    Unbiased,
    Version,
)
from mlflow_soup.registry import naming, scores
from mlflow_soup.registry.outages import is_forbidden
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.tracking import find_runs, log, metric, without_model
from mlflow_soup.registry.trust import UNREADABLE, Trust, sign_file

logger = logging.getLogger("mlflow_soup")

SCHEMA = 2  # the version of the format of `evidence.json`
_HELD_OUT = "held-out"
_EARLIER = "earlier"  # in `evidence.json`: the examinations of the soup that were there before


def score_metrics(score: Score, prefix: str) -> list[MlflowMetric]:
    """A score as metrics of a run: its mean, and each task's metric as lm-eval prints it."""
    numbers = {f"{prefix}/objective": score.value}
    numbers |= {f"{prefix}/{m.key}": m.value for m in score.metrics}
    return [metric(key, value) for key, value in numbers.items()]


def _metrics_of_model(
    score: Score,
    prefix: str,
    model_id: str | None,
    datasets: Mapping[str, Dataset],
    step: int = 0,
) -> list[MlflowMetric]:
    """Each task's metric, of a logged model and of the dataset of the task.

    Args:
        score: the score.
        prefix: what the metrics' names begin with.
        model_id: the logged model; None if there is none.
        datasets: task → its items.
        step: the metrics' step.
    """
    return [
        metric(
            f"{prefix}/{m.key}",
            m.value,
            step,
            model_id=model_id,
            dataset_name=datasets[m.task].task,
            dataset_digest=datasets[m.task].digest,
        )
        for m in score.metrics
    ]


def log_scores(
    client: Store, run_id: str, measured: Scores, file: str, about: Mapping[str, Any]
) -> str:
    """Log scores with their item rows as an artifact, and sign it; return its SHA-256.

    Args:
        client: the store's client.
        run_id: the run.
        measured: the scores.
        file: the artifact.
        about: what the signature says that the scores are about.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(file).name)
        scores.write(measured, path)
        parent = str(PurePosixPath(file).parent)
        client.put(run_id, str(path), "" if parent == "." else parent)
        sign_file(client, run_id, file, path, "scores", about)
        return sha256_of(path)


@dataclass(frozen=True)
class Known:
    """Scores that a trial measured, and the run of that trial."""

    run_id: str
    scores: Scores


def find_score(trust: Trust, measured: str, fits: Callable[[Score], bool]) -> Known | None:
    """The scores of any trial that evaluated the same weights in the same way, or None.

    Args:
        trust: which runs count.
        measured: the digest of the weights and of the way they are scored.
        fits: whether a score is one of the items that are scored now.
    """
    for run in trust.runs({naming.MEASURED: measured}):
        score = _read_items(trust, run, measured, fits)
        if score is not None:
            source = run.data.tags.get(naming.ITEMS_RUN, run.info.run_id)
            truncated = run.data.metrics.get(naming.TRUNCATED, 0.0)
            return Known(source, Scores({"": score}, {naming.TRUNCATED: truncated}))
    return None


def _read_items(
    trust: Trust, run: Run, measured: str, fits: Callable[[Score], bool]
) -> Score | None:
    """A trial's score, from its own items or those of the run it reuses; None if it has none.

    A trial whose items are gone, or are not those that are scored now, is passed over.
    """
    source = run.data.tags.get(naming.ITEMS_RUN, run.info.run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            about = {"measured": measured}
            path = trust.read(source, naming.ITEMS, Path(folder), "scores", about)
            score = scores.read(path).mean
            _check_numbers(score)
        except UNREADABLE:
            return None
    if not fits(score):
        logger.warning("run %s is passed over: its scores are of other items", run.info.run_id)
        return None
    return score


def read_trials(
    trust: Trust,
    key: str,
    measured_of: Callable[[Recipe, Mapping[str, str]], str],
    fits: Callable[[Score], bool],
) -> list[Trial]:
    """The committed trials of a search, by number: those with a score and those that failed.

    A run that is malformed, or scored something else than its recipe says, is passed over.

    Args:
        trust: which runs count.
        key: the search's key.
        measured_of: gives `naming.MEASURED` for a recipe and the tags of its run.
        fits: as for `find_score`.
    """
    trials: dict[int, Trial] = {}
    for run in trust.runs({naming.KEY: key, naming.ROLE: "trial"}, finished=False):
        try:
            number, recipe = _read_recipe(run)
            measured = measured_of(recipe, run.data.tags)
        except UNREADABLE as error:
            if "weights" in run.data.params:  # without, it was cut short
                words = "run %s is passed over: it is no trial that mlflow-soup wrote (%s)"
                logger.warning(words, run.info.run_id, type(error).__name__)
            continue
        if number in trials:
            continue
        if run.info.status == RunStatus.to_string(RunStatus.FINISHED):
            if run.data.tags.get(naming.MEASURED) != measured:
                words = "run %s is passed over: it scored something else than its recipe says"
                logger.warning(words, run.info.run_id)
                continue
            score = _read_items(trust, run, measured, fits)
            if score is not None:
                trials[number] = Trial(number, recipe, score, run.info.run_id)
        elif naming.FAILED in run.data.tags and trust.mode == "experiment":  # nobody signs it
            trials[number] = Trial(number, recipe, None, run.info.run_id)
    return [trials[number] for number in sorted(trials)]


def _read_recipe(run: Run) -> tuple[int, Recipe]:
    """Number and recipe of a trial's run.

    Raises:
        KeyError, ValueError, TypeError: a tag or param is missing or malformed.
    """
    weights = tuple(map(float, json.loads(run.data.params["weights"])))
    number = int(run.data.tags[naming.NUMBER])
    if number < 0 or not all(0.0 <= weight <= 1.0 for weight in weights):
        raise ValueError("a number is out of range")
    return number, Recipe(run.data.params["method"], weights)


def log_examination(
    client: Store,
    examination: Examination,
    model_ids: Mapping[str, str | None],
    datasets: Mapping[str, Mapping[str, Dataset]],
) -> None:
    """Log the evidence that the gate reads, and show it on MLflow's Models page.

    Each model has one Parquet file, and metrics that name its logged model and their dataset.

    Args:
        client: the store's client.
        examination: the OOD run's evidence.
        model_ids: role → logged model; a parent without one gets no metrics, since the run would
            show them as the soup's.
        datasets: `dev` and `ood` → task → its items.
    """
    run_id, index = examination.run_id, {}
    metrics: dict[str, list[MlflowMetric]] = {}
    for role, evidence in examination.roles.items():
        file = f"{role.replace(' ', '-')}.parquet"
        of = {_HELD_OUT: evidence.held_out, **dict(evidence.ood)}
        sha256 = log_scores(client, run_id, Scores(of), file, {"digest": evidence.digest})
        for position, score in enumerate(of.values()):
            prefix = naming.OOD if position else naming.HELD_OUT
            if model_ids[role] is not None or role == "soup":
                last = int(role == "soup")  # a run shows its last step: the soup
                at = (prefix, model_ids[role], datasets[prefix], last)
                metrics.setdefault(role, []).extend(_metrics_of_model(score, *at))
        index[role] = {
            "model": evidence.version.name,
            "version": evidence.version.number,
            "digest": evidence.digest,
            "scores": file,
            "sha256": sha256,
        }
    log_of_models(client, run_id, metrics, "soup")
    there = find_runs(client, _of_soup(examination.roles["soup"].digest), status="FINISHED")
    content = {
        "schema": SCHEMA,
        "settings": dict(examination.settings),
        "roles": index,
        _EARLIER: sorted({run.info.run_id for run in there} - {run_id}),
    }
    text = json.dumps(content, indent=2)
    client.log_text(run_id, text, naming.EVIDENCE)
    sign_file(client, run_id, naming.EVIDENCE, text, "examination", {"run": run_id})


def log_test(
    client: Store,
    run_id: str,
    tested: Unbiased,
    *,
    measured: str,
    model_id: str | None,
    datasets: Mapping[str, Dataset],
) -> None:
    """Log a version's score on the test set, and show it on MLflow's Models page.

    Args:
        client: the store's client.
        run_id: the test run of this version; `find_score` finds it by its tag.
        tested: the version and its score.
        measured: digest of the weights and of how they were scored.
        model_id: the logged model; None if there is none.
        datasets: task → its items.
    """
    score = tested.score
    log_scores(client, run_id, Scores({"": score}), naming.ITEMS, {"measured": measured})
    shown = str(tested.version)
    metrics = [metric(naming.TEST_OBJECTIVE, score.value, model_id=model_id)]
    metrics += _metrics_of_model(score, naming.TEST, model_id, datasets)
    log_of_models(client, run_id, {shown: metrics}, shown)


def _of_soup(digest: str) -> dict[str, str]:
    """The tags of the OOD runs of a soup."""
    return {naming.ROLE: "ood", naming.DIGEST: digest}


def log_of_models(
    client: Store, run_id: str, of: Mapping[str, Sequence[MlflowMetric]], shown: str
) -> None:
    """Log the metrics of each role; those of models that the user may not write to only on the run.

    The run shows one set of metrics, that of the role `shown`, so only this set can do without its
    model.
    """
    try:
        log(client, run_id, metrics=[m for metrics in of.values() for m in metrics])
        return
    except MlflowException as error:
        if not is_forbidden(error):
            raise
    left = []
    for role, metrics in of.items():
        try:
            log(client, run_id, metrics=metrics)
        except MlflowException as error:
            if not is_forbidden(error):
                raise
            left.append(role)
    if shown in left:
        log(client, run_id, metrics=[without_model(m) for m in of[shown]])
    logger.warning(
        "MLflow's pages of these models do not show the scores: %s; that needs EDIT on the "
        "experiment of their logged models",
        ", ".join(left),
    )


def read_examination(trust: Trust, run_id: str) -> Examination | None:
    """The examination of a run; None if it does not count, or any of it is lost or damaged."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, roles = Path(temporary), {}
        try:
            content = _read_index(trust, run_id, folder)
            settings = dict(content["settings"])
            if not isinstance(settings["asked"], dict):
                return None
            if not {"inherited", "held_out", "ood", "limit"} <= settings.keys():
                return None
            for role, entry in content["roles"].items():
                about = {"digest": entry["digest"]}
                file = trust.read(run_id, entry["scores"], folder, "scores", about)
                if sha256_of(file) != entry["sha256"]:
                    return None
                of = dict(scores.read(file).of)
                held_out = of.pop(_HELD_OUT)
                if not isinstance(entry["digest"], str) or not of:
                    return None
                for score in (held_out, *of.values()):
                    _check_numbers(score)
                version = Version(str(entry["model"]), int(entry["version"]))
                roles[role] = Evidence(version, entry["digest"], held_out, tuple(of.items()))
            return Examination(run_id, roles, settings) if "soup" in roles else None
        except UNREADABLE:
            return None


def _read_index(trust: Trust, run_id: str, folder: Path) -> dict[str, Any]:
    """What an examination says that it holds, downloaded into a folder.

    Raises:
        MlflowException, OSError, ValueError …: as in `UNREADABLE`; it does not count, or is lost or
            damaged.
    """
    about = {"run": run_id}  # so that nobody can log it again as that of another run
    path = trust.read(run_id, naming.EVIDENCE, folder, "examination", about)
    content = parse_json(read_regular(path, LARGEST_JSON))
    if content["schema"] != SCHEMA or not all(isinstance(e, str) for e in content[_EARLIER]):
        raise ValueError("mlflow-soup did not write it")
    return dict(content)


def _check_numbers(score: Score) -> None:
    """Refuse a score that is no number, or has no items.

    Raises:
        ValueError, TypeError: it is.
    """
    numbers = [score.value, score.stderr, *(m.value for m in score.metrics)]
    numbers += [n for i in score.items for n in (i.weight, *i.values, *i.shares)]
    if not all(map(math.isfinite, numbers)) or not all(i.ids for i in score.items):
        raise ValueError("a number is not finite, or there are no items")
    if not score.items:
        raise ValueError("there are no items")


def find_examinations(trust: Trust, tags: Mapping[str, str]) -> Iterator[Examination]:
    """The examinations of the OOD runs with these tags, in any order; each is read when asked."""
    for run in reversed(trust.runs({naming.ROLE: "ood", **tags})):
        if (examination := read_examination(trust, run.info.run_id)) is not None:
            yield examination


def examinations_of(trust: Trust, digest: str) -> Iterator[Examination]:
    """The examinations of a soup, newest first; each is read when asked.

    Each names those that were there before it, so the clocks of the machines do not matter. They
    order only what was measured at the same time.

    Args:
        trust: which runs count.
        digest: the digest of the soup's tensors.
    """
    runs = trust.runs(_of_soup(digest))
    later: Counter[str] = Counter()  # run → how many examinations came after it
    for run in runs:
        with contextlib.suppress(*UNREADABLE), tempfile.TemporaryDirectory() as folder:
            later.update({*_read_index(trust, run.info.run_id, Path(folder))[_EARLIER]})
    runs.reverse()
    for run in sorted(runs, key=lambda run: later[run.info.run_id]):
        if (examination := read_examination(trust, run.info.run_id)) is not None:
            yield examination
