"""Write the soup that a search chose, and register it as a version."""

import logging
from collections.abc import Callable, Sequence

from mlflow_soup.errors import MismatchError, ObjectiveError, ParentError, SpecError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.files.durable import scratch
from mlflow_soup.records import Manifest, Recipe, Trial, Version, listed
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.register import register_soup
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import origin_of
from mlflow_soup.weights import provenance
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workflows.bench import Opened, check_digest
from mlflow_soup.workflows.job import Job
from mlflow_soup.workflows.proof import Proven, check_tags, prove, version_of

logger = logging.getLogger("mlflow_soup")


def register(
    job: Job,
    run_id: str,
    recipe: Recipe,
    trials: Sequence[Trial],
    fits: Callable[[Version], bool] = lambda _: True,
) -> Version:
    """The version of a soup, once it is written, uploaded and read back from the store.

    A soup with the weights of a parent is not registered again, unless the request asks for it.

    Args:
        job: the request.
        run_id: the search run.
        recipe: the chosen recipe.
        trials: all trials of the search.
        fits: whether a version that claims to be the request's result is one.

    Returns:
        The version of the soup, or that of the newest parent with the same weights.

    Raises:
        ParentError: a parent changed during the search, or its files are gone.
        ObjectiveError: the statistics gave other weights than those that were scored.
        StoreError: a disk is full, or the store holds other bytes than were uploaded.
    """
    client, opened = job.client, job.mixed(recipe)
    versions = tuple(o.parent.version for o in opened)
    origins = [
        provenance.Origin(o.parent.folder, v.uri, *origin_of(client, v))
        for o, v in zip(opened, versions, strict=True)
    ]
    merged = job.merged(recipe)
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
    if job.spec.scheduled:  # the soup's parents may be only some of them
        search["versions"] = [version.uri for version in job.versions]
    # the search may have taken hours
    parents_now = [find_checkpoint(o.parent.folder, o.parent.version.uri) for o in opened]
    check_compatible(parents_now)
    with scratch() as folder:
        manifest = provenance.make(
            parents_now,
            origins,
            merged.lam,
            folder,
            method=recipe.method,
            model=job.session.name,
            search=search,
            blend=job.blend(recipe),
        )
        assert manifest.digests is not None
        _check_unchanged(opened, manifest)
        digest = manifest.digests.canonical
        _check_scored(client, recipe, trials, digest)
        same = [o.parent.version for o in opened if o.parent.digest == digest]
        if same and not job.spec.register_copies:
            return same[-1]
        parents = naming.format_parents(job.session.name, versions)
        method = job.spec.method
        tags = naming.version_tags(parents, merged, method, job.key, job.request, digest)
        return register_soup(
            client,
            folder,
            name=job.session.name,
            run_id=run_id,
            parents=versions,
            tags=tags,
            params=_params(job, merged),
            description=f"Soup of {listed(versions)}, {merged.label}.",
            check=lambda tree: check_digest(tree, "the uploaded soup", digest),
            fits=fits,
        )


def _params(job: Job, merged: Recipe) -> dict[str, str]:
    """What MLflow's pages show of a soup, and search by, besides its parents and λ."""
    params = {
        "method": job.spec.method,
        "weights": naming.format_weights(merged.lam),
        "tasks": redact(job.spec.tasks),
        "ood_tasks": redact(job.spec.ood_tasks),
    }
    return {key: value for key, value in params.items() if value}


def recipe_of(job: Job, manifest: Manifest) -> Recipe:
    """The recipe that a soup of the request was made by, according to its manifest."""
    lam = {version_of(source.uri): source.lam for source in manifest.sources}
    return job.recipe([lam.get(version, 0.0) for version in job.versions])


def made_by(
    job: Job, version: Version, trials: Sequence[Trial], chosen: Recipe, experiment: str
) -> Proven | None:
    """The proof that a version is a result of the request; None, with a warning, if it is not.

    Its parents must have the bytes of the request's parents, they must mix to its bytes, and its
    recipe must be the chosen one, or one that an earlier search run of the request registered.
    Such a run counts only in the experiment that this request writes to.

    Raises:
        MismatchError: it is, but somebody changed its tags.
    """
    method = job.method.needs or "linear"
    try:
        blend = job.blend(Recipe(method, job.space.uniform().lam))
        proven = prove(job.client, version, at_hand=job.opened, blend=blend)
    except (SpecError, MismatchError, ParentError) as error:
        logger.warning("%s is passed over: %s", version, error.what)
        return None
    recipe = recipe_of(job, proven.manifest)
    parents = [(o.parent.version, o.parent.digest) for o in job.mixed(recipe)]
    why = ""
    if [*proven.parents.items()] != parents or proven.manifest.method != method:
        why = "it was made of other parents, or in another way, than its tags say"
    elif recipe not in {t.recipe for t in trials if t.held_out}:
        why = "the search has not scored its weights"
    elif recipe != chosen and not _searched(job, proven, experiment):
        why = "this search chose other weights, and no search run of this experiment made it"
    if why:
        logger.warning("%s is passed over: %s", version, why)
        return None
    check_tags(proven)
    return proven


def _searched(job: Job, proven: Proven, experiment: str) -> bool:
    """Whether a search run of the same request made a soup, in an experiment."""
    wanted = {naming.ROLE: "search", naming.REQUEST: job.request}
    runs = tracking.find_runs(job.client, wanted, experiments=[experiment])
    return proven.manifest.search.get("run_id") in {run.info.run_id for run in runs}


def _check_unchanged(parents: Sequence[Opened], manifest: Manifest) -> None:
    """Refuse a soup of other weights than the search scored.

    Raises:
        ParentError: the weights of a parent changed during the search.
    """
    for opened, source in zip(parents, manifest.sources, strict=True):
        assert source.digests is not None
        if source.digests.canonical != opened.parent.digest:
            raise ParentError(
                f"the weights of {opened.parent.version} were changed during the search",
                where=f"{opened.parent.folder}: {source.digests.canonical}, "
                f"{opened.parent.digest} before",
                fix="do not write into registered versions; run the same command again",
            )


def _check_scored(client: Store, recipe: Recipe, trials: Sequence[Trial], digest: str) -> None:
    """Refuse a soup if its statistics give other weights than those that were scored.

    Raises:
        ObjectiveError: the statistics were measured again, and the soup has another digest.
    """
    run_id = next(trial.run_id for trial in trials if trial.recipe == recipe)
    before = client.get_run(run_id).data.tags.get(naming.DIGEST, digest)
    if before != digest:
        raise ObjectiveError(
            "the statistics of the parents give another soup than the one that was scored",
            where=f"{digest}, and {before} in run {run_id}",
            fix=f"delete run {run_id}, then run the same command again: it scores the soup anew",
        )
