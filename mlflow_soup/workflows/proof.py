"""Decide whether a version may be promoted, from what nobody can talk about.

Tags are for people: anybody who may register a version may write them. So a decision reads

- the soup's bytes and its manifest, which must agree, and the parents, which must mix to these
  bytes again (`verify`);
- the scores of exactly these bytes on all items, from where they count (`trust`);
- the rules of the registered model that owns the promotion's target.

The verdict is computed from these each time. `run`, `gate`, `promote` and `doctor` share it.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

from mlflow_soup.decision import gate as gates
from mlflow_soup.errors import GateError, SpecError
from mlflow_soup.evaluation.items import Part, all_items, asked
from mlflow_soup.evaluation.loading import open_tokenizer
from mlflow_soup.evaluation.suite import load_suite, named_terms, replaced_by
from mlflow_soup.records import Evidence, Examination, Finding, Manifest, Rules, Verdict, Version
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.evaluations import examinations_of
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.trust import Trust
from mlflow_soup.registry.versions import policy
from mlflow_soup.request import knobs
from mlflow_soup.request.names import parse_target, parse_uri
from mlflow_soup.request.spec import Spec, policy_for
from mlflow_soup.weights import soup
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.provenance import Origin
from mlflow_soup.workflows.bench import Opened, judged, open_version, prompting_of, rivals
from mlflow_soup.workflows.merge import fetch
from mlflow_soup.workflows.verify import inspect, mismatch, read_manifest


@dataclass(frozen=True)
class Standard:
    """What the evidence must be like for a verdict.

    Attributes:
        rules: the rules of the gate.
        items: OOD task → its items; None if nobody stated the tasks.
        asked: task → digest of what it asks (`items.asked`); of the held-out tasks too, where the
            target's model states them.
        max_length: the longest input in tokens that was asked for.
        limited: whether scores on the first items suffice, for a verdict that promotes nothing.
    """

    rules: Rules
    items: Mapping[str, Sequence[Part]] | None = None
    asked: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    limited: bool = False


@dataclass(frozen=True)
class Proven:
    """A soup whose files, manifest and parents agree.

    Attributes:
        version: the registered version.
        manifest: its manifest, with the digests of its own tensors and of its parents'.
        mixed: whether the parents were merged again and gave its bytes.
        tags: the finding about its tags.
    """

    version: Version
    manifest: Manifest
    mixed: bool
    tags: Finding

    @property
    def digest(self) -> str:
        """The digest of the soup's tensors."""
        assert self.manifest.digests is not None
        return self.manifest.digests.canonical

    @property
    def parents(self) -> dict[Version, str]:
        """Each parent, oldest first → the digest of its tensors."""
        found = {}
        for source in self.manifest.sources:
            assert source.digests is not None
            found[version_of(source.uri)] = source.digests.canonical
        return found


@dataclass(frozen=True)
class Decision:
    """A verdict, and what it was computed from.

    Attributes:
        proven: the soup.
        examination: the evidence; roles as the gate compared them.
        verdict: the gate's verdict.
        compared: the digest of each model that the soup was compared with.
    """

    proven: Proven
    examination: Examination
    verdict: Verdict
    compared: frozenset[str]


def version_of(uri: str) -> Version:
    """The version that a manifest's `models:/name/12` names.

    Raises:
        SpecError: it is the path of a folder, or names an alias.
    """
    name, ref = parse_uri(uri, "the soup's manifest")
    if ref.number is None:
        raise SpecError(
            f"{uri} names no version",
            where="the soup's manifest",
            fix="do not use this soup: mlflow-soup writes the number of each parent",
        )
    return Version(name, ref.number)


def owner_of(spec: Spec, name: str) -> str:
    """The registered model that owns the promotion's target, and so states the rules."""
    target = parse_target(spec.promote) if spec.promote else None
    return (target.model if target is not None else None) or name


def would_replace(spec: Spec, name: str, rival: Version) -> bool:
    """Whether a promotion of a soup of model `name` would replace a rival.

    Whoever may move an alias of the candidates' model replaces nothing at another model.
    """
    return rival.name == owner_of(spec, name)


