"""MLflow's model registry: resolve, pull, register and promote versions."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_soup import family, lineage
from mlflow_soup.durable import scratch
from mlflow_soup.errors import (
    ParentError,
    SoupError,
    SpecError,
    StoreError,
)
from mlflow_soup.naming import Target, VersionRef, check_name
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact
from mlflow_soup.store import Store, asking, pages, where

MODEL_ENV = "MLFLOW_SOUP_MODEL"
CACHE_ENV = "MLFLOW_SOUP_CACHE"
_MODEL_ID = re.compile(r"models:/(m-[0-9a-f]+)")
_NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"


def find_model(client: Store, named: str, refs: Sequence[VersionRef]) -> str:
    """The registered model that a request means.

    Args:
        client: of the store.
        named: what the user wrote; may be empty.
        refs: the versions asked for; without a name, the only model that has them all is meant.

    Raises:
        ParentError: no such model, or none at all.
        SpecError: no name, and not exactly one model has these versions.
    """
    named = named or os.environ.get(MODEL_ENV, "")
    check_name(named)
    with asking("list registered models"):
        models = [str(m.name) for m in pages(client.search_registered_models)]
    if not models:
        raise ParentError(
            "the store holds no registered model",
            where=where(),
            fix="point MLFLOW_TRACKING_URI to the store that does",
        )
    if named:
        if named not in models:
            raise ParentError(
                f"there is no registered model {named!r}",
                where=where(),
                fix=f"registered models: {', '.join(sorted(models)[:10])}; "
                "another store: set MLFLOW_TRACKING_URI",
            )
        return named
    if len(models) == 1:
        check_name(models[0], f"the only registered model in {where()}")
        return models[0]
    having = [m for m in models if all(_version(client, m, ref) is not None for ref in refs)]
    if len(having) != 1:
        wanted = " and ".join(map(str, refs)) or "versions"  # with --last, none is named
        found = f"{', '.join(sorted(having))} have" if having else "no registered model has"
        raise SpecError(
            f"no model was named, and {found} {wanted}",
            where=where(),
            fix=f"name one: --model NAME, or {MODEL_ENV}"
            + f"; registered models: {', '.join(sorted(models)[:10])}",
        )
    check_name(having[0], f"registered model in {where()}")
    return having[0]


def _version(client: Store, name: str, ref: VersionRef) -> ModelVersion | None:
    """MLflow's record of a version, or None when there is none."""
    try:
        number = ref.number
        if ref.alias:  # asking for a missing alias gives no error code of its own
            number = client.get_registered_model(name).aliases.get(ref.alias)
        return client.get_model_version(name, str(number)) if number else None
    except MlflowException as error:
        if error.error_code == _NOT_FOUND:
            return None
        raise


def look_up(client: Store, version: Version) -> ModelVersion | None:
    """MLflow's record of a version, or None when it is gone."""
    with asking(f"look up {version}"):
        return _version(client, version.name, VersionRef(version.number, None))


def versions_of(client: Store, name: str, more: str = "") -> list[ModelVersion]:
    """The versions of a model that a filter finds; some databases take `A` for `a`.

    Raises:
        SpecError: the name, which a store may hold whatever it is, would be more than a name there.
    """
    check_name(name, f"registered model in {where()}")
    found = pages(client.search_model_versions, f"name='{name}'{more}")
    return [version for version in found if version.name == name]


def resolve(client: Store, name: str, ref: VersionRef) -> Version:
    """The version a reference means; an alias is resolved now and never again.

    Raises:
        ParentError: there is no such version or alias.
    """
    with asking(f"look up {name} {ref}"):
        found = _version(client, name, ref)
    if found is None:
        numbers = sorted(int(v.version) for v in versions_of(client, name))
        aliases = sorted(client.get_registered_model(name).aliases)
        raise ParentError(
            f"{name} has no {'alias ' if ref.alias else ''}{ref}",
            where=where(),
            fix=f"its versions: {', '.join(map(str, numbers)) or 'none'}; "
            f"its aliases: {', '.join(aliases) or 'none'}",
        )
    return Version(name, int(found.version))  # int on a database, str over HTTP


