"""The order of the steps; nothing else knows it.

pull → open → [ ask → mix → evaluate → tell ]×n → register → examine → judge → promote → report
"""

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlflow import MlflowClient
from tqdm import tqdm

from mlflow_soup import checkpoint, lineage, registry, report, search, tracking
from mlflow_soup import gate as gates
from mlflow_soup.checkpoint import Checkpoint
from mlflow_soup.errors import GateError, ObjectiveError, SpecError, StoreError
from mlflow_soup.live import LiveModel, Weights, open_weights
from mlflow_soup.objective import Evaluator, Suite, load_suite
from mlflow_soup.records import (
    Difference,
    Evidence,
    Outcome,
    Parent,
    Recipe,
    Score,
    Soup,
    Trial,
    Verdict,
    Version,
)
from mlflow_soup.space import Space
from mlflow_soup.spec import Spec, parse_pair, parse_target, parse_version

logger = logging.getLogger("mlflow_soup")


@dataclass(frozen=True)
class _Opened:
    """A registered version whose files were pulled, read once and found sound."""

    parent: Parent
    checkpoint: Checkpoint


@dataclass(frozen=True)
class _Bench:
    """The live model and how it is scored: held-out by the search, OOD after it."""

    live: LiveModel
    held_out: Evaluator
    ood: Evaluator | None


def _open(client: MlflowClient, version: Version) -> _Opened:
    folder = registry.pull(client, version)
    found = checkpoint.find(folder, version.uri)
    parent = Parent(version, checkpoint.digest(found), folder, registry.model_id(client, version))
    return _Opened(parent, found)


def _load_suites(spec: Spec) -> tuple[Suite, Suite | None]:
    """Held-out and OOD tasks, which share neither a task nor a document.

    Raises:
        SpecError: no tasks, or the two sets overlap.
    """
    if not spec.tasks:
        raise SpecError(
            "there is nothing to score a soup on",
            where="--tasks, and the registered model has no tag soup.tasks",
            fix="name lm-eval tasks: --tasks arc_easy,piqa, or set the tag as the model's policy",
        )
    held_out = load_suite(spec.tasks, include_path=spec.include_path, where="--tasks")
    if not spec.ood_tasks:
        return held_out, None
    ood = load_suite(spec.ood_tasks, include_path=spec.include_path, where="--ood-tasks")
    shared = sorted({*held_out.loaded["tasks"]} & {*ood.loaded["tasks"]})
    if shared:
        raise SpecError(
            f"{', '.join(shared[:5])} is held-out and out of domain at once",
            where="--tasks and --ood-tasks",
            fix="the gate must judge on items that the search never saw: drop it from one of them",
        )
    seen = held_out.documents()
    common = [
        (seen[document], name) for document, name in ood.documents().items() if document in seen
    ]
    if common:
        raise SpecError(
            f"{len(common)} documents are in held-out and OOD tasks alike, "
            f"the first in {common[0][0]} and {common[0][1]}",
            where="--tasks and --ood-tasks",
            fix="the gate must judge on items that the search never saw: choose other tasks",
        )
    return held_out, ood


def _set_up(spec: Spec, donor: Checkpoint, suites: tuple[Suite, Suite | None]) -> _Bench:
    live = LiveModel(donor, spec.device)
    evaluators = [
        Evaluator(
            live,
            suite,
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
        )
        if suite is not None
        else None
        for suite in suites
    ]
    assert evaluators[0] is not None
    return _Bench(live, evaluators[0], evaluators[1])


def _log_request(client: MlflowClient, run_id: str, spec: Spec, key: str, bench: _Bench) -> None:
    """Params under `cfg.`: MLproject's own are logged by `mlflow run`, quoted and write-once."""
    said = {f"cfg.{f.name}": getattr(spec, f.name) for f in fields(spec)}
    params = {k: v for k, v in said.items() if v not in ("", None)}
    params |= {f"cfg.evaluator.{k}": v for k, v in bench.held_out.settings().items()}
    tracking.log(client, run_id, params=params, tags={lineage.KEY: key})


