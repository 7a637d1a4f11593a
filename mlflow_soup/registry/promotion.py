"""Move an alias, a stage or another model's alias, after the ledger decides which process may.

A promotion takes three steps: it appends an entry to the ledger of the model that owns the target,
it moves the target, and it marks the entry as made. Of several simultaneous promotions, one appends
the next entry and the others are overtaken. Only the process that appended an entry moves the
target for it. If that process is killed before it moves the target, nobody was told of a success,
and the same command promotes again. If someone moved the target by hand, it stays where it is.
"""

import getpass
import json
import logging
import secrets
import shlex
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_soup.errors import DeniedError, GateError, OvertakenError
from mlflow_soup.files.signing import Verifier, open_signer, own_verifier, sha256_of
from mlflow_soup.records import Promotion, Version
from mlflow_soup.registry import family, naming
from mlflow_soup.registry.ledger import Entry, Ledger, find_ledger, open_ledger
from mlflow_soup.registry.links import version_link
from mlflow_soup.registry.outages import asking, where
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import (
    find_copies,
    find_registered,
    look_up,
    set_tags,
    tags_of,
    unregister,
    version_at,
    versions_of,
)
from mlflow_soup.request.names import Target

logger = logging.getLogger("mlflow_soup")

MADE, VOID = "made", "void"  # marks on entries
SIGNED = "signed"  # the field of an entry that holds its signature
_LONGEST = 4000  # characters of an entry; MLflow cuts a param at 6000, and the signature needs some
SERIES = "promotion/"
# a promotion takes a second, but the clocks of two machines may differ by more
UNDER_WAY_S = 600.0


def series_of(target: Target) -> str:
    """The name of the series of entries about a target."""
    return f"{SERIES}{'stage' if target.kind == 'stage' else 'alias'} {target.name}"


def target_of(series: str) -> Target:
    """The target that a series is about, as its owner names it: without a model."""
    kind, _, name = series.removeprefix(SERIES).partition(" ")
    return Target(kind, name)


def promote(
    client: Store,
    version: Version,
    target: Target,
    told: Mapping[str, Any],
    covers: Callable[[Version], bool] = lambda _: True,
) -> Promotion:
    """Point the target at a version.

    The order of the last three steps survives a crash: the ledger's entry, the move, the mark.

    Args:
        client: the store's client.
        version: the soup; the caller has computed its verdict.
        target: an alias, a stage, or an alias of another registered model, which gets a copy.
        told: for the ledger: digest, verdict, rules and run of the verdict.
        covers: whether the verdict covers a version, so that the soup may replace it.

    Returns:
        The promotion: of `version`, or of its copy in the other model. If it was made before, the
        one that was made then.

    Raises:
        GateError: someone put a version at the target that the verdict does not cover.
        OvertakenError: another promotion came first; the target keeps what it put there.
    """
    owner = target.model or version.name
    with asking(f"promote {version} to {target}"):
        ledger = open_ledger(client, owner)
        standing = version_at(client, owner, target)
        _check_previous(ledger, target, version, standing, covers)
        made = None
        if target.model:
            version, made = _copy(client, version, target.model, told)
        try:
            return _promote(ledger, version, target, told, standing)
        except OvertakenError:
            if made is not None:
                _discard_copy(ledger, made)
            raise


def _promote(
    ledger: Ledger,
    version: Version,
    target: Target,
    told: Mapping[str, Any],
    covered: Version | None,
) -> Promotion:
    """Append the entry, move the target, mark the entry.

    Args:
        ledger: the ledger of the target's owner.
        version: the version to promote, of the same model.
        target: the target.
        told: as for `promote`.
        covered: what the target pointed to when it was checked that the verdict covers it.
    """
    entries = _settle_last(ledger, target, version)
    previous = version_at(ledger.client, ledger.name, target)
    # whoever has a key leaves no promotion that the key does not vouch for
    if previous == version and (made := _made(ledger, target, entries, version, own_verifier())):
        before = made.told.get("from")
        replaced = Version(ledger.name, before) if isinstance(before, int) else None
        return Promotion(str(target), version, replaced, str(made.told.get("at", "")))
    if previous not in (covered, version):
        raise _overtaken(target, version, previous)
    number = entries[-1].number + 1 if entries else 1
    content = _announcement(version, previous, target, told)
    series = series_of(target)
    ours = Entry(number, sign(ledger.name, series, number, content))
    if not ledger.append(series, ours.number, ours.told):
        raise _overtaken(target, version, previous)
    found = _move_unless_overtaken(ledger, target, ours, version, previous)
    ledger.mark(series, ours.number, MADE if found == version else VOID)
    if found != version:
        raise _overtaken(target, version, found)
    return Promotion(str(target), version, previous, str(content["at"]))


