"""The stages of a registered soup: score it out of domain, judge it, promote it.

The command `run` runs all stages in one process; a pipeline can also run each as its own step.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace

from mlflow_soup.errors import DeniedError, SpecError
from mlflow_soup.files.signing import open_verifier
from mlflow_soup.records import (
    Evidence,
    Examination,
    Manifest,
    Promotion,
    Score,
    Soup,
    Version,
)
from mlflow_soup.redaction import redact
from mlflow_soup.registry import inputs, naming, probes, promotion, tracking
from mlflow_soup.registry.alone import alone
from mlflow_soup.registry.descriptions import describe, description_of
from mlflow_soup.registry.evaluations import find_examinations, find_score, log_examination
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.trees import tree_of
from mlflow_soup.registry.trust import Trust, sign_file, trust_of
from mlflow_soup.registry.versions import (
    find_model,
    resolve,
    set_tags,
)
from mlflow_soup.reporting import answers, report
from mlflow_soup.request import knobs
from mlflow_soup.request.names import Target, parse_target, parse_version
from mlflow_soup.request.spec import SCORE, Spec
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.signature import check_library, open_tree_signer
from mlflow_soup.workflows.bench import (
    Bench,
    Opened,
    check_machine,
    check_stored,
    conditions,
    contenders,
    evaluator_params,
    examine,
    forget,
    judged,
    load_suites,
    measured_key,
    no_ood_tasks,
    open_journal,
    open_rivals,
    open_version,
    set_up,
    settings,
)
from mlflow_soup.workflows.job import Job
from mlflow_soup.workflows.merge import fetch
from mlflow_soup.workflows.portrait import portray
from mlflow_soup.workflows.proof import (
    Decision,
    check_tags,
    decide,
    owner_of,
    prove,
    require_passed,
    settle_rules,
    standard_of,
    version_of,
)
from mlflow_soup.workflows.signed import add_signature, require_signature
from mlflow_soup.workflows.verify import read_manifest

logger = logging.getLogger("mlflow_soup")


def examine_once(
    job: Job,
    trust: Trust,
    run_id: str,
    soup: Soup,
    manifest: Manifest,
    known: Mapping[str, Score],
    at_hand: Sequence[Opened],
    check: Callable[[], None] = lambda: None,
) -> Examination:
    """The evidence about a soup. What an earlier run measured, and counts, is not measured again.

    Args:
        job: the request.
        trust: which earlier runs count.
        run_id: the search run; a new OOD run is its child.
        soup: the registered soup.
        manifest: its manifest.
        known: digest → held-out score that the search measured.
        at_hand: versions that are open already.
        check: raises if another process took over.
    """
    client, bench = job.client, job.bench
    stored = check_stored(client, soup.version, soup.digest, fresh=False)  # `prove` fetched it
    champions = open_rivals(client, job.session.name, job.spec, at_hand)
    parents = judged(job.mixed(soup.recipe), scheduled=job.spec.scheduled)
    models = contenders(stored, parents, champions)
    needed = {opened.parent.digest for opened in models.values()}
    measured: dict[str, Evidence] = {}
    tags = _tags(soup.version, soup.digest, conditions(bench))
    for found in find_examinations(trust, {naming.CONDITIONS: tags[naming.CONDITIONS]}):
        if needed <= set(measured):
            break
        if not _is_alike(found, bench, manifest):
            continue
        digests = {evidence.digest for evidence in found.roles.values()}
        if found.roles["soup"].version == soup.version and needed <= digests:
            return found
        measured |= {evidence.digest: evidence for evidence in found.roles.values()}
    with tracking.open_child(client, run_id, f"OOD {soup.version}", tags) as ood_run:
        at = (client, ood_run, bench, manifest)
        examination = _examine(*at, models, known, measured, job.journal, check)
    forget(bench, examination.roles, job.journal)
    return examination


def _is_alike(found: Examination, bench: Bench, manifest: Manifest) -> bool:
    """Whether an examination scored the same items in the same way."""
    assert bench.ood is not None
    now = settings(bench, manifest)
    return (
        "soup" in found.roles
        and all(
            found.settings.get(key) == now[key] for key in ("held_out", "ood", "limit", "inherited")
        )
        and all(bench.held_out.fits(e.held_out) for e in found.roles.values())
        and all(bench.ood.fits_each(dict(e.ood)) for e in found.roles.values())
    )


def _examine(
    client: Store,
    run_id: str,
    bench: Bench,
    manifest: Manifest,
    models: Mapping[str, Opened],
    known: Mapping[str, Score],
    measured: Mapping[str, Evidence],
    journal: Journal,
    check: Callable[[], None] = lambda: None,
) -> Examination:
    """Score all models out of domain, and store the evidence in a run.

    The evidence counts once the run has ended. Until then the journal must keep the scores.
    """
    assert bench.ood is not None
    model_ids = {role: opened.parent.model_id for role, opened in models.items()}
    used = {inputs.HELD_OUT: bench.held_out, inputs.OOD: bench.ood}
    inputs.link(
        client,
        run_id,
        {context: [*evaluator.datasets.values()] for context, evaluator in used.items()},
        [*model_ids.values()],
    )
    tracking.log(client, run_id, params=evaluator_params(bench.held_out))
    roles = examine(bench, models, known, measured, journal, check)
    examination = Examination(run_id, roles, settings(bench, manifest))
    datasets = {naming.HELD_OUT: bench.held_out.datasets, naming.OOD: bench.ood.datasets}
    log_examination(client, examination, model_ids, datasets)
    return examination


def record(client: Store, decision: Decision, *runs: str) -> bool:
    """Write a verdict for people to read: to the OOD run, then to the version.

    A user who may not write to the OOD run writes nothing to the version either. Both are only for
    people: the verdict holds all the same, and a warning says what is not written.

    Args:
        client: the store's client.
        decision: the decision.
        runs: more runs that get the verdict, which are the user's own.

    Returns:
        Whether the verdict is on the version.
    """
    verdict, version = decision.verdict, decision.proven.version
    ood_run = decision.examination.run_id
    word = naming.PASSED if verdict.passed else naming.REFUSED
    rules = json.dumps(rules_told(decision), sort_keys=True)
    scores = report.ood_table(decision.examination.roles)
    parts = [answers.verdict_line(verdict, version.name), scores, report.checks_table(verdict)]
    table = redact("\n\n".join([*parts, report.luckless(verdict)]).rstrip() + "\n")
    about = {"soup": decision.proven.digest, "verdict": word, "rules": rules_told(decision)}
    told = {naming.GATE: word, naming.GATE_RULES: rules}
    for run_id in runs:
        tracking.log(client, run_id, tags=told)
    try:
        # before the files: an artifact store without permissions of its own would take these
        with asking("write to its OOD run"):
            tracking.log(client, ood_run, tags=told, description=table)
            client.log_text(ood_run, table, "gate.md")
            sign_file(client, ood_run, "gate.md", table, "verdict", about)
    except DeniedError as error:
        logger.warning("this verdict is not recorded: %s", error.what)
        return False
    tags = {naming.GATE_RUN: ood_run, naming.GATE: word}
    try:
        set_tags(client, version, tags)
    except DeniedError:
        logger.warning(
            "you may not write the tags of %s, so the verdict is only on run %s", version, ood_run
        )
        return False
    return True


def rules_told(decision: Decision) -> dict[str, object]:
    """The rules of a verdict, with the number of items of each OOD task."""
    soup = decision.examination.of(decision.proven.digest)
    assert soup is not None
    counts = {task: sum(len(i.ids) for i in score.items) for task, score in soup.ood}
    judged = decision.verdict.rules.tasks or tuple(counts)
    return {
        **asdict(decision.verdict.rules),
        "tasks": {task: counts[task] for task in judged},
        "evaluator": decision.examination.settings["ood"],
    }


def _tags(version: Version, digest: str, key: str) -> dict[str, str]:
    return {
        "mlflow.runName": naming.run_name(f"OOD {version}"),
        naming.ROLE: "ood",
        naming.VERSION: f"{version.name}/{version.number}",
        naming.DIGEST: digest,
        naming.CONDITIONS: key,
    }


def _open_request(
    spec: Spec, *, evaluates: bool = False, promotes: bool = False
) -> tuple[Store, Version, Spec]:
    """The store, the version that `spec.version` names, and the spec with the rules that hold.

    Args:
        spec: the request.
        evaluates: whether the command will evaluate, and so write to the experiment.
        promotes: whether it will write to the model that owns the target, and to its ledger.

    Raises:
        DeniedError: the user may not read the model, or not write what the command will write.
        SpecError: no version was named, or the command line is looser than the rules.
    """
    if not spec.version:
        raise SpecError(
            "no version was named", where="--version", fix="name the soup: --version v14"
        )
    client = connect(60.0 * spec.store_patience)
    ref = parse_version(spec.version)
    name = find_model(client, spec.model, [ref])
    version = resolve(client, name, ref)
    if promotes:  # before the rules are read there: to promote needs more than to read
        probes.check_model(client, owner_of(spec, name))
    spec = settle_rules(client, spec, name)
    if evaluates:
        probes.check_experiment(client, spec.experiment)
    return client, version, spec


@asking("evaluate the soup")
@alone()
def evaluate(spec: Spec) -> Examination:
    """Score a registered soup, its parents and the champion out of domain, in a separate run.

    Args:
        spec: `version` names the soup.

    Returns:
        The evidence about each of them, and the run. `gate` reads the evidence from MLflow.

    Raises:
        SpecError: the version is not a soup, or there are no tasks.
        MismatchError: the soup's manifest cannot be read.
        ParentError: the soup, a parent or the champion is missing or damaged.
        StoreError: the store holds other bytes than the manifest says.
    """
    client, version, spec = _open_request(spec, evaluates=True)
    manifest = None
    if not (spec.tasks and spec.ood_tasks):
        manifest = _fetch_manifest(client, version)
        spec = _as_searched(client, spec, manifest)
    return _evaluate(client, version, spec, manifest)


def _fetch_manifest(client: Store, version: Version) -> Manifest:
    return read_manifest(fetch(version.uri, "--version", client=client, fresh=True))


def _as_searched(client: Store, spec: Spec, manifest: Manifest) -> Spec:
    """The spec; what it leaves open about scoring is as in the search that made the soup.

    The search run may be gone, or somebody else's. `evaluate` only measures: the gate judges by the
    rules of the target, whatever was measured.
    """
    run_id = str(manifest.search.get("run_id"))
    params = tracking.params_of(client, run_id, {naming.KEY: str(manifest.search.get("key"))})
    taken, told = {}, []
    for knob in fields(Spec):
        text = params.get(f"cfg.{knob.name}", "")
        scores = knob.metadata["group"] == SCORE and knob.metadata["policy"]
        scores = scores and "evaluate" in knob.metadata["commands"]
        if not scores or not text or knob.name in spec.stated:
            continue
        try:
            value = knobs.read(knob, text)
            replace(spec, **{knob.name: value})
        except SpecError:
            logger.warning(
                "search run %s: cfg.%s is %r, and is passed over", run_id, knob.name, text
            )
            continue
        taken[knob.name] = value
        told.append(f"{knobs.option(knob)} {value}")
    if told:
        logger.warning("as in the search run %s: %s", run_id, " ".join(told))
    return replace(spec, **taken)


def _evaluate(
    client: Store, version: Version, spec: Spec, manifest: Manifest | None = None
) -> Examination:
    """Score a soup and its rivals.

    Args:
        client: the store's client.
        version: the soup.
        spec: a settled spec.
        manifest: the soup's manifest, if this process has just fetched the soup.
    """
    check_machine(spec)
    suites = replace(load_suites(spec), test=None)  # of which the gate reads nothing
    if suites.ood is None:
        raise no_ood_tasks()
    manifest = manifest or _fetch_manifest(client, version)
    if manifest.digests is None or any(source.digests is None for source in manifest.sources):
        raise SpecError(
            f"the manifest of {version} holds no digests",
            where=version.uri,
            fix="name a version that mlflow-soup run registered",
        )
    soup = check_stored(client, version, manifest.digests.canonical, fresh=False)
    bench = set_up(spec, soup, suites)
    trust = trust_of(client, spec).to_sign
    known: dict[str, Score] = {}
    sources = [(s.digests.canonical, s) for s in manifest.sources if s.digests is not None]
    mixed = [(its, source.lam) for its, source in sources]
    # the search has measured these if it used the same evaluator
    for its, parts in [*((its, [(its, 1.0)]) for its, _ in sources), (soup.parent.digest, mixed)]:
        found = find_score(trust, measured_key(bench.held_out, parts), bench.held_out.fits)
        if found is not None:
            known[its] = found.scores.mean
    parents = [
        check_stored(client, version_of(source.uri), its)
        for its, source in judged(sources, scheduled=manifest.scheduled)
    ]
    champions = open_rivals(client, version.name, spec, parents)
    models = contenders(soup, parents, champions)
    ood_tags = _tags(version, soup.parent.digest, conditions(bench))
    journal = open_journal(fresh=not trust.stored)
    params = evaluator_params(bench.held_out)
    with (
        tracking.open_run(client, spec.experiment, ood_tags, params=params) as run_id,
        bench.engine,
    ):
        at = (client, run_id, bench, manifest)
        examination = _examine(*at, models, known, {}, journal)
        tracking.log(client, run_id, description=report.ood_table(examination.roles))
    forget(bench, examination.roles, journal)
    return examination


@asking("judge the soup")
@alone()
def gate(spec: Spec) -> Decision:
    """Judge a soup by its newest evidence that counts, and write the verdict for people to read.

    Args:
        spec: `version` names the soup; margin, confidence and OOD tasks are the rules, never looser
            than the policy of the model that owns the target.

    Raises:
        SpecError: the version is not a soup, or the command line is looser than the policy.
        MismatchError: the version is not what its manifest says.
        GateError: no evidence that counts covers the soup, its parents and what it would replace.
    """
    client, version, spec = _open_request(spec, evaluates=spec.evidence == "own")
    decision = _decide(client, version, spec)
    if record(client, decision):
        describe_verdict(client, decision)
    return decision


def _decide(client: Store, version: Version, spec: Spec) -> Decision:
    proven = prove(client, version)
    check_tags(proven)
    trust = trust_of(client, spec)
    soup = find_checkpoint(pull(client, version), version.uri)  # `prove` fetched it
    standard = standard_of(spec, soup, elsewhere=owner_of(spec, version.name) != version.name)
    own = spec.evidence == "own"
    examined = _evaluate(client, version, spec, proven.manifest) if own else None
    return decide(client, proven, spec, standard, trust, examined=examined)


def describe_verdict(client: Store, decision: Decision) -> None:
    """Renew what the version's description tells of the verdict."""
    version = decision.proven.version
    text = description_of(client, version)
    section = report.verdict_section(decision.verdict, decision.examination.roles)
    text = answers.renew(text, answers.verdict_line(decision.verdict, version.name))
    describe(client, version, report.renew(text, section))


