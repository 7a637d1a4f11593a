"""Look up registered models and their versions; search them, read and write their tags."""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact
from mlflow_soup.registry import family, naming
from mlflow_soup.registry.outages import NOT_FOUND, asking, is_server, where_models
from mlflow_soup.registry.store import Store, equals, pages
from mlflow_soup.request.names import Target, VersionRef, check_name
from mlflow_soup.request.spec import unread

logger = logging.getLogger("mlflow_soup")
MODEL_ENV = "MLFLOW_SOUP_MODEL"
LATEST = 2.0**63  # of the times of checkpoints: MLflow's steps end there
_MODEL_ID = re.compile(r"models:/(m-[0-9a-f]+)")


def find_model(client: Store, named: str, refs: Sequence[VersionRef]) -> str:
    """The name of the registered model of a request.

    Args:
        client: the store's client.
        named: the name that the user wrote; may be empty.
        refs: the requested versions; without a name, the only model that has them all is meant.

    Raises:
        ParentError: the store has no such model, or no model at all.
        DeniedError: the user may not read the named model.
        SpecError: no model was named, and not exactly one model has these versions.
    """
    named = named or os.environ.get(MODEL_ENV, "")
    check_name(named)
    if named:
        registered = find_registered(client, named)
        if registered is not None and registered.name == named:  # some databases ignore case
            return named
    with asking("list registered models"):  # a server leaves out those that the user may not read
        models = [str(m.name) for m in pages(client.search_registered_models)]
    if not models:
        raise ParentError(
            "you may read no registered model here, or there is none"
            if is_server(where_models())
            else "the store holds no registered model",
            where=where_models(),
            fix="set MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI to the store that holds your models"
            + (", or ask for READ on them" if is_server(where_models()) else ""),
        )
    if named:
        raise ParentError(
            f"there is no registered model {named!r}",
            where=where_models(),
            fix=f"name one of {', '.join(sorted(models)[:10])}, "
            "or set MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI to another store",
        )
    if len(models) == 1:
        check_name(models[0], f"the only registered model in {where_models()}")
        return models[0]
    having = [m for m in models if all(find_version(client, m, ref) is not None for ref in refs)]
    if len(having) != 1:
        wanted = " and ".join(map(str, refs)) or "versions"  # --last names no version
        found = f"{', '.join(sorted(having))} have" if having else "no registered model has"
        raise SpecError(
            f"no model was named, and {found} {wanted}",
            where=where_models(),
            fix=f"name one: --model NAME, or {MODEL_ENV}"
            + f"; registered models: {', '.join(sorted(models)[:10])}",
        )
    check_name(having[0], f"registered model in {where_models()}")
    return having[0]


def find_version(client: Store, name: str, ref: VersionRef) -> ModelVersion | None:
    """MLflow's record of a version, or None if there is no such version or alias."""
    try:
        number = ref.number
        if ref.alias:  # MLflow has no error code for a missing alias
            number = client.get_registered_model(name).aliases.get(ref.alias)
        if not number:
            return None
        found = client.get_model_version(name, str(number))
        client.remember(_source(Version(name, int(number))), lambda: found.source or "")
        return found
    except MlflowException as error:
        if error.error_code == NOT_FOUND:
            return None
        raise


def look_up(client: Store, version: Version) -> ModelVersion | None:
    """MLflow's record of a version, or None if it is gone."""
    with asking(f"look up {version}"):
        return find_version(client, version.name, VersionRef(version.number, None))


def versions_of(client: Store, name: str, more: str = "") -> list[ModelVersion]:
    """The versions of a model that a filter finds.

    Raises:
        SpecError: the name cannot be used here.
    """
    check_name(name, f"registered model in {where_models()}")
    found = pages(client.search_model_versions, equals("name", name) + more)
    return [version for version in found if version.name == name]  # some databases ignore case