def last(client: Store, name: str, count: int) -> list[Version]:
    """The newest versions that are no soups, oldest first.

    Raises:
        SpecError: there are fewer.
    """
    with asking(f"list the versions of {name}"):
        found = versions_of(client, name)
    numbers = sorted(int(v.version) for v in found if lineage.DIGEST not in v.tags)
    if len(numbers) < count:
        raise SpecError(
            f"{name} has only {len(numbers)} versions that are no soups",
            where=f"--last {count}",
            fix=f"at most --last {len(numbers)}" if len(numbers) > 1 else "register checkpoints",
        )
    return [Version(name, number) for number in numbers[-count:]]


def holder(client: Store, name: str, alias: str) -> Version | None:
    """The version an alias points to, or None."""
    with asking(f"look up {name}@{alias}"):
        found = _version(client, name, VersionRef(None, alias)) if alias else None
    return Version(name, int(found.version)) if found is not None else None


def policy(client: Store, name: str) -> dict[str, str]:
    """The registered model's tags."""
    with asking(f"read the tags of {name}"):
        return dict(client.get_registered_model(name).tags)


def tags_of(client: Store, version: Version) -> dict[str, str]:
    """A version's tags."""
    with asking(f"read the tags of {version}"):
        return dict(client.get_model_version(version.name, str(version.number)).tags)


def soup_tags(client: Store, version: Version) -> dict[str, str]:
    """The tags of a soup, each of those that it was registered with still there and readable.

    Raises:
        SpecError: it is no soup, or somebody changed or deleted one.
    """
    tags = tags_of(client, version)
    if lineage.DIGEST not in tags:
        raise SpecError(
            f"{version} is no soup: it has no tag {lineage.DIGEST}",
            where=version.uri,
            fix="name a version that mlflow-soup run registered",
        )
    spoilt = [
        tag
        for tag in (lineage.PARENTS, lineage.WEIGHTS, lineage.KEY, lineage.RUN_ID)
        if tag not in tags
    ]
    readers = {
        lineage.PARENTS: lambda text: lineage.parse_parents(version.name, text),
        lineage.WEIGHTS: lineage.parse_weights,
    }
    for tag, read in readers.items():
        try:
            read(tags.get(tag, ""))
        except ValueError:
            spoilt.append(tag)
    if spoilt:
        raise SpecError(
            f"somebody changed the tags of {version}: {', '.join(dict.fromkeys(spoilt))}",
            where=version.uri,
            fix=f"mlflow-soup verify {version.uri} tells what its manifest says: set them so, or "
            "delete the version and run its request again",
        )
    return tags


def trace(client: Store, version: Version) -> family.Family:
    """A version and all that it is made of, generation by generation; each is looked up once.

    Deleted parents are members of kind `missing`.
    """
    members: dict[Version, family.Member] = {}
    generation = [version]
    while generation:
        for v in dict.fromkeys(generation):
            found = look_up(client, v)
            members[v] = (
                family.read(v, found.tags, tuple(found.aliases))
                if found is not None
                else family.Member(v, family.MISSING)
            )
        parents = [parent for v in generation for parent, _ in members[v].parents]
        generation = [parent for parent in parents if parent not in members]
    return family.gather(version, members)


def set_tags(client: Store, version: Version, tags: Mapping[str, str]) -> None:
    """Write a version's tags, one by one: MLflow has no other way."""
    with asking(f"tag {version}"):
        for key, value in tags.items():
            client.set_model_version_tag(version.name, str(version.number), key, value)


def model_id(client: Store, version: Version) -> str | None:
    """The logged model behind a version; MLflow tells it in the version's source only."""
    with asking(f"look up {version}"):
        source = client.get_model_version(version.name, str(version.number)).source
    match = _MODEL_ID.fullmatch(source or "")
    return str(match[1]) if match else None


def origin(client: Store, version: Version) -> tuple[str, str]:
    """The run that logged a version, and where its files are."""
    with asking(f"look up {version}"):
        run_id = client.get_model_version(version.name, str(version.number)).run_id
        location = client.get_model_version_download_uri(version.name, str(version.number))
    return run_id or "", redact(location)


