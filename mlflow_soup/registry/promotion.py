"""Move an alias, a stage or another model's alias, after the ledger decides which process may.

A promotion takes three steps: it appends an entry to the ledger of the model that owns the target,
it moves the target, and it marks the entry as made. Of several simultaneous promotions, one appends
the next entry and the others are overtaken. Only the process that appended an entry moves the
target for it. If that process is killed before it moves the target, nobody was told of a success,
and the same command promotes again. If someone moved the target by hand, it stays where it is.
"""

import getpass
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlflow_soup.errors import GateError, OvertakenError
from mlflow_soup.records import Version
from mlflow_soup.registry import family, naming
from mlflow_soup.registry.ledger import Entry, Ledger, open_ledger
from mlflow_soup.registry.outages import asking, where
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_copies, set_tags, tags_of, unregister, version_at
from mlflow_soup.request.names import Target

MADE, VOID = "made", "void"  # marks on entries
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
    check: Callable[[Version], None] = lambda _: None,
) -> Version:
    """Point the target at a version that passed the gate, and return what it then points to.

    The order of the last three steps survives a crash: the ledger's entry, the move, the mark.

    Args:
        client: the store's client.
        version: the soup; the caller has verified its bytes.
        target: an alias, a stage, or an alias of another registered model, which gets a copy.
        check: raises a GateError for a version that the soup was not judged against.

    Returns:
        `version`, or its copy in the other model.

    Raises:
        GateError: the gate did not pass the version, or judged it against another version than
            the one at the target.
        OvertakenError: another promotion came first; the target keeps what it put there.
    """
    tags = tags_of(client, version)
    _require_passed(version, tags)
    with asking(f"promote {version} to {target}"):
        owner = target.model or version.name
        if target.model:
            version = _copy(client, version, target.model)
        ledger = open_ledger(client, owner)
        entries = _settle_last(ledger, target, version)
        previous = version_at(client, owner, target)
        _check_previous(ledger, target, version, previous, check)
        if previous == version and _was_made(entries, version):
            return version
        told = _announcement(version, previous, target, tags)
        ours = Entry(entries[-1].number + 1 if entries else 1, told)
        if not ledger.append(series_of(target), ours.number, told):
            raise _overtaken(target, version, previous)
        found = _move_unless_overtaken(ledger, target, ours, version, previous)
        ledger.mark(series_of(target), ours.number, MADE if found == version else VOID)
    if found != version:
        raise _overtaken(target, version, found)
    return version


def _require_passed(version: Version, tags: Mapping[str, str]) -> None:
    """Refuse a version that the gate has not passed.

    Raises:
        GateError: its tag `soup.gate` is not `passed`.
    """
    if tags.get(naming.GATE) != naming.PASSED:
        raise GateError(
            f"{version} has not passed the gate, so it is not promoted",
            where=f"{version.uri}, tag {naming.GATE}",
            fix=f"run mlflow-soup evaluate and then mlflow-soup gate --model {version.name} "
            f"--version v{version.number}",
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
    check: Callable[[Version], None],
) -> None:
    """Check the version at the target; another one than the gate judged against may be there.

    Raises:
        GateError: someone put it there by hand, and the soup was not judged against it.
        OvertakenError: another promotion put it there.
    """
    if previous is None or previous == version:
        return
    try:
        check(previous)
    except GateError as error:
        if not _was_made(ledger.read(series_of(target)), previous):
            raise
        raise _overtaken(target, version, previous) from error


def _was_made(entries: Sequence[Entry], version: Version) -> bool:
    """Whether the last promotion that was made moved the target to this version."""
    last = last_made(entries)
    return last is not None and last.told.get("to") == version.number


def _announcement(
    version: Version, previous: Version | None, target: Target, tags: Mapping[str, str]
) -> dict[str, Any]:
    """The content of a promotion's entry."""
    return {
        "to": version.number,
        "from": previous.number if previous else None,
        "digest": tags.get(naming.DIGEST),
        "gate_run": tags.get(naming.GATE_RUN),
        "verdict": tags[naming.GATE],
        "target": str(target),
        **signature(),
    }


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


def last_made(entries: Sequence[Entry]) -> Entry | None:
    """The last entry that is marked as made, or None."""
    return next((entry for entry in reversed(entries) if entry.mark == MADE), None)


def is_under_way(entry: Entry) -> bool:
    """Whether the process that appended an entry may still be at work on it."""
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(str(entry.told.get("at")))
    except (ValueError, TypeError):
        return False
    return age.total_seconds() < UNDER_WAY_S


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
    """Tag the version, then move the target to it."""
    tags = {
        naming.PROMOTED_TO: str(told["target"]),
        naming.PROMOTED_AT: str(told["at"]),
        naming.PREVIOUS: str(told["from"] or ""),
    }
    set_tags(client, version, tags)
    owner, number = version.name, str(version.number)
    if target.kind == "stage":
        client.transition_model_version_stage(
            owner, number, target.name, archive_existing_versions=True
        )
    else:
        client.set_registered_model_alias(owner, target.name, number)


def _copy(client: Store, version: Version, model: str) -> Version:
    """The version's copy in another registered model; the first call makes it."""
    tags = tags_of(client, version)
    digest = tags.get(naming.DIGEST, "")
    made: list[Version] = []

    def create() -> Version:
        made.append(Version(model, int(client.copy_model_version(version.uri, model).version)))
        return made[-1]

    def look() -> Version | None:
        return next(iter(find_copies(client, version, model, digest)), None)

    client.once(look, create, f"copy {version} to {model}")
    copy = find_copies(client, version, model, digest)[0]
    if made and made[-1] != copy:  # another process made its copy first
        unregister(client, made[-1])
    # MLflow copied bare numbers, which would mean versions of the copy's model
    parents = tuple(parent for parent, _ in family.read(version, tags).parents)
    if parents:
        set_tags(client, copy, {naming.PARENTS: naming.format_parents(model, parents)})
    return copy
