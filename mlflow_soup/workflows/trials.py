"""Score one recipe in one child run, or all recipes of a method, one after the other.

A recipe that any request has scored already is not scored again: the trial's run is written as
usual, and it names the run that measured the score. A new score goes into the journal first, and
then to MLflow. While MLflow is unreachable, the search continues.
"""

import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType

from mlflow.entities import Metric
from tqdm import tqdm

from mlflow_soup.errors import DeniedError, NonFiniteError, ObjectiveError, StoreError
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.files.durable import scratch
from mlflow_soup.records import Dataset, Found, Recipe, Score, Trial, listed
from mlflow_soup.redaction import redact
from mlflow_soup.registry import inputs, naming, tracking
from mlflow_soup.registry.evaluations import (
    find_score,
    log_scores,
    read_trials,
    score_metrics,
)
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.trust import Trust, trust_of
from mlflow_soup.reporting import geometry
from mlflow_soup.reporting.progress import ends_by
from mlflow_soup.search.schedule import Schedule
from mlflow_soup.weights import soup
from mlflow_soup.weights.digests import digest
from mlflow_soup.workers.worker import Mixture
from mlflow_soup.workflows.bench import evaluator_params, measured_key, mixture_of
from mlflow_soup.workflows.job import Job

logger = logging.getLogger("mlflow_soup")
PROGRESS_S = 10.0  # at least, between two requests with points of a search's curves
AT_ONCE = 2  # λ of one search at once: more cost many evaluations, and save few rounds


@dataclass(frozen=True)
class Evaluation:
    """A recipe that was scored, and everything that its run records.

    Attributes:
        recipe: the recipe that was scored.
        measured: digest of the recipe's weights and of how they were scored.
        scores: the scores; None if they were not finite.
        source: the run that measured the score, if another run did; else empty.
        tags: tags for the recipe's run.
        began, ended: times in milliseconds since 1970.
        attempt: an id of the recipe's run. If the store's answer to its creation is lost, the run
            is found by this id.
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
    """The tags of a new search run. `study` is the run of the study that it belongs to."""
    return ({naming.STUDY: study} if study else {}) | {
        "mlflow.runName": naming.run_name(name),
        naming.ROLE: "search",
        naming.KEY: job.key,
        naming.REQUEST: job.request,
        naming.METHOD: job.spec.method,
        naming.MODEL: job.session.name,
        **({naming.TIME_TAG: job.time_tag} if job.time_tag else {}),
    }


def request_params(job: Job) -> dict[str, str]:
    """Params, prefixed `cfg.`: `mlflow run` logs MLproject's params, quoted and write-once."""
    said = {f"cfg.{f.name}": getattr(job.spec, f.name) for f in fields(job.spec)}
    said |= {"cfg.alpha": job.space.alpha, "cfg.trials": job.spec.budget}
    for machine in ("store_patience", "workers", "worker_patience"):
        del said[f"cfg.{machine}"]  # a later attempt may have others
    params = {k: v for k, v in said.items() if v not in ("", None) and v is not False}
    params |= evaluator_params(job.bench.held_out)
    return {k: redact(str(v)) for k, v in params.items()}


def _log_request(job: Job, run_id: str) -> None:
    tracking.log(job.client, run_id, params=request_params(job))
    inputs.link(job.client, run_id, _used(job.bench.held_out))


def _used(evaluator: Evaluator) -> dict[str, list[Dataset]]:
    """What a search reads of its evaluator, for MLflow's own pages."""
    return {inputs.HELD_OUT: [*evaluator.datasets.values()]}


@dataclass
class _Outbox:
    """What MLflow does not have yet of a search. The journal drops a score once MLflow has it."""

    job: Job
    run_id: str
    waiting: list[tuple[int, Evaluation]] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    runs: dict[int, str] = field(default_factory=dict)  # number of a trial → its run
    tried: set[str] = field(default_factory=set)  # attempts that may have made a run
    shown: float = float("-inf")  # when the search run last got metrics

    def flush(self, *, patiently: bool) -> None:
        """Send everything to MLflow; the metrics of quick trials together.

        Args:
            patiently: wait for a store that is unreachable, and send all metrics now; otherwise,
                fail at once.

        Raises:
            StoreError: the store is unreachable. What was not sent stays in the outbox.
        """
        client = self.job.client if patiently else self.job.client.hasty
        while self.waiting:
            number, evaluation = self.waiting[0]
            tags = {
                naming.KEY: self.job.key,
                naming.ROLE: "trial",
                naming.NUMBER: str(number),
            }
            label = self.job.space.label(evaluation.recipe)
            tried = evaluation.attempt in self.tried
            self.tried.add(evaluation.attempt)
            at = (self.job, client, self.run_id, label, tags)
            evaluator = self.job.bench.held_out
            self.runs[number] = _publish(*at, evaluation, evaluator, tried=tried)
            self.waiting.pop(0)
        if self.metrics and (patiently or time.monotonic() - self.shown > PROGRESS_S):
            tracking.log(client, self.run_id, metrics=self.metrics)
            self.metrics.clear()
            self.shown = time.monotonic()


