"""Upload a soup and register it; each request gets exactly one version."""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mlflow_soup.errors import StoreError
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact
from mlflow_soup.registry import inputs, naming
from mlflow_soup.registry.outages import NOT_FOUND, asking
from mlflow_soup.registry.pull import fetch_tree
from mlflow_soup.registry.store import Store, equals, pages
from mlflow_soup.registry.versions import (
    find_soups,
    find_version,
    model_id,
    unregister,
)
from mlflow_soup.request.names import VersionRef

logger = logging.getLogger("mlflow_soup")


def register_soup(
    client: Store,
    folder: Path,
    *,
    name: str,
    run_id: str,
    parents: Sequence[Version],
    tags: Mapping[str, str],
    params: Mapping[str, str],
    description: str,
    check: Callable[[Path], None],
    fits: Callable[[Version], bool] = lambda _: True,
) -> Version:
    """Upload a soup and register it as a new version with MLflow's own lineage to its parents.

    One request gets one version, even if several processes register it at once: MLflow numbers
    versions in the order in which they are created, and the lowest number stays.

    Args:
        client: the store's client.
        folder: the soup's files, in the layout of its parents; an MLmodel file in it is rewritten.
        name: the registered model.
        run_id: the search run; the parents become its input models, the soup its output model.
        parents: the versions that the soup was made of.
        tags: the version's tags, with `soup.request`; one transaction writes them and it.
        params: more params of the logged model than parents and λ.
        description: Markdown for the version's page.
        check: raises an error if the files that the store returns are not the uploaded ones.
        fits: whether a version whose tags name the request is its result; the others are left
            alone.

    Returns:
        The version of the request: ours, or the one that another process registered first.
    """
    with asking(f"register a soup of {name}"):
        experiment = client.experiment_of(run_id)
        for left in uploads(client, experiment, {naming.REQUEST: tags[naming.REQUEST]}):
            if left.status == LoggedModelStatus.PENDING:  # an earlier upload that was cut short
                client.finalize_logged_model(left.model_id, LoggedModelStatus.FAILED)
        shown = {k: v for k, v in tags.items() if k in (naming.PARENTS, naming.LAMBDA)}
        made = {k.removeprefix("soup."): v for k, v in shown.items()}
        attempt = {naming.ATTEMPT: uuid.uuid4().hex}
        logged = client.once(
            lambda: next(iter(uploads(client, experiment, attempt)), None),
            lambda: client.create_logged_model(
                *(experiment, "soup", run_id),
                {**tags, **attempt, naming.MODEL: name},
                *({**made, **params}, "causal-lm"),
            ),
            "create a logged model",
            tried=False,
        )
        if (folder / "MLmodel").is_file():
            _rewrite_mlmodel(folder, logged.model_id, run_id, logged.artifact_location, made)
        _check_upload(folder)
        client.log_model_artifacts(logged.model_id, str(folder))
        check(fetch_tree(client, logged.artifact_location, fresh=True))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        inputs.link(client, run_id, {}, [model_id(client, version) for version in parents])
        _link_output(client, run_id, logged.model_id)
        version = _register_once(client, name, logged.model_id, run_id, tags, description, fits)
        if model_id(client, version) == logged.model_id:
            _settle_upload(client, logged.model_id, version)
    return version


def _settle_upload(client: Store, logged_id: str, version: Version) -> None:
    """Make a logged model show that it is complete, and which version it belongs to."""
    found = client.get_logged_model(logged_id)
    if found.status != LoggedModelStatus.READY:  # another process took it for cut short just now
        client.finalize_logged_model(logged_id, LoggedModelStatus.READY)
    # private door: mlflow.modelVersions
    # a server writes this link itself; MLflow on a database does not
    if "mlflow.modelVersions" not in found.tags:
        shown_at = json.dumps([{"name": version.name, "version": version.number}])
        client.set_logged_model_tags(logged_id, {"mlflow.modelVersions": shown_at})


def _link_output(client: Store, run_id: str, logged_id: str) -> None:
    """Make a logged model an output of a run, once: MLflow refuses a second time."""

    def look() -> bool | None:
        outputs = client.get_run(run_id).outputs
        found = outputs.model_outputs if outputs is not None else ()
        return logged_id in {output.model_id for output in found} or None

    def create() -> bool:
        client.log_outputs(run_id, [LoggedModelOutput(logged_id, 0)])
        return True

    client.once(look, create, "link the soup with its run")


def uploads(client: Store, experiment: str, tags: Mapping[str, str]) -> list[LoggedModel]:
    """The logged models of an experiment with these tags."""
    query = " and ".join(equals(f"tags.`{key}`", value) for key, value in tags.items())
    found = pages(client.search_logged_models, [experiment], query)
    return [model for model in found if tags.items() <= model.tags.items()]


def find_upload(client: Store, logged_id: str) -> LoggedModel | None:
    """A logged model, or None if it is gone."""
    with asking(f"look up {logged_id}"):
        try:
            return client.get_logged_model(logged_id)
        except MlflowException as error:
            if error.error_code == NOT_FOUND:
                return None
            raise


def _register_once(
    client: Store,
    name: str,
    logged_id: str,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
    fits: Callable[[Version], bool],
) -> Version:
    """The one version of a request; ours is deleted if another process registered first."""
    request = {naming.REQUEST: tags[naming.REQUEST]}

    def registered() -> list[Version]:
        return [version for version in find_soups(client, name, request) if fits(version)]

    def create() -> Version:
        created = client.create_model_version(
            name,
            source=f"models:/{logged_id}",
            run_id=run_id,
            tags=dict(tags),
            description=redact(description),
            await_creation_for=0,
            model_id=logged_id,
        )
        return Version(name, int(created.version))

    client.once(lambda: next(iter(registered()), None), create, "register a version")
    first, *others = registered()
    for version in others:
        found = find_version(client, name, VersionRef(version.number, None))
        # a version may be gone: its own process deletes it, too
        if found is not None and found.source == f"models:/{logged_id}":
            unregister(client, version)
    if model_id(client, first) != logged_id:
        client.discard(lambda: client.delete_logged_model(logged_id), f"delete {logged_id}")
    return first


def _check_upload(folder: Path) -> None:
    """Refuse links in the soup's folder: MLflow would upload the files that they point to.

    Raises:
        StoreError: someone put a link or a special file there after the soup was written.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"the soup's folder holds {path.name}, which is not a plain file",
                where=str(path),
                fix="set TMPDIR to a folder that only you may write to",
            )


def _rewrite_mlmodel(
    folder: Path, logged_id: str, run_id: str, location: str, params: Mapping[str, Any]
) -> None:
    """Make a copied MLmodel file describe the soup; flavours and signature stay the parents'."""
    model = Model.load(str(folder))
    model.model_id = model.model_uuid = logged_id
    model.run_id, model.artifact_path = run_id, location
    model.metadata = {**(model.metadata or {}), "soup": dict(params)}
    model.save(str(folder / "MLmodel"))
