"""The main job: the order of its steps.

pull → open → [ ask → mix → evaluate → tell ]×n → register → examine → judge → promote
→ score on the test set → report
"""

import contextlib
import functools
import logging
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlflow_soup.decision import pairing
from mlflow_soup.decision.power import told
from mlflow_soup.errors import SpecError, StoreError
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.files.durable import check_space, scratch
from mlflow_soup.records import Found, Outcome, Promotion, Soup, Unbiased, Version, listed
from mlflow_soup.redaction import redacting
from mlflow_soup.registry import lease, naming, probes, tracking
from mlflow_soup.registry.alone import alone
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import connect
from mlflow_soup.registry.versions import find_model, find_soups, tell_untimed
from mlflow_soup.reporting import geometry, report, windows
from mlflow_soup.request.names import parse_target
from mlflow_soup.request.spec import MOST, Spec
from mlflow_soup.search.methods import unused
from mlflow_soup.weights import distance
from mlflow_soup.workflows.bench import Opened, judged, open_rivals
from mlflow_soup.workflows.job import Job, open_session
from mlflow_soup.workflows.power import designs_of
from mlflow_soup.workflows.proof import (
    Decision,
    Proven,
    Standard,
    decide,
    owner_of,
    rules_of,
    settle_rules,
    would_replace,
)
from mlflow_soup.workflows.publication import notes, publish
from mlflow_soup.workflows.registration import made_by, recipe_of, register
from mlflow_soup.workflows.release import examine_once, point, record
from mlflow_soup.workflows.testset import models_of, score_once
from mlflow_soup.workflows.trials import (
    find_recipe,
    request_params,
    scored,
    search_tags,
    trusted,
)

logger = logging.getLogger("mlflow_soup")


@redacting()
@asking("merge")
@alone()
def run(spec: Spec) -> Outcome:
    """The main job: search λ, register the soup, examine, judge and promote it, and test it.

    The same request continues where an earlier run stopped, and registers at most one version.

    Args:
        spec: the request; the model's policy tags set the knobs that it does not name.

    Raises:
        SpecError: the request is wrong; nothing was changed.
        ParentError: a parent is missing or damaged, or the parents do not match.
        ObjectiveError: a parent has no finite score, or the data of a task cannot be loaded.
        GateError: someone moved the promotion target by hand during the run.
        OvertakenError: another promotion came first, or another process took over.
        DeniedError: MLflow's permissions forbid it; nothing was evaluated.
        RegistryError: MLflow refused.
        StoreError: a store did not answer for longer than `store_patience`, or a disk is full;
            finished evaluations are kept, and the same request continues.
    """
    asked, (job, champions) = spec, _prepare(spec)
    client, spec, name = job.client, job.spec, job.session.name
    designs = None
    if job.bench.ood is not None:
        replaced = sum(would_replace(spec, name, rival.parent.version) for rival in champions)
        designs = designs_of(spec, job.bench.suites, replaced=replaced)
        logger.warning(report.power_words(*designs))
    apart = None
    if not spec.scheduled:  # the ends of a window are always far apart
        apart = distance.measure([opened.checkpoint for opened in job.opened])
        if warning := geometry.caution(apart, [v.short for v in job.versions]):
            logger.warning(warning)
    with (
        lease.hold(client, name, job.key, lease_folder()) as check,
        _open_search(job) as run_id,
        job.bench.engine,
    ):
        found = find_recipe(job, run_id, check=check)
        soup, proven, existed = _find_or_register(job, run_id, found, check)
        decision, promotion = None, None
        if proven is not None and job.bench.ood is not None:
            decision, promotion = _decide(job, run_id, soup, proven, found, champions, check)
        tested: dict[str, Unbiased] = {}
        if proven is not None and job.bench.test is not None:  # last: no decision can read it
            parents = judged(job.mixed(soup.recipe), scheduled=spec.scheduled)
            models = models_of(soup, parents, champions, decision.examination if decision else None)
            at_hand = (*job.opened, *champions)
            tested = score_once(job, trusted(job, run_id), run_id, models, at_hand, check)
        if spec.scheduled and 1 < len(soup.parents) <= MOST:
            apart = distance.measure([o.checkpoint for o in job.mixed(soup.recipe)])
        story = report.Story(
            method=spec.method,
            space=job.space,
            soup=soup,
            existed=existed,
            trials=found.trials,
            references=found.references,
            gains=tuple(pairing.paired(soup.held_out, alone) for alone in found.alone),
            better=pairing.better(found.alone),
            roles=decision.examination.roles if decision is not None else {},
            verdict=decision.verdict if decision is not None else None,
            tested=tested,
            time_tag=job.time_tag,
            target=spec.promote,
            promotion=promotion,
            distance=apart,
            notes=tuple(notes(job, found.trials, soup, apart)),
            next=_next(asked, spec, soup, decision, promotion),
        )
        summary = publish(client, run_id, job.key, story)
    return Outcome(
        soup,
        method=spec.method,
        versions=found.versions,
        trials=story.trials,
        alone=dict(zip(found.references, found.alone, strict=True)),
        gains=report.gains(story),
        verdict=story.verdict,
        target=spec.promote,
        promotion=promotion,
        run_id=run_id,
        summary=summary,
        examination=decision.examination if decision is not None else None,
        tested=tested,
        test_gains=report.test_gains(story) if tested else {},
        power=told(*designs) if designs is not None else None,
        window=windows.window(story),
    )


