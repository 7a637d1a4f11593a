"""One recipe, one child run; and a method's recipes one after the other until it ends.

What any request has scored already is not scored again: the trial is written down as usual, and
says whose score it took over. What is scored goes into the journal first and to MLflow then; while
that is away, the search goes on.
"""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from mlflow.entities import Metric
from tqdm import tqdm

from mlflow_soup.errors import NonFiniteError, ObjectiveError, StoreError
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import Link
from mlflow_soup.files.durable import scratch
from mlflow_soup.records import Found, Recipe, Score, Trial
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.evaluations import find_score, log_scores, read_trials, score_metrics
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.store import Store
from mlflow_soup.reporting import geometry
from mlflow_soup.weights import soup
from mlflow_soup.weights.digests import digest
from mlflow_soup.workflows.bench import measured_key
from mlflow_soup.workflows.job import Job

logger = logging.getLogger("mlflow_soup")


@dataclass(frozen=True)
class Evaluation:
    """A recipe that was scored, and all that its run says of it.

    Attributes:
        recipe: what was scored.
        measured: digest of its weights and how they were scored.
        scores: None when they were not finite.
        source: the run that measured it, where its score was taken over; else empty.
        tags: of its run.
        began, ended: in milliseconds since 1970.
        attempt: names its run, so that it is found where the answer to its creation was lost.
    """

    recipe: Recipe
    measured: str
    scores: Scores | None
    source: str
    tags: Mapping[str, str]
    began: int
    ended: int
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def score(self) -> Score | None:
        """The mean over tasks."""
        return self.scores.mean if self.scores is not None else None


def search_tags(job: Job, name: str, study: str = "") -> dict[str, str]:
    """What a search run is created with; a search within a study is known by its study's run."""
    return ({naming.STUDY: study} if study else {}) | {
        "mlflow.runName": name,
        naming.ROLE: "search",
        naming.KEY: job.key,
        naming.REQUEST: job.request,
        naming.METHOD: job.spec.method,
        naming.MODEL: job.session.name,
    }


def request_params(job: Job) -> dict[str, str]:
    """Params under `cfg.`: MLproject's own are logged by `mlflow run`, quoted and write-once."""
    said = {f"cfg.{f.name}": getattr(job.spec, f.name) for f in fields(job.spec)}
    said |= {"cfg.alpha": job.space.alpha, "cfg.trials": job.spec.budget}
    del said["cfg.store_patience"]  # whoever tries again may be more patient
    params = {k: v for k, v in said.items() if v not in ("", None)}
    params |= {f"cfg.evaluator.{k}": v for k, v in job.bench.held_out.settings().items()}
    return {k: redact(str(v)) for k, v in params.items()}


def _log_request(job: Job, run_id: str) -> None:
    tracking.log(job.client, run_id, params=request_params(job))


@dataclass
class _Outbox:
    """What MLflow is still to be told of a search. What it is told, the journal may forget."""

    job: Job
    run_id: str
    waiting: list[tuple[int, Evaluation]] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    runs: dict[int, str] = field(default_factory=dict)  # number of a trial → its run

    def flush(self, *, patiently: bool) -> None:
        """Send all of it; else as much as goes at once.

        Raises:
            StoreError: the store is away; what was not sent waits on.
        """
        client = self.job.client if patiently else self.job.client.hasty
        while self.waiting:
            number, evaluation = self.waiting[0]
            tags = {
                naming.KEY: self.job.key,
                naming.ROLE: "trial",
                naming.NUMBER: str(number),
                naming.EVALUATOR: self.job.bench.held_out.fingerprint,
            }
            label = evaluation.recipe.label
            self.runs[number] = _publish(self.job, client, self.run_id, label, tags, evaluation)
            self.waiting.pop(0)
        if self.metrics:
            tracking.log(client, self.run_id, metrics=self.metrics)
            self.metrics.clear()


