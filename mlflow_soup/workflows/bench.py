"""Open registered versions, load them into a live model, and score them on the same items."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mlflow_soup.errors import ParentError, SpecError, StoreError
from mlflow_soup.evaluation.compatibility import differences
from mlflow_soup.evaluation.device_map import asked_device
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import ChatTemplate, Prompting, parse_generation
from mlflow_soup.evaluation.suite import Suite, load_suite
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.records import Evidence, Manifest, Parent, Score, Version
from mlflow_soup.registry import naming
from mlflow_soup.registry.cache import store_id
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import holder, model_id, versions_at
from mlflow_soup.request.names import parse_target, parse_workers
from mlflow_soup.request.spec import Spec
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers.engine import Engine, Inline
from mlflow_soup.workers.open import check_workers, open_engine
from mlflow_soup.workers.worker import Mixture

# each two sets of tasks → why no item may be in both
_APART = {
    ("tasks", "ood_tasks"): "the gate must judge on items that the search never saw",
    ("tasks", "test_tasks"): "a test set is unbiased only on items that the search never saw",
    ("ood_tasks", "test_tasks"): "a test set is unbiased only on items that the gate never saw",
}
FEW = 4  # parents of a schedule: the gate compares the soup with each of so many
T = TypeVar("T")
_SETS = {"tasks": "held-out", "ood_tasks": "out-of-domain", "test_tasks": "test"}


@dataclass(frozen=True)
class Suites:
    """The tasks of a request: for the search, for the gate, and for neither of them."""

    held_out: Suite
    ood: Suite | None = None
    test: Suite | None = None


@dataclass(frozen=True)
class Opened:
    """A registered version: its files were pulled, read once, and found to be valid."""

    parent: Parent
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Bench:
    """A live model and its evaluators: held-out for the search, OOD for the gate, test for neither.

    `engine` is where evaluations run; `inline` is this process, with the live model.
    `spec` and `suites` are what the bench was set up from. A champion with another architecture
    needs a second bench from the same `spec` and `suites`.
    """

    spec: Spec
    suites: Suites
    live: LiveModel
    inline: Inline
    engine: Engine
    held_out: Evaluator
    ood: Evaluator | None
    test: Evaluator | None


def mixture_of(
    opened: Sequence[Opened], lam: Sequence[float] = (1.0,), where: str = "mmap"
) -> Mixture:
    """The mixture of opened versions with merge weights λ; `where` says where they are kept."""
    checkpoints = tuple(one.checkpoint for one in opened)
    return Mixture(checkpoints, tuple(one.parent.digest for one in opened), tuple(lam), where)


def open_version(client: Store, version: Version, *, fresh: bool = False) -> Opened:
    """Pull a version, check that every value is finite, and compute its digest, in one read.

    Raises:
        ParentError: files are missing, or they are not a valid checkpoint.
    """
    folder = pull(client, version, fresh=fresh)
    found = find_checkpoint(folder, version.uri)
    found.tell_passed_over()
    parent = Parent(version, digest(found), folder, model_id(client, version))
    return Opened(parent, found)


def check_machine(spec: Spec) -> None:
    """Refuse a device or workers that this machine does not have, before anything is pulled.

    Raises:
        SpecError: it does not have them.
    """
    if not spec.device_map:  # a map names the devices itself, and takes no workers
        check_workers(parse_workers(spec.workers), asked_device(spec.device))


def load_suites(spec: Spec) -> Suites:
    """The tasks of a request. No two sets share a task or a document.

    Raises:
        SpecError: there are no tasks, two sets overlap, or no document has the field of the
            clusters.
    """
    if not spec.tasks:
        raise SpecError(
            "there are no tasks to score a soup on",
            where="--tasks, and the registered model has no tag soup.tasks",
            fix="name lm-eval tasks: --tasks arc_easy,piqa, or set the tag soup.tasks",
        )
    load = partial(load_suite, include_path=spec.include_path, allowed=spec.allowed_code)
    named = {knob: getattr(spec, knob) for knob in _SETS}
    found = {k: load(text, where=_option(k)) for k, text in named.items() if text}
    for pair, why in _APART.items():
        if found.keys() >= {*pair}:
            _check_apart(pair, why, found)
    if spec.cluster:
        names = set().union(*(suite.fields() for suite in found.values()))
        if spec.cluster not in names:
            raise SpecError(
                f"no document of the tasks has the field {spec.cluster!r}",
                where="--cluster, or the model's tag soup.cluster",
                fix=f"name one of their fields: {', '.join(sorted(names))}",
            )
    return Suites(found["tasks"], found.get("ood_tasks"), found.get("test_tasks"))


def no_ood_tasks() -> SpecError:
    """The error for a command that needs OOD tasks where nobody states any."""
    return SpecError(
        "there are no out-of-domain tasks",
        where="--ood-tasks, and the registered model has no tag soup.ood_tasks",
        fix="name tasks from another domain: --ood-tasks lambada_openai",
    )


def _option(knob: str) -> str:
    return "--" + knob.replace("_", "-")


def _check_apart(pair: tuple[str, str], why: str, suites: Mapping[str, Suite]) -> None:
    """Refuse two sets that share a task or a document.

    Args:
        pair: the knobs that name the sets.
        why: why nothing may be in both.
        suites: knob → its tasks.
    """
    one, other = pair
    both = f"{_SETS[one]} and {_SETS[other]} tasks"
    where = f"{_option(one)} and {_option(other)}, or the model's tags soup.{one} and soup.{other}"
    shared = sorted({*suites[one].loaded["tasks"]} & {*suites[other].loaded["tasks"]})
    if shared:
        raise SpecError(
            f"{both} overlap: {', '.join(shared[:5])}",
            where=where,
            fix=f"name each task in one option only: {why}",
        )
    seen, others = suites[one].documents(), suites[other].documents()
    common = [(seen[document], name) for document, name in others.items() if document in seen]
    if common:
        raise SpecError(
            f"{len(common)} documents are in both {both}, "
            f"the first in {common[0][0]} and {common[0][1]}",
            where=where,
            fix=f"choose other tasks: {why}",
        )


def set_up(spec: Spec, donor: Opened, suites: Suites, *, workers: bool = True) -> Bench:
    """Load a live model with the architecture of a version, and prepare the tasks for it.

    Args:
        spec: a settled spec.
        donor: the version.
        suites: the tasks.
        workers: whether the bench may have the workers that the spec asks for.
    """
    live = LiveModel(donor.checkpoint, spec.device, device_map=spec.device_map)
    inline = Inline(live)
    asked = parse_workers(spec.workers) if workers else None
    engine = open_engine(inline, mixture_of([donor]), asked, patience=60.0 * spec.worker_patience)
    held_out = _evaluator(live, suites.held_out, spec)
    ood, test = (
        None if suite is None else _evaluator(live, suite, spec)
        for suite in (suites.ood, suites.test)
    )
    return Bench(spec, suites, live, inline, engine, held_out, ood, test)


def bench_for(bench: Bench, opened: Opened, fits: Checkpoint) -> Bench:
    """The bench, or for a version of another architecture a second one with the same tasks.

    Args:
        bench: the bench.
        opened: what is to be scored.
        fits: a checkpoint that the bench's model can hold.
    """
    if differences(fits, opened.checkpoint):
        return set_up(bench.spec, opened, bench.suites, workers=False)
    return bench


def aim(bench: Bench, task: str) -> Bench:
    """A bench with the same live model, scored on one task only.

    Args:
        bench: the bench that provides the model and the settings.
        task: `task:metric`, in the syntax of a suite's terms.
    """
    spec = bench.spec
    suite = load_suite(task, include_path=spec.include_path, allowed=spec.allowed_code)
    held_out = _evaluator(bench.live, suite, spec)
    return replace(bench, suites=Suites(suite), held_out=held_out, ood=None, test=None)


def prompting_of(spec: Spec, open_tokenizer: Callable[[], Any]) -> Prompting:
    """How the requests of a spec are built.

    Args:
        spec: a settled spec.
        open_tokenizer: returns the model's tokenizer; called if the spec asks for chat.

    Raises:
        SpecError: the tokenizer has no chat template, or none is to be applied to the turns that
            are asked for; or `gen_kwargs` cannot be read.
    """
    if spec.fewshot_as_multiturn and not spec.apply_chat_template:
        raise SpecError(
            "few-shot examples can be turns of a conversation only with a chat template",
            where="--fewshot-as-multiturn without --apply-chat-template",
            fix="give both options, or neither",
        )
    return Prompting(
        spec.num_fewshot,
        spec.system_instruction,
        ChatTemplate(open_tokenizer()) if spec.apply_chat_template else None,
        spec.fewshot_as_multiturn is not False,
        parse_generation(spec.gen_kwargs, "--gen-kwargs, or tag soup.gen_kwargs of the model"),
        spec.cluster,
    )


def _evaluator(live: LiveModel, suite: Suite, spec: Spec) -> Evaluator:
    return Evaluator(
        live,
        suite,
        evaluator=spec.evaluator,
        batch_size=spec.batch_size,
        max_length=spec.max_length,
        prompting=prompting_of(spec, lambda: live.tokenizer),
        limit=spec.limit,
    )


def check_stored(client: Store, version: Version, expected: str, *, fresh: bool = True) -> Opened:
    """Read a version from the store, not from the cache, and compare it with its digest.

    Args:
        client: the store's client.
        version: the version.
        expected: the digest of its tensors.
        fresh: False if this process has just fetched the version from the store.

    Raises:
        StoreError: the store holds other bytes.
    """
    opened = open_version(client, version, fresh=fresh)
    _compare(opened.parent.digest, expected, str(version), opened.parent.folder)
    return opened


def check_digest(folder: Path, what: str, expected: str) -> None:
    """Refuse an artifact tree whose tensors do not have the expected digest.

    Raises:
        StoreError: the tree holds other bytes.
    """
    try:
        found = digest(find_checkpoint(folder, what))
    except ParentError as error:
        found = error.what
    _compare(found, expected, what, folder)


def _compare(found: str, expected: str, what: str, folder: Path) -> None:
    if found != expected:
        raise StoreError(
            f"{what} holds other weights than it should",
            where=f"{folder}: {found}, expected {expected}",
            fix="do not use these weights: something else changed the files, or the artifact store "
            "is faulty; delete the version if there is one, and run the same command again",
        )


def rivals(client: Store, name: str, spec: Spec) -> list[Version]:
    """The versions that the soup would replace: the champions, and the one at `promote`."""
    aliases, found = {(name, spec.champion): None}, list[Version]()
    if spec.promote:
        target = parse_target(spec.promote)
        owner = target.model or name
        aliases[owner, spec.champion] = None
        if target.kind == "stage":
            found = versions_at(client, owner, target)
        else:
            aliases[owner, target.name] = None
    at = (holder(client, *alias) for alias in aliases)
    return list(dict.fromkeys([*(version for version in at if version is not None), *found]))


def open_rivals(client: Store, name: str, spec: Spec, at_hand: Sequence[Opened]) -> list[Opened]:
    """The current rivals, opened. Versions in `at_hand` are not pulled again."""
    opened = {o.parent.version: o for o in at_hand}
    return [opened.get(v) or open_version(client, v) for v in rivals(client, name, spec)]


def judged(parents: Sequence[T], *, scheduled: bool) -> Sequence[T]:
    """The parents that the gate compares a soup with, oldest first: all of them.

    Of a schedule with more than a few, only the newest, which a soup of a window would replace:
    each further one costs an evaluation. That a soup is one of a schedule, its manifest says. It
    gives nobody more than the choice of the parents does, which is his anyway.

    Args:
        parents: the parents, oldest first.
        scheduled: whether they were merged by a schedule.
    """
    return parents[-1:] if scheduled and len(parents) > FEW else parents


def contenders(
    soup: Opened, parents: Sequence[Opened], champions: Sequence[Opened]
) -> dict[str, Opened]:
    """The versions to score out of domain: soup, parents, and champions other than the soup.

    Returns:
        Role (`soup`, `parent 0`, `parent 1` …, `champion 0` …) → opened version.
    """
    others = [c for c in champions if c.parent.digest != soup.parent.digest]
    return {
        "soup": soup,
        **{f"parent {i}": parent for i, parent in enumerate(parents)},
        **{f"champion {i}": champion for i, champion in enumerate(others)},
    }


def conditions(bench: Bench) -> str:
    """Digest of everything that the evidence depends on, except the weights."""
    assert bench.ood is not None
    return naming.key_of({"held_out": bench.held_out.fingerprint, "ood": bench.ood.fingerprint})


def settings(bench: Bench, soup: Manifest) -> dict[str, Any]:
    """How a bench scores a soup and its rivals, for the record.

    Args:
        bench: the bench.
        soup: the soup's manifest: its config and tokenizer decide, too, and no tensor shows them.
    """
    assert bench.ood is not None
    return {
        "asked": bench.held_out.asked | bench.ood.asked,
        "max_length": bench.spec.max_length,
        "inherited": naming.key_of(soup.inherited),
        "held_out": bench.held_out.fingerprint,
        "ood": bench.ood.fingerprint,
        "limit": bench.spec.limit,
        "num_fewshot": bench.spec.num_fewshot,
        "evaluator": bench.ood.settings(),
    }


def examine(
    bench: Bench,
    models: Mapping[str, Opened],
    known: Mapping[str, Score],
    measured: Mapping[str, Evidence],
    journal: Journal,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Evidence]:
    """Score the soup, the parents and the champions out of domain, and held-out if unknown.

    Args:
        bench: a live model with the soup's architecture, and its evaluators.
        models: role → opened version, from `contenders`.
        known: tensor digest → held-out score that the search measured already.
        measured: tensor digest → evidence of an earlier examination under the same conditions.
        journal: keeps the scores until `forget` drops them, after MLflow has stored them.
        check: is called before each model and at the end; it raises to stop the examination.
    """
    soup = models["soup"].checkpoint
    left = {o.parent.digest: o for o in models.values() if o.parent.digest not in measured}
    for its, opened in left.items() if bench.engine.most else ():
        if not differences(soup, opened.checkpoint):
            _expect(bench, opened, journal, held_out=its not in known)
    bench.engine.begin()
    roles: dict[str, Evidence] = {}
    for role, opened in tqdm(models.items(), desc="out of domain", unit="model", disable=None):
        check()
        its = opened.parent.digest
        # two roles can have the same weights: at λ = 1 the soup equals its parent
        same = measured.get(its) or next((e for e in roles.values() if e.digest == its), None)
        if same is not None:
            roles[role] = replace(same, version=opened.parent.version)
            continue
        at = bench_for(bench, opened, soup)
        held_out, ood = _looks(at, opened, journal)
        alone = known.get(its) or held_out().mean
        roles[role] = Evidence(opened.parent.version, its, alone, tuple(ood().of.items()))
    check()
    return roles


def _expect(bench: Bench, opened: Opened, journal: Journal, *, held_out: bool) -> None:
    """Begin to score a version, and let the journal have what comes early."""
    names = _entries(bench, opened.parent.digest)
    looks = zip(names, (bench.held_out, bench.ood), _looks(bench, opened, journal), strict=True)
    for name, evaluator, look in looks:
        if (evaluator is bench.ood or held_out) and journal.read(name) is None:
            assert evaluator is not None
            bench.engine.expect(name, evaluator, mixture_of([opened]), look)


def _looks(
    bench: Bench, opened: Opened, journal: Journal
) -> tuple[Callable[[], Scores], Callable[[], Scores]]:
    """What scores a version held-out and out of domain; the journal keeps both."""
    assert bench.ood is not None
    mixture, names = mixture_of([opened]), _entries(bench, opened.parent.digest)

    def held_out() -> Scores:
        answers = bench.engine.answer(names[0], bench.held_out, mixture)
        score = bench.held_out.score(*answers.parts)
        return Scores({"": score}, {naming.TRUNCATED: bench.held_out.truncated})

    def ood() -> Scores:
        assert bench.ood is not None
        answers = bench.engine.answer(names[1], bench.ood, mixture)
        return Scores(dict(bench.ood.evaluate(*answers.parts)))

    return partial(journal.recall, names[0], held_out), partial(journal.recall, names[1], ood)


def _entries(bench: Bench, its: str) -> tuple[str, str]:
    """The names of a model's journal entries: one for its held-out, one for its OOD scores."""
    assert bench.ood is not None
    held_out, ood = (measured_key(e, [(its, 1.0)]) for e in (bench.held_out, bench.ood))
    return held_out, ood


