"""Move an alias, a stage or another model's alias: who was first is settled before anything moves.

A promotion is an entry in the ledger of the registered model that owns the target, then the move
itself, then a mark on the entry that it was made. Of several at once one writes the next entry; the
others are overtaken. What a killed process left between entry and move, the next promotion makes
first. A target that was moved by hand, past the ledger, stays where it was put.
"""

import getpass
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlflow_soup import family, lineage
from mlflow_soup.errors import GateError, OvertakenError
from mlflow_soup.ledger import Entry, Ledger, open_ledger
from mlflow_soup.naming import Target
from mlflow_soup.records import Version
from mlflow_soup.registry import (
    find_copies,
    look_up,
    set_tags,
    standing,
    tags_of,
    unregister,
)
from mlflow_soup.store import Store, asking, where

MADE, VOID = "made", "void"  # marks on entries
SERIES = "promotion/"


def series_of(target: Target) -> str:
    """The ledger's name for all that happened to a target."""
    return f"{SERIES}{'stage' if target.kind == 'stage' else 'alias'} {target.name}"


def target_of(series: str) -> Target:
    """The target that a series is about, as the model that owns it sees it."""
    kind, _, name = series.removeprefix(SERIES).partition(" ")
    return Target(kind, name)


def promote(
    client: Store,
    version: Version,
    target: Target,
    check: Callable[[Version], None] = lambda _: None,
) -> Version:
    """Point the target at a version whose gate passed; tags first, the pointer last, then look.

    Args:
        client: of the store.
        version: the soup; its bytes were verified by the caller.
        target: alias, stage, or alias of another registered model (which gets a copy).
        check: raises a GateError for a version that the soup was not judged against.

    Returns:
        The version the target points to: `version`, or its copy in the other model.

    Raises:
        GateError: the gate has not passed it, or not against what stands there.
        OvertakenError: another promotion came between; what it put there stays.
    """
    tags = tags_of(client, version)
    if tags.get(lineage.GATE) != lineage.PASSED:
        raise GateError(
            f"{version} has not passed the gate, so it is not promoted",
            where=f"{version.uri}, tag {lineage.GATE}",
            fix=f"mlflow-soup evaluate and mlflow-soup gate --model {version.name} "
            f"--version v{version.number} decide",
        )
    owner = target.model or version.name
    with asking(f"promote {version} to {target}"):
        if target.model:
            version = _copy(client, version, target.model)
        ledger, series = open_ledger(client, owner), series_of(target)
        last = next(iter(ledger.read(series)[::-1]), None)
        if last is not None and not last.mark:
            last = finish(ledger, series, last)
        previous = standing(client, owner, target)
        if previous == version:
            return version
        if previous is not None:
            try:
                check(previous)
            except GateError as error:
                newest = next(iter(ledger.read(series)[::-1]), None)
                if newest is None or newest.told.get("to") != previous.number:
                    raise  # it was put there by hand
                raise _overtaken(target, version, previous) from error
        told = {
            "to": version.number,
            "from": previous.number if previous else None,
            "digest": tags.get(lineage.DIGEST),
            "gate_run": tags.get(lineage.GATE_RUN),
            "verdict": tags[lineage.GATE],
            "target": str(target),
            **signature(),
        }
        entry = Entry(last.number + 1 if last else 1, told)
        if not ledger.append(series, entry.number, told):
            raise _overtaken(target, version, previous)
        if finish(ledger, series, entry) != replace(entry, mark=MADE):
            raise _overtaken(target, version, previous)
        found = standing(client, owner, target)
    if found != version:
        raise _overtaken(target, version, found)
    return version


def signature() -> dict[str, str]:
    """By whom and when; no two are equal."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    return {
        "by": f"{user}@{socket.gethostname()}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "nonce": secrets.token_hex(8),
    }


def _overtaken(target: Target, version: Version, found: Version | None) -> OvertakenError:
    return OvertakenError(
        f"{version} was overtaken: another promotion to {target} came between",
        where=f"{where()}, {target}: {found or 'nothing'} stood there, "
        f"experiment {lineage.ledger_name(version.name)} tells by whom",
        fix="look which one you want; mlflow-soup evaluate, gate and promote decide anew",
    )


def finish(ledger: Ledger, series: str, entry: Entry) -> Entry:
    """Make the move that an entry tells of, and mark the entry; made twice it is the same.

    The entry of a version that is gone by now, or has lost its verdict, is void: nothing moves.

    Returns:
        The entry with its mark; or a later one, when others went on meanwhile: then that is made
        again, since our move may have undone it.
    """
    target = target_of(series)
    while True:
        moved = _move(ledger.client, ledger.name, target, entry.told)
        newest = ledger.read(series)[-1]
        if newest.number == entry.number:
            mark = MADE if moved else VOID
            ledger.mark(series, entry.number, mark)
            return replace(newest, mark=mark)
        entry = newest


def _move(client: Store, owner: str, target: Target, told: Mapping[str, Any]) -> bool:
    """Tags first, the pointer last; False where there is no such version that passed its gate."""
    number = str(told.get("to"))
    found = look_up(client, Version(owner, int(number))) if number.isdecimal() else None
    if found is None or found.tags.get(lineage.GATE) != lineage.PASSED:
        return False
    tags = {
        lineage.PROMOTED_TO: str(told.get("target", target)),
        lineage.PROMOTED_AT: str(told.get("at", "")),
        lineage.PREVIOUS: str(told.get("from") or ""),
    }
    set_tags(client, Version(owner, int(number)), tags)
    if target.kind == "stage":
        client.transition_model_version_stage(
            owner, number, target.name, archive_existing_versions=True
        )
    else:
        client.set_registered_model_alias(owner, target.name, number)
    return True


def _copy(client: Store, version: Version, model: str) -> Version:
    """The version's copy in another registered model, made when it is not there yet."""
    tags = tags_of(client, version)
    digest = tags[lineage.DIGEST]
    made: list[Version] = []

    def create() -> Version:
        made.append(Version(model, int(client.copy_model_version(version.uri, model).version)))
        return made[-1]

    def look() -> Version | None:
        return next(iter(find_copies(client, version, model, digest)), None)

    client.once(look, create, f"copy {version} to {model}")
    copy = find_copies(client, version, model, digest)[0]
    if made and made[-1] != copy:  # another was quicker
        unregister(client, made[-1])
    # the bare numbers that MLflow copied would name versions of the copy's model
    parents = tuple(parent for parent, _ in family.read(version, tags).parents)
    if parents:
        set_tags(client, copy, {lineage.PARENTS: lineage.format_parents(model, parents)})
    return copy
