"""Complaints about a registered model: its ledger, aliases, versions, runs and bytes disagree.

Other programs write to the registry too, and processes are killed. Where two records disagree, a
complaint says how that happens and what to do. A repair completes or undoes what mlflow-soup began.
If a person decided otherwise, the repair records that decision. No repair moves an alias or a stage
that deployments read.
"""

import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from mlflow.entities import LoggedModelStatus, Run
from mlflow.entities.model_registry import ModelVersion
from tqdm import tqdm

from mlflow_soup.errors import SoupError
from mlflow_soup.records import Version
from mlflow_soup.registry import family, lease, naming, promotion, tracking
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.ledger import Entry, Ledger, find_ledger, leftovers
from mlflow_soup.registry.outages import asking, is_full, is_transient
from mlflow_soup.registry.register import find_upload, uploads
from mlflow_soup.registry.store import Store, connect, pages
from mlflow_soup.registry.trust import Trust, trust_of
from mlflow_soup.registry.versions import (
    find_model,
    look_up,
    model_id,
    registered_as,
    unregister,
    version_at,
    versions_of,
)
from mlflow_soup.request.names import Target
from mlflow_soup.request.spec import Spec
from mlflow_soup.workflows.proof import (
    Proven,
    Standard,
    decide,
    read_proof,
    rules_of,
    settle_rules,
)
from mlflow_soup.workflows.verify import mismatch

_LONG_S = 86400.0  # a run without a lease that is older than a day is probably abandoned


@dataclass(frozen=True)
class Complaint:
    """Two records that disagree.

    Attributes:
        what: what is wrong.
        why: how that happens.
        remedy: what `repair` does, or what a person should do.
        repair: removes the cause of the complaint; None if only a person can.
    """

    what: str
    why: str
    remedy: str
    repair: Callable[[], object] | None = None


@dataclass(frozen=True)
class _Registered:
    """A registered model and its ledger; the versions are read from the store at each access."""

    client: Store
    name: str
    ledger: Ledger | None
    spec: Spec
    trust: Trust

    @property
    def soups(self) -> list[tuple[Version, ModelVersion]]:
        """The versions that mlflow-soup registered, in the order of their numbers."""
        versions = versions_of(self.client, self.name)
        found = [(Version(self.name, int(v.version)), v) for v in versions]
        return sorted((at, v) for at, v in found if naming.DIGEST in v.tags)

    @cached_property
    def searches(self) -> list[Run]:
        """All search runs of the model, including those within studies."""
        about = {naming.MODEL: self.name, naming.ROLE: "search"}
        return tracking.find_runs(self.client, about)

    def pointers(self) -> dict[Version, list[str]]:
        """Version → the aliases and stages that point to the version."""
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
        """What uses a version: aliases and stages, promotions, soups and copies."""
        found = self.pointers()[version]
        for series in self.ledger.series(promotion.SERIES) if self.ledger else ():
            assert self.ledger is not None
            for entry in self.ledger.read(series):
                if entry.told.get("to") == version.number:
                    found.append(f"promotion {entry.number} to {promotion.target_of(series)}")
        made = f"tags.`{naming.PARENTS}` LIKE '%'"  # in all registered models
        for other in pages(self.client.search_model_versions, made):
            of = Version(other.name, int(other.version))
            if version in {parent for parent, _ in family.read(of, other.tags).parents}:
                found.append(f"parent of {of}")
            if other.source == version.uri:
                found.append(f"copied as {of}")
        return found