def evaluator_params(evaluator: Evaluator) -> dict[str, str]:
    """The settings of an evaluator as params of a run, below `cfg.evaluator.`."""
    return {f"cfg.evaluator.{key}": str(value) for key, value in evaluator.settings().items()}


def measured_key(evaluator: Evaluator, parts: Sequence[tuple[str, float]]) -> str:
    """Digest of the weights and of how they are scored; an equal digest is not scored twice.

    Args:
        evaluator: the evaluator that scores the weights.
        parts: digest and λ of each checkpoint in the mixture.
    """
    weights = [(digest, weight.hex()) for digest, weight in parts if weight]
    return naming.key_of({"evaluator": evaluator.fingerprint, "weights": weights})


def forget(bench: Bench, roles: Mapping[str, Evidence], journal: Journal) -> None:
    """Drop the scores of an examination from the journal, once MLflow has stored them."""
    for evidence in roles.values():
        for entry in _entries(bench, evidence.digest):
            journal.drop(entry)


def open_journal(*, fresh: bool = False) -> Journal:
    """The journal of scores that MLflow has not stored yet. Each store has its own journal.

    Args:
        fresh: an empty journal for this process only, which takes over no score.
    """
    folder = cache_folder() / "journal" / store_id()
    if fresh:
        folder = Path(tempfile.mkdtemp(prefix="soup-journal-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    journal = Journal(folder)
    journal.open()
    return journal
