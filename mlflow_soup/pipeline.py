"""The order of the steps; nothing else knows it.

pull → open → [ ask → mix → evaluate → tell ]×n → register → examine → judge → promote → report
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from mlflow_soup import (
    checkpoint,
    distance,
    geometry,
    lineage,
    provenance,
    registry,
    report,
    search,
    tables,
    tracking,
)
from mlflow_soup import gate as gates
from mlflow_soup.bench import (
    Bench,
    Opened,
    check_stored,
    conditions,
    contenders,
    examine,
    load_suites,
    open_rivals,
    open_version,
    rivals,
    set_up,
)
from mlflow_soup.compatibility import check_compatible
from mlflow_soup.errors import GateError, ObjectiveError, ParentError, SpecError
from mlflow_soup.job import Job, open_session, settle
from mlflow_soup.records import (
    Distance,
    Evidence,
    Manifest,
    Outcome,
    Recipe,
    Score,
    Soup,
    Trial,
    Verdict,
    Version,
)
from mlflow_soup.space import Space
from mlflow_soup.spec import Spec, Target, parse_target, parse_version
from mlflow_soup.trials import find, scored, search_tags

logger = logging.getLogger("mlflow_soup")
# MLflow's, of a version's description on databases that enforce it
DESCRIPTION_LIMIT = 5000


def _write_and_register(
    job: Job, run_id: str, recipe: Recipe, trials: Sequence[Trial]
) -> tuple[Version, str]:
    """The soup as a new version, read back from the store; and its digest."""
    client = job.client
    versions = job.versions
    origins = [
        provenance.Origin(o.parent.folder, v.uri, *registry.origin(client, v))
        for o, v in zip(job.opened, versions, strict=True)
    ]
    search = {
        "key": job.key,
        "run_id": run_id,
        "evaluator": job.bench.held_out.settings(),
        "held_out": {
            ",".join(weight.hex() for weight in t.recipe.lam): t.held_out.value
            for t in trials
            if t.held_out is not None
        },
    }
    # hours have passed since they were opened
    parents_now = [checkpoint.find(o.parent.folder, o.parent.version.uri) for o in job.opened]
    check_compatible(parents_now)
    with tempfile.TemporaryDirectory(prefix="mlflow-soup-") as temporary:
        folder = Path(temporary)
        manifest = provenance.make(
            parents_now,
            origins,
            recipe.lam,
            folder,
            method=recipe.method,
            model=job.session.name,
            search=search,
            blend=job.blend(recipe),
        )
        assert manifest.digests is not None
        _check_unchanged(job.opened, manifest)
        digest = manifest.digests.canonical
        _check_scored(client, recipe, trials, digest)
        parents = lineage.format_parents(job.session.name, versions)
        tags = lineage.version_tags(parents, recipe, job.key, job.request, run_id, digest)
        tags |= {
            lineage.METHOD: job.spec.method,
            lineage.EVALUATOR: job.bench.held_out.fingerprint,
        }
        version = registry.register(
            client,
            folder,
            name=job.session.name,
            run_id=run_id,
            parents=versions,
            tags=tags,
            description=f"Soup of {' and '.join(map(str, versions))}, {recipe.label}.",
        )
    check_stored(client, version, digest)
    return version, digest


def _check_unchanged(parents: Sequence[Opened], manifest: Manifest) -> None:
    """Refuse a soup of other weights than the search has scored.

    Raises:
        ParentError: a parent's weights are not those it had when the search began.
    """
    for opened, source in zip(parents, manifest.sources, strict=True):
        assert source.digests is not None
        if source.digests.canonical != opened.parent.digest:
            raise ParentError(
                f"the weights of {opened.parent.version} were changed during the search",
                where=f"{opened.parent.folder}: {source.digests.canonical}, "
                f"{opened.parent.digest} before",
                fix="registered versions must not be written to; run the same command again",
            )


def _check_scored(
    client: MlflowClient, recipe: Recipe, trials: Sequence[Trial], digest: str
) -> None:
    """Refuse a soup that statistics have made otherwise than when it was scored.

    Raises:
        ObjectiveError: they were measured again, elsewhere perhaps, and came out otherwise.
    """
    run_id = next(trial.run_id for trial in trials if trial.recipe == recipe)
    before = client.get_run(run_id).data.tags.get(lineage.DIGEST, digest)
    if before != digest:
        raise ObjectiveError(
            "the statistics of the parents came out otherwise than when their soup was scored",
            where=f"{digest}, and {before} in run {run_id}",
            fix=f"delete run {run_id}, then run the same command again: it scores the soup anew",
        )


def _examine(
    client: MlflowClient,
    run_id: str,
    bench: Bench,
    models: Mapping[str, Opened],
    known: Mapping[str, Score],
    measured: Mapping[str, Evidence],
) -> dict[str, Evidence]:
    """Score everyone out of domain, and keep the evidence in a run."""
    roles = examine(bench, models, known, measured)
    assert bench.ood is not None
    model_ids = {role: opened.parent.model_id for role, opened in models.items()}
    datasets = {"dev": bench.held_out.fingerprint, "ood": bench.ood.fingerprint}
    tracking.log_evidence(client, run_id, roles, model_ids, datasets)
    return roles


def _judge(
    client: MlflowClient, version: Version, roles: Mapping[str, Evidence], spec: Spec, ood_run: str
) -> Verdict:
    """The gate's verdict, written to the version and the OOD run before anyone reads it here."""
    parents = [evidence for role, evidence in roles.items() if role.startswith("parent")]
    rules = gates.Rules(spec.margin, spec.confidence)
    champions = [evidence for role, evidence in roles.items() if role.startswith("champion")]
    verdict = gates.judge(roles["soup"], parents, champions, rules)
    word = lineage.PASSED if verdict.passed else lineage.REFUSED
    for run_id in (ood_run, registry.tags_of(client, version)[lineage.RUN_ID]):
        tracking.log(client, run_id, tags={lineage.GATE: word})
    client.log_text(ood_run, report.checks_table(verdict) + "\n", "gate.md")
    registry.set_tags(client, version, {lineage.GATE_RUN: ood_run, lineage.GATE: word})
    return verdict