def _require_passed(decision: Decision) -> None:
    require_passed(
        decision, [report.format_check(c) for c in decision.verdict.checks if not c.passed]
    )


def point(client: Store, decision: Decision, target: Target) -> Promotion:
    """Promote a soup, after a check that the verdict allows it and still applies."""
    _require_passed(decision)
    version = decision.proven.version

    def covers(standing: Version) -> bool:
        digest = open_version(client, standing, fresh=True).parent.digest
        return digest in decision.compared

    told = {
        "digest": decision.proven.digest,
        "gate_run": decision.examination.run_id,
        "verdict": naming.PASSED,
        "rules": rules_told(decision),
    }
    made = promotion.promote(client, version, target, told, covers)
    _tell(client, made)
    return made


def _tell(client: Store, made: Promotion) -> None:
    """Tell a promotion in the descriptions of the version and its model, where the user may."""
    try:
        text = description_of(client, made.version)
        line = answers.promotion_line(made)
        describe(client, made.version, answers.renew(text, line))
        portray(client, made.version.name)
    except DeniedError:
        words = "you may not write the description of %s, which does not tell the promotion"
        logger.warning(words, made.version)


@asking("sign the soup")
@alone()
def sign(spec: Spec) -> tuple[Version, str]:
    """Sign the files of a soup that passes the gate; the signature joins the version's files.

    Args:
        spec: `version` names the soup; `promote` only says whose rules hold.

    Returns:
        The version, and the name of the key: the SHA-256 of its public part.

    Raises:
        SpecError: there is no key to sign with, the extra `sign` is not installed, the version is
            not a soup, or MLflow cannot add a file to it.
        MismatchError: the version is not what its manifest says.
        GateError: no evidence that counts supports a promotion, or the gate refuses.
    """
    signer = open_tree_signer()
    client, version, spec = _open_request(spec)
    tree = tree_of(client, version)
    decision = _decide(client, version, spec)
    _require_passed(decision)
    add_signature(client, decision, tree, signer)
    return version, signer.name


@asking("promote the soup")
@alone()
def promote(spec: Spec) -> tuple[Decision, Promotion]:
    """Point an alias, a stage or another model's alias to a soup, after its verdict is computed.

    Args:
        spec: `version` names the soup, `promote` the target.

    Returns:
        The decision that supports the promotion, and the promotion.

    Raises:
        SpecError: the version is not a soup, or the command line is looser than the policy.
        MismatchError: the version is not what its manifest says; or, with public keys, none of
            them has signed it.
        GateError: no evidence that counts supports the promotion, or the gate refuses.
        OvertakenError: another promotion moved the target meanwhile.
    """
    if not spec.promote:
        raise SpecError(
            "no target was named",
            where="--promote",
            fix="name a target: --promote alias:champion",
        )
    verifier = open_verifier(spec.public_keys) if spec.public_key else None
    if verifier is not None:
        check_library()
    client, version, spec = _open_request(spec, evaluates=spec.evidence == "own", promotes=True)
    target = parse_target(spec.promote)
    decision = _decide(client, version, spec)
    _require_passed(decision)
    if verifier is not None:
        require_signature(client, decision, verifier)
    return decision, point(client, decision, target)
