"""The order of the steps; nothing else knows it.

pull → open → [ ask → mix → evaluate → tell ]×n → register → examine → judge → promote → report
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mlflow_soup.decision import pairing
from mlflow_soup.errors import ObjectiveError, ParentError, SpecError
from mlflow_soup.files.durable import check_space, scratch
from mlflow_soup.records import Distance, Evidence, Manifest, Outcome, Recipe, Soup, Trial, Version
from mlflow_soup.redaction import redact, redacting
from mlflow_soup.registry import lease, naming, tracking
from mlflow_soup.registry import links as tracking_links
from mlflow_soup.registry.cache import cache_folder, lease_folder
from mlflow_soup.registry.evaluations import score_metrics
from mlflow_soup.registry.links import how_to_look, link, share_view, version_path
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.register import register_soup
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import describe, find_soup, origin_of, soup_tags
from mlflow_soup.reporting import geometry, report, tables
from mlflow_soup.request.names import parse_target
from mlflow_soup.request.spec import Spec
from mlflow_soup.search.belief import LANDSCAPE, believe
from mlflow_soup.weights import distance, provenance
from mlflow_soup.weights.compatibility import check_compatible
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workflows.bench import Opened, check_digest, open_rivals
from mlflow_soup.workflows.job import Job, open_session, settle
from mlflow_soup.workflows.release import examine_once, judge, point
from mlflow_soup.workflows.trials import find_recipe, request_params, scored, search_tags

logger = logging.getLogger("mlflow_soup")
# MLflow's, of a version's description on databases that enforce it
DESCRIPTION_LIMIT = 5000


def _write_and_register(job: Job, run_id: str, recipe: Recipe, trials: Sequence[Trial]) -> Version:
    """The soup as a new version, after it was read back from the store."""
    client = job.client
    versions = job.versions
    origins = [
        provenance.Origin(o.parent.folder, v.uri, *origin_of(client, v))
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
    parents_now = [find_checkpoint(o.parent.folder, o.parent.version.uri) for o in job.opened]
    check_compatible(parents_now)
    with scratch() as folder:
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
        parents = naming.format_parents(job.session.name, versions)
        tags = naming.version_tags(parents, recipe, job.key, job.request, run_id, digest)
        tags |= {
            naming.METHOD: job.spec.method,
            naming.EVALUATOR: job.bench.held_out.fingerprint,
        }
        return register_soup(
            client,
            folder,
            name=job.session.name,
            run_id=run_id,
            parents=versions,
            tags=tags,
            description=f"Soup of {' and '.join(map(str, versions))}, {recipe.label}.",
            check=lambda tree: check_digest(tree, "the uploaded soup", digest),
        )


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


def _check_scored(client: Store, recipe: Recipe, trials: Sequence[Trial], digest: str) -> None:
    """Refuse a soup that statistics have made otherwise than when it was scored.

    Raises:
        ObjectiveError: they were measured again, elsewhere perhaps, and came out otherwise.
    """
    run_id = next(trial.run_id for trial in trials if trial.recipe == recipe)
    before = client.get_run(run_id).data.tags.get(naming.DIGEST, digest)
    if before != digest:
        raise ObjectiveError(
            "the statistics of the parents came out otherwise than when their soup was scored",
            where=f"{digest}, and {before} in run {run_id}",
            fix=f"delete run {run_id}, then run the same command again: it scores the soup anew",
        )


@redacting()
@asking("merge")
def run(spec: Spec) -> Outcome:
    """The main job: search λ, register the soup, examine, judge and promote it.

    The same request continues where an earlier run of it stopped and never registers twice.

    Args:
        spec: the request; what it leaves open comes from the model's policy tags.

    Raises:
        SpecError: the request is wrong; nothing was touched.
        ParentError: a parent is missing, damaged, or unlike the other.
        ObjectiveError: a parent has no finite score, or a task's data cannot be loaded.
        GateError: what stands in its place was put there by hand meanwhile.
        OvertakenError: another promotion came between, or another process took over.
        RegistryError: MLflow refused.
        StoreError: a store was away for longer than patience lasts, or a disk is full; what was
            evaluated is kept, and the same request continues.
    """
    job, champions = _prepare(spec)
    client, spec, name, versions = job.client, job.spec, job.session.name, job.versions
    title = f"soup of {' and '.join(map(str, versions))}"
    apart = distance.measure([o.checkpoint for o in job.opened])
    if warning := geometry.caution(apart, _names(versions)):
        logger.warning(warning)
    with (
        lease.hold(client, name, job.key, lease_folder()) as check,
        _open_search(job, title) as run_id,
    ):
        found = find_recipe(job, run_id, check=check)
        trials, alone = found.trials, found.alone
        better = pairing.better(alone)
        # what was registered, should another library version recommend another λ today
        existing = find_soup(client, name, {naming.REQUEST: job.request})
        if existing is None:
            weights = naming.format_weights(found.recipe.lam)
            same = {naming.KEY: job.key, naming.WEIGHTS: weights}  # by another budget
            existing = find_soup(client, name, same)
        check()
        version = existing or _write_and_register(job, run_id, found.recipe, trials)
        its = soup_tags(client, version)
        recipe = job.recipe(naming.parse_weights(its[naming.WEIGHTS]))
        digest = its[naming.DIGEST]
        held_out = scored(trials, recipe, "the soup")
        soup = Soup(version, recipe, tuple(o.parent for o in job.opened), held_out, digest)

        roles: Mapping[str, Evidence] = {}
        verdict, promoted = None, ""
        if job.bench.ood is not None:
            known = {digest: held_out}
            known |= {o.parent.digest: s for o, s in zip(job.opened, alone, strict=True)}
            at_hand = (*job.opened, *champions)
            ood_run, roles = examine_once(job, run_id, soup, known, at_hand, check)
            verdict = judge(client, version, roles, spec, ood_run)
            if spec.promote and verdict.passed:
                target = parse_target(spec.promote)
                promoted = f"{target} → {point(client, version, target)}"
        story = report.Story(
            method=spec.method,
            space=job.space,
            soup=soup,
            existed=existing is not None,
            trials=trials,
            gain=pairing.paired(held_out, alone[better]),
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


@contextlib.contextmanager
def _open_search(job: Job, title: str) -> Iterator[str]:
    """The search run: that of an earlier run of the same request, if it was cut short."""
    client, spec, params = job.client, job.spec, request_params(job)
    cut_short = tracking.unfinished(client, job.key)
    resumable = [
        run
        for run in cut_short
        if run.data.tags.get(naming.REQUEST) == job.request and not tracking.differing(run, params)
    ]
    tags = search_tags(job, title)
    with tracking.open_run(
        client, spec.experiment, tags, params=params, resumable=resumable
    ) as run_id:
        tracking.orphan(client, cut_short, run_id)
        yield run_id


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
    session, (versions,) = open_session(client, name, spec, [spec.parents], where)
    job = session.job(versions)
    _check_room(job)
    return job, open_rivals(client, name, spec, job.opened)


def _check_room(job: Job) -> None:
    """Refuse to search for hours what there will be no room to write.

    The soup is written to a temporary folder and copied into the store; from a store that is
    elsewhere it is read back into another.

    Raises:
        StoreError: a disk is too full.
    """
    with scratch():
        pass  # sweeps what killed processes have left
    donor = job.opened[-1]
    size = sum(stamp[0] for stamp in donor.checkpoint.stamps.values())
    temporary, tree = Path(tempfile.gettempdir()), donor.parent.folder
    elsewhere = tree.is_relative_to(cache_folder())
    needed: dict[int, tuple[Path, float]] = {}
    for folder in (temporary, temporary if elsewhere else tree):
        device = folder.stat().st_dev
        needed[device] = (folder, needed.get(device, (folder, 0.0))[1] + 1.2 * size)
    for folder, amount in needed.values():
        check_space(folder, int(amount))


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
        belief = believe(trials)
        if spec.acquisition == LANDSCAPE and belief.landscape is None:
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
        optimism = pairing.optimism([score for _, score in measured])
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
    if cut := int(client.get_run(first.run_id).data.metrics.get(naming.TRUNCATED, 0)):
        notes.append(f"{cut} held-out requests were cut to the longest input.")
    return notes


def _tell(client: Store, run_id: str, story: report.Story) -> str:
    """Report in MLflow: metrics, note, figure, prepared view, version page. Returns the summary."""
    soup, space = story.soup, story.space
    version = f"{soup.version.name}/{soup.version.number}"
    run_path, view = tracking_links.run_path(client, run_id), share_view(client, run_id)
    links = {"run": f"#{run_path}", "trials": f"#{view}"}
    for parent in soup.parents:
        path = version_path(parent.version)
        links[str(parent.version)] = f"#{path}"
    text = redact(report.markdown(story, links))
    names = _names([parent.version for parent in soup.parents])
    layers = tables.markdown(geometry.table(story.distance, names))
    whole = redact(f"{text}{report.trials_table(story)}\n## Distance of the parents\n\n{layers}\n")
    numbers = {
        "search/gain": story.gain.value,
        "search/gain_stderr": story.gain.stderr,
        "search/chosen_lambda": soup.recipe.lam[-1],
        "search/kl_ratio": geometry.kl_ratio(story.distance.whole, soup.recipe.lam),
        "distance/relative_l2": story.distance.whole.relative(0, -1),
        "distance/cosine": story.distance.whole.cosine(0, -1),
    }
    metrics = score_metrics(soup.held_out, "dev")
    metrics += [tracking.metric(key, value) for key, value in numbers.items()]
    metrics += [
        tracking.metric("curve/objective", t.held_out.value, round(1000 * t.recipe.lam[-1]))
        for t in story.trials
        if t.held_out is not None and space.count == 2
    ]
    for _, score in story.roles["soup"].ood if story.roles else ():
        metrics += [tracking.metric(f"ood/{m.key}", m.value) for m in score.metrics]
    tags = {"mlflow.note.content": whole[: tracking.NOTE_LIMIT], naming.VERSION: version}
    if story.verdict is not None:
        tags[naming.GATE] = naming.PASSED if story.verdict.passed else naming.REFUSED
    tracking.log(client, run_id, metrics=metrics, tags=tags)
    client.log_text(run_id, whole, naming.REPORT)
    figure = report.landscape(story)
    for suffix in ("png", "svg"):
        client.log_figure(run_id, figure, f"{naming.LANDSCAPE}.{suffix}")
    client.log_figure(run_id, geometry.distances(story.distance, names), naming.DISTANCES)
    describe(client, soup.version, text[:DESCRIPTION_LIMIT])
    look = [
        f"version: {link(version_path(soup.version))}",
        f"run: {link(run_path)}",
        f"all λ: {link(view)}",
    ]
    if command := how_to_look():
        look.append(f"to open these, run: {command}")
    return report.summary(story, look)