def explore(
    job: Job, run_id: str, *, alone: bool = True, check: Callable[[], None] = lambda: None
) -> list[Trial]:
    """Trials until the method ends; those of an earlier run with the same key count.

    Args:
        job: the request.
        run_id: the search run; trials are its children.
        alone: it is all that the user waits for: say on the way what is amiss with the parents.
        check: is called before and after each evaluation, and raises where there is to be none.

    Raises:
        StoreError: the store was away for longer than patience lasts; the journal has what it
            was not told.
    """
    spec, space = job.spec, job.space
    parents = [o.checkpoint for o in job.opened]
    links = job.bench.live.link(parents, resident=spec.parents_in == "memory")
    trials: list[Trial] = []
    history = {trial.number: trial for trial in read_trials(job.client, job.key)}
    outbox = _Outbox(job, run_id)
    best, at, away = float("-inf"), "", False
    total = spec.budget if job.method.searches else None
    with tqdm(total=total, desc="search", unit="λ", disable=None, leave=alone) as bar:
        while (recipe := job.method.proceed(space, trials, spec)) is not None:
            # what was evaluated stands; it ends here, however far another request went on
            number = len(trials)
            if number in history:
                trials.append(history[number])
            else:
                check()
                evaluation = _evaluate(job, recipe, links, job.bench.held_out)
                check()  # that took long: another may have written it down
                outbox.waiting.append((number, evaluation))
                trials.append(Trial(number, recipe, evaluation.score))
            trial = trials[-1]
            bar.update()
            if trial.held_out is None and trial.recipe in space.parents():
                break  # nothing can be compared with it
            if trial.held_out is not None:
                started = {*space.start()} == {t.recipe for t in trials}
                if alone and started and (warning := geometry.barrier(space, trials)):
                    logger.warning(warning)
                lam, value = trial.recipe.lam[-1], trial.held_out.value
                if value > best:
                    best, at = value, f"best {value:.4f} at {trial.recipe.label}"
                bar.set_postfix_str(at)
                numbers = {"search/objective": value, "search/lambda": lam, "search/best": best}
                outbox.metrics += [tracking.metric(k, v, number) for k, v in numbers.items()]
            if number in history:
                continue
            try:
                outbox.flush(patiently=False)
                away = False
            except StoreError as error:  # evaluations go on
                if not away:
                    logger.warning(
                        "%s; the search goes on, and what it finds is kept in %s",
                        *(error.what, job.journal.folder),
                    )
                away = True
    outbox.flush(patiently=True)
    return [replace(t, run_id=outbox.runs.get(t.number, t.run_id)) for t in trials]


def find_recipe(
    job: Job, run_id: str, *, alone: bool = True, check: Callable[[], None] = lambda: None
) -> Found:
    """What the method of a job makes of its parents, all of it in a search run.

    Args:
        job: the request.
        run_id: the search run.
        alone: as of `explore`.
        check: as of `explore`.

    Raises:
        ObjectiveError: a parent, or what was chosen, has no finite score.
        StoreError: as of `explore`.
    """
    _log_request(job, run_id)
    trials = explore(job, run_id, alone=alone, check=check)
    parents = tuple(
        scored(trials, recipe, str(version))
        for recipe, version in zip(job.space.parents(), job.versions, strict=True)
    )
    recipe = job.method.choose(job.space, trials, job.spec)
    score = scored(trials, recipe, "the soup")
    return Found(job.spec.method, job.versions, recipe, score, parents, tuple(trials))


def _now() -> int:
    return int(time.time() * 1000)