def explore(
    job: Job, run_id: str, *, alone: bool = True, check: Callable[[], None] = lambda: None
) -> list[Trial]:
    """All trials of a search. The trials of earlier runs with the same key count too.

    Args:
        job: the request.
        run_id: the search run; the trials' runs are its children.
        alone: the user waits for this search only: keep its progress bar, and warn during the
            search if the parents do not merge well.
        check: is called before and after each evaluation; it raises to stop the search.

    Raises:
        StoreError: the store was unreachable for longer than the set patience. The journal keeps
            the scores that the store does not have.
    """
    spec, space = job.spec, job.space
    trials: list[Trial] = []
    asked: list[Recipe] = []  # what was begun beside another recipe
    trust = trusted(job, run_id)
    history = _history(job, trust)
    outbox = _Outbox(job, run_id)
    best, at, away, took = float("-inf"), "", False, list[float]()
    total = spec.budget if job.method.searches else None
    with tqdm(total=total, desc="search", unit="λ", disable=None, leave=alone) as bar:
        while (recipe := _next(job, trials, asked)) is not None:
            # trials of earlier runs are reused; this search ends where its own request says
            number, clock = len(trials), time.monotonic()
            first = number < len(space.alone())  # every method begins with these
            if first and number in history and history[number].recipe != recipe:
                logger.warning("trial %d is passed over: it is not of this search", number)
                del history[number]
            if number in history:
                trials.append(history[number])
            else:
                check()
                ahead = _foresee(job, trials, history)
                if not ahead and not asked:
                    asked += _beside(job, trials, recipe)
                expect(job, trust, [recipe, *ahead, *asked])
                evaluation = _evaluate(job, recipe, job.bench.held_out, trust)
                check()  # the evaluation took long: another process may have recorded this trial
                outbox.waiting.append((number, evaluation))
                trials.append(Trial(number, recipe, evaluation.score))
            trial = trials[-1]
            bar.update()
            if trial.held_out is None and trial.recipe in space.alone():
                break  # without a parent's score, nothing can be compared
            if trial.held_out is not None:
                started = {*space.start()} == {t.recipe for t in trials}
                if alone and started and (warning := geometry.barrier(space, trials)):
                    logger.warning(warning)
                lam, value = trial.recipe.lam[-1], trial.held_out.value
                if value > best:
                    best, at = value, f"best {value:.4f} at {space.label(trial.recipe)}"
                bar.set_postfix_str(at)
                if number not in history:
                    took.append(time.monotonic() - clock)
                if alone and bar.disable:
                    told = f"{space.label(trial.recipe)} scores {value:.4f}, {at}"
                    line = _line(number, total, told, took if number not in history else ())
                    tqdm.write(line, file=sys.stderr)
                numbers = {
                    naming.SEARCH_OBJECTIVE: value,
                    naming.SEARCH_LAMBDA: lam,
                    naming.SEARCH_BEST: best,
                }
                outbox.metrics += [tracking.metric(k, v, number) for k, v in numbers.items()]
            if number in history:
                continue
            try:
                outbox.flush(patiently=False)
                away = False
            except StoreError as error:  # the search continues
                if not away:
                    logger.warning(
                        "%s; the search continues, and its scores are kept in %s",
                        *(error.what, job.journal.folder),
                    )
                away = True
    outbox.flush(patiently=True)
    return [replace(t, run_id=outbox.runs.get(t.number, t.run_id)) for t in trials]


def _next(job: Job, trials: Sequence[Trial], asked: list[Recipe]) -> Recipe | None:
    """The recipe to evaluate next: one that was begun, or else what the method asks for."""
    return asked.pop(0) if asked else job.method.proceed(job.space, trials, job.spec)