def _search(
    client: MlflowClient,
    run_id: str,
    key: str,
    spec: Spec,
    bench: _Bench,
    sources: Sequence[Weights],
) -> list[Trial]:
    """Trials until the budget is spent; those of an earlier run with the same key count."""
    space = Space.pair(spec.alpha)
    trials = tracking.read_trials(client, key)[: spec.trials]
    with tqdm(total=spec.trials, initial=len(trials), desc="search", unit="λ", disable=None) as bar:
        while len(trials) < spec.trials:
            recipe = search.ask(space, trials, acquisition=spec.acquisition, seed=spec.seed)
            trial = _try(client, run_id, key, len(trials), recipe, bench, sources)
            trials.append(trial)
            scored = [t for t in trials if t.held_out is not None]
            if scored:
                best = max(scored, key=lambda t: t.held_out.value if t.held_out else 0.0)
                assert best.held_out is not None
                lam, value = space.point(best.recipe), best.held_out.value
                bar.set_postfix_str(f"best {value:.4f} at λ = {lam:g}")
                numbers = {"search/best": value, "search/lambda": space.point(recipe)}
                if trial.held_out is not None:
                    numbers["search/objective"] = trial.held_out.value
                step = trial.number
                tracking.log(
                    client,
                    run_id,
                    metrics=[tracking.metric(k, v, step) for k, v in numbers.items()],
                )
            bar.update()
    return trials


def _try(
    client: MlflowClient,
    run_id: str,
    key: str,
    number: int,
    recipe: Recipe,
    bench: _Bench,
    sources: Sequence[Weights],
) -> Trial:
    """One λ: a child run with its params, metrics, item rows and seconds."""
    lam = recipe.lam[-1]
    tags = {
        lineage.KEY: key,
        lineage.ROLE: "trial",
        lineage.NUMBER: str(number),
        lineage.EVALUATOR: bench.held_out.fingerprint,
    }
    child = ""
    try:
        with tracking.open_child(client, run_id, f"λ = {lam:g}", tags) as child:
            weights = json.dumps(recipe.lam)
            params = {"lambda": f"{lam:g}", "method": recipe.method, "weights": weights}
            tracking.log(client, child, params=params)
            begin = time.monotonic()
            bench.live.set_weights(sources, recipe.lam)
            merged = time.monotonic()
            score = bench.held_out.score()
            seconds = {
                "seconds/merge": merged - begin,
                "seconds/evaluate": time.monotonic() - merged,
            }
            tracking.log_score(client, child, score, lineage.ITEMS)
            metrics = [tracking.metric(k, v) for k, v in seconds.items()]
            metrics.append(tracking.metric("dev/stderr", score.stderr))
            tracking.log(client, child, metrics=metrics + tracking.score_metrics(score, "dev"))
    except ObjectiveError as error:
        logger.warning("λ = %g failed: %s", lam, error.what)
        tracking.log(client, child, tags={lineage.FAILED: error.what[:5000]})
        return Trial(number, recipe, None, child)
    return Trial(number, recipe, score, child)


def _scored(trials: Sequence[Trial], recipe: Recipe, what: str) -> Score:
    """A recipe's held-out score.

    Raises:
        ObjectiveError: its evaluation failed.
    """
    for trial in trials:
        if trial.recipe == recipe and trial.held_out is not None:
            return trial.held_out
    raise ObjectiveError(
        f"{what} could not be scored",
        where=f"λ = {recipe.lam[-1]:g}, see tag {lineage.FAILED} of its run",
        fix="a parent must have a finite score; choose other versions or tasks",
    )