@tracking.asking("merge")
def run(spec: Spec) -> Outcome:
    """The main job: search λ, register the soup, examine, judge and promote it.

    The same request continues where an earlier run of it stopped and never registers twice.

    Args:
        spec: the request; what it leaves open comes from the model's policy tags.

    Raises:
        SpecError: the request is wrong; nothing was touched.
        ParentError: a parent is missing, damaged, or unlike the other.
        ObjectiveError: a parent has no finite score, or a task's data cannot be loaded.
        RegistryError: MLflow refused or cannot be reached.
    """
    job, champions = _prepare(spec)
    client, spec, name, versions = job.client, job.spec, job.session.name, job.versions
    title = f"soup of {' and '.join(map(str, versions))}"
    apart = distance.measure([o.checkpoint for o in job.opened])
    if warning := geometry.caution(apart, _names(versions)):
        logger.warning(warning)
    with tracking.open_run(spec.experiment, search_tags(job, title)) as run_id:
        found = find(job, run_id)
        trials, alone = found.trials, found.alone
        better = gates.better(alone)
        # what was registered, should another library version recommend another λ today
        existing = registry.find_soup(client, name, {lineage.REQUEST: job.request})
        if existing is None:
            weights = lineage.format_weights(found.recipe.lam)
            same = {lineage.KEY: job.key, lineage.WEIGHTS: weights}  # by another budget
            existing = registry.find_soup(client, name, same)
        if existing is None:
            recipe = found.recipe
            version, digest = _write_and_register(job, run_id, recipe, trials)
        else:
            its = registry.tags_of(client, existing)
            recipe = job.recipe(lineage.parse_weights(its[lineage.WEIGHTS]))
            version, digest = existing, its[lineage.DIGEST]
        held_out = scored(trials, recipe, "the soup")
        soup = Soup(version, recipe, tuple(o.parent for o in job.opened), held_out, digest)

        roles: Mapping[str, Evidence] = {}
        verdict, promoted = None, ""
        if job.bench.ood is not None:
            known = {digest: held_out}
            known |= {o.parent.digest: s for o, s in zip(job.opened, alone, strict=True)}
            at_hand = (*job.opened, *champions)
            ood_run, roles = _examine_once(job, run_id, soup, known, at_hand)
            verdict = _judge(client, version, roles, spec, ood_run)
            if spec.promote and verdict.passed:
                target = parse_target(spec.promote)
                promoted = f"{target} → {_promote(client, version, target)}"
        story = report.Story(
            method=spec.method,
            space=job.space,
            soup=soup,
            existed=existing is not None,
            trials=trials,
            gain=gates.paired(held_out, alone[better]),
            better=versions[better],
            roles=roles,
            verdict=verdict,
            promoted=promoted,
            distance=apart,
            notes=tuple(_notes(job, trials, soup, apart)),
        )
        return Outcome(
            soup, story.trials, story.gain, verdict, promoted, run_id, _tell(client, run_id, story)
        )


