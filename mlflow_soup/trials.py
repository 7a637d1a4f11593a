"""One recipe, one child run; and a method's recipes one after the other until it ends.

What any request has scored already is not scored again: the trial is written down as usual, and
says whose score it took over.
"""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from mlflow_soup import geometry, lineage, soup, tracking
from mlflow_soup.digests import digest
from mlflow_soup.errors import NonFiniteError, ObjectiveError
from mlflow_soup.job import Job
from mlflow_soup.live import Link
from mlflow_soup.objective import Evaluator
from mlflow_soup.records import Found, Recipe, Score, Trial

logger = logging.getLogger("mlflow_soup")


def search_tags(job: Job, name: str) -> dict[str, str]:
    """What a search run is created with."""
    return {
        "mlflow.runName": name,
        lineage.ROLE: "search",
        lineage.KEY: job.key,
        lineage.REQUEST: job.request,
        lineage.METHOD: job.spec.method,
    }


def _log_request(job: Job, run_id: str) -> None:
    """Params under `cfg.`: MLproject's own are logged by `mlflow run`, quoted and write-once."""
    said = {f"cfg.{f.name}": getattr(job.spec, f.name) for f in fields(job.spec)}
    said |= {"cfg.alpha": job.space.alpha, "cfg.trials": job.spec.budget}
    params = {k: v for k, v in said.items() if v not in ("", None)}
    params |= {f"cfg.evaluator.{k}": v for k, v in job.bench.held_out.settings().items()}
    tracking.log(job.client, run_id, params=params)


def explore(job: Job, run_id: str, *, alone: bool = True) -> list[Trial]:
    """Trials until the method ends; those of an earlier run with the same key count.

    Args:
        job: the request.
        run_id: the search run; trials are its children.
        alone: it is all that the user waits for: say on the way what is amiss with the parents.
    """
    spec, space = job.spec, job.space
    parents = [o.checkpoint for o in job.opened]
    links = job.bench.live.link(parents, resident=spec.parents_in == "memory")
    trials: list[Trial] = []
    history = {trial.number: trial for trial in tracking.read_trials(job.client, job.key)}
    best, at = float("-inf"), ""
    total = spec.budget if job.method.searches else None
    with tqdm(total=total, desc="search", unit="λ", disable=None, leave=alone) as bar:
        while (recipe := job.method.proceed(space, trials, spec)) is not None:
            # what was evaluated stands; it ends here, however far another request went on
            number = len(trials)
            trials.append(history.get(number) or _try(job, run_id, number, recipe, links))
            trial = trials[-1]
            bar.update()
            if trial.held_out is None:
                if trial.recipe in space.parents():
                    break  # nothing can be compared with it
                continue
            started = {*space.start()} == {t.recipe for t in trials}
            if alone and started and (warning := geometry.barrier(space, trials)):
                logger.warning(warning)
            lam, value = trial.recipe.lam[-1], trial.held_out.value
            if value > best:
                best, at = value, f"best {value:.4f} at {trial.recipe.label}"
            bar.set_postfix_str(at)
            numbers = {"search/objective": value, "search/lambda": lam, "search/best": best}
            metrics = [tracking.metric(k, v, trial.number) for k, v in numbers.items()]
            tracking.log(job.client, run_id, metrics=metrics)
    return trials


def find(job: Job, run_id: str, *, alone: bool = True) -> Found:
    """What the method of a job makes of its parents, all of it in a search run.

    Args:
        job: the request.
        run_id: the search run.
        alone: as of `explore`.

    Raises:
        ObjectiveError: a parent, or what was chosen, has no finite score.
    """
    _log_request(job, run_id)
    trials = explore(job, run_id, alone=alone)
    parents = tuple(
        scored(trials, recipe, str(version))
        for recipe, version in zip(job.space.parents(), job.versions, strict=True)
    )
    recipe = job.method.choose(job.space, trials, job.spec)
    score = scored(trials, recipe, "the soup")
    return Found(job.spec.method, job.versions, recipe, score, parents, tuple(trials))


