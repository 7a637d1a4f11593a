"""What a registered model's ledger, aliases, versions, runs and bytes say of each other.

Others write to the registry too, and processes are killed: where accounts differ, a complaint says
how that can be and what to do. A repair settles or takes back what we began; where a person has
decided otherwise, it writes that down. It never moves what deployments read by its own judgement.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from mlflow.entities import LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from tqdm import tqdm

from mlflow_soup.errors import SoupError
from mlflow_soup.records import Version
from mlflow_soup.registry import family, lease, naming, promotion, tracking
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.ledger import Ledger, find_ledger, leftovers
from mlflow_soup.registry.outages import asking, is_full, is_transient
from mlflow_soup.registry.register import find_upload, is_registered, uploads
from mlflow_soup.registry.store import Store, connect, pages
from mlflow_soup.registry.versions import (
    find_model,
    look_up,
    model_id,
    unregister,
    version_at,
    versions_of,
)
from mlflow_soup.workflows.bench import check_stored

_LONG_S = 86400.0  # that nobody works on a run without a lease for so long is likely


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
class _Registered:
    """A registered model and its ledger; versions as they are when they are asked for."""

    client: Store
    name: str
    ledger: Ledger | None

    @property
    def soups(self) -> list[tuple[Version, ModelVersion]]:
        """The versions that we have registered, by number."""
        versions = versions_of(self.client, self.name)
        found = [(Version(self.name, int(v.version)), v) for v in versions]
        return sorted((at, v) for at, v in found if naming.DIGEST in v.tags)

    @cached_property
    def searches(self) -> list[Run]:
        """All search runs about it, those within studies too."""
        about = {naming.MODEL: self.name, naming.ROLE: "search"}
        return tracking.find_runs(self.client, about)

    def pointers(self) -> dict[Version, list[str]]:
        """Version → aliases and stages that point to it."""
        found = defaultdict(list)
        with asking(f"read the aliases of {self.name}"):
            aliases = self.client.get_registered_model(self.name).aliases
        for alias, number in aliases.items():
            found[Version(self.name, int(number))].append(f"@{alias}")
        for version, its in self.soups:
            if its.current_stage not in (None, "", "None", "Archived"):
                found[version].append(f"stage {its.current_stage}")
        return found

    def uses(self, version: Version) -> list[str]:
        """Why a version is not to be deleted: what points to it, promotions, soups and copies."""
        found = self.pointers()[version]
        for series in self.ledger.series(promotion.SERIES) if self.ledger else ():
            assert self.ledger is not None
            for entry in self.ledger.read(series):
                if entry.told.get("to") == version.number:
                    found.append(f"promotion {entry.number} to {promotion.target_of(series)}")
        made = f"tags.`{naming.PARENTS}` LIKE '%'"  # in whatever model
        for other in pages(self.client.search_model_versions, made):
            of = Version(other.name, int(other.version))
            if version in {parent for parent, _ in family.read(of, other.tags).parents}:
                found.append(f"parent of {of}")
            if other.source == version.uri:
                found.append(f"copied as {of}")
        return found


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
    name = find_model(client, model, [])
    return name, _complaints(_Registered(client, name, find_ledger(client, name)), digests)


def _complaints(model: _Registered, digests: bool) -> Iterator[Complaint]:
    checks = [_ledger, _aliases, _duplicates, _incomplete, _verdicts, _parents, _left, _asides]
    with asking(f"examine {model.name}"):
        for check in [*checks, *([_digests] if digests else [])]:
            yield from check(model)


def mend(complaint: Complaint) -> bool:
    """Do what a complaint offers; False where that takes a person."""
    if complaint.repair is None:
        return False
    with asking("repair what disagrees"):
        complaint.repair()
    return True


def _ledger(model: _Registered) -> Iterator[Complaint]:
    """The ledger against what its targets point to."""
    ledger = model.ledger
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
        made = promotion.last_made(entries)
        standing = version_at(model.client, model.name, target)
        number = standing.number if standing is not None else None
        if not last.mark:
            stands = last.told.get("to") == number
            if promotion.is_under_way(last):
                remedy = "its process may be at it: look again in ten minutes"
            elif stands:
                remedy = "--fix marks it as made: nothing moves"
            else:
                remedy = "--fix marks it as void: nothing moves; run the promotion again if it is "
                remedy += "still wanted"
            settle = partial(promotion.settle, ledger, series, last)
            yield Complaint(
                f"promotion {last.number} to {target}, of v{last.told.get('to')}, was begun and "
                "not finished",
                f"its process was killed in between, or is at it now; {target} points to "
                f"{_shown(number)}",
                remedy,
                None if promotion.is_under_way(last) else settle,
            )
        elif made is not None and made.told.get("to") != number:
            told = {"to": number, "from": made.told.get("to"), "moved": "past mlflow-soup"}
            yield Complaint(
                f"{target} points to {_shown(number)}, and the last promotion that was made, "
                f"{made.number} to {target}, of v{made.told.get('to')}, by {made.told.get('by')}",
                "it was moved by hand, past mlflow-soup; or its version was deleted; or what a "
                "process asked for that was taken for dead came late",
                "--fix writes into the ledger where it stands now; it is not moved back",
                partial(_write_down, ledger, series, last.number + 1, told),
            )


def _shown(number: int | None) -> str:
    return "nothing" if number is None else f"v{number}"


def _write_down(ledger: Ledger, series: str, number: int, told: Mapping[str, object]) -> None:
    if ledger.append(series, number, {**told, **promotion.signature()}):
        ledger.mark(series, number, promotion.MADE)


def _aliases(model: _Registered) -> Iterator[Complaint]:
    """Aliases and stages against verdicts."""
    pointers = model.pointers()
    for version, found in model.soups:
        gate = found.tags.get(naming.GATE)
        if version in pointers and gate != naming.PASSED:
            yield Complaint(
                f"{', '.join(pointers[version])} points to soup {version}, whose gate is "
                f"{gate or 'not judged'}",
                "it was put there by hand, or its verdict changed afterwards",
                f"point it elsewhere, or judge it: mlflow-soup gate --model {version.name} "
                f"--version v{version.number}",
            )


def _duplicates(model: _Registered) -> Iterator[Complaint]:
    """Versions that were registered for one request; copies of other versions are none."""
    requests: dict[str, list[Version]] = defaultdict(list)
    for version, found in model.soups:
        if naming.REQUEST in found.tags and model_id(model.client, version):
            requests[found.tags[naming.REQUEST]].append(version)
    for first, *others in requests.values():
        for version in others:
            uses = ", ".join(model.uses(version))
            yield Complaint(
                f"{version} and {first} are soups of one request",
                "a process was killed before it took back what it had registered in vain",
                f"{version} is in use ({uses}): have {first} used instead, or keep both"
                if uses
                else f"--fix deletes {version}: nothing needs it",
                None if uses else partial(unregister, model.client, version),
            )


def _incomplete(model: _Registered) -> Iterator[Complaint]:
    """Versions whose files never arrived completely, or are gone."""
    for version, _ in model.soups:
        logged_id = model_id(model.client, version)
        if logged_id is None:
            continue
        logged = find_upload(model.client, logged_id)
        if logged is None or logged.status != LoggedModelStatus.READY:
            yield Complaint(
                f"{version} is registered, and its logged model {logged_id} is "
                f"{logged.status if logged is not None else 'gone'}",
                "MLflow registers what was never uploaded completely, too"
                if logged is not None
                else "somebody deleted it",
                "point elsewhere what points to the version, and delete it; the same request then "
                "registers it anew",
            )


def _verdicts(model: _Registered) -> Iterator[Complaint]:
    """Verdicts of versions against those of the runs that judged them."""
    for version, found in model.soups:
        gate, run_id = found.tags.get(naming.GATE), found.tags.get(naming.GATE_RUN)
        if gate is None:
            continue
        runs = tracking.find_runs(model.client, {naming.DIGEST: found.tags[naming.DIGEST]})
        judged = {run.info.run_id: run.data.tags.get(naming.GATE) for run in runs}
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


def _parents(model: _Registered) -> Iterator[Complaint]:
    """Soups whose parents are gone."""
    for version, found in model.soups:
        gone = [
            parent
            for parent, _ in family.read(version, found.tags).parents
            if look_up(model.client, parent) is None
        ]
        if gone:
            yield Complaint(
                f"{' and '.join(map(str, gone))}, of which {version} was made, is gone",
                "somebody deleted it",
                f"none is needed to serve {version}; mlflow-soup verify cannot mix it again",
            )


def _left(model: _Registered) -> Iterator[Complaint]:
    """Runs and uploads that nobody works on any more."""
    left = [*_running(model), *_uploads(model)]
    keys = {key for key, _ in left if key}
    ledger, folder = model.ledger, lease_folder()
    held = lease.held(ledger, keys, folder) if ledger is not None else set()
    yield from (complaint for key, complaint in left if key not in held)


def _running(model: _Registered) -> Iterator[tuple[str, Complaint]]:
    """Runs that are RUNNING, with the key of the request whose lease tells whether they are."""
    client = model.client
    keys = {
        search.info.run_id: search.data.tags.get(naming.KEY, "")
        for search in model.searches
        if naming.STUDY not in search.data.tags
    }
    for run in tracking.find_runs(client, {}, status="RUNNING"):
        run_id, tags = run.info.run_id, run.data.tags
        what = f"{tags.get(naming.ROLE, 'some')} run {run_id} is RUNNING"
        of = run_id if run_id in keys else tags.get("mlflow.parentRunId", "")
        owners = tags.get(naming.MODEL), tags.get(naming.VERSION, "").rpartition("/")[0]
        if of in keys:
            complaint = Complaint(
                f"{what}, and nobody works on it",
                "its process was killed",
                "--fix ends it as KILLED; the same command continues the search anyway",
                partial(client.set_terminated, run_id, "KILLED"),
            )
            yield keys[of], complaint
        elif model.name in owners and time.time() - run.info.start_time / 1000.0 > _LONG_S:
            complaint = Complaint(
                f"{what} for more than a day",
                "its process was killed, or is at it still: evaluations and studies hold no lease, "
                "so nobody can tell",
                'look for the process; if there is none, end the run: python -c "import mlflow; '
                f"mlflow.MlflowClient().set_terminated('{run_id}', 'KILLED')\"",
            )
            yield "", complaint


def _uploads(model: _Registered) -> Iterator[tuple[str, Complaint]]:
    """Logged models that no version is made of, with the key of their request."""
    client = model.client
    remedies = {
        LoggedModelStatus.PENDING: "--fix marks it as FAILED; the same command uploads again",
        LoggedModelStatus.READY: "--fix deletes it; `mlflow gc` then removes its files",
    }
    for experiment in sorted({search.info.experiment_id for search in model.searches}):
        for logged in uploads(client, experiment, {naming.MODEL: model.name}):
            if logged.status not in remedies or is_registered(client, logged.model_id):
                continue
            complaint = Complaint(
                f"logged model {logged.model_id} of run {logged.source_run_id} is {logged.status}, "
                "and no version is made of it",
                "its process was killed before it was registered, or its version was deleted",
                remedies[logged.status],
                partial(_discard, client, logged.model_id),
            )
            yield logged.tags.get(naming.KEY, ""), complaint


def _discard(client: Store, logged_id: str) -> None:
    """End an upload that is not complete and delete one that is, unless it was registered since."""
    logged = find_upload(client, logged_id)
    if logged is None or is_registered(client, logged_id):
        return
    if logged.status == LoggedModelStatus.PENDING:
        client.finalize_logged_model(logged_id, LoggedModelStatus.FAILED)
    else:
        client.delete_logged_model(logged_id)


def _asides(model: _Registered) -> Iterator[Complaint]:
    """Ledgers that were made and not needed."""
    for experiment_id, title in leftovers(model.client, model.name):
        yield Complaint(
            f"experiment {title!r} is the beginning of a ledger that nobody uses",
            "a process was killed while it made one, or another was quicker",
            "--fix deletes it",
            partial(model.client.delete_experiment, experiment_id),
        )


def _digests(model: _Registered) -> Iterator[Complaint]:
    """The bytes of soups against the digests that they were registered with."""
    for version, found in tqdm(model.soups, "read soups", unit="version", disable=None):
        try:
            check_stored(model.client, version, found.tags[naming.DIGEST])
        except SoupError as error:
            if is_transient(error) or is_full(error):
                raise  # the store is away, or our disk is full: that says nothing of the version
            yield Complaint(
                f"{error.what} ({error.where})",
                "the artifact store lost or changed its files after they were registered, or does "
                "not let you read them",
                f"do not use {version} before its files are back; else delete it, and run its "
                "request again",
            )