def _prepare(spec: Spec) -> tuple[Job, list[Opened]]:
    """The job, and what stands in the soup's place; all is checked, nothing is touched."""
    if not spec.parents and not spec.last:
        raise SpecError(
            "no pair was named",
            where="--pair",
            fix="older, then newer: --pair v12,v13; more than two: --versions v11,v12,v13 or "
            "--last 3",
        )
    client, name, spec = settle(spec, spec.parents)
    if spec.promote and not spec.ood_tasks:
        raise SpecError(
            "a promotion needs out-of-domain tasks for the gate",
            where="--promote without --ood-tasks, and the model has no tag soup.ood_tasks",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    if spec.promote and spec.limit:
        raise SpecError(
            f"the first {spec.limit} items of each task are no grounds for a promotion",
            where="--limit with --promote",
            fix="drop one of them",
        )
    where = "--pair" if spec.pair else "--versions"
    session, versions = open_session(client, name, spec, spec.parents, where)
    job = session.job(versions)
    return job, open_rivals(client, name, spec, job.opened)


def _examine_once(
    job: Job,
    run_id: str,
    soup: Soup,
    known: Mapping[str, Score],
    at_hand: Sequence[Opened],
) -> tuple[str, Mapping[str, Evidence]]:
    """The OOD run and its evidence; what an earlier run measured is not measured again."""
    client, bench = job.client, job.bench
    stored = check_stored(client, soup.version, soup.digest)
    champions = open_rivals(client, job.session.name, job.spec, at_hand)
    models = contenders(stored, job.opened, champions)
    needed = {opened.parent.digest for opened in models.values()}
    measured: dict[str, Evidence] = {}
    tags = _ood_tags(soup.version, soup.digest, conditions(bench))
    earlier = tracking.find_runs(client, {lineage.CONDITIONS: tags[lineage.CONDITIONS]})
    for found in reversed(earlier):
        if found.info.status != "FINISHED" or needed <= set(measured):
            continue
        roles = tracking.read_evidence(client, found.info.run_id)
        digests = {evidence.digest for evidence in roles.values()}
        if found.data.tags[lineage.VERSION] == tags[lineage.VERSION] and needed <= digests:
            return found.info.run_id, roles
        measured |= {evidence.digest: evidence for evidence in roles.values()}
    with tracking.open_child(client, run_id, f"OOD {soup.version}", tags) as ood_run:
        return ood_run, _examine(client, ood_run, bench, models, known, measured)


def _names(versions: Sequence[Version]) -> list[str]:
    return [f"v{version.number}" for version in versions]


def _notes(job: Job, trials: Sequence[Trial], soup: Soup, apart: Distance) -> list[str]:
    """What a reader of the scores should know besides."""
    client, spec = job.client, job.spec
    notes = [
        f"No merge was found that is better than {parent.version}: the soup is a copy of it."
        if job.method.merges
        else f"Nothing was merged: the new version is a copy of {parent.version}."
        for parent in soup.parents
        if parent.digest == soup.digest
    ]
    if spec.method == "bayesopt":
        if len(trials) < spec.budget:
            notes.append(
                f"The search ended after {len(trials)} of {spec.budget} evaluations: one more was "
                f"expected to gain less than {spec.stop:g} of the paired standard error."
            )
        belief = search.believe(trials)
        if spec.acquisition == search.LANDSCAPE and belief.landscape is None:
            notes.append(f"The curve was not reconstructed from the items: {belief.why}.")
    measured = [(t.recipe, t.held_out) for t in trials if t.held_out is not None]
    if job.method.searches:
        notes += [
            f"{recipe.label} scores {score.value:.4f}, and weighs the newest less than "
            f"--alpha {job.space.alpha:g} allows."
            for recipe, score in measured
            if not job.space.feasible(recipe) and score.value > soup.held_out.value
        ]
        measured = [(recipe, score) for recipe, score in measured if job.space.feasible(recipe)]
    if job.method.chooses and len(measured) > 1:
        optimism = gates.optimism([score for _, score in measured])
        notes.append(
            f"The best of {len(measured)} scores on the same items is expected to look "
            f"{optimism:.4f} better than it is."
        )
    if job.method.needs:
        notes += job.statistics_notes
    names = _names(job.versions)
    said = [geometry.words(apart, names), geometry.caution(apart, names)]
    said += [geometry.barrier(job.space, trials)]
    if soup.recipe.method == "linear":
        said += [geometry.theory(apart, soup.recipe)]
    notes += filter(None, said)
    first = next(t for t in trials if t.held_out is not None)
    if cut := int(client.get_run(first.run_id).data.metrics[lineage.TRUNCATED]):
        notes.append(f"{cut} held-out requests were cut to the longest input.")
    return notes


def _ood_tags(version: Version, digest: str, key: str) -> dict[str, str]:
    return {
        "mlflow.runName": f"OOD {version}",
        lineage.ROLE: "ood",
        lineage.VERSION: f"{version.name}/{version.number}",
        lineage.DIGEST: digest,
        lineage.CONDITIONS: key,
    }


def _tell(client: MlflowClient, run_id: str, story: report.Story) -> str:
    """Report in MLflow: metrics, note, figure, prepared view, version page. Returns the summary."""
    soup, space = story.soup, story.space
    version = f"{soup.version.name}/{soup.version.number}"
    run_path, view = tracking.run_path(client, run_id), tracking.share_view(client, run_id)
    links = {"run": f"#{run_path}", "trials": f"#{view}"}
    for parent in soup.parents:
        path = registry.version_path(parent.version)
        links[str(parent.version)] = f"#{path}"
    text = report.markdown(story, links)
    names = _names([parent.version for parent in soup.parents])
    layers = tables.markdown(geometry.table(story.distance, names))
    whole = f"{text}{report.trials_table(story)}\n## Distance of the parents\n\n{layers}\n"
    numbers = {
        "search/gain": story.gain.value,
        "search/gain_stderr": story.gain.stderr,
        "search/chosen_lambda": soup.recipe.lam[-1],
        "search/kl_ratio": geometry.kl_ratio(story.distance.whole, soup.recipe.lam),
        "distance/relative_l2": story.distance.whole.relative(0, -1),
        "distance/cosine": story.distance.whole.cosine(0, -1),
    }
    metrics = tracking.score_metrics(soup.held_out, "dev")
    metrics += [tracking.metric(key, value) for key, value in numbers.items()]
    metrics += [
        tracking.metric("curve/objective", t.held_out.value, round(1000 * t.recipe.lam[-1]))
        for t in story.trials
        if t.held_out is not None and space.count == 2
    ]
    for _, score in story.roles["soup"].ood if story.roles else ():
        metrics += [tracking.metric(f"ood/{m.key}", m.value) for m in score.metrics]
    tags = {"mlflow.note.content": whole[: tracking.NOTE_LIMIT], lineage.VERSION: version}
    if story.verdict is not None:
        tags[lineage.GATE] = lineage.PASSED if story.verdict.passed else lineage.REFUSED
    tracking.log(client, run_id, metrics=metrics, tags=tags)
    client.log_text(run_id, whole, lineage.REPORT)
    figure = report.landscape(story)
    for suffix in ("png", "svg"):
        client.log_figure(run_id, figure, f"{lineage.LANDSCAPE}.{suffix}")
    client.log_figure(run_id, geometry.distances(story.distance, names), lineage.DISTANCES)
    registry.describe(client, soup.version, text[:DESCRIPTION_LIMIT])
    look = [
        f"version: {tracking.link(registry.version_path(soup.version))}",
        f"run: {tracking.link(run_path)}",
        f"all λ: {tracking.link(view)}",
    ]
    if command := tracking.how_to_look():
        look.append(f"to open these, run: {command}")
    return report.summary(story, look)


def _soup_version(client: MlflowClient, spec: Spec) -> tuple[Version, dict[str, str]]:
    """The registered soup that a later stage is about, with its tags.

    Raises:
        SpecError: no version was named, or it is no soup.
    """
    if not spec.version:
        raise SpecError(
            "no version was named", where="--version", fix="name the soup: --version v14"
        )
    ref = parse_version(spec.version)
    name = registry.find_model(client, spec.model, [ref])
    version = registry.resolve(client, name, ref)
    tags = registry.tags_of(client, version)
    if lineage.DIGEST not in tags:
        raise SpecError(
            f"{version} is no soup: it has no tag {lineage.DIGEST}",
            where=version.uri,
            fix="name a version that mlflow-soup run registered",
        )
    return version, tags


@tracking.asking("evaluate the soup")
def evaluate(spec: Spec) -> dict[str, Evidence]:
    """Examine a registered soup, its parents and the champion out of domain, in a run of its own.

    Args:
        spec: `version` names the soup.

    Returns:
        `soup`, `parent 0`, `parent 1` …, `champion` → its evidence, which `gate` reads from MLflow.

    Raises:
        SpecError: the version is no soup, or no tasks are known.
        ParentError: the soup, a parent or the champion is missing or damaged.
    """
    client = tracking.connect()
    version, tags = _soup_version(client, spec)
    spec = spec.settle(registry.policy(client, version.name))
    suites = load_suites(spec)
    if suites[1] is None:
        raise SpecError(
            "there are no out-of-domain tasks",
            where="--ood-tasks, and the registered model has no tag soup.ood_tasks",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    soup = check_stored(client, version, tags[lineage.DIGEST])
    parents = [
        open_version(client, v) for v in lineage.parse_parents(version.name, tags[lineage.PARENTS])
    ]
    champions = open_rivals(client, version.name, spec, parents)
    models = contenders(soup, parents, champions)
    bench = set_up(spec, soup.checkpoint, suites)
    known: dict[str, Score] = {}
    if tags.get(lineage.EVALUATOR) == bench.held_out.fingerprint:  # the search measured the same
        scores = {
            t.recipe.lam: t.held_out
            for t in tracking.read_trials(client, tags[lineage.KEY])
            if t.held_out is not None
        }
        alone = Space.simplex(len(parents), 0.0).parents()
        digests = {r.lam: p.parent.digest for r, p in zip(alone, parents, strict=True)}
        digests[lineage.parse_weights(tags[lineage.WEIGHTS])] = tags[lineage.DIGEST]
        known = {digests[lam]: score for lam, score in scores.items() if lam in digests}
    ood_tags = _ood_tags(version, tags[lineage.DIGEST], conditions(bench))
    with tracking.open_run(spec.experiment, ood_tags) as run_id:
        roles = _examine(client, run_id, bench, models, known, {})
        tracking.log(client, run_id, tags={"mlflow.note.content": report.ood_table(roles)})
    return roles


@tracking.asking("judge the soup")
def gate(spec: Spec) -> tuple[Version, Verdict]:
    """Judge a soup by its newest examination and write the verdict to its tags.

    Args:
        spec: `version` names the soup; `margin` and `confidence` are the rules.

    Raises:
        GateError: it was never examined, or not with what stands in its place by now.
    """
    client = tracking.connect()
    version, tags = _soup_version(client, spec)
    spec = spec.settle(registry.policy(client, version.name))
    about = {lineage.ROLE: "ood", lineage.DIGEST: tags[lineage.DIGEST]}
    runs = [r for r in tracking.find_runs(client, about) if r.info.status == "FINISHED"]
    if not runs:
        raise GateError(
            f"{version} was never examined out of domain",
            where=version.uri,
            fix=_how_to_evaluate(version),
        )
    roles = tracking.read_evidence(client, runs[-1].info.run_id)
    roles["soup"] = replace(roles["soup"], version=version)
    for rival in rivals(client, version.name, spec):
        _check_examined(client, version, rival, roles)
    return version, _judge(client, version, roles, spec, runs[-1].info.run_id)


def _how_to_evaluate(version: Version) -> str:
    return (
        f"mlflow-soup evaluate --model {version.name} --version v{version.number}, then gate; "
        "with --promote, what stands at that target is examined too"
    )


def _check_examined(
    client: MlflowClient, version: Version, rival: Version, roles: Mapping[str, Evidence]
) -> None:
    """Refuse a verdict that says nothing of what stands in the soup's place now.

    Raises:
        GateError: the rival's weights were not examined together with the soup.
    """
    if rival in {evidence.version for evidence in roles.values()}:
        return
    digest = open_version(client, rival).parent.digest
    if digest not in {evidence.digest for evidence in roles.values()}:
        raise GateError(
            f"{rival} stands there by now, which was not examined with {version}",
            where=rival.uri,
            fix=_how_to_evaluate(version),
        )


def _promote(client: MlflowClient, version: Version, target: Target) -> Version:
    """Promote on the strength of a verdict that still applies."""
    tags = registry.tags_of(client, version)
    standing = registry.standing(client, target.model or version.name, target)
    if tags.get(lineage.GATE) == lineage.PASSED and standing is not None:
        roles = tracking.read_evidence(client, tags[lineage.GATE_RUN])
        roles["soup"] = replace(roles["soup"], version=version)
        _check_examined(client, version, standing, roles)
    return registry.promote(client, version, target)


@tracking.asking("promote the soup")
def promote(spec: Spec) -> tuple[Version, str]:
    """Point an alias, a stage or another model's alias at a soup that its gate passed.

    Args:
        spec: `version` names the soup, `promote` the target.

    Returns:
        What the target points to now, and the target in words.

    Raises:
        GateError: the gate has not passed it, or not against what stands there now.
        StoreError: the store holds other bytes than were judged.
        OvertakenError: another promotion came between.
    """
    if not spec.promote:
        raise SpecError(
            "no target was named", where="--promote", fix="name one: --promote alias:champion"
        )
    client = tracking.connect()
    version, tags = _soup_version(client, spec)
    target = parse_target(spec.promote)
    check_stored(client, version, tags[lineage.DIGEST])
    return _promote(client, version, target), str(target)