def _evaluate(job: Job, recipe: Recipe, links: Sequence[Link], evaluator: Evaluator) -> Evaluation:
    """A recipe's score; taken over where it is known already."""
    client, bench, began = job.client, job.bench, _now()
    tags: dict[str, str] = {}
    if recipe.method == "linear":
        parts = [(o.parent.digest, w) for o, w in zip(job.opened, recipe.lam, strict=True)]
    else:
        with scratch() as folder:
            parents = [o.checkpoint for o in job.opened]
            blend = job.blend(recipe)
            made = soup.write(parents, recipe.lam, folder, digests=False, blend=blend)
            parts = [(digest(made.checkpoint), 1.0)]
            bench.live.set_weights(bench.live.link([made.checkpoint]), [1.0])
        tags = {naming.DIGEST: parts[0][0]}
    measured = measured_key(evaluator, parts)
    scores, source = job.journal.read(measured), ""
    if scores is None:
        with contextlib.suppress(StoreError):  # away: what it knows is measured once more
            known = find_score(client.hasty, measured)
            if known is not None:
                scores, source = known.scores, known.run_id

    def evaluate() -> Scores:
        begin = time.monotonic()
        try:
            if recipe.method == "linear":
                bench.live.set_weights(links, recipe.lam)
            merged = time.monotonic()
            score = evaluator.score()
        except NonFiniteError as error:  # it would be so again; anything else ends the run
            if recipe.method != "linear":
                raise  # with other statistics it might not
            return Scores({}, failed=error.what[:5000])
        about = {
            "seconds/merge": merged - begin,
            "seconds/evaluate": time.monotonic() - merged,
            naming.TRUNCATED: evaluator.truncated,
        }
        return Scores({"": score}, about)

    if scores is None:
        scores = job.journal.recall(measured, evaluate)
    if scores.failed:
        logger.warning("%s failed: %s", recipe.label, scores.failed)
        tags[naming.FAILED], scores = scores.failed, None
    return Evaluation(recipe, measured, scores, source, tags, began, _now())


def _publish(
    job: Job,
    client: Store,
    parent: str,
    name: str,
    tags: Mapping[str, str],
    evaluation: Evaluation,
) -> str:
    """An evaluation as a run of its own, FINISHED once all of it is there; its id."""
    recipe, scores = evaluation.recipe, evaluation.scores
    known = {**tags, naming.ATTEMPT: evaluation.attempt}
    child = tracking.begin_child(client, parent, name, known, evaluation.began)
    weights = json.dumps(recipe.lam)
    params = {"lambda": str(recipe), "method": recipe.method, "weights": weights}
    metrics, more = [], dict(evaluation.tags)
    if scores is not None:
        if evaluation.source:
            more[naming.ITEMS_RUN] = evaluation.source
        else:
            log_scores(client, child, scores, naming.ITEMS)
        more[naming.MEASURED] = evaluation.measured
        numbers = {**scores.about, "dev/stderr": scores.mean.stderr}
        metrics = [tracking.metric(key, value) for key, value in numbers.items()]
        metrics += score_metrics(scores.mean, "dev")
    tracking.log(client, child, params=params, metrics=metrics, tags=more)
    status = "FAILED" if scores is None else "FINISHED"
    client.set_terminated(child, status, evaluation.ended)
    job.journal.drop(evaluation.measured)
    return child


def look(job: Job, run_id: str, recipe: Recipe, evaluator: Evaluator) -> Score:
    """A recipe's score by another evaluator than the job's, in a run that no search reads.

    Raises:
        NonFiniteError: it is not finite.
    """
    links = job.bench.live.link([o.checkpoint for o in job.opened])
    evaluation = _evaluate(job, recipe, links, evaluator)
    about = f"{recipe.label} of {' and '.join(map(str, job.versions))}"
    tags = {naming.ROLE: "look", naming.EVALUATOR: evaluator.fingerprint}
    _publish(job, job.client, run_id, about, tags, evaluation)
    if evaluation.scores is None:
        raise NonFiniteError(
            evaluation.tags[naming.FAILED], where=recipe.label, fix="leave this one out"
        )
    return evaluation.scores.mean


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
        where=f"{recipe.label}, see tag {naming.FAILED} of its run",
        fix="a parent must have a finite score; choose other versions or tasks",
    )