@asking("examine the registered model")
def examine(spec: Spec, *, digests: bool = True) -> tuple[str, Iterator[Complaint]]:
    """All complaints about a registered model, one after the other. Nothing is changed.

    Args:
        spec: names the model; it may be empty if MLFLOW_SOUP_MODEL is set or the store has only one
            model. `experiment`, `evidence` and `public_key` say which scores count.
        digests: also read the bytes of all soups, and compute their verdicts again.

    Returns:
        The name of the model, and the complaints about it.

    Raises:
        ParentError: there is no such model.
        SpecError: a public key cannot be read, or a policy tag of the model.
    """
    client = connect()
    name = find_model(client, spec.model, [])
    ledger, trust = find_ledger(client, name), trust_of(client, spec)
    settled = settle_rules(client, spec, name)
    return name, _complaints(_Registered(client, name, ledger, settled, trust), digests)


def _complaints(model: _Registered, digests: bool) -> Iterator[Complaint]:
    checks = [_ledger, _aliases, _duplicates, _incomplete, _verdicts, _parents, _left, _asides]
    with asking(f"examine {model.name}"):
        for check in [*checks, *([_proofs] if digests else [])]:
            yield from check(model)


def mend(complaint: Complaint) -> bool:
    """Run the repair of a complaint; False if only a person can repair it."""
    if complaint.repair is None:
        return False
    with asking("repair what disagrees"):
        complaint.repair()
    return True


def _ledger(model: _Registered) -> Iterator[Complaint]:
    """Compare the ledger with the versions that its targets point to."""
    ledger = model.ledger
    for series in ledger.series(promotion.SERIES) if ledger is not None else ():
        assert ledger is not None
        target = promotion.target_of(series)
        entries = ledger.read(series)
        yield from _entries(model, ledger, series, entries)
        last = entries[-1]
        made = _last_made(model, ledger, series)
        standing = version_at(model.client, model.name, target)
        number = standing.number if standing is not None else None
        if not last.mark:
            stands = last.told.get("to") == number
            if promotion.is_under_way(last):
                remedy = "the process may still be working: look again in ten minutes"
            elif stands:
                remedy = "--fix marks the promotion as made; it moves nothing"
            else:
                remedy = "--fix marks the promotion as void; it moves nothing; "
                remedy += "promote again if you still want it"
            settle = partial(promotion.settle, ledger, series, last)
            yield Complaint(
                f"promotion {last.number}, of v{last.told.get('to')} to {target}, was begun and "
                "not finished",
                f"the process was killed halfway, or it is still working; {target} points to "
                f"{_shown(number)}",
                remedy,
                None if promotion.is_under_way(last) else settle,
            )
        elif made is not None and made.told.get("to") != number and not _moved_on(model, made):
            told = {"to": number, "from": made.told.get("to"), "moved": "past mlflow-soup"}
            yield Complaint(
                f"{target} points to {_shown(number)}, but the last promotion, number "
                f"{made.number} by {made.told.get('by')}, pointed it to v{made.told.get('to')}",
                f"someone moved {target} by hand; or someone deleted the version; or the late "
                "request of a process that seemed dead moved it",
                f"--fix records in the ledger what {target} points to now; it does not move "
                f"{target} back",
                partial(_write_down, ledger, series, last.number + 1, told),
            )


def _last_made(model: _Registered, ledger: Ledger, series: str) -> Entry | None:
    return promotion.last_made(ledger.name, series, ledger.read(series), model.trust.verifier)


def _moved_on(model: _Registered, made: Entry) -> bool:
    """Whether a version left a stage because it was promoted to another: it can be in only one."""
    assert model.ledger is not None
    version = Version(model.name, int(made.told.get("to") or 0))
    found = look_up(model.client, version) if version.number else None
    if found is None or not str(made.told.get("target")).startswith("stage "):
        return False
    series = promotion.series_of(Target("stage", str(found.current_stage)))
    later = _last_made(model, model.ledger, series)
    return later is not None and later.told.get("to") == version.number