def _write_and_register(
    client: MlflowClient,
    run_id: str,
    key: str,
    name: str,
    recipe: Recipe,
    opened: Sequence[_Opened],
    fingerprint: str,
) -> tuple[Version, str]:
    """The soup as a new version, read back from the store; and its digest."""
    versions = tuple(o.parent.version for o in opened)
    with tempfile.TemporaryDirectory(prefix="mlflow-soup-") as temporary:
        folder = Path(temporary) / "soup"
        written = checkpoint.write([o.checkpoint for o in opened], recipe.lam, folder)
        digest = checkpoint.digest(written)
        digests = {o.parent.version: o.parent.digest for o in opened}
        manifest = lineage.manifest(name, recipe, digests, key, run_id, digest)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=2))
        (folder / checkpoint.CARD).write_text(lineage.card(name, recipe, versions))
        tags = lineage.version_tags(
            lineage.format_parents(name, versions), recipe, key, run_id, digest
        )
        version = registry.register(
            client,
            folder,
            name=name,
            run_id=run_id,
            parents=versions,
            tags=tags | {lineage.EVALUATOR: fingerprint},
            description=f"Soup of {' and '.join(map(str, versions))}, λ = {recipe.lam[-1]:g}.",
        )
    _check_stored(client, version, digest)
    return version, digest


def _check_stored(client: MlflowClient, version: Version, digest: str) -> _Opened:
    """Read a version back and compare it with what it should be.

    Raises:
        StoreError: the store holds other bytes.
    """
    opened = _open(client, version)
    if opened.parent.digest != digest:
        raise StoreError(
            f"{version} holds other weights than were registered",
            where=f"{opened.parent.folder}: {opened.parent.digest}, expected {digest}",
            fix="do not use this version; delete it and run the same command again",
        )
    return opened


def _examine(
    client: MlflowClient,
    run_id: str,
    bench: _Bench,
    models: Mapping[str, _Opened],
    known: Mapping[str, Score],
    spec: Spec,
    suites: tuple[Suite, Suite | None],
) -> dict[str, Evidence]:
    """Score soup, parents and champion out of domain, and keep the evidence in a run.

    Args:
        client: of the store.
        run_id: the OOD run.
        bench: live model and evaluators, of the soup's architecture.
        models: `soup`, `parent 0` …, `champion` → opened version.
        known: tensor digest → held-out score that the search measured already.
        spec: for a champion of another architecture, which needs a bench of its own.
        suites: likewise.
    """
    roles: dict[str, Evidence] = {}
    soup = models["soup"].checkpoint
    for role, opened in tqdm(models.items(), desc="out of domain", unit="model", disable=None):
        digest = opened.parent.digest
        same = [e for e in roles.values() if e.digest == digest]
        if same:  # λ = 1: the soup is its parent
            roles[role] = Evidence(opened.parent.version, digest, same[0].held_out, same[0].ood)
            continue
        at = bench
        if checkpoint.differences(soup, opened.checkpoint):
            at = _set_up(spec, opened.checkpoint, suites)
        assert at.ood is not None
        at.live.set_weights([open_weights(opened.checkpoint)], [1.0])
        held_out = known.get(digest) or at.held_out.score()
        roles[role] = Evidence(opened.parent.version, digest, held_out, at.ood.evaluate())
    tracking.log_evidence(client, run_id, roles)
    assert bench.ood is not None
    about = {"held_out": bench.held_out.fingerprint, "ood": bench.ood.fingerprint}
    for role, evidence in roles.items():
        model_id = models[role].parent.model_id
        if model_id is None and role != "soup":
            continue  # a number without its model would pass for the soup's
        groups = {"dev": [("", evidence.held_out)], "ood": list(evidence.ood)}
        for prefix, scores in groups.items():
            dataset = "held-out" if prefix == "dev" else "out-of-domain"
            digest = about["held_out" if prefix == "dev" else "ood"][:12]
            metrics = [
                tracking.metric(
                    f"{prefix}/{m.key}",
                    m.value,
                    model_id=model_id,
                    dataset_name=dataset,
                    dataset_digest=digest,
                )
                for _, score in scores
                for m in score.metrics
            ]
            tracking.log(client, run_id, metrics=metrics)
    return roles