def _find_or_register(
    job: Job, run_id: str, found: Found, check: Callable[[], None]
) -> tuple[Soup, Proven | None, bool]:
    """The soup of the request, its proof, and whether it was registered before.

    There is no proof of a soup that has a parent's weights and is not registered.

    A registered soup counts even if another version of a library would choose another λ today. Tags
    only point at it: what the version holds must be a result of this request.
    """
    client, name = job.client, job.session.name
    experiment = client.experiment_of(run_id)

    @functools.cache
    def recognise(version: Version) -> Proven | None:
        return made_by(job, version, found.trials, found.recipe, experiment)

    candidates = find_soups(client, name, {naming.REQUEST: job.request})
    weights = naming.format_weights(job.merged(found.recipe).lam)
    # a request with another budget may have chosen the same weights
    candidates += find_soups(client, name, {naming.KEY: job.key, naming.WEIGHTS: weights})
    existing = next((v for v in candidates if recognise(v) is not None), None)
    check()

    def fits(version: Version) -> bool:
        return recognise(version) is not None

    version = existing or register(job, run_id, found.recipe, found.trials, fits)
    parents = tuple(opened.parent for opened in job.mixed(found.recipe))
    for parent in parents:
        if parent.version == version:
            held_out = scored(found.trials, found.recipe, "the soup")
            return Soup(version, found.recipe, parents, held_out, parent.digest), None, False
    proven = recognise(version)
    if proven is None:
        raise StoreError(
            f"{version} is not what was registered a moment ago",
            where=version.uri,
            fix="find out who else writes to the registry or the artifact store, then run the same "
            "command again",
        )
    recipe = recipe_of(job, proven.manifest)
    held_out = scored(found.trials, recipe, "the soup")
    parents = tuple(opened.parent for opened in job.mixed(recipe))
    soup = Soup(version, recipe, parents, held_out, proven.digest)
    return soup, proven, existing is not None


def _decide(
    job: Job,
    run_id: str,
    soup: Soup,
    proven: Proven,
    found: Found,
    champions: Sequence[Opened],
    check: Callable[[], None],
) -> tuple[Decision, Promotion | None]:
    """Examine the soup out of domain, judge it, and promote it if the request says so.

    Args:
        job: the request.
        run_id: the search run.
        soup: the registered soup.
        proven: its proof.
        found: what the search found.
        champions: the versions that the soup would replace.
        check: raises if another process took over.

    Returns:
        The decision, and the promotion; None if the soup was not promoted.
    """
    assert job.bench.ood is not None
    client, spec = job.client, job.spec
    known = {soup.digest: soup.held_out}
    digests = {o.parent.version: o.parent.digest for o in job.opened}
    known |= {digests[v]: s for v, s in zip(found.references, found.alone, strict=True)}
    trust = trusted(job, run_id)
    at_hand = (*job.opened, *champions)
    examined = examine_once(job, trust, run_id, soup, proven.manifest, known, at_hand, check)
    # a limited run judges, and says so, but does not promote
    items = None if spec.limit else job.bench.ood.items
    standard = Standard(
        rules_of(spec, tuple(job.bench.ood.items)), items, limited=bool(spec.limit)
    )  # what was asked is what this process has just asked, or compared
    decision = decide(client, proven, spec, standard, trust, examined=examined, at_hand=at_hand)
    record(client, decision, run_id)
    if not (spec.promote and decision.verdict.passed):
        return decision, None
    return decision, point(client, decision, parse_target(spec.promote))