def _entries(
    model: _Registered, ledger: Ledger, series: str, entries: Sequence[Entry]
) -> Iterator[Complaint]:
    """Entries that are missing, unreadable, not signed, or were never settled."""
    target = promotion.target_of(series)
    there = {entry.number for entry in entries}
    for number in sorted({*range(1, entries[-1].number)} - there):
        yield Complaint(
            f"the ledger of {target} has no entry {number}",
            "somebody else wrote to the ledger, or deleted the entry from it",
            f"--fix writes entry {number} as void; find out who may write to that experiment",
            partial(_fill, ledger, series, number),
        )
    for entry in entries:
        what = f"entry {entry.number} in the ledger of {target}"
        if entry.mark != promotion.VOID and not isinstance(entry.told.get("to"), int | None):
            why = "somebody else wrote it"
            yield _void(ledger, series, entry, f"{what} cannot be read", why)
        elif not entry.mark and entry is not entries[-1]:
            why = "its process was killed before it marked it, or somebody else wrote it"
            yield _void(ledger, series, entry, f"{what} was never settled", why)
        elif (
            model.trust.verifier is not None
            and entry.mark == promotion.MADE
            and not promotion.is_signed(model.trust.verifier, ledger.name, series, entry)
        ):
            yield Complaint(
                f"{what} is signed by no key of --public-key",
                "it was written without MLFLOW_SOUP_KEY, or by somebody else",
                "ask whoever promoted; the entry stays",
            )


def _void(ledger: Ledger, series: str, entry: Entry, what: str, why: str) -> Complaint:
    remedy = "--fix marks it as void; it moves nothing"
    return Complaint(what, why, remedy, partial(ledger.mark, series, entry.number, promotion.VOID))


def _fill(ledger: Ledger, series: str, number: int) -> None:
    if ledger.append(series, number, {"missing": True, **promotion.signature()}):
        ledger.mark(series, number, promotion.VOID)


def _shown(number: int | None) -> str:
    return "nothing" if number is None else f"v{number}"


def _write_down(ledger: Ledger, series: str, number: int, told: Mapping[str, object]) -> None:
    content = promotion.sign(ledger.name, series, number, {**told, **promotion.signature()})
    if ledger.append(series, number, content):
        ledger.mark(series, number, promotion.MADE)


def _aliases(model: _Registered) -> Iterator[Complaint]:
    """Compare aliases and stages with the gate's verdicts."""
    pointers = model.pointers()
    for version, found in model.soups:
        gate = found.tags.get(naming.GATE)
        if version in pointers and gate != naming.PASSED:
            yield Complaint(
                f"{', '.join(pointers[version])} points to soup {version}, which "
                f"{f'has the gate verdict {gate}' if gate else 'the gate has not judged'}",
                "someone moved the alias or stage by hand, or the verdict changed afterwards",
                "point the alias or stage to another version, or judge the soup: mlflow-soup gate "
                f"{version.options}",
            )


def _duplicates(model: _Registered) -> Iterator[Complaint]:
    """Versions that were registered for the same request. Copies of other versions do not count."""
    requests: dict[str, list[Version]] = defaultdict(list)
    for version, found in model.soups:
        if naming.REQUEST in found.tags and model_id(model.client, version):
            requests[found.tags[naming.REQUEST]].append(version)
    for first, *others in requests.values():
        for version in others:
            uses = ", ".join(model.uses(version))
            yield Complaint(
                f"{version} and {first} are soups of the same request",
                f"a process registered {version} and was killed before it deleted this duplicate",
                f"{version} is in use ({uses}): use {first} instead, or keep both"
                if uses
                else f"--fix deletes {version}: nothing uses it",
                None if uses else partial(unregister, model.client, version),
            )


def _incomplete(model: _Registered) -> Iterator[Complaint]:
    """Versions whose upload never finished, or whose logged model is gone."""
    for version, _ in model.soups:
        logged_id = model_id(model.client, version)
        if logged_id is None:
            continue
        logged = find_upload(model.client, logged_id)
        if logged is None or logged.status != LoggedModelStatus.READY:
            yield Complaint(
                f"{version} is registered, but its logged model {logged_id} is "
                f"{logged.status if logged is not None else 'gone'}",
                "MLflow also registers logged models whose upload never finished"
                if logged is not None
                else "someone deleted the logged model",
                "point the aliases and stages of this version elsewhere, and delete the version; "
                "then run the same request again, which registers a new one",
            )