def resolve(client: Store, name: str, ref: VersionRef) -> Version:
    """The version that a reference names; an alias is resolved now and never again.

    Raises:
        ParentError: there is no such version or alias.
    """
    with asking(f"look up {name} {ref}"):
        found = find_version(client, name, ref)
    if found is None:
        numbers = sorted(int(v.version) for v in versions_of(client, name))
        aliases = sorted(client.get_registered_model(name).aliases)
        raise ParentError(
            f"{name} has no {'alias ' if ref.alias else ''}{ref}",
            where=where_models(),
            fix=f"choose one of its versions: {', '.join(map(str, numbers)) or 'none'}; "
            f"or of its aliases: {', '.join(aliases) or 'none'}",
        )
    return Version(name, int(found.version))  # int on a database, str over HTTP


def last(client: Store, name: str, count: int) -> list[Version]:
    """The newest versions that are not soups, oldest first.

    Raises:
        SpecError: the model has fewer.
    """
    return newest(name, checkpoints(client, name), count)


def newest(name: str, found: Sequence[Version], count: int) -> list[Version]:
    """The last of a model's versions that are not soups.

    Raises:
        SpecError: there are fewer.
    """
    if len(found) < count:
        raise SpecError(
            f"{name} has only {len(found)} versions that are not soups",
            where=f"--last {count}",
            fix=f"ask for at most --last {len(found)}"
            if len(found) > 1
            else "register more checkpoints",
        )
    return list(found[-count:])


def checkpoints(client: Store, name: str) -> list[Version]:
    """All versions that are not soups, oldest first."""
    with asking(f"list the versions of {name}"):
        found = versions_of(client, name)
    numbers = sorted(int(v.version) for v in found if naming.DIGEST not in v.tags)
    return [Version(name, number) for number in numbers]


def tell_untimed(tag: str) -> None:
    """Warn that no version has the tag that the user named for `times`."""
    logger.warning("no version has the tag %s, so they count as equally spaced", tag)


def times(client: Store, versions: Sequence[Version], tag: str) -> tuple[float, ...] | None:
    """When checkpoints were saved, by a tag of their versions; None if no version has it.

    Args:
        client: the store's client.
        versions: the versions, oldest first.
        tag: the name of the tag, such as `tokens_seen`.

    Raises:
        SpecError: only some versions have the tag, or its values are no ascending numbers.
    """
    return read_times(versions, [tags_of(client, v).get(tag) for v in versions], tag)


def read_times(
    versions: Sequence[Version], texts: Sequence[str | None], tag: str
) -> tuple[float, ...] | None:
    """The same, of texts that were read already.

    Args:
        versions: as for `times`.
        texts: the value of the tag of each; None for a version without it.
        tag: as for `times`.

    Raises:
        SpecError: as `times`.
    """
    if not any(texts):
        return None
    found: list[float] = []
    for version, text in zip(versions, texts, strict=True):
        try:
            value = float(text or "")
        except ValueError:
            value = math.nan
        if not (abs(value) < LATEST and value > (found[-1] if found else -math.inf)):
            before = f", after {found[-1]:.15g} of the version before" if found and text else ""
            raise SpecError(
                f"the tag {tag} of {version} is {repr(text) if text else 'missing'}{before}",
                where=version.uri,
                fix="give every version a number there, the older a smaller one; or name another "
                "tag with --time-tag, or one that no version has: then they count as equally "
                "spaced",
            )
        found.append(value)
    return tuple(found)


def holder(client: Store, name: str, alias: str) -> Version | None:
    """The version that an alias points to, or None."""
    with asking(f"look up {name}@{alias}"):
        found = find_version(client, name, VersionRef(None, alias)) if alias else None
    return Version(name, int(found.version)) if found is not None else None


def find_registered(client: Store, name: str) -> RegisteredModel | None:
    """MLflow's record of a registered model, or None if there is none."""
    with asking(f"look up {name}"):
        try:
            return client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code == NOT_FOUND:
                return None
            raise


def policy(client: Store, name: str) -> dict[str, str]:
    """The registered model's tags; none if there is no such model yet. Misspelt ones are told."""
    found = find_registered(client, name)
    tags = dict(found.tags) if found is not None else {}
    ours = {value for value in vars(naming).values() if isinstance(value, str)}
    for words in unread(tags, ours):
        logger.warning("registered model %s: %s", name, words)
    return tags


def tags_of(client: Store, version: Version) -> dict[str, str]:
    """A version's tags."""
    with asking(f"read the tags of {version}"):
        return dict(client.get_model_version(version.name, str(version.number)).tags)


