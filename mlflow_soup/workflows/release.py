"""The stages of a registered soup: score it out of domain, judge it, promote it.

The command `run` runs all stages in one process; a pipeline can also run each as its own step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mlflow_soup.decision import gate as gates
from mlflow_soup.errors import GateError, SpecError
from mlflow_soup.records import Evidence, Score, Soup, Verdict, Version
from mlflow_soup.registry import naming, promotion, tracking
from mlflow_soup.registry.evaluations import log_evidence, read_evidence, read_trials
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.versions import find_model, policy, resolve, set_tags, soup_tags, tags_of
from mlflow_soup.reporting import report
from mlflow_soup.request.names import Target, parse_target, parse_version
from mlflow_soup.request.spec import Spec
from mlflow_soup.search.space import Space
from mlflow_soup.workflows.bench import (
    Bench,
    Opened,
    check_stored,
    conditions,
    contenders,
    examine,
    forget,
    load_suites,
    open_journal,
    open_rivals,
    open_version,
    rivals,
    set_up,
)
from mlflow_soup.workflows.job import Job


def examine_once(
    job: Job,
    run_id: str,
    soup: Soup,
    known: Mapping[str, Score],
    at_hand: Sequence[Opened],
    check: Callable[[], None] = lambda: None,
) -> tuple[str, Mapping[str, Evidence]]:
    """The OOD run and its evidence. Evidence that an earlier run measured is not measured again."""
    client, bench = job.client, job.bench
    stored = check_stored(client, soup.version, soup.digest)
    champions = open_rivals(client, job.session.name, job.spec, at_hand)
    models = contenders(stored, job.opened, champions)
    needed = {opened.parent.digest for opened in models.values()}
    measured: dict[str, Evidence] = {}
    tags = _tags(soup.version, soup.digest, conditions(bench))
    earlier = tracking.find_runs(client, {naming.CONDITIONS: tags[naming.CONDITIONS]})
    for found in reversed(earlier):
        if found.info.status != "FINISHED" or needed <= set(measured):
            continue
        roles = read_evidence(client, found.info.run_id)
        digests = {evidence.digest for evidence in roles.values()}
        if found.data.tags[naming.VERSION] == tags[naming.VERSION] and needed <= digests:
            return found.info.run_id, roles
        measured |= {evidence.digest: evidence for evidence in roles.values()}
    with tracking.open_child(client, run_id, f"OOD {soup.version}", tags) as ood_run:
        roles = _examine(client, ood_run, bench, models, known, measured, job.journal, check)
    forget(bench, roles, job.journal)
    return ood_run, roles


def _examine(
    client: Store,
    run_id: str,
    bench: Bench,
    models: Mapping[str, Opened],
    known: Mapping[str, Score],
    measured: Mapping[str, Evidence],
    journal: Journal,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Evidence]:
    """Score all models out of domain, and store the evidence in a run."""
    roles = examine(bench, models, known, measured, journal, check)
    assert bench.ood is not None
    model_ids = {role: opened.parent.model_id for role, opened in models.items()}
    datasets = {
        naming.HELD_OUT: bench.held_out.fingerprint,
        naming.OOD: bench.ood.fingerprint,
    }
    log_evidence(client, run_id, roles, model_ids, datasets)
    return roles


def judge(
    client: Store, version: Version, roles: Mapping[str, Evidence], spec: Spec, ood_run: str
) -> Verdict:
    """The gate's verdict. It is written to the version and to the OOD run before it is returned."""
    parents = [evidence for role, evidence in roles.items() if role.startswith("parent")]
    rules = gates.Rules(spec.margin, spec.confidence)
    champions = [evidence for role, evidence in roles.items() if role.startswith("champion")]
    verdict = gates.judge(roles["soup"], parents, champions, rules)
    word = naming.PASSED if verdict.passed else naming.REFUSED
    for run_id in (ood_run, tags_of(client, version)[naming.RUN_ID]):
        tracking.log(client, run_id, tags={naming.GATE: word})
    client.log_text(ood_run, report.checks_table(verdict) + "\n", "gate.md")
    set_tags(client, version, {naming.GATE_RUN: ood_run, naming.GATE: word})
    return verdict


def _tags(version: Version, digest: str, key: str) -> dict[str, str]:
    return {
        "mlflow.runName": f"OOD {version}",
        naming.ROLE: "ood",
        naming.VERSION: f"{version.name}/{version.number}",
        naming.DIGEST: digest,
        naming.CONDITIONS: key,
    }


def _soup_version(client: Store, spec: Spec) -> tuple[Version, dict[str, str]]:
    """The registered soup that `spec.version` names, and its tags.

    Raises:
        SpecError: no version was named, or the version is not a soup.
    """
    if not spec.version:
        raise SpecError(
            "no version was named", where="--version", fix="name the soup: --version v14"
        )
    ref = parse_version(spec.version)
    name = find_model(client, spec.model, [ref])
    version = resolve(client, name, ref)
    return version, soup_tags(client, version)