def find_soups(client: Store, name: str, tags: Mapping[str, str]) -> list[Version]:
    """The versions that were registered with these tags, by number."""
    query = "".join(f" and tags.`{key}`='{value}'" for key, value in tags.items())
    with asking(f"search the versions of {name}"):
        found = versions_of(client, name, query)
    return sorted(Version(name, int(v.version)) for v in found if tags.items() <= v.tags.items())


def find_soup(client: Store, name: str, tags: Mapping[str, str]) -> Version | None:
    """The version that was registered with these tags; the lowest, should there be several."""
    return next(iter(find_soups(client, name, tags)), None)


def cache_folder() -> Path:
    """Where pulled versions and what was measured of them are kept on this machine."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlflow-soup")
    except RuntimeError as error:  # a container's user without a home
        raise SpecError(
            f"there is no folder for what is kept on this machine: {error}",
            where=f"{CACHE_ENV} is not set",
            fix=f"name one: {CACHE_ENV}=/var/cache/mlflow-soup",
        ) from error


def lease_folder() -> Path:
    """Where processes on this machine see which requests are worked on."""
    return cache_folder() / "lease" / store_id()


def store_id() -> str:
    """A name for the tracking store, for folders that belong to it."""
    return hashlib.sha256(where().encode()).hexdigest()[:16]


def _tree_digest(folder: Path) -> str:
    """Digest of every file below a folder with its name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def pull(client: Store, version: Version, *, fresh: bool = False) -> Path:
    """A version's artifact tree on this machine; never to be written into.

    In a local store it is the tree itself, without a copy. From elsewhere it is downloaded once
    into a cache whose entries are named by their content and checked before they are used again.

    Args:
        client: of the store.
        version: what to pull.
        fresh: download it even if it is cached, to see what the store holds now.

    Raises:
        ParentError: its files are not there.
        StoreError: they could not be fetched.
    """
    try:
        if logged_id := model_id(client, version):
            status = client.get_logged_model(logged_id).status
            if status != LoggedModelStatus.READY:  # MLflow serves it all the same
                raise ParentError(
                    f"{version} was never uploaded completely: its logged model is {status}",
                    where=f"{where()}, {logged_id}",
                    fix="register the checkpoint again",
                )
        source = client.get_model_version_download_uri(version.name, str(version.number))
        if is_local_uri(source):
            folder = Path(local_file_uri_to_path(source))
            if not folder.is_dir():
                raise ParentError(
                    f"the files of {version} are gone", where=str(folder), fix="register it again"
                )
            return folder
        return _pull_remote(client, version, source, fresh)
    except SoupError:
        raise
    except Exception as error:  # each artifact store has its own, for sources of any kind
        raise StoreError(
            f"{version} could not be fetched: {error}",
            where=where(),
            fix="check the artifact store and its credentials, then run the same command again",
        ) from error


def download_tree(client: Store, uri: str, folder: Path) -> Path:
    """All artifacts below a `models:/` URI, into an empty folder, which is returned."""

    def download() -> str:
        return str(download_artifacts(uri, dst_path=str(folder)))

    client.download(download, lambda: bool(_listing_of(client, uri)), f"fetch {uri}")
    (folder / "registered_model_meta").unlink(missing_ok=True)  # written by MLflow as it serves
    return folder


def _pull_remote(client: Store, version: Version, source: str, fresh: bool) -> Path:
    cache = cache_folder()
    listing = _listing_of(client, version.uri)
    entry = hashlib.sha256(json.dumps([source, listing]).encode()).hexdigest()
    pointer = cache / "source" / entry
    if pointer.is_file() and not fresh:
        folder = cache / "content" / pointer.read_text()
        if folder.is_dir() and _tree_digest(folder) == folder.name:
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # spoilt
    for below in ("source", "content", "temporary"):
        (cache / below).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache / "temporary") as temporary:
        fetched = Path(temporary) / "tree"
        fetched.mkdir()
        download_tree(client, version.uri, fetched)
        folder = cache / "content" / _tree_digest(fetched)
        with contextlib.suppress(FileExistsError):
            if not folder.exists():
                fetched.rename(folder)
        (Path(temporary) / "pointer").write_text(folder.name)
        (Path(temporary) / "pointer").replace(pointer)
    return folder