def trace(client: Store, version: Version) -> family.Family:
    """The family tree of a version, down to its first parents; each version is looked up once.

    A deleted parent is a member of kind `missing`.
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
    """Write a version's tags, one by one, because MLflow cannot write several at once."""
    with asking(f"tag {version}"):
        for key, value in tags.items():
            client.set_model_version_tag(version.name, str(version.number), key, value)


def model_id(client: Store, version: Version) -> str | None:
    """The id of the logged model that is a version's source; None if the source is another."""

    def ask() -> str:
        with asking(f"look up {version}"):
            return client.get_model_version(version.name, str(version.number)).source or ""

    match = _MODEL_ID.fullmatch(client.remember(_source(version), ask))
    return str(match[1]) if match else None


def _source(version: Version) -> tuple[str, Version]:
    """What a client remembers the source of a version by: a version keeps its source."""
    return "source", version


def logged_model(client: Store, version: Version) -> LoggedModel | None:
    """The logged model that is a version's source, as it is now; None if the source is another."""
    logged_id = model_id(client, version)
    if logged_id is None:
        return None
    found = client.get_logged_model(logged_id)
    client.remember(_place(version), lambda: str(found.artifact_location))
    return found


def place_of(client: Store, version: Version) -> str:
    """The URI of a version's files, as the version was created."""

    def ask() -> str:
        if (logged := logged_model(client, version)) is not None:
            return str(logged.artifact_location)
        return str(client.get_model_version_download_uri(version.name, str(version.number)))

    return client.remember(_place(version), ask)


def _place(version: Version) -> tuple[str, Version]:
    return "place", version


def registered_as(client: Store, logged_id: str) -> list[Version]:
    """The versions of any registered model that have a logged model as their source."""
    with asking(f"look for versions of {logged_id}"):
        found = pages(client.search_model_versions, f"source_path = 'models:/{logged_id}'")
    return sorted(Version(version.name, int(version.version)) for version in found)


def origin_of(client: Store, version: Version) -> tuple[str, str]:
    """The id of the run that logged a version, and the location of its files."""
    with asking(f"look up {version}"):  # each time: somebody may have deleted the version
        found = client.get_model_version(version.name, str(version.number))
        return found.run_id or "", redact(place_of(client, version))


def find_soups(client: Store, name: str, tags: Mapping[str, str]) -> list[Version]:
    """The versions with these tags, by number."""
    query = "".join(" and " + equals(f"tags.`{key}`", value) for key, value in tags.items())
    with asking(f"search the versions of {name}"):
        found = versions_of(client, name, query)
    return sorted(Version(name, int(v.version)) for v in found if tags.items() <= v.tags.items())


def unregister(client: Store, version: Version) -> None:
    """Delete a version."""
    name, number = version.name, str(version.number)
    client.discard(lambda: client.delete_model_version(name, number), f"delete {version}")


def version_at(client: Store, name: str, target: Target) -> Version | None:
    """The version that a target points to now, or None; of several in a stage the newest."""
    return next(reversed(versions_at(client, name, target)), None)


def versions_at(client: Store, name: str, target: Target) -> list[Version]:
    """The versions that a target points to now, by number; only a stage may have several."""
    if target.kind != "stage":
        found = holder(client, name, target.name)
        return [found] if found is not None else []
    staged = [v for v in versions_of(client, name) if v.current_stage == target.name]
    return sorted(Version(name, int(v.version)) for v in staged)


def find_copies(
    client: Store, version: Version, model: str, tags: Mapping[str, str] | None = None
) -> list[Version]:
    """The copies of a version in another registered model, by number; with `tags`, only those."""
    with asking(f"search the versions of {model}"):
        found = versions_of(client, model)
        like = [
            int(v.version)
            for v in found
            if v.source == version.uri and (tags or {}).items() <= v.tags.items()
        ]
        # the source is a text: since the copy was made, another version may have got that name
        files = client.get_model_version_download_uri
        its = files(version.name, str(version.number)) if like else ""
        return sorted(Version(model, n) for n in like if files(model, str(n)) == its)