def _beside(job: Job, trials: Sequence[Trial], recipe: Recipe) -> list[Recipe]:
    """What is evaluated beside a recipe where its batches cannot be cut over the workers."""
    count = min(job.bench.engine.size, AT_ONCE)
    if job.method.beside is None or count < 2 or not job.bench.held_out.lm.stays_whole:
        return []
    found: list[Recipe] = []
    while len(found) < count - 1:
        another = job.method.beside(job.space, trials, job.spec, [recipe, *found])
        if another is None:
            break
        found.append(another)
    return found


def _foresee(job: Job, trials: Sequence[Trial], history: Mapping[int, Trial]) -> list[Recipe]:
    """What the search will ask for whatever the scores are, after the trials of earlier runs."""
    later = [history[number] for number in sorted(history) if number >= len(trials)]
    known = [*trials, *later]
    return job.method.foresee(job.space, known, job.spec, job.bench.engine.most)


def _line(number: int, total: int | None, told: str, took: Sequence[float]) -> str:
    """A line about a trial for a log file, where no progress bar is shown.

    Args:
        number: the number of the trial, from 0.
        total: the largest number of trials, if it is known.
        told: what it found.
        took: the seconds of each evaluation of this process; none if this is not one of them.
    """
    line = f"trial {number + 1}{f'/{total}' if total else ''}: {told}; "
    if not took:
        return line + "scored by an earlier run"
    line += f"{took[-1]:.1f} s"
    if total and (left := total - number - 1) > 0:
        line += f", {ends_by(left, took)}"
    return line


def find_recipe(
    job: Job, run_id: str, *, alone: bool = True, check: Callable[[], None] = lambda: None
) -> Found:
    """The recipe that the method of a job finds for its parents, with all trials.

    Args:
        job: the request.
        run_id: the search run.
        alone: as in `explore`.
        check: as in `explore`.

    Raises:
        ObjectiveError: a parent or the chosen recipe has no finite score.
        StoreError: as in `explore`.
    """
    _log_request(job, run_id)
    trials = explore(job, run_id, alone=alone, check=check)
    parents = tuple(
        scored(trials, recipe, str(version))
        for recipe, version in zip(job.space.alone(), job.references, strict=True)
    )
    recipe = job.method.choose(job.space, trials, job.spec)
    score = scored(trials, recipe, "the soup")
    _mark(job, run_id, trials, recipe, score)
    return Found(
        *(job.spec.method, job.versions, recipe, score, job.references, parents, tuple(trials))
    )


def _mark(job: Job, run_id: str, trials: Sequence[Trial], recipe: Recipe, score: Score) -> None:
    """Let the search run and the trial show what was chosen: another trial may score higher."""
    chosen = next(trial for trial in trials if trial.recipe == recipe)
    try:
        name = naming.run_name(f"{job.space.label(recipe)} (chosen)")
        tags = {naming.CHOSEN: "yes", "mlflow.runName": name}
        with asking("mark the chosen trial"):
            tracking.log(job.client, chosen.run_id, tags=tags)
    except DeniedError:  # the run of another user, whose score this search took over
        logger.warning("you may not mark run %s as the chosen trial", chosen.run_id)
    numbers = {
        naming.SEARCH_OBJECTIVE: score.value,
        naming.SEARCH_LAMBDA: recipe.lam[-1],
        naming.SEARCH_BEST: score.value,
    }
    metrics = [tracking.metric(key, value, len(trials)) for key, value in numbers.items()]
    tracking.log(job.client, run_id, metrics=metrics)


def trusted(job: Job, run_id: str) -> Trust:
    """Which stored scores count for a job whose run is open."""
    return trust_of(job.client, job.spec, job.client.experiment_of(run_id)).to_sign


def _history(job: Job, trust: Trust) -> dict[int, Trial]:
    """The trials of earlier runs with the same key: those that count, and fit the request."""
    evaluator, digests = job.bench.held_out, [o.parent.digest for o in job.opened]

    def measured_of(recipe: Recipe, tags: Mapping[str, str]) -> str:
        if recipe.method not in ("linear", job.method.needs):
            raise ValueError("it is of another method")
        if recipe.method == "linear":
            parts = list(zip(digests, recipe.lam, strict=True))
        else:  # registration compares this digest with that of the soup it writes
            parts = [(tags[naming.DIGEST], 1.0)]
        return measured_key(evaluator, parts)

    found = read_trials(trust, job.key, measured_of, evaluator.fits)
    return {trial.number: trial for trial in found}


def _now() -> int:
    return int(time.time() * 1000)