def settle_rules(client: Store, spec: Spec, name: str) -> Spec:
    """The spec, with the model's policy, and the rules of the model that owns the target.

    Raises:
        SpecError: the command line is looser than the rules, or nobody who may state the OOD tasks
            for another model's alias did.
    """
    owner, tags = owner_of(spec, name), policy(client, name)
    if owner != name:
        tags = policy_for(tags, policy(client, owner))
    settled = spec.settle(tags, owner)
    if stated := tags.get("soup.ood_tasks"):
        folders = tags.get("soup.include_path", "")
        added = _added_to(settled, stated, folders, owner)
        _check_none_replaced(settled, stated, folders, owner)
        # judged together with the policy's tasks, they could hide a loss there
        settled = settled.judge_alone(added) if added else settled
    for knob, what in (("tasks", "held-out"), ("ood_tasks", "out-of-domain")):
        if owner != name and not getattr(settled, knob):
            option = "--" + knob.replace("_", "-")
            raise SpecError(
                f"nobody states the {what} tasks for a promotion to {owner}",
                where=f"tag soup.{knob} of {owner}; those of {name} do not count for another model",
                fix=f"set the tag soup.{knob} on {owner}, or name the tasks: {option} TASK,TASK",
            )
    return settled


def _folders_beside(spec: Spec, folders: str) -> set[str]:
    """The folders with tasks that a spec names besides those of the policy."""
    return {*spec.include_path.split(os.pathsep)} - {*folders.strip().split(os.pathsep), ""}


def _added_to(spec: Spec, stated: str, folders: str, owner: str) -> list[str]:
    """The OOD tasks, `task` or `task:metric`, that a command line adds to those of the policy.

    A pattern of the policy stands for the tasks of its own folders, not for those of others.

    Raises:
        SpecError: it leaves out one of the policy's, or names it with another filter.
    """
    more = _folders_beside(spec, folders)
    if not spec.ood_tasks or (spec.ood_tasks == stated and not more):
        return []
    named = partial(named_terms, allowed=spec.allowed_code)
    its = named(
        stated,
        # the policy may name a task whose folder only the command line knows
        include_path=folders.strip() if set(stated) & {*"*?["} else spec.include_path,
        where=f"tag soup.ood_tasks of {owner}",
    )
    ours = named(spec.ood_tasks, include_path=spec.include_path, where="--ood-tasks")
    if not {*its} <= {*ours}:
        knob_ = next(knob_ for knob_ in fields(Spec) if knob_.name == "ood_tasks")
        raise knobs.looser(knob_, spec.ood_tasks, stated, owner)
    added = [":".join(filter(None, term[:2])) for term in ours if term not in its]
    if odd := next((name for name in added if re.search(r"[\s=,%]", name)), ""):
        raise SpecError(
            f"the name of the task {odd!r} holds a character that --margin reads otherwise",
            where="--ood-tasks, which adds it to the tasks of the policy",
            fix="rename the task: no blank, no comma, no = and no %",
        )
    return added


def _check_none_replaced(spec: Spec, stated: str, folders: str, owner: str) -> None:
    """Refuse folders and files of the command line that replace a task of the policy.

    A group takes its members by their names, so these count, too.
    """
    more = _folders_beside(spec, folders)
    if not spec.ood_tasks or not (more or ".yaml" in spec.ood_tasks):
        return
    found = replaced_by(
        stated,
        spec.ood_tasks,
        spec.include_path,
        besides=folders.strip(),
        allowed=spec.allowed_code,
        where="--ood-tasks",
    )
    if found:
        raise SpecError(
            f"{found[0]}, a name that the policy of {owner} gives to another task",
            where="--include-path or --ood-tasks; a command line may add tasks, and replace none",
            fix="rename the task, or leave the folder or file out; whoever owns "
            f"{owner} may add the folder to the tag soup.include_path",
        )


def standard_of(spec: Spec, soup: Checkpoint, *, elsewhere: bool) -> Standard:
    """The standard of a settled spec. The tasks are loaded, to know all that they ask.

    Args:
        spec: the request.
        soup: the soup; its tokenizer's chat template may write the prompts.
        elsewhere: whether the target belongs to another model than the soup; then the held-out
            tasks must be those of the request, too.

    Raises:
        SpecError, ObjectiveError: as `load_suite`.
        ParentError: the tokenizer cannot be loaded, or its chat template fails.
    """
    if not spec.ood_tasks:
        return Standard(rules_of(spec, ()))
    load = partial(load_suite, include_path=spec.include_path, allowed=spec.allowed_code)
    suite = load(spec.ood_tasks, where="--ood-tasks")
    prompting = prompting_of(spec, lambda: open_tokenizer(soup))
    items = all_items(suite, prompting)
    digests = asked(suite)
    if elsewhere:
        held_out = load(spec.tasks, where="--tasks")
        all_items(held_out, prompting)
        digests |= asked(held_out)
    return Standard(rules_of(spec, tuple(items)), items, digests, spec.max_length)