@asking("evaluate the soup")
def evaluate(spec: Spec) -> dict[str, Evidence]:
    """Score a registered soup, its parents and the champion out of domain, in a separate run.

    Args:
        spec: `version` names the soup.

    Returns:
        Role (`soup`, `parent 0`, `parent 1` …, `champion 0` …) → evidence. `gate` reads the
        evidence from MLflow.

    Raises:
        SpecError: the version is not a soup, or there are no tasks.
        ParentError: the soup, a parent or the champion is missing or damaged.
    """
    client = connect(60.0 * spec.store_patience)
    version, tags = _soup_version(client, spec)
    spec = spec.settle(policy(client, version.name))
    suites = load_suites(spec)
    if suites[1] is None:
        raise SpecError(
            "there are no out-of-domain tasks",
            where="--ood-tasks, and the registered model has no tag soup.ood_tasks",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    soup = check_stored(client, version, tags[naming.DIGEST])
    parents = [
        open_version(client, v) for v in naming.parse_parents(version.name, tags[naming.PARENTS])
    ]
    champions = open_rivals(client, version.name, spec, parents)
    models = contenders(soup, parents, champions)
    bench = set_up(spec, soup.checkpoint, suites)
    known: dict[str, Score] = {}
    # scores of the search are known if it used the same evaluator
    if tags.get(naming.EVALUATOR) == bench.held_out.fingerprint:
        scores = {
            t.recipe.lam: t.held_out
            for t in read_trials(client, tags[naming.KEY])
            if t.held_out is not None
        }
        alone = Space.simplex(len(parents), 0.0).parents()
        digests = {r.lam: p.parent.digest for r, p in zip(alone, parents, strict=True)}
        digests[naming.parse_weights(tags[naming.WEIGHTS])] = tags[naming.DIGEST]
        known = {digests[lam]: score for lam, score in scores.items() if lam in digests}
    journal = open_journal()
    ood_tags = _tags(version, tags[naming.DIGEST], conditions(bench))
    with tracking.open_run(client, spec.experiment, ood_tags) as run_id:
        roles = _examine(client, run_id, bench, models, known, {}, journal)
        tracking.log(client, run_id, tags={"mlflow.note.content": report.ood_table(roles)})
    forget(bench, roles, journal)
    return roles


@asking("judge the soup")
def gate(spec: Spec) -> tuple[Version, Verdict]:
    """Judge a soup by its newest OOD run, and write the verdict to its tags.

    Args:
        spec: `version` names the soup; `margin` and `confidence` are the rules.

    Raises:
        GateError: the soup was never scored out of domain, or not together with the version that
            it would replace now.
    """
    client = connect(60.0 * spec.store_patience)
    version, tags = _soup_version(client, spec)
    spec = spec.settle(policy(client, version.name))
    about = {naming.ROLE: "ood", naming.DIGEST: tags[naming.DIGEST]}
    runs = [r for r in tracking.find_runs(client, about) if r.info.status == "FINISHED"]
    if not runs:
        raise GateError(
            f"{version} was never scored out of domain",
            where=version.uri,
            fix=_how_to_evaluate(version),
        )
    roles = _evidence(client, version, runs[-1].info.run_id)
    for rival in rivals(client, version.name, spec):
        _check_examined(client, version, rival, roles)
    return version, judge(client, version, roles, spec, runs[-1].info.run_id)


def _evidence(client: Store, version: Version, run_id: str) -> dict[str, Evidence]:
    """The evidence of an OOD run about a soup, with the soup's current version number.

    Raises:
        GateError: the evidence is lost or damaged.
    """
    roles = read_evidence(client, run_id) if run_id else {}
    if "soup" not in roles:
        raise GateError(
            f"the out-of-domain scores of {version} are lost or damaged",
            where=f"artifacts of run {run_id}"
            if run_id
            else f"{version.uri}: the tag {naming.GATE_RUN} is missing",
            fix=_how_to_evaluate(version),
        )
    return roles | {"soup": replace(roles["soup"], version=version)}


def _how_to_evaluate(version: Version) -> str:
    return (
        f"run mlflow-soup evaluate --model {version.name} --version v{version.number}, then "
        "mlflow-soup gate; with --promote, evaluate also scores the version at that target"
    )


def _check_examined(
    client: Store, version: Version, rival: Version, roles: Mapping[str, Evidence]
) -> None:
    """Refuse a verdict that does not cover the version that the soup would replace now.

    Raises:
        GateError: the rival's weights were not scored together with the soup.
    """
    if rival in {evidence.version for evidence in roles.values()}:
        return
    digest = open_version(client, rival).parent.digest
    if digest not in {evidence.digest for evidence in roles.values()}:
        raise GateError(
            f"{version} would replace {rival}, but the two were not scored out of domain together",
            where=rival.uri,
            fix=_how_to_evaluate(version),
        )


def point(client: Store, version: Version, target: Target) -> Version:
    """Promote a soup if the gate passed it and the verdict still applies."""

    def check(standing: Version) -> None:
        gate_run = tags_of(client, version).get(naming.GATE_RUN, "")
        roles = _evidence(client, version, gate_run)
        _check_examined(client, version, standing, roles)

    return promotion.promote(client, version, target, check)


@asking("promote the soup")
def promote(spec: Spec) -> tuple[Version, str]:
    """Point an alias, a stage or another model's alias to a soup that passed the gate.

    Args:
        spec: `version` names the soup, `promote` the target.

    Returns:
        The version that the target points to now, and the target in words.

    Raises:
        GateError: the soup has not passed the gate, or not against the version at the target now.
        StoreError: the store holds other bytes than the gate judged.
        OvertakenError: another promotion moved the target meanwhile.
    """
    if not spec.promote:
        raise SpecError(
            "no target was named",
            where="--promote",
            fix="name a target: --promote alias:champion",
        )
    client = connect(60.0 * spec.store_patience)
    version, tags = _soup_version(client, spec)
    target = parse_target(spec.promote)
    check_stored(client, version, tags[naming.DIGEST])
    return point(client, version, target), str(target)