def _discard_copy(ledger: Ledger, copy: Version) -> None:
    """Delete a copy that was made for a promotion that was not made, unless others use it."""
    client = ledger.client
    told = [entry.told for series in ledger.series(SERIES) for entry in ledger.read(series)]
    found = look_up(client, copy)
    if found is None or found.aliases or copy.number in {entry.get("to") for entry in told}:
        return
    try:
        unregister(client, copy)
    except DeniedError:
        logger.warning(
            "%s is a copy for a promotion that was not made; you may not delete it", copy
        )


def _settle_last(ledger: Ledger, target: Target, version: Version) -> list[Entry]:
    """The target's entries, after an entry without a mark was settled.

    Raises:
        OvertakenError: another process may still be at work on the last entry.
    """
    series = series_of(target)
    entries = ledger.read(series)
    if entries and not entries[-1].mark:
        if entries[-1].told.get("to") != version.number and is_under_way(entries[-1]):
            raise _overtaken(target, version, version_at(ledger.client, ledger.name, target))
        entries[-1] = settle(ledger, series, entries[-1])
    return entries


def _check_previous(
    ledger: Ledger,
    target: Target,
    version: Version,
    previous: Version | None,
    covers: Callable[[Version], bool],
) -> None:
    """Check the version at the target; another one than the gate judged against may be there.

    Raises:
        GateError: someone put it there by hand, and the soup was not judged against it.
        OvertakenError: another promotion put it there since the verdict was computed.
    """
    if previous is None or previous == version or covers(previous):
        return
    entries = ledger.read(series_of(target))
    if _is_announced(entries, previous) or _made(ledger, target, entries, previous):
        raise _overtaken(target, version, previous)
    raise GateError(
        f"{version} would replace {previous}, but the two were not scored out of domain together",
        where=previous.uri,
        fix=f"run mlflow-soup evaluate {version.options} "
        f"--promote {shlex.quote(target.text)}, then mlflow-soup promote",
    )


def _is_announced(entries: Sequence[Entry], version: Version) -> bool:
    """Whether the last promotion is of this version, and is not settled yet.

    The entry comes before the move and its mark after.
    """
    return bool(entries) and not entries[-1].mark and entries[-1].told.get("to") == version.number


def _made(
    ledger: Ledger,
    target: Target,
    entries: Sequence[Entry],
    version: Version,
    verifier: Verifier | None = None,
) -> Entry | None:
    """The last promotion, as `last_made` finds it, if it is of this version."""
    last = last_made(ledger.name, series_of(target), entries, verifier)
    return last if last is not None and last.told.get("to") == version.number else None