def rules_of(spec: Spec, tasks: tuple[str, ...]) -> Rules:
    """The rules of a settled spec, for these OOD tasks."""
    return Rules(spec.margin, spec.confidence, spec.min_items, tasks)


def prove(
    client: Store,
    version: Version,
    *,
    at_hand: Sequence[Opened] = (),
    blend: soup.Blend | None = None,
) -> Proven:
    """Read a soup from the store, and merge its parents again.

    Args:
        client: the store's client.
        version: the registered soup.
        at_hand: parents that this process has read already; the others are fetched anew.
        blend: as for `inspect`.

    Raises:
        SpecError: the version is not a soup.
        MismatchError: its files and parents are not what its manifest says.
        ParentError: the version does not exist.
    """
    proven, wrong = read_proof(client, version, at_hand=at_hand, blend=blend)
    if wrong := [finding for finding in wrong if finding is not proven.tags]:
        raise mismatch(str(version), version.uri, wrong)
    return proven


def read_proof(
    client: Store,
    version: Version,
    *,
    at_hand: Sequence[Opened] = (),
    blend: soup.Blend | None = None,
) -> tuple[Proven, list[Finding]]:
    """What `prove` reads, and what is wrong with it: the tags, the files, the parents.

    Args and errors are those of `prove`, but what is wrong raises none.
    """
    origin = fetch(version.uri, "the soup", client=client, fresh=True)
    manifest = read_manifest(origin)
    known = {o.parent.version.uri: Origin(o.parent.folder, o.parent.version.uri) for o in at_hand}
    for source in manifest.sources:
        version_of(source.uri)  # raises if a parent is no version
    findings = list(inspect(origin, manifest, client=client, at_hand=known, blend=blend))
    wrong = [f for f in findings if f.verdict != "ok" and not _is_allowed(f, manifest)]
    return Proven(version, manifest, findings[-1].verdict == "ok", findings[0]), wrong


def check_tags(proven: Proven) -> None:
    """Refuse a soup whose tags tell people something else than its manifest.

    Raises:
        MismatchError: they do.
    """
    if proven.tags.verdict != "ok":
        raise mismatch(str(proven.version), proven.version.uri, [proven.tags])


def _is_allowed(finding: Finding, manifest: Manifest) -> bool:
    """Statistics are not stored with a soup, so that its parents cannot always be merged again."""
    return (finding.what, finding.verdict) == (
        "merged again",
        "skipped",
    ) and manifest.method != "linear"


def decide(
    client: Store,
    proven: Proven,
    spec: Spec,
    standard: Standard,
    trust: Trust,
    *,
    examined: Examination | None = None,
    at_hand: Sequence[Opened] = (),
) -> Decision:
    """Compute the verdict on a soup.

    Args:
        client: the store's client.
        proven: the soup.
        spec: a settled spec; it names champion and target.
        standard: what the evidence must be like.
        trust: where evidence counts.
        examined: the evidence, if this process measured it or has read it from where it counts.
        at_hand: versions that this process has read already.

    Raises:
        GateError: no evidence counts and suffices.
        ParentError: a version that the soup would replace is missing or damaged.
    """
    read = {o.parent.version: o.parent.digest for o in at_hand}
    champions = {}
    for rival in rivals(client, proven.version.name, spec):
        champions[rival] = read.get(rival) or open_version(client, rival, fresh=True).parent.digest
    required = judged([*proven.parents.items()], scheduled=proven.manifest.scheduled)
    needed = {proven.version: proven.digest, **dict(required), **champions}
    found = examinations_of(trust, proven.digest)
    examination = _choose(proven, [examined] if examined else found, needed, standard, trust)
    of = {version: _as(examination, digest, version) for version, digest in needed.items()}
    parents = [of[version] for version, _ in required]
    others = [of[version] for version, its in champions.items() if its != proven.digest]
    # a version that the soup has replaced since is no rival any more, but its checks still hold
    others += [e for role, e in examination.roles.items() if role.startswith("champion")]
    replaces = partial(would_replace, spec, proven.version.name)
    replaced = [e for e in others if replaces(e.version)]
    more = [e for e in others if not replaces(e.version)]
    verdict = gates.judge(of[proven.version], parents, replaced, standard.rules, more)
    against = {check.against for check in verdict.checks}
    compared = {evidence.digest for evidence in parents if evidence.version in against}
    compared |= {proven.digest, *(e.digest for e in others)}
    return Decision(proven, examination, verdict, frozenset(compared))


