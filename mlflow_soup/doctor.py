"""What a registered model's ledger, aliases, versions, runs and bytes say of each other.

Others write to the registry too, and processes are killed: where accounts differ, a complaint says
how that can be and what to do. A repair finishes or takes back what we began; where a person has
decided otherwise, it writes that down. It never moves what deployments read by its own judgement.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from tqdm import tqdm

from mlflow_soup import lease, lineage, promotion, registry, tracking
from mlflow_soup.bench import check_stored
from mlflow_soup.errors import ParentError, StoreError
from mlflow_soup.ledger import Entry, Ledger, find_ledger, leftovers
from mlflow_soup.records import Version
from mlflow_soup.store import Store, asking, connect


@dataclass(frozen=True)
class Complaint:
    """Two accounts that differ.

    Attributes:
        what: is wrong.
        why: how that can be.
        remedy: what `repair` does, or what a person should.
        repair: mends it; None where that takes a person.
    """

    what: str
    why: str
    remedy: str
    repair: Callable[[], object] | None = None


@dataclass(frozen=True)
class _Patient:
    """A registered model as the store has it now."""

    client: Store
    name: str
    versions: tuple[ModelVersion, ...]
    ledger: Ledger | None

    @property
    def soups(self) -> list[tuple[Version, ModelVersion]]:
        """The versions that we have registered, by number."""
        found = [(Version(self.name, int(v.version)), v) for v in self.versions]
        return sorted((at, v) for at, v in found if lineage.DIGEST in v.tags)


@asking("examine the registered model")
def examine(model: str = "", *, digests: bool = True) -> tuple[str, Iterator[Complaint]]:
    """All complaints of a registered model, one after the other; nothing is touched.

    Args:
        model: its name; empty where MLFLOW_SOUP_MODEL or the store leave no choice.
        digests: read the bytes of all soups, too.

    Returns:
        The model that is meant, and its complaints.

    Raises:
        ParentError: there is no such model.
    """
    client = connect()
    name = registry.find_model(client, model, [])
    versions = registry.versions_of(client, name)
    ledger = find_ledger(client, name)
    patient = _Patient(client, name, tuple(versions), ledger)
    return name, _complaints(patient, digests)


def _complaints(patient: _Patient, digests: bool) -> Iterator[Complaint]:
    checks = [_ledger, _aliases, _duplicates, _uploads, _verdicts, _parents, _runs, _asides]
    with asking(f"examine {patient.name}"):
        for check in [*checks, *([_digests] if digests else [])]:
            yield from check(patient)


def mend(complaint: Complaint) -> bool:
    """Do what a complaint offers; False where that takes a person."""
    if complaint.repair is None:
        return False
    with asking("repair what disagrees"):
        complaint.repair()
    return True


def _ledger(patient: _Patient) -> Iterator[Complaint]:
    """The ledger against what its targets point to."""
    ledger = patient.ledger
    for series in ledger.series(promotion.SERIES) if ledger is not None else ():
        assert ledger is not None
        target = promotion.target_of(series)
        entries = ledger.read(series)
        numbers = [entry.number for entry in entries]
        if numbers != list(range(1, len(numbers) + 1)):
            yield Complaint(
                f"the ledger of {target} has entries {numbers}",
                "somebody else wrote to it, or deleted from it",
                "find out who may write to that experiment; later promotions go on from the last",
            )
        last = entries[-1]
        standing = registry.standing(patient.client, patient.name, target)
        number = standing.number if standing is not None else None
        move = f"promotion {last.number} to {target}, of v{last.told.get('to')}"
        if not last.mark:
            yield Complaint(
                f"{move}, was begun and not finished",
                f"its process was killed in between, or is at it now; {target} points to "
                f"{_shown(number)}",
                f"--fix makes the move: {target} → v{last.told.get('to')}",
                partial(promotion.settle, ledger, series, last),
            )
        elif last.mark == promotion.MADE and last.told.get("to") != number:
            yield Complaint(
                f"{target} points to {_shown(number)}, and the last {move}, by "
                f"{last.told.get('by')}",
                "it was moved by hand, past mlflow-soup, or its version was deleted",
                "--fix writes into the ledger where it stands now; it is not moved back",
                partial(_write_down, ledger, series, last, number),
            )


def _shown(number: int | None) -> str:
    return "nothing" if number is None else f"v{number}"


def _write_down(ledger: Ledger, series: str, last: Entry, number: int | None) -> None:
    told = {"to": number, "from": last.told.get("to"), "moved": "by hand, past mlflow-soup"}
    if ledger.append(series, last.number + 1, {**told, **promotion.signature()}):
        ledger.mark(series, last.number + 1, promotion.MADE)


def _aliases(patient: _Patient) -> Iterator[Complaint]:
    """Aliases and stages against verdicts."""
    with asking(f"read the aliases of {patient.name}"):
        aliases = patient.client.get_registered_model(patient.name).aliases
    for version, found in patient.soups:
        at = [f"@{alias}" for alias, number in aliases.items() if int(number) == version.number]
        if found.current_stage not in (None, "", "None", "Archived"):
            at.append(f"stage {found.current_stage}")
        gate = found.tags.get(lineage.GATE)
        if at and gate != lineage.PASSED:
            yield Complaint(
                f"{', '.join(at)} points to soup {version}, whose gate is {gate or 'not judged'}",
                "it was put there by hand, or its verdict changed afterwards",
                f"point it elsewhere, or judge it: mlflow-soup gate --model {version.name} "
                f"--version v{version.number}",
            )


def _duplicates(patient: _Patient) -> Iterator[Complaint]:
    """Versions of one request."""
    with asking(f"read the aliases of {patient.name}"):
        aliases = patient.client.get_registered_model(patient.name).aliases
    pointed = {int(number) for number in aliases.values()}
    requests: dict[str, list[Version]] = defaultdict(list)
    for version, found in patient.soups:
        if lineage.REQUEST in found.tags:
            requests[found.tags[lineage.REQUEST]].append(version)
    for first, *others in requests.values():
        for version in others:
            free = version.number not in pointed
            yield Complaint(
                f"{version} and {first} are soups of one request",
                "a process was killed before it took back what it had registered in vain",
                f"--fix deletes {version}: nothing points to it"
                if free
                else f"an alias points to {version}: move it to {first}, then --fix",
                partial(registry.unregister, patient.client, version) if free else None,
            )


def _uploads(patient: _Patient) -> Iterator[Complaint]:
    """Versions whose files never arrived completely."""
    for version, _ in patient.soups:
        logged_id = registry.model_id(patient.client, version)
        if logged_id is None:
            continue
        with asking(f"look up {logged_id}"):
            status = patient.client.get_logged_model(logged_id).status
        if status != LoggedModelStatus.READY:
            yield Complaint(
                f"{version} is registered, and its logged model {logged_id} is {status}",
                "MLflow registers what was never uploaded completely, too",
                "delete the version; the same request then registers it anew",
            )


def _verdicts(patient: _Patient) -> Iterator[Complaint]:
    """Verdicts of versions against those of the runs that judged them."""
    for version, found in patient.soups:
        gate, run_id = found.tags.get(lineage.GATE), found.tags.get(lineage.GATE_RUN)
        if gate is None:
            continue
        runs = tracking.find_runs(patient.client, {lineage.DIGEST: found.tags[lineage.DIGEST]})
        judged = {run.info.run_id: run.data.tags.get(lineage.GATE) for run in runs}
        again = (
            f"mlflow-soup evaluate, then gate: --model {version.name} --version v{version.number}"
        )
        if run_id not in judged:
            yield Complaint(
                f"the gate of {version} is {gate}, and there is no run that judged it",
                "the run was deleted, or the tag was written by hand",
                again,
            )
        elif judged[run_id] != gate:
            yield Complaint(
                f"the gate of {version} is {gate}, and {judged[run_id]} in run {run_id}, "
                "which judged it",
                "a tag was written by hand, or a process was killed between the two",
                again,
            )


def _parents(patient: _Patient) -> Iterator[Complaint]:
    """Soups whose parents are gone."""
    for version, _ in patient.soups:
        family = registry.trace(patient.client, version)
        gone = [
            parent
            for parent, _ in family.members[version].parents
            if registry.look_up(patient.client, parent) is None
        ]
        if gone:
            yield Complaint(
                f"{' and '.join(map(str, gone))}, of which {version} was made, is gone",
                "somebody deleted it",
                f"none is needed to serve {version}; mlflow-soup verify cannot mix it again",
            )


def _runs(patient: _Patient) -> Iterator[Complaint]:
    """Runs and uploads that nobody works on any more."""
    client, ledger = patient.client, patient.ledger
    about = {lineage.MODEL: patient.name, lineage.ROLE: "search"}
    folder = registry.lease_folder()
    held: dict[str, bool] = {}
    for run in tracking.find_runs(client, about):
        key = run.data.tags[lineage.KEY]
        if run.info.status != "RUNNING" or "mlflow.parentRunId" in run.data.tags:
            continue
        if key not in held:
            held[key] = ledger is not None and lease.is_held(ledger, key, folder)
        if not held[key]:
            yield Complaint(
                f"search run {run.info.run_id} is RUNNING, and nobody works on it",
                "its process was killed",
                "--fix ends it and what runs below it; the same command continues it anyway",
                partial(tracking.end_dead, client, run),
            )
        for left in registry.uploads(
            client, run.info.experiment_id, {lineage.REQUEST: run.data.tags[lineage.REQUEST]}
        ):
            if left.status == LoggedModelStatus.PENDING and not held[key]:
                yield Complaint(
                    f"logged model {left.model_id} of run {run.info.run_id} is PENDING",
                    "its process was killed while it uploaded",
                    "--fix marks it as FAILED; the same command uploads again",
                    partial(client.finalize_logged_model, left.model_id, LoggedModelStatus.FAILED),
                )


def _asides(patient: _Patient) -> Iterator[Complaint]:
    """Ledgers that were made and not needed."""
    for experiment_id, title in leftovers(patient.client, patient.name):
        yield Complaint(
            f"experiment {title!r} is the beginning of a ledger that nobody uses",
            "a process was killed while it made one, or another was quicker",
            "--fix deletes it",
            partial(patient.client.delete_experiment, experiment_id),
        )


def _digests(patient: _Patient) -> Iterator[Complaint]:
    """The bytes of soups against the digests that they were registered with."""
    for version, found in tqdm(patient.soups, "read soups", unit="version", disable=None):
        try:
            check_stored(patient.client, version, found.tags[lineage.DIGEST])
        except (ParentError, StoreError) as error:
            if error.__cause__ is not None and isinstance(error, StoreError):
                raise  # the store is away: that says nothing of the version
            yield Complaint(
                f"{error.what} ({error.where})",
                "the artifact store lost or changed them after they were registered",
                f"do not use {version}; delete it, and run its request again",
            )