def _listing_of(client: Store, uri: str) -> list[tuple[str, int]]:
    """Name and size of every file below a `models:/` URI."""
    files: list[tuple[str, int]] = []
    pending = [uri]
    while pending:
        place = pending.pop()
        what = f"list the files of {uri}"
        for info in client.persist(partial(list_artifacts, artifact_uri=place), what) or []:
            if info.is_dir:
                pending.append(f"{uri}/{info.path}")
            else:
                files.append((info.path, info.file_size or 0))
    return sorted(files)


def register(
    client: Store,
    folder: Path,
    *,
    name: str,
    run_id: str,
    parents: Sequence[Version],
    tags: Mapping[str, str],
    description: str,
    check: Callable[[Path], None],
) -> Version:
    """Upload a soup and register it as a new version with native lineage to its parents.

    One request has one version, however many ask for it at once: MLflow numbers versions in the
    order in which they are created, and the lowest stays.

    Args:
        client: of the store.
        folder: the artifact tree, in its parents' layout; an MLmodel file in it is rewritten.
        name: the registered model.
        run_id: the search run; parents become its input models, the soup its output model.
        parents: the versions it was made of.
        tags: created together with the version, in one transaction; with the request.
        description: Markdown for the version's page.
        check: refuses a tree, read back from the store, that does not hold what was uploaded.

    Returns:
        The version of the request: ours, or that of a quicker one.
    """
    with asking(f"register a soup of {name}"):
        experiment = client.get_run(run_id).info.experiment_id
        for left in uploads(client, experiment, {lineage.REQUEST: tags[lineage.REQUEST]}):
            if left.status == LoggedModelStatus.PENDING:  # cut short; nobody else is at it
                client.finalize_logged_model(left.model_id, LoggedModelStatus.FAILED)
        shown = {k: v for k, v in tags.items() if k in (lineage.PARENTS, lineage.LAMBDA)}
        params = {k.removeprefix("soup."): v for k, v in shown.items()}
        attempt = {lineage.ATTEMPT: uuid.uuid4().hex}
        logged = client.once(
            lambda: next(iter(uploads(client, experiment, attempt)), None),
            lambda: client.create_logged_model(
                *(experiment, "soup", run_id),
                {**tags, **attempt, lineage.MODEL: name},
                *(params, "causal-lm"),
            ),
            "create a logged model",
        )
        if (folder / "MLmodel").is_file():
            _rewrite_mlmodel(folder, logged.model_id, run_id, logged.artifact_location, params)
        _check_upload(folder)
        client.log_model_artifacts(logged.model_id, str(folder))
        with scratch() as temporary:
            check(_read_back(client, logged, temporary))
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        inputs = [LoggedModelInput(i) for v in parents if (i := model_id(client, v))]
        client.log_inputs(run_id, models=inputs)
        _link_output(client, run_id, logged.model_id)
        version = _register_once(client, name, logged.model_id, run_id, tags, description)
        if model_id(client, version) == logged.model_id:
            _settle_upload(client, logged.model_id, version)
    return version


def _settle_upload(client: Store, logged_id: str, version: Version) -> None:
    """Make a logged model say that it is complete, and of which version it is."""
    found = client.get_logged_model(logged_id)
    if found.status != LoggedModelStatus.READY:  # another took it for cut short, just before
        client.finalize_logged_model(logged_id, LoggedModelStatus.READY)
    # a server writes this link itself, a database does not
    if "mlflow.modelVersions" not in found.tags:
        shown_at = json.dumps([{"name": version.name, "version": version.number}])
        client.set_logged_model_tags(logged_id, {"mlflow.modelVersions": shown_at})