def _evaluate(job: Job, recipe: Recipe, evaluator: Evaluator, trust: Trust) -> Evaluation:
    """Score a recipe, or take its score over from an earlier evaluation."""
    began = _now()
    if recipe.method == "linear":
        return _finish(job, recipe, evaluator, trust, _mixture(job, recipe), began)
    with scratch() as folder:
        parents = [o.checkpoint for o in job.opened]
        made = soup.write(parents, recipe.lam, folder, digests=False, blend=job.blend(recipe))
        mixture = Mixture((made.checkpoint,), (digest(made.checkpoint),), (1.0,))
        return _finish(job, recipe, evaluator, trust, mixture, began)


def _mixture(job: Job, recipe: Recipe) -> Mixture:
    return mixture_of(job.opened, recipe.lam, job.spec.parents_in)


def _finish(
    job: Job, recipe: Recipe, evaluator: Evaluator, trust: Trust, mixture: Mixture, began: int
) -> Evaluation:
    measured = _name_of(evaluator, mixture)
    tags = {} if recipe.method == "linear" else {naming.DIGEST: mixture.digests[0]}
    scores, source = job.journal.read(measured), ""
    if scores is None and not job.bench.engine.expects(measured):
        scores, source = _stored(trust, measured, evaluator)
    if scores is None:
        scores = _score(job, recipe, evaluator, mixture)
    if scores.failed:
        logger.warning("%s failed: %s", recipe.label, scores.failed)
        tags[naming.FAILED], scores = scores.failed, None
    return Evaluation(recipe, measured, scores, source, tags, began, _now())


def _name_of(evaluator: Evaluator, mixture: Mixture) -> str:
    return measured_key(evaluator, list(zip(mixture.digests, mixture.lam, strict=True)))


def _stored(trust: Trust, measured: str, evaluator: Evaluator) -> tuple[Scores | None, str]:
    """The scores that a run holds, and this run; None and empty if there is none that counts."""
    with contextlib.suppress(StoreError):  # if the store is unreachable, score the recipe again
        known = find_score(trust.hasty, measured, evaluator.fits)
        if known is not None:
            return known.scores, known.run_id
    return None, ""


def _score(job: Job, recipe: Recipe, evaluator: Evaluator, mixture: Mixture) -> Scores:
    """Score a recipe; the journal keeps the scores."""
    measured, linear = _name_of(evaluator, mixture), recipe.method == "linear"

    def evaluate() -> Scores:
        engine = job.bench.engine if linear else job.bench.inline
        try:
            answers = engine.answer(measured, evaluator, mixture)
            begin = time.monotonic()
            score = evaluator.score(*answers.parts)
        except NonFiniteError as error:  # another try gives the same; other errors end the run
            if not linear:
                raise  # other statistics might give finite scores
            return Scores({}, failed=error.what[:5000])
        about = {
            naming.SECONDS_MERGE: answers.merge,
            naming.SECONDS_EVALUATE: answers.evaluate + time.monotonic() - begin,
            naming.TRUNCATED: evaluator.truncated,
        }
        return Scores({"": score}, about)

    return job.journal.recall(measured, evaluate)


def expect(job: Job, trust: Trust, recipes: Sequence[Recipe]) -> None:
    """Let idle workers begin what a job will ask for, whatever the scores are until then.

    Args:
        job: the job.
        trust: which stored scores count.
        recipes: what it will ask for, in order.
    """
    engine, evaluator = job.bench.engine, job.bench.held_out
    for recipe in recipes if engine.most else ():
        if recipe.method != "linear":
            continue  # this process makes its weights
        mixture = _mixture(job, recipe)
        measured = _name_of(evaluator, mixture)
        if not engine.offer(measured) or job.journal.read(measured) is not None:
            continue
        if _stored(trust, measured, evaluator)[0] is None:
            arrived = partial(_score, job, recipe, evaluator, mixture)
            engine.expect(measured, evaluator, mixture, arrived)
    engine.begin()


def in_turn(jobs: Sequence[Job], run_id: str) -> Iterator[Job]:
    """Each job, while idle workers begin what the later ones will ask for.

    Args:
        jobs: the jobs of one session.
        run_id: the run that they belong to.
    """
    for number, job in enumerate(jobs):
        if most := job.bench.engine.most:
            trust = trusted(job, run_id)
            for later in jobs[number:]:
                expect(later, trust, later.method.foresee(later.space, (), later.spec, most))
        yield job