def _ood_key(bench: _Bench, models: Mapping[str, _Opened]) -> str:
    """Digest of everything an examination depends on."""
    assert bench.ood is not None
    return lineage.key_of(
        {
            "models": {role: opened.parent.digest for role, opened in models.items()},
            "held_out": bench.held_out.fingerprint,
            "ood": bench.ood.fingerprint,
        }
    )


def _models(
    client: MlflowClient, soup: _Opened, parents: Sequence[_Opened], champion: Version | None
) -> dict[str, _Opened]:
    """Whom the OOD stage examines: soup, parents, and the champion if it is none of them."""
    models = {"soup": soup} | {f"parent {i}": parent for i, parent in enumerate(parents)}
    if champion is not None and champion not in {o.parent.version for o in models.values()}:
        models["champion"] = _open(client, champion)
    return models


def _judge(
    client: MlflowClient, version: Version, roles: Mapping[str, Evidence], spec: Spec, ood_run: str
) -> Verdict:
    """The gate's verdict, written to the version and the OOD run before anyone reads it here."""
    parents = [evidence for role, evidence in roles.items() if role.startswith("parent")]
    rules = gates.Rules(spec.margin, spec.confidence)
    verdict = gates.judge(roles["soup"], parents, roles.get("champion"), rules)
    word = lineage.PASSED if verdict.passed else lineage.REFUSED
    tracking.log(client, ood_run, tags={lineage.GATE: word})
    client.log_text(ood_run, report.checks_table(verdict) + "\n", "gate.md")
    registry.set_tags(client, version, {lineage.GATE_RUN: ood_run, lineage.GATE: word})
    return verdict