def _link_output(client: Store, run_id: str, logged_id: str) -> None:
    """Make a logged model an output of a run; MLflow refuses to do so twice."""

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
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return pages(client.search_logged_models, [experiment], query)


def find_upload(client: Store, logged_id: str) -> LoggedModel | None:
    """A logged model, or None when it is gone."""
    with asking(f"look up {logged_id}"):
        try:
            return client.get_logged_model(logged_id)
        except MlflowException as error:
            if error.error_code == _NOT_FOUND:
                return None
            raise


def is_registered(client: Store, logged_id: str) -> bool:
    """Whether a version of any model is made of a logged model."""
    with asking(f"look for versions of {logged_id}"):
        return bool(pages(client.search_model_versions, f"source_path = 'models:/{logged_id}'"))


def _read_back(client: Store, logged: LoggedModel, temporary: Path) -> Path:
    """What the store holds of a logged model by now."""
    if is_local_uri(logged.artifact_location):
        return Path(local_file_uri_to_path(logged.artifact_location))
    uri = f"models:/{logged.model_id}"
    return download_tree(client, uri, temporary)


def _register_once(
    client: Store,
    name: str,
    logged_id: str,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
) -> Version:
    """The one version of a request; what we have made in vain is taken back."""
    request = {lineage.REQUEST: tags[lineage.REQUEST]}

    def create() -> Version:
        created = client.create_model_version(
            name,
            source=f"models:/{logged_id}",
            run_id=run_id,
            tags=dict(tags),
            description=description,
            await_creation_for=0,
            model_id=logged_id,
        )
        return Version(name, int(created.version))

    client.once(lambda: find_soup(client, name, request), create, "register a version")
    first, *others = find_soups(client, name, request)
    for version in others:
        found = _version(client, name, VersionRef(version.number, None))
        # where there is none, another has taken theirs back meanwhile
        if found is not None and found.source == f"models:/{logged_id}":
            unregister(client, version)
    if model_id(client, first) != logged_id:
        client.discard(lambda: client.delete_logged_model(logged_id), f"delete {logged_id}")
    return first


def unregister(client: Store, version: Version) -> None:
    """Delete a version."""
    name, number = version.name, str(version.number)
    client.discard(lambda: client.delete_model_version(name, number), f"delete {version}")


def _check_upload(folder: Path) -> None:
    """Refuse links in what is uploaded: MLflow would upload what they point to.

    Raises:
        StoreError: somebody put one there after the soup was written.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(
                f"{path.name} came into the soup's folder, and is no plain file",
                where=str(path),
                fix="nobody else may write to the folder of temporary files: set TMPDIR",
            )


def _rewrite_mlmodel(
    folder: Path, logged_id: str, run_id: str, location: str, params: Mapping[str, Any]
) -> None:
    """Make a copied MLmodel speak of the soup; flavours and signature stay the parents'."""
    model = Model.load(str(folder))
    model.model_id = model.model_uuid = logged_id
    model.run_id, model.artifact_path = run_id, location
    model.metadata = {**(model.metadata or {}), "soup": dict(params)}
    model.save(str(folder / "MLmodel"))


def version_path(version: Version) -> str:
    """The UI's path of a version."""
    return f"/models/{version.name}/versions/{version.number}"


def describe(client: Store, version: Version, description: str) -> None:
    """Replace a version's description."""
    with asking(f"describe {version}"):
        client.update_model_version(version.name, str(version.number), description)


def standing(client: Store, name: str, target: Target) -> Version | None:
    """What a target points to now."""
    if target.kind != "stage":
        return holder(client, name, target.name)
    found = versions_of(client, name)
    numbers = [int(v.version) for v in found if v.current_stage == target.name]
    return Version(name, max(numbers)) if numbers else None


def find_copies(client: Store, version: Version, model: str, digest: str) -> list[Version]:
    """A version's copies in another registered model, by number."""
    with asking(f"search the versions of {model}"):
        found = versions_of(client, model)
    return sorted(
        Version(model, int(v.version))
        for v in found
        if v.tags.get(lineage.DIGEST) == digest and v.source == version.uri
    )