def _publish(
    job: Job,
    client: Store,
    parent: str,
    name: str,
    tags: Mapping[str, str],
    evaluation: Evaluation,
    evaluator: Evaluator,
    *,
    tried: bool = False,
) -> str:
    """Write an evaluation as a separate run, ended once everything is stored; the id of the run."""
    recipe, scores = evaluation.recipe, evaluation.scores
    known = {naming.EVALUATOR: evaluator.fingerprint, naming.ATTEMPT: evaluation.attempt, **tags}
    child = tracking.begin_child(client, parent, name, known, evaluation.began, tried=tried)
    weights = json.dumps(recipe.lam)
    inputs.link(client, child, _used(evaluator))
    params = {"lambda": str(recipe), "method": recipe.method, "weights": weights}
    params |= evaluator_params(evaluator)
    if isinstance(job.space, Schedule) and (found := job.space.window_of(recipe)):
        params |= dict(zip(("duration", "power"), map(str, found), strict=True))
    metrics, more = [], dict(evaluation.tags)
    if scores is not None:
        if evaluation.source:
            more[naming.ITEMS_RUN] = evaluation.source
        else:
            about = {"measured": evaluation.measured}
            log_scores(client, child, scores, naming.ITEMS, about)
        more[naming.MEASURED] = evaluation.measured
        numbers = {**scores.about, naming.STDERR: scores.mean.stderr}
        metrics = [tracking.metric(key, value) for key, value in numbers.items()]
        metrics += score_metrics(scores.mean, naming.HELD_OUT)
    tracking.log(client, child, params=params, metrics=metrics, tags=more)
    status = "FAILED" if scores is None else "FINISHED"
    client.set_terminated(child, status, evaluation.ended)
    job.journal.drop(evaluation.measured)
    return child


def look(job: Job, run_id: str, recipe: Recipe, evaluator: Evaluator) -> Score:
    """A recipe's score by another evaluator than the job's, in a run that no search reads.

    Raises:
        NonFiniteError: the score is not finite.
    """
    name = f"{recipe.label} of {listed(job.versions)}"
    return measure(job, run_id, recipe, evaluator, name=name)[0]


def measure(
    job: Job,
    run_id: str,
    recipe: Recipe,
    evaluator: Evaluator,
    *,
    name: str,
    tags: Mapping[str, str] = MappingProxyType({}),
    more: Callable[[Score], Mapping[str, float]] = lambda score: {},
) -> tuple[Score, str]:
    """A recipe's score, and its run, which no search reads.

    Args:
        job: the parents, and the live model.
        run_id: the run whose child the new run is.
        recipe: what to score.
        evaluator: what scores it.
        name: the name of the run.
        tags: more tags of the run.
        more: score → more metrics of the run.

    Raises:
        NonFiniteError: the score is not finite.
    """
    evaluation = _evaluate_once(job, run_id, recipe, evaluator)
    tags = {naming.ROLE: "look", **tags}
    if (scores := evaluation.scores) is not None:
        about = {**scores.about, **more(scores.mean)}
        evaluation = replace(evaluation, scores=replace(scores, about=about))
    child = _publish(job, job.client, run_id, name, tags, evaluation, evaluator)
    return _finite(evaluation), child


def score_of(job: Job, run_id: str, recipe: Recipe, evaluator: Evaluator) -> Score:
    """A recipe's score, without a run of its own; it has usually been measured already.

    Raises:
        NonFiniteError: the score is not finite.
    """
    return _finite(_evaluate_once(job, run_id, recipe, evaluator))


def _evaluate_once(job: Job, run_id: str, recipe: Recipe, evaluator: Evaluator) -> Evaluation:
    """Score one recipe of a job, outside of a search."""
    return _evaluate(job, recipe, evaluator, trusted(job, run_id))


def _finite(evaluation: Evaluation) -> Score:
    """The score of an evaluation.

    Raises:
        NonFiniteError: it is not finite.
    """
    if evaluation.score is None:
        raise NonFiniteError(
            evaluation.tags[naming.FAILED],
            where=evaluation.recipe.label,
            fix="leave this recipe out",
        )
    return evaluation.score


def scored(trials: Sequence[Trial], recipe: Recipe, what: str) -> Score:
    """A recipe's held-out score.

    Raises:
        ObjectiveError: the evaluation of the recipe failed.
    """
    for trial in trials:
        if trial.recipe == recipe and trial.held_out is not None:
            return trial.held_out
    raise ObjectiveError(
        f"{what} has no finite score",
        where=f"{recipe.label}; the tag {naming.FAILED} of its run says why",
        fix="choose other versions or tasks: each parent and the soup need a finite score",
    )