def _verdicts(model: _Registered) -> Iterator[Complaint]:
    """Compare the verdict of each version with that of the run that judged it."""
    for version, found in model.soups:
        gate, run_id = found.tags.get(naming.GATE), found.tags.get(naming.GATE_RUN)
        if gate is None:
            continue
        runs = tracking.find_runs(model.client, {naming.DIGEST: found.tags[naming.DIGEST]})
        judged = {run.info.run_id: run.data.tags.get(naming.GATE) for run in runs}
        again = f"run mlflow-soup evaluate, then mlflow-soup gate, both with {version.options}"
        if run_id not in judged:
            yield Complaint(
                f"the gate verdict of {version} is {gate}, but there is no run that judged it",
                "someone deleted the run, or wrote the tag by hand",
                again,
            )
        elif judged[run_id] != gate:
            yield Complaint(
                f"the gate verdict of {version} is {gate}, but run {run_id}, which judged it, says "
                f"{judged[run_id]}",
                "someone wrote a tag by hand, or a process was killed after it wrote the first "
                "of the two tags",
                again,
            )


def _parents(model: _Registered) -> Iterator[Complaint]:
    """Soups with a parent that is gone."""
    for version, found in model.soups:
        gone = [
            parent
            for parent, _ in family.read(version, found.tags).parents
            if look_up(model.client, parent) is None
        ]
        if gone:
            yield Complaint(
                f"{version} was made of {' and '.join(map(str, gone))}, which no longer "
                f"exist{'s' if len(gone) == 1 else ''}",
                "someone deleted the version" if len(gone) == 1 else "someone deleted the versions",
                f"serving {version} needs no parent, so this can stay; mlflow-soup verify cannot "
                "merge the soup again",
            )


def _left(model: _Registered) -> Iterator[Complaint]:
    """Runs and uploads that no process works on any more."""
    left = [*_running(model), *_uploads(model)]
    keys = {key for key, _ in left if key}
    ledger, folder = model.ledger, lease_folder()
    held = lease.held(ledger, keys, folder) if ledger is not None else set()
    yield from (complaint for key, complaint in left if key not in held)


def _running(model: _Registered) -> Iterator[tuple[str, Complaint]]:
    """Runs with status RUNNING, each with the key of its request, which names the lease."""
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
                f"{what}, but no process works on it",
                "the process was killed",
                "--fix ends the run as KILLED; the same command still continues the search",
                partial(_end, model, run_id, keys[of]),
            )
            yield keys[of], complaint
        elif model.name in owners and time.time() - run.info.start_time / 1000.0 > _LONG_S:
            complaint = Complaint(
                f"{what} for more than a day",
                "the process was killed, or it is still working: evaluations and studies hold no "
                "lease, so mlflow-soup cannot tell",
                'look for the process; if there is none, end the run: python -c "import mlflow; '
                f"mlflow.MlflowClient().set_terminated('{run_id}', 'KILLED')\"",
            )
            yield "", complaint


def _end(model: _Registered, run_id: str, key: str) -> None:
    """End a run as KILLED, unless it has ended or somebody works on it by now."""
    ledger = model.ledger
    if ledger is not None and lease.held(ledger, {key}, lease_folder()):
        return
    if model.client.get_run(run_id).info.status == "RUNNING":
        model.client.set_terminated(run_id, "KILLED")