def _try(job: Job, run_id: str, number: int, recipe: Recipe, links: Sequence[Link]) -> Trial:
    """One recipe: a child run with its params, metrics, item rows and seconds."""
    client, bench = job.client, job.bench
    tags = {
        lineage.KEY: job.key,
        lineage.ROLE: "trial",
        lineage.NUMBER: str(number),
        lineage.EVALUATOR: bench.held_out.fingerprint,
    }
    child = ""
    try:
        with tracking.open_child(client, run_id, recipe.label, tags) as child:
            score = _score(job, child, recipe, links, bench.held_out)
    except NonFiniteError as error:  # it would be so again; anything else ends the run
        if recipe.method != "linear":
            raise  # with other statistics it might not
        logger.warning("%s failed: %s", recipe.label, error.what)
        tracking.log(client, child, tags={lineage.FAILED: error.what[:5000]})
        return Trial(number, recipe, None, child)
    return Trial(number, recipe, score, child)


def _score(
    job: Job, child: str, recipe: Recipe, links: Sequence[Link], evaluator: Evaluator
) -> Score:
    """A recipe's score, logged to its run; taken over where it is known already."""
    client, bench = job.client, job.bench
    weights = json.dumps(recipe.lam)
    params = {"lambda": str(recipe), "method": recipe.method, "weights": weights}
    tracking.log(client, child, params=params)
    begin = time.monotonic()
    if recipe.method == "linear":
        parts = [(o.parent.digest, w.hex()) for o, w in zip(job.opened, recipe.lam, strict=True)]
        parts = [part for part in parts if part[1] != (0.0).hex()]
    else:
        with tempfile.TemporaryDirectory(prefix="mlflow-soup-") as folder:
            parents = [o.checkpoint for o in job.opened]
            blend = job.blend(recipe)
            made = soup.write(parents, recipe.lam, Path(folder), digests=False, blend=blend)
            parts = [(digest(made.checkpoint), (1.0).hex())]
            bench.live.set_weights(bench.live.link([made.checkpoint]), [1.0])
        tracking.log(client, child, tags={lineage.DIGEST: parts[0][0]})
    measured = lineage.key_of({"evaluator": evaluator.fingerprint, "weights": parts})
    known = tracking.find_score(client, measured)
    if known is not None:
        metrics = [tracking.metric(lineage.TRUNCATED, known.truncated)]
        tags = {lineage.MEASURED: measured, lineage.ITEMS_RUN: known.run_id}
        score = known.score
    else:
        if recipe.method == "linear":
            bench.live.set_weights(links, recipe.lam)
        merged = time.monotonic()
        score = evaluator.score()
        numbers = {
            "seconds/merge": merged - begin,
            "seconds/evaluate": time.monotonic() - merged,
            lineage.TRUNCATED: evaluator.truncated,
        }
        metrics = [tracking.metric(key, value) for key, value in numbers.items()]
        tags = {lineage.MEASURED: measured}
        tracking.log_score(client, child, score, lineage.ITEMS)
    metrics += [tracking.metric("dev/stderr", score.stderr)]
    metrics += tracking.score_metrics(score, "dev")
    tracking.log(client, child, metrics=metrics, tags=tags)
    return score


def look(job: Job, run_id: str, recipe: Recipe, evaluator: Evaluator) -> Score:
    """A recipe's score by another evaluator than the job's, in a run that no search reads."""
    links = job.bench.live.link([o.checkpoint for o in job.opened])
    about = f"{recipe.label} of {' and '.join(map(str, job.versions))}"
    tags = {lineage.ROLE: "look", lineage.EVALUATOR: evaluator.fingerprint}
    with tracking.open_child(job.client, run_id, about, tags) as child:
        return _score(job, child, recipe, links, evaluator)


def scored(trials: Sequence[Trial], recipe: Recipe, what: str) -> Score:
    """A recipe's held-out score.

    Raises:
        ObjectiveError: its evaluation failed.
    """
    for trial in trials:
        if trial.recipe == recipe and trial.held_out is not None:
            return trial.held_out
    raise ObjectiveError(
        f"{what} could not be scored",
        where=f"{recipe.label}, see tag {lineage.FAILED} of its run",
        fix="a parent must have a finite score; choose other versions or tasks",
    )
