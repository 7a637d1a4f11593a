"""Score a soup, its parents and its rivals on the test set, once, when all decisions are made.

The score of a version on these items is stored in a run of its own. It depends on the weights and
the items alone, so every request for the same score finds it.
"""

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.records import Examination, Score, Soup, Unbiased, Version
from mlflow_soup.registry import inputs, naming, tracking
from mlflow_soup.registry.evaluations import find_score, log_test
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.trust import Trust
from mlflow_soup.workflows.bench import (
    Bench,
    Opened,
    bench_for,
    check_stored,
    evaluator_params,
    measured_key,
    mixture_of,
)
from mlflow_soup.workflows.job import Job

Models = Mapping[str, tuple[Version, str]]  # role → version, and the digest of its tensors


def models_of(
    soup: Soup,
    parents: Sequence[Opened],
    champions: Sequence[Opened],
    examination: Examination | None,
) -> Models:
    """What is scored: what was examined, or else the soup, its parents and the champions.

    The soup may stand where a champion stood by now, so an examination tells better.

    Args:
        soup: the soup.
        parents: the parents that it is compared with.
        champions: the versions that it would replace.
        examination: the evidence of the gate, if it ran.
    """
    if examination is not None:
        return {role: (e.version, e.digest) for role, e in examination.roles.items()}
    others = [c.parent for c in champions if c.parent.digest != soup.digest]
    return {
        "soup": (soup.version, soup.digest),
        **{f"parent {i}": (p.parent.version, p.parent.digest) for i, p in enumerate(parents)},
        **{f"champion {i}": (c.version, c.digest) for i, c in enumerate(others)},
    }


def score_once(
    job: Job,
    trust: Trust,
    run_id: str,
    models: Models,
    at_hand: Sequence[Opened],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Unbiased]:
    """The score of each model on the test set. What is stored, and counts, is not measured again.

    Args:
        job: the request.
        trust: which earlier runs count.
        run_id: the search run; new test runs are its children.
        models: what to score.
        at_hand: versions that are open already.
        check: raises if another process took over.

    Raises:
        ParentError: a version that is not scored yet is missing or damaged.
        NonFiniteError: a score is not finite.
    """
    known = {digest: _find(trust, job.bench, digest) for _, digest in models.values()}
    left = {digest: version for version, digest in models.values() if known[digest] is None}
    opened = {o.parent.digest: o for o in at_hand}
    for digest, version in tqdm(left.items(), "test set", unit="model", disable=not left or None):
        check()
        one = opened.get(digest) or check_stored(job.client, version, digest, fresh=False)
        known[digest] = _score(job, trust, run_id, version, one)
    check()
    return {
        role: Unbiased(version, score)
        for role, (version, digest) in models.items()
        if (score := known[digest]) is not None
    }


def _test(bench: Bench) -> Evaluator:
    assert bench.test is not None
    return bench.test


def _find(trust: Trust, bench: Bench, digest: str) -> Score | None:
    """The stored score of a model that this bench would score; None if there is none."""
    measured = measured_key(_test(bench), [(digest, 1.0)])
    found = find_score(trust, measured, _test(bench).fits)
    return None if found is None else found.scores.mean


def _score(job: Job, trust: Trust, run_id: str, version: Version, opened: Opened) -> Score:
    """Score a version, and store the score in a run."""
    client, digest = job.client, opened.parent.digest
    bench = bench_for(job.bench, opened, job.opened[-1].checkpoint)
    if bench is not job.bench and (stored := _find(trust, bench, digest)) is not None:
        return stored
    evaluator = _test(bench)
    measured = measured_key(evaluator, [(digest, 1.0)])

    def evaluate() -> Scores:
        answers = bench.engine.answer(measured, evaluator, mixture_of([opened]))
        return Scores({"": evaluator.score(*answers.parts)})

    score = job.journal.recall(measured, evaluate).mean
    name = f"test {version}"
    tags = {
        "mlflow.runName": naming.run_name(name),
        naming.ROLE: "test",
        naming.VERSION: f"{version.name}/{version.number}",
        naming.DIGEST: digest,
        naming.EVALUATOR: evaluator.fingerprint,
        naming.MEASURED: measured,
    }
    datasets = evaluator.datasets
    with tracking.open_child(client, run_id, name, tags) as test_run:
        tracking.log(client, test_run, params=evaluator_params(evaluator))
        used = {inputs.TEST: [*datasets.values()]}
        inputs.link(client, test_run, used, [opened.parent.model_id])
        log_test(
            client,
            test_run,
            Unbiased(version, score),
            measured=measured,
            model_id=opened.parent.model_id,
            datasets=datasets,
        )
    job.journal.drop(measured)  # only now: a run counts once it has ended
    return score