def _announcement(
    version: Version, previous: Version | None, target: Target, told: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a promotion's entry."""
    content = {
        "to": version.number,
        "from": previous.number if previous else None,
        "target": str(target),
        **told,
        **signature(),
    }
    if len(json.dumps(content)) > _LONGEST:  # MLflow would cut it
        tasks = content["rules"]["tasks"]
        content["rules"] = {**content["rules"], "tasks": f"{len(tasks)} tasks"}
    return content


def sign(model: str, series: str, number: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's content, with its signature if this process has a key."""
    signer = open_signer()
    if signer is None:
        return dict(content)
    about = {"model": model, "series": series, "number": number}
    name = f"{naming.ledger_name(model)} {series}/{number}"
    return {**content, SIGNED: signer.sign("entry", name, _digest(content), about)}


def is_signed(verifier: Verifier, model: str, series: str, entry: Entry) -> bool:
    """Whether one of the keys signed an entry of this ledger, in this place."""
    content = {key: value for key, value in entry.told.items() if key != SIGNED}
    about = {"model": model, "series": series, "number": entry.number}
    return verifier.holds(str(entry.told.get(SIGNED)), "entry", _digest(content), about)


def _digest(content: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(content, sort_keys=True))


def _move_unless_overtaken(
    ledger: Ledger, target: Target, ours: Entry, version: Version, previous: Version | None
) -> Version | None:
    """Move the target for our entry, and return the version that the target then points to.

    A process may be held up between its entry and its move. It moves nothing if others settled its
    entry, appended a newer one or moved the target meanwhile.
    """
    newest = ledger.read(series_of(target))[-1]
    found = version_at(ledger.client, ledger.name, target)
    if newest.number == ours.number and not newest.mark and found in (previous, version):
        _move(ledger.client, version, target, ours.told)
        found = version_at(ledger.client, ledger.name, target)
    return found


def last_made(
    model: str, series: str, entries: Sequence[Entry], verifier: Verifier | None = None
) -> Entry | None:
    """The last promotion of a series, or None.

    Without keys, it is the last entry that is marked as made. A mark is a tag, which others may
    write, so with keys no mark counts: it is the last entry that one of the keys signed. The
    signature covers the number of the entry.
    """
    for entry in reversed(entries):
        if entry.mark == MADE if verifier is None else is_signed(verifier, model, series, entry):
            return entry
    return None


def objection(
    client: Store, version: Version, alias: str, digest: str, verifier: Verifier | None = None
) -> str:
    """Why the ledger does not say that a promotion put an alias where it stands; empty if it does.

    An entry that has no mark yet counts.

    Args:
        client: the store's client.
        version: what the alias points to.
        alias: an alias of the version's model.
        digest: of the version's tensors.
        verifier: keys; only entries that one of them signed count, whatever their marks say.
    """
    ledger, series = find_ledger(client, version.name), series_of(Target("alias", alias))
    entries = ledger.read(series) if ledger is not None else []
    entry, signed = last_made(version.name, series, entries, verifier), verifier is not None
    if not signed and _is_announced(entries, version):
        entry = entries[-1]
    if entry is None and signed and entries:
        return f"none of the keys signed a promotion to @{alias}"
    if entry is None:
        return f"no promotion to @{alias} was ever made"
    if entry.told.get("to") != version.number:
        last = f"the last {'signed ' if signed else ''}promotion to @{alias}, {entry.number}"
        under_way = ", and may be under way: ask again" if signed and is_under_way(entry) else ""
        return f"{last}, is of {_shown(entry.told.get('to'))}{under_way}"
    if entry.told.get("verdict") != naming.PASSED or entry.told.get("digest") != digest:
        return f"entry {entry.number} of the ledger records no verdict about these weights"
    return ""


def _shown(number: object) -> str:
    return "nothing" if number is None else f"v{number}"


def is_under_way(entry: Entry) -> bool:
    """Whether the process that appended an entry may still be at work on it."""
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(str(entry.told.get("at")))
    except (ValueError, TypeError):
        return False
    return -UNDER_WAY_S < age.total_seconds() < UNDER_WAY_S  # clocks differ, but not by years


def signature() -> dict[str, str]:
    """Who promotes and when; a nonce makes each signature unique."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "unknown"
    return {
        "by": f"{user}@{socket.gethostname()}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "nonce": secrets.token_hex(8),
    }


def _overtaken(target: Target, version: Version, found: Version | None) -> OvertakenError:
    return OvertakenError(
        f"{version} was overtaken: another promotion to {target} came first",
        where=f"{where()}: {target} pointed to {found or 'nothing'}; "
        f"experiment {naming.ledger_name(version.name)} says who promoted",
        fix="choose the version that you want, and run mlflow-soup evaluate, gate and promote for "
        f"it; if the other process was killed, wait {UNDER_WAY_S / 60:.0f} minutes first",
    )


def settle(ledger: Ledger, series: str, entry: Entry) -> Entry:
    """Mark an entry whose process is gone: made if the target points to its version, else void.

    The target is not moved: someone may have moved it on purpose since.

    Returns:
        The entry with its mark.
    """
    found = version_at(ledger.client, ledger.name, target_of(series))
    stands = found is not None and found.number == entry.told.get("to")
    mark = MADE if stands else VOID
    ledger.mark(series, entry.number, mark)
    return replace(entry, mark=mark)


def _move(client: Store, version: Version, target: Target, told: Mapping[str, Any]) -> None:
    """Move the target to the version, and tag the version.

    An alias moves last: whoever is told of it finds the tags. If it cannot be moved, the tags are
    as before. A stage has no event of its own, and pipelines are told of the tags: these come last.
    """
    if target.kind == "stage":
        _move_stage(client, version, target.name)
        set_tags(client, version, _promotion_tags(tags_of(client, version), told))
        return
    before = tags_of(client, version)
    tags = _promotion_tags(before, told)
    set_tags(client, version, tags)
    try:
        client.set_registered_model_alias(version.name, target.name, str(version.number))
    except MlflowException:
        set_tags(client, version, {name: before.get(name, "") for name in tags})
        raise


def _promotion_tags(before: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, str]:
    """The tags that say where and when a version was promoted; all its targets, and the last.

    Args:
        before: the version's tags.
        told: as for `promote`.
    """
    target, at = str(told["target"]), str(told["at"])
    earlier = before.get(naming.PROMOTIONS, "")
    others = [line for line in earlier.split("; ") if line and not line.startswith(f"{target} ")]
    return {
        naming.PROMOTED_TO: target,
        naming.PROMOTIONS: "; ".join([*others, f"{target} {at}"]),
    }


def _move_stage(client: Store, version: Version, stage: str) -> None:
    """Move a version to a stage, and what it replaces to Archived."""

    def move(number: int, to: str, *, archive: bool) -> None:
        client.transition_model_version_stage(
            version.name, str(number), to, archive_existing_versions=archive
        )

    try:
        move(version.number, stage, archive=True)
    except MlflowException as error:
        # mlflow#24592: on PostgreSQL with psycopg 3 it compares a number with a text
        if "operator does not exist" not in str(error.message):
            raise
        move(version.number, stage, archive=False)
        for other in versions_of(client, version.name):
            if other.current_stage == stage and int(other.version) != version.number:
                move(int(other.version), "Archived", archive=False)


def _copy(
    client: Store, version: Version, model: str, told: Mapping[str, Any]
) -> tuple[Version, Version | None]:
    """The version's copy in another registered model, and the same again if this call made it.

    The copy has the tags that say what the soup is, and none that say where the original was
    promoted to: `copy_model_version` would copy all of them, and the description.
    """
    with asking(f"copy {version} to {model}"):
        source = client.get_model_version(version.name, str(version.number))
        parents = tuple(parent for parent, _ in family.read(version, source.tags).parents)
        tags = {name: source.tags[name] for name in naming.COPIED if name in source.tags}
        # bare numbers would mean versions of the copy's model
        tags |= {
            naming.DIGEST: str(told["digest"]),
            naming.PARENTS: naming.format_parents(model, parents),
        }
        tags |= {
            naming.GATE: str(told.get("verdict")),
            naming.GATE_RUN: str(told.get("gate_run")),
        }
        if found := find_copies(client, version, model):
            _mend_tags(client, found[0], tags)
            return found[0], None
        attempt = {naming.ATTEMPT: uuid.uuid4().hex}
        _make_model(client, model)

        def create() -> Version:
            made = client.create_model_version(
                model,
                source=version.uri,
                run_id=source.run_id,
                tags={**tags, **attempt},
                description=f"Copy of {version_link(version)}.\n\nPromoted: not yet",
                await_creation_for=0,
            )
            return Version(model, int(made.version))

        def look() -> Version | None:
            return next(iter(find_copies(client, version, model, attempt)), None)

        made = client.once(look, create, f"copy {version} to {model}")
        first = find_copies(client, version, model)[0]
        if made != first:  # another process made its copy first
            unregister(client, made)
            return first, None
    return made, made


def _mend_tags(client: Store, copy: Version, tags: Mapping[str, str]) -> None:
    """Give a copy the tags of its original again, if somebody has changed them."""
    now = tags_of(client, copy)
    set_tags(client, copy, {name: text for name, text in tags.items() if now.get(name) != text})


def _make_model(client: Store, model: str) -> None:
    """Register a model if there is none of this name."""

    def look() -> Any:
        return find_registered(client, model)

    client.once(look, lambda: client.create_registered_model(model), f"register model {model}")