def _as(examination: Examination, digest: str, version: Version) -> Evidence:
    evidence = examination.of(digest)
    assert evidence is not None
    return replace(evidence, version=version)


def _choose(
    proven: Proven,
    examinations: Iterable[Examination],
    needed: Mapping[Version, str],
    standard: Standard,
    trust: Trust,
) -> Examination:
    """The first examination that suffices; they come newest first.

    Raises:
        GateError: none does; the error says what the newest one lacks.
    """
    version, reasons = proven.version, []
    inherited = naming.key_of(proven.manifest.inherited)
    for examination in examinations:
        absent = [v for v, digest in needed.items() if examination.of(digest) is None]
        if absent:
            reason = f"{' and '.join(map(str, absent))} was not scored together with it"
        elif examination.settings["inherited"] != inherited:
            reason = "its config or tokenizer has changed since it was scored"
        else:
            reason = gates.inconsistent(examination) or _scored_otherwise(examination, standard)
            reason = reason or gates.missing(
                examination, standard.rules, standard.items, limited=standard.limited
            )
        if not reason:
            return examination
        reasons.append(f"{reason} (run {examination.run_id})")
    why, first = (reasons[0], "") if reasons else _why_none(needed[version], trust)
    raise GateError(
        f"no evidence supports a verdict on {version}: {why}",
        where=version.uri,
        fix=f"{first}run mlflow-soup evaluate {version.options}, "
        "then the same command again; give both the same options, above all --promote, --ood-tasks "
        "and --experiment",
    )


def _scored_otherwise(examination: Examination, standard: Standard) -> str:
    """What an examination asked otherwise than the standard, in words; empty if nothing."""
    asked_then = examination.settings["asked"]
    for task, digest in standard.asked.items():
        if task not in asked_then:
            return f"it was not scored on {task}"
        if asked_then[task] != digest:
            return f"{task} asked something else when it was scored"
    longest = examination.settings.get("max_length")
    if standard.asked and longest != standard.max_length:
        return f"it was scored with --max-length {longest}, not {standard.max_length}"
    return ""


def _why_none(digest: str, trust: Trust) -> tuple[str, str]:
    """Why no examination of a soup counts, and what may help besides a new one."""
    elsewhere = tracking.find_runs(trust.client, {naming.ROLE: "ood", naming.DIGEST: digest})
    if not elsewhere:
        return "it was never scored out of domain", ""
    if trust.mode == "signed":
        return (
            "no key of --public-key has signed its out-of-domain scores",
            "let MLFLOW_SOUP_KEY name the private part of such a key, then ",
        )
    if trust.mode == "own":
        return "with --evidence own no stored score counts", ""
    there = {run.info.experiment_id for run in elsewhere}
    if trust.experiment in there:
        return "its out-of-domain scores are lost, damaged or unfinished", ""
    names = sorted(trust.client.get_experiment(e).name for e in there)
    return (
        f"its out-of-domain scores are in experiment {' and '.join(names)}, which does not count",
        f"name it, if you trust all who may write to it: --experiment {shlex.quote(names[0])}; or ",
    )


def require_passed(decision: Decision, words: Sequence[str]) -> None:
    """Refuse to promote what did not pass, or what cannot be merged again.

    Args:
        decision: the decision.
        words: the checks that failed, in words.

    Raises:
        GateError: the verdict is no, or the parents were not merged again.
    """
    version, method = decision.proven.version, decision.proven.manifest.method
    if not decision.verdict.passed:
        refusal = GateError(
            f"the gate refuses {version}: {'; '.join(words)}",
            where=f"run {decision.examination.run_id}, {decision.verdict.rules}",
            fix="keep the version that stands at the target; train on, or merge other versions",
        )
        refusal.verdict = decision.verdict
        raise refusal
    if decision.examination.settings.get("limit") is not None:
        raise GateError(
            f"{version} was judged on the first items of each task only",
            where=f"run {decision.examination.run_id}",
            fix="run the same command without --limit",
        )
    if not decision.proven.mixed:
        raise GateError(
            f"the parents of {version} cannot be merged again, because the statistics of {method} "
            "are not stored",
            where=version.uri,
            fix="promote it with the command that made it: mlflow-soup run … --promote TARGET",
        )