def run(spec: Spec) -> Outcome:
    """The main job: search λ for a pair, register the soup, examine, judge and promote it.

    The same request continues where an earlier run of it stopped and never registers twice.

    Args:
        spec: the request; what it leaves open comes from the model's policy tags.

    Raises:
        SpecError: the request is wrong; nothing was touched.
        ParentError: a parent is missing, damaged, or unlike the other.
        ObjectiveError: a parent has no finite score, or a task's data cannot be loaded.
        RegistryError: MLflow refused or cannot be reached.
    """
    if not spec.pair:
        raise SpecError(
            "no pair was named", where="--pair", fix="older, then newer: --pair v12,v13"
        )
    refs = parse_pair(spec.pair)
    client = tracking.connect()
    name = registry.find_model(client, spec.model, refs)
    spec = spec.settle(registry.policy(client, name))
    if spec.promote and not spec.ood_tasks:
        raise SpecError(
            "a promotion needs out-of-domain tasks for the gate",
            where="--promote without --ood-tasks, and the model has no tag soup.ood_tasks",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    versions = [registry.resolve(client, name, ref) for ref in refs]
    if versions[0] == versions[1]:
        raise SpecError(
            f"{refs[0]} and {refs[1]} are the same version, {versions[0]}",
            where="--pair",
            fix="name two different versions",
        )
    suites = _load_suites(spec)
    opened = [_open(client, version) for version in versions]
    checkpoint.check_compatible([o.checkpoint for o in opened])
    bench = _set_up(spec, opened[-1].checkpoint, suites)
    space = Space.pair(spec.alpha)
    request = {
        "parents": [o.parent.digest for o in opened],
        "evaluator": bench.held_out.fingerprint,
        **{k: getattr(spec, k) for k in ("alpha", "trials", "acquisition", "seed")},
    }
    key = lineage.key_of(request)
    with tracking.open_run(spec.experiment, {lineage.ROLE: "search", lineage.KEY: key}) as run_id:
        _log_request(client, run_id, spec, key, bench)
        sources = [open_weights(o.checkpoint) for o in opened]
        trials = _search(client, run_id, key, spec, bench, sources)
        truncated = bench.held_out.truncated
        alone = [
            _scored(trials, recipe, str(version))
            for recipe, version in zip(space.parents(), versions, strict=True)
        ]
        recipe = search.recommend(space, trials)
        held_out = _scored(trials, recipe, "the soup")
        best = gates.better(alone)
        gain = gates.paired(held_out, alone[best])

        existing = registry.find_soup(client, name, key)
        if existing is None:
            version, digest = _write_and_register(
                client, run_id, key, name, recipe, opened, bench.held_out.fingerprint
            )
        else:
            version, digest = existing, registry.tags_of(client, existing)[lineage.DIGEST]
        soup = Soup(version, recipe, tuple(o.parent for o in opened), held_out, digest)

        roles: dict[str, Evidence] = {}
        verdict, promoted = None, ""
        if bench.ood is not None:
            stored = _check_stored(client, version, digest)
            champion = registry.holder(client, name, spec.champion)
            models = _models(client, stored, opened, champion)
            known = {digest: held_out, **dict(zip(request["parents"], alone, strict=True))}
            ood_key = _ood_key(bench, models)
            done = [
                r.info.run_id
                for r in tracking.find_runs(client, {lineage.OOD_KEY: ood_key})
                if r.info.status == "FINISHED"
            ]
            if done:
                ood_run, roles = done[0], tracking.read_evidence(client, done[0])
            else:
                tags = _ood_tags(version, ood_key)
                with tracking.open_child(client, run_id, f"OOD {version}", tags) as ood_run:
                    roles = _examine(client, ood_run, bench, models, known, spec, suites)
            verdict = _judge(client, version, roles, spec, ood_run)
            if spec.promote and verdict.passed:
                target = parse_target(spec.promote)
                standing = registry.promote(client, version, target)
                promoted = f"{target} → {standing}"
        return _finish(
            client,
            run_id,
            space,
            soup,
            trials,
            gain,
            versions[best],
            roles,
            verdict,
            promoted,
            existing is not None,
            truncated,
        )


def _ood_tags(version: Version, ood_key: str) -> dict[str, str]:
    return {
        lineage.ROLE: "ood",
        lineage.VERSION: f"{version.name}/{version.number}",
        lineage.OOD_KEY: ood_key,
    }


def _finish(
    client: MlflowClient,
    run_id: str,
    space: Space,
    soup: Soup,
    trials: Sequence[Trial],
    gain: Difference,
    better: Version,
    roles: Mapping[str, Evidence],
    verdict: Verdict | None,
    promoted: str,
    existed: bool,
    truncated: int,
) -> Outcome:
    """Report: the run's metrics, note, figure and prepared view, and the version's page."""
    model_pages = {
        str(p.version): f"#/models/{p.version.name}/versions/{p.version.number}"
        for p in soup.parents
    }
    view = tracking.share_view(client, run_id)
    links = {"run": "#" + tracking.run_path(client, run_id), "trials": "#" + view, **model_pages}
    notes = [f"{truncated} requests were cut to the longest input."] if truncated else []
    story = report.markdown(
        space=space,
        soup=soup,
        trials=trials,
        gain=gain,
        better=better,
        roles=roles,
        verdict=verdict,
        promoted=promoted,
        links=links,
        notes=notes,
    )
    metrics = tracking.score_metrics(soup.held_out, "dev")
    metrics += [
        tracking.metric("search/gain", gain.value),
        tracking.metric("search/gain_stderr", gain.stderr),
        tracking.metric("search/chosen_lambda", space.point(soup.recipe)),
    ]
    metrics += [
        tracking.metric("curve/objective", t.held_out.value, round(1000 * space.point(t.recipe)))
        for t in trials
        if t.held_out is not None
    ]
    for _, score in roles["soup"].ood if roles else ():
        metrics += [tracking.metric(f"ood/{m.key}", m.value) for m in score.metrics]
    tags = {
        "mlflow.note.content": story,
        lineage.VERSION: f"{soup.version.name}/{soup.version.number}",
    }
    if verdict is not None:
        tags[lineage.GATE] = lineage.PASSED if verdict.passed else lineage.REFUSED
    tracking.log(client, run_id, metrics=metrics, tags=tags)
    client.log_text(run_id, story, lineage.REPORT)
    figure = report.landscape(space, soup, trials)
    for suffix in ("png", "svg"):
        client.log_figure(run_id, figure, f"{lineage.LANDSCAPE}.{suffix}")
    registry.describe(client, soup.version, story)
    page = f"/models/{soup.version.name}/versions/{soup.version.number}"
    look = [
        f"version: {tracking.link(page)}",
        f"run: {tracking.link(tracking.run_path(client, run_id))}",
    ]
    look.append(f"all λ: {tracking.link(view)}")
    if command := tracking.how_to_look():
        look.append(f"to open these: {command}")
    words = report.summary(
        space=space,
        soup=soup,
        trials=trials,
        gain=gain,
        better=better,
        verdict=verdict,
        promoted=promoted,
        existed=existed,
        look=look,
    )
    return Outcome(soup, tuple(trials), gain, verdict, promoted, run_id, words)


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
    suites = _load_suites(spec)
    if suites[1] is None:
        raise SpecError(
            "there are no out-of-domain tasks",
            where="--ood-tasks, and the registered model has no tag soup.ood_tasks",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    soup = _check_stored(client, version, tags[lineage.DIGEST])
    parents = [_open(client, v) for v in lineage.parse_parents(version.name, tags[lineage.PARENTS])]
    models = _models(client, soup, parents, registry.holder(client, version.name, spec.champion))
    bench = _set_up(spec, soup.checkpoint, suites)
    known: dict[str, Score] = {}
    if tags.get(lineage.EVALUATOR) == bench.held_out.fingerprint:  # the search measured the same
        scores = {
            t.recipe.lam: t.held_out
            for t in tracking.read_trials(client, tags[lineage.KEY])
            if t.held_out is not None
        }
        lam = float(tags[lineage.LAMBDA])
        digests = {0.0: parents[0].parent.digest, 1.0: parents[-1].parent.digest}
        digests[lam] = tags[lineage.DIGEST]
        known = {digests[k[-1]]: score for k, score in scores.items() if k[-1] in digests}
    ood_key = _ood_key(bench, models)
    with tracking.open_run(spec.experiment, _ood_tags(version, ood_key)) as run_id:
        roles = _examine(client, run_id, bench, models, known, spec, suites)
        tracking.log(client, run_id, tags={"mlflow.note.content": report.ood_table(roles)})
    return roles


def gate(spec: Spec) -> tuple[Version, Verdict]:
    """Judge a soup by its newest examination and write the verdict to its tags.

    Args:
        spec: `version` names the soup; `margin` and `confidence` are the rules.

    Raises:
        GateError: it was never examined, or the champion has moved since.
    """
    client = tracking.connect()
    version, _ = _soup_version(client, spec)
    spec = spec.settle(registry.policy(client, version.name))
    about = {lineage.ROLE: "ood", lineage.VERSION: f"{version.name}/{version.number}"}
    runs = [r for r in tracking.find_runs(client, about) if r.info.status == "FINISHED"]
    fix = f"mlflow-soup evaluate --model {version.name} --version v{version.number}"
    if not runs:
        raise GateError(f"{version} was never examined out of domain", where=version.uri, fix=fix)
    roles = tracking.read_evidence(client, runs[-1].info.run_id)
    champion = registry.holder(client, version.name, spec.champion)
    if champion is not None and champion not in {e.version for e in roles.values()}:
        raise GateError(
            f"the {spec.champion} is {champion} by now, which was not examined with {version}",
            where=f"OOD run {runs[-1].info.run_id}",
            fix=fix,
        )
    return version, _judge(client, version, roles, spec, runs[-1].info.run_id)


def promote(spec: Spec) -> tuple[Version, str]:
    """Point an alias, a stage or another model's alias at a soup that its gate passed.

    Args:
        spec: `version` names the soup, `promote` the target.

    Returns:
        What the target points to now, and the target in words.

    Raises:
        GateError: the gate has not passed it.
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
    _check_stored(client, version, tags[lineage.DIGEST])
    return registry.promote(client, version, target), str(target)