def _uploads(model: _Registered) -> Iterator[tuple[str, Complaint]]:
    """Logged models without a registered version, each with the key of its request."""
    client = model.client
    remedies = {
        LoggedModelStatus.PENDING: "--fix marks it as FAILED; the same command uploads again",
        LoggedModelStatus.READY: "--fix deletes it; run `mlflow gc` to remove its files",
    }
    for experiment in sorted({search.info.experiment_id for search in model.searches}):
        for logged in uploads(client, experiment, {naming.MODEL: model.name}):
            if logged.status not in remedies or registered_as(client, logged.model_id):
                continue
            complaint = Complaint(
                f"logged model {logged.model_id} of run {logged.source_run_id} is {logged.status}, "
                "but no version was registered from it",
                "the process was killed before it registered one, or someone deleted the version",
                remedies[logged.status],
                partial(_discard, client, logged.model_id),
            )
            yield logged.tags.get(naming.KEY, ""), complaint


def _discard(client: Store, logged_id: str) -> None:
    """Mark an incomplete upload as FAILED, delete a complete one, keep a registered one."""
    logged = find_upload(client, logged_id)
    if logged is None or registered_as(client, logged_id):
        return
    if logged.status == LoggedModelStatus.PENDING:
        client.finalize_logged_model(logged_id, LoggedModelStatus.FAILED)
    else:
        client.delete_logged_model(logged_id)


def _asides(model: _Registered) -> Iterator[Complaint]:
    """Ledger experiments that were created but never used."""
    for experiment_id, title in leftovers(model.client, model.name):
        yield Complaint(
            f"experiment {title!r} is an unfinished ledger that nothing uses",
            "a process was killed while it created the ledger, or another process created it first",
            "--fix deletes the experiment",
            partial(model.client.delete_experiment, experiment_id),
        )


def _proofs(model: _Registered) -> Iterator[Complaint]:
    """Compare each soup with its manifest, merge its parents, and compute its verdict again."""
    for version, found in tqdm(model.soups, "reading soups", unit="version", disable=None):
        try:
            proven, wrong = read_proof(model.client, version)
        except SoupError as error:
            if is_transient(error) or is_full(error):
                raise  # an unreachable store or a full disk says nothing about the version
            yield Complaint(
                f"{error.what} ({error.where})",
                "the artifact store lost or changed the files after they were registered, or does "
                "not let you read them",
                f"do not use {version} until its files are restored; or delete the version and "
                "run its request again",
            )
            continue
        # a parent that is gone has a complaint of its own
        if differing := [finding for finding in wrong if finding.verdict == "MISMATCH"]:
            yield Complaint(
                mismatch(str(version), version.uri, differing).what,
                "somebody changed files or tags after the soup was registered, or the artifact "
                "store is faulty",
                f"do not use {version} before you know why; mlflow-soup verify "
                f"{shlex.quote(version.uri)} shows all differences",
            )
        elif naming.GATE in found.tags and not wrong:
            yield from _verdict_again(model, proven, found.tags[naming.GATE])


def _verdict_again(model: _Registered, proven: Proven, told: str) -> Iterator[Complaint]:
    """Compute a verdict again, against the soup's parents, from the evidence that counts."""
    version = proven.version
    alone = replace(model.spec, champion="")  # what it would replace has changed since
    try:
        decision = decide(model.client, proven, alone, Standard(rules_of(alone, ())), model.trust)
    except SoupError as error:
        if is_transient(error) or is_full(error):
            raise
        yield Complaint(
            f"the tag {naming.GATE} of {version} says {told}, but {error.what}",
            "somebody wrote the tag by hand, the scores are gone, or they lie in an experiment "
            "that does not count here",
            f"name the experiment that holds the scores (--experiment), or {error.fix}",
        )
        return
    word = naming.PASSED if decision.verdict.passed else naming.REFUSED
    if word == naming.REFUSED and told == naming.PASSED:
        yield Complaint(
            f"the tag {naming.GATE} of {version} says {told}, but its scores say {word} by today's "
            f"rules ({decision.verdict.rules})",
            "somebody wrote the tag by hand, or the rules of the model became stricter since",
            f"do not serve {version} before you know why; mlflow-soup gate {version.options} "
            "shows each check",
        )