@contextlib.contextmanager
def _open_search(job: Job) -> Iterator[str]:
    """The search run; an interrupted run of the same request is continued."""
    client, spec, params = job.client, job.spec, request_params(job)
    interrupted = tracking.unfinished(client, job.key)
    resumable = [
        run
        for run in interrupted
        if tracking.is_ours(run)
        and run.data.tags.get(naming.REQUEST) == job.request
        and not tracking.differing(run, params)
    ]
    tags = search_tags(job, f"soup of {listed(job.versions)}")
    with tracking.open_run(
        client, spec.experiment, tags, params=params, resumable=resumable
    ) as run_id:
        tracking.orphan(client, interrupted, run_id)
        yield run_id


def _prepare(spec: Spec) -> tuple[Job, list[Opened]]:
    """The checked request, and the versions that the soup would replace. Nothing is changed.

    Raises:
        SpecError: the request is wrong.
        ParentError: a version is missing or damaged.
        DeniedError: the user may not write what the request will write.
        StoreError: a disk has no room for the soup.
    """
    if not spec.parents and not spec.last:
        raise SpecError(
            "the request names no versions to merge",
            where="--pair, --versions and --last are all missing",
            fix="name the older version, then the newer: --pair v12,v13; for more than two: "
            "--versions v11,v12,v13 or --last 3",
        )
    check_promotion(spec)
    client = connect(60.0 * spec.store_patience)
    name = find_model(client, spec.model, spec.parents)
    for model in dict.fromkeys((name, owner_of(spec, name))):
        probes.check_model(client, model)
    asked, named = spec.space if "space" in spec.named else "", spec.named
    spec = settle_rules(client, spec, name)
    spec.check_space(asked)
    for words in unused([spec.method], named):
        logger.warning(words)
    check_promotion(spec)  # again: the policy may limit the items
    if spec.promote and not spec.ood_tasks:
        raise SpecError(
            "a promotion needs out-of-domain tasks for the gate",
            where="--promote without --ood-tasks; the model has no tag soup.ood_tasks either",
            fix="name tasks from another domain: --ood-tasks lambada_openai",
        )
    probes.check_experiment(client, spec.experiment)
    where = "--pair" if spec.pair else "--versions"
    session, (versions,) = open_session(client, name, spec, [spec.parents], where)
    job = session.job(versions)
    if "time_tag" in named and job.space.times and job.tagged is None:
        tell_untimed(spec.time_tag)
    if "time_tag" in named and spec.method == "bayesopt" and not spec.scheduled:
        logger.warning("--time-tag changes nothing for the simplex; it is for schedules")
    _check_room(job)
    return job, open_rivals(client, name, spec, job.opened)


def _next(
    asked: Spec, spec: Spec, soup: Soup, decision: Decision | None, promotion: Promotion | None
) -> str:
    """The command that promotes a soup that the gate passed and nobody promoted; else empty."""
    if promotion is not None or decision is None or not decision.verdict.passed:
        return ""
    named = asked.words_of("promote", "model", "version", "promote")
    target = shlex.quote(f"alias:{spec.champion or 'champion'}")
    return f"mlflow-soup promote {soup.version.options} --promote {target} {named}".rstrip()


def _check_room(job: Job) -> None:
    """Refuse to search when a disk has no room for the soup.

    The soup is written to a temporary folder and copied into the store. From a remote store it is
    read back into the cache, and fetched once more when it is registered.

    Raises:
        StoreError: a disk is too full.
    """
    with scratch():
        pass  # removes the folders that killed processes left
    donor = job.opened[-1]
    size = sum(stamp[0] for stamp in donor.checkpoint.stamps.values())
    needed: dict[int, tuple[Path, float]] = {}
    tree = donor.parent.folder  # in a local store, or in the cache
    copies = 2 if tree.is_relative_to(cache_folder()) else 1
    for folder in (Path(tempfile.gettempdir()), *[tree] * copies):
        device = folder.stat().st_dev
        needed[device] = (folder, needed.get(device, (folder, 0.0))[1] + 1.2 * size)
    for folder, amount in needed.values():
        check_space(folder, int(amount))


def check_promotion(spec: Spec) -> None:
    """Refuse a request to promote that cannot be followed, whatever its soup is.

    Raises:
        SpecError: it asks for a signature, or judges on some of the items only.
    """
    if spec.promote and spec.public_key:
        raise SpecError(
            "a soup that is yet to be made cannot be signed already",
            where="--promote together with --public-key",
            fix="take the steps one by one: run without --promote, then gate, sign and promote, "
            "these with --public-key",
        )
    if spec.promote and spec.limit:
        raise SpecError(
            f"the gate does not judge on the first {spec.limit} items of each task",
            where="--limit together with --promote",
            fix="drop one of the two options",
        )
