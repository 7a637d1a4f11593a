"""Move an alias, a stage or another model's alias: who was first is settled before anything moves.

A promotion is an entry in the ledger of the registered model that owns the target, then the move
itself, then a mark on the entry that it was made. Of several at once one writes the next entry; the
others are overtaken. Only who wrote an entry moves by it: where a process was killed in between,
nobody was told that its promotion succeeded, and the same command makes it anew. A target that was
moved by hand, past the ledger, stays where it was put.
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
# a promotion takes a second; clocks of two machines may differ by more
UNDER_WAY_S = 600.0


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
    if tags.get(naming.GATE) != naming.PASSED:
        raise GateError(
            f"{version} has not passed the gate, so it is not promoted",
            where=f"{version.uri}, tag {naming.GATE}",
            fix=f"mlflow-soup evaluate and mlflow-soup gate --model {version.name} "
            f"--version v{version.number} decide",
        )
    owner = target.model or version.name
    with asking(f"promote {version} to {target}"):
        if target.model:
            version = _copy(client, version, target.model)
        ledger, series = open_ledger(client, owner), series_of(target)
        entries = ledger.read(series)
        if entries and not entries[-1].mark:
            if entries[-1].told.get("to") != version.number and is_under_way(entries[-1]):
                raise _overtaken(target, version, version_at(client, owner, target))
            entries[-1] = settle(ledger, series, entries[-1])
        previous = version_at(client, owner, target)
        if previous is not None and previous != version:
            try:
                check(previous)
            except GateError as error:
                last = last_made(ledger.read(series))
                if last is None or last.told.get("to") != previous.number:
                    raise  # it was put there by hand
                raise _overtaken(target, version, previous) from error
        before = last_made(entries)
        if previous == version and before is not None and before.told.get("to") == version.number:
            return version
        told = {
            "to": version.number,
            "from": previous.number if previous else None,
            "digest": tags.get(naming.DIGEST),
            "gate_run": tags.get(naming.GATE_RUN),
            "verdict": tags[naming.GATE],
            "target": str(target),
            **signature(),
        }
        number = len(entries) and entries[-1].number
        if not ledger.append(series, number + 1, told):
            raise _overtaken(target, version, previous)
        newest = ledger.read(series)[-1]
        found = version_at(client, owner, target)
        # who was held up for so long that others settled the entry, or went on, moves nothing
        if newest.number == number + 1 and not newest.mark and found in (previous, version):
            _move(client, version, target, told)
            found = version_at(client, owner, target)
        ledger.mark(series, number + 1, MADE if found == version else VOID)
    if found != version:
        raise _overtaken(target, version, found)
    return version


def last_made(entries: Sequence[Entry]) -> Entry | None:
    """The last promotion that was made; None for none."""
    return next((entry for entry in reversed(entries) if entry.mark == MADE), None)


def is_under_way(entry: Entry) -> bool:
    """Whether the process that wrote an entry may still be at it."""
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(str(entry.told.get("at")))
    except (ValueError, TypeError):
        return False
    return age.total_seconds() < UNDER_WAY_S


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
        f"experiment {naming.ledger_name(version.name)} tells by whom",
        fix="look which one you want; mlflow-soup evaluate, gate and promote decide anew; if the "
        f"other was killed meanwhile, {UNDER_WAY_S / 60:.0f} minutes later at the earliest",
    )


def settle(ledger: Ledger, series: str, entry: Entry) -> Entry:
    """Mark an entry whose writer is gone: made where its version stands, else void.

    Nothing is moved: whoever has moved the target since then had reasons.

    Returns:
        The entry with its mark.
    """
    found = version_at(ledger.client, ledger.name, target_of(series))
    stands = found is not None and found.number == entry.told.get("to")
    mark = MADE if stands else VOID
    ledger.mark(series, entry.number, mark)
    return replace(entry, mark=mark)


def _move(client: Store, version: Version, target: Target, told: Mapping[str, Any]) -> None:
    """Tags first, the pointer last."""
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
    """The version's copy in another registered model, made when it is not there yet."""
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
    if made and made[-1] != copy:  # another was quicker
        unregister(client, made[-1])
    # the bare numbers that MLflow copied would name versions of the copy's model
    parents = tuple(parent for parent, _ in family.read(version, tags).parents)
    if parents:
        set_tags(client, copy, {naming.PARENTS: naming.format_parents(model, parents)})
    return copy
