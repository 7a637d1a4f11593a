"""Check a request: open its versions, load its tasks, and compute the key that identifies it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version as version_of
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.files.cache import CACHE_ENV, cache_folder
from mlflow_soup.files.durable import check_writable
from mlflow_soup.records import Recipe, Version
from mlflow_soup.registry import naming
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.versions import find_model, last, policy, resolve, tags_of, times
from mlflow_soup.request.names import VersionRef
from mlflow_soup.request.spec import LONGEST, MOST, WINDOWS, Spec
from mlflow_soup.search.methods import METHODS, Method, lattice
from mlflow_soup.search.schedule import Schedule, evenly
from mlflow_soup.search.space import Space
from mlflow_soup.statistics.calibration import Calibration, calibrate, read_texts
from mlflow_soup.statistics.measure import Statistics, blend, measure
from mlflow_soup.weights.soup import Blend
from mlflow_soup.workflows.bench import (
    Bench,
    Opened,
    aim,
    check_machine,
    load_suites,
    open_journal,
    open_version,
    set_up,
)

logger = logging.getLogger("mlflow_soup")


def _plain(text: str) -> str:
    """The text with each run of white space replaced by one space."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Session:
    """What requests about one registered model share: the opened versions and a bench.

    `spec` is settled: the model's policy filled in what the caller left open.
    """

    client: Store
    spec: Spec
    name: str
    opened: Mapping[Version, Opened]
    bench: Bench

    @cached_property
    def journal(self) -> Journal:
        """The journal of scores that the store does not have yet."""
        return open_journal(fresh=self.spec.evidence == "own")

    @cached_property
    def calibration(self) -> Calibration:
        """The text that the statistics are computed on.

        Raises:
            SpecError: there is no text, or it contains an item of the gate or of the test set.
        """
        spec, bench = self.spec, self.bench
        if not spec.calibration:
            texts = list(bench.held_out.texts())
        else:
            texts = read_texts(Path(spec.calibration))
            read = _plain("\n".join(texts))
            for evaluator, what, why in (
                (bench.ood, "out-of-domain", "the gate must judge on items that no method saw"),
                (bench.test, "test", "a test set is unbiased only on items that no method saw"),
            ):
                items = map(_plain, evaluator.texts()) if evaluator is not None else ()
                if seen := sum(item in read for item in items if item):
                    raise SpecError(
                        f"the calibration text contains {seen} {what} items",
                        where=f"--calibration {spec.calibration}",
                        fix=f"remove them: {why}",
                    )
        return calibrate(
            texts, bench.live, tokens=spec.calibration_tokens, max_length=spec.max_length
        )

    def on(self, task: str) -> "Session":
        """A session with the same versions, scored on one task only, without OOD and test tasks."""
        spec = replace(self.spec, tasks=task, ood_tasks="", test_tasks="")
        return replace(self, spec=spec, bench=aim(self.bench, task))

    def job(self, versions: Sequence[Version], spec: Spec | None = None) -> "Job":
        """One request about some of the versions.

        Args:
            versions: the parents, oldest first.
            spec: the session's spec with the changes of this request; None for no changes.

        Raises:
            SpecError: the method cannot run with these settings.
        """
        numbers = ",".join(version.short for version in versions)
        spec = replace(spec or self.spec, pair="", versions=numbers, last=None, pairs="")
        job = Job(self, spec, tuple(self.opened[version] for version in versions))
        job.check()
        return job


@dataclass(frozen=True)
class Job:
    """Parents, and the method that makes one model from them.

    Attributes:
        session: the session in which the parents were opened.
        spec: the session's spec with the changes of this request.
        opened: the parents, oldest first.
    """

    session: Session
    spec: Spec
    opened: tuple[Opened, ...]

    @property
    def client(self) -> Store:
        """The store's client."""
        return self.session.client

    @property
    def bench(self) -> Bench:
        """The session's live model and evaluators."""
        return self.session.bench

    @property
    def journal(self) -> Journal:
        """The session's journal."""
        return self.session.journal

    @property
    def versions(self) -> tuple[Version, ...]:
        """The parents, oldest first."""
        return tuple(opened.parent.version for opened in self.opened)

    @property
    def method(self) -> Method:
        """The method's row in `METHODS`."""
        return METHODS[self.spec.method]

    @property
    def space(self) -> Space:
        """The merge weights that the method may choose."""
        space = Space.simplex(len(self.opened), self.spec.least)
        if self.spec.scheduled:
            return Schedule(space.count, space.alpha, self.times)
        return replace(space, times=self.times) if self.spec.method in WINDOWS else space

    @cached_property
    def tagged(self) -> tuple[float, ...] | None:
        """When the parents were saved, by a tag of theirs; None if none has it."""
        return times(self.client, self.versions, self.spec.time_tag)

    @property
    def times(self) -> tuple[float, ...]:
        """When the parents were saved; without a tag, they are equally spaced."""
        return self.tagged or evenly(len(self.opened))

    @property
    def time_tag(self) -> str:
        """The tag that says when the parents were saved; empty if nobody asks, or none has it."""
        return self.spec.time_tag if self.space.times and self.tagged else ""

    @property
    def references(self) -> tuple[Version, ...]:
        """The parents that are scored alone."""
        return tuple(
            next(v for v, weight in zip(self.versions, recipe.lam, strict=True) if weight)
            for recipe in self.space.alone()
        )

    def mixed(self, recipe: Recipe) -> list[Opened]:
        """The parents of a soup: those that its recipe gives a weight.

        All parents of a simplex are: the request named each of them.
        """
        kept = zip(self.opened, recipe.lam, strict=True)
        return [o for o, weight in kept if weight or not self.spec.scheduled]

    def merged(self, recipe: Recipe) -> Recipe:
        """The recipe with the weights of the soup's parents alone."""
        lam = tuple(weight for weight in recipe.lam if weight or not self.spec.scheduled)
        return replace(recipe, lam=lam)

    @cached_property
    def key(self) -> str:
        """Digest of everything that decides what is evaluated, except when the search ends."""
        spec, space = self.spec, self.space
        own = {"alpha": space.alpha, "trials": spec.budget}
        knobs = {name: own.get(name, getattr(spec, name)) for name in self.method.knobs}
        if self.method.needs:
            knobs["calibration"] = self.session.calibration.digest
        if knobs.get("fisher_estimator") == "sampled":
            knobs["seed"] = spec.seed
        if space.times:
            knobs |= {"times": space.times, "schedule": spec.scheduled}
        searched = {
            "parents": [o.parent.digest for o in self.opened],
            "evaluator": self.bench.held_out.fingerprint,
            "method": spec.method,
            "code": version_of("mlflow-soup"),
        }
        return naming.key_of(searched | knobs)

    @cached_property
    def request(self) -> str:
        """Digest of the key and of when the search ends. One request registers one version."""
        spec = self.spec
        limits = {"trials": spec.budget, "stop": spec.stop}
        if spec.reserve:
            limits["reserve"] = spec.reserve
        return naming.key_of({"key": self.key, **limits})

    def recipe(self, lam: Sequence[float]) -> Recipe:
        """The recipe of the method for the chosen weights."""
        return replace(self.space.recipe(lam), method=self.method.needs or "linear")

    @cached_property
    def statistics(self) -> tuple[Statistics, ...]:
        """The statistics of each parent, if the method needs them; measured once, kept on disk."""
        return tuple(
            measure(
                self.method.needs,
                self.bench.live,
                opened.checkpoint,
                opened.parent.digest,
                self.session.calibration,
                cache_folder() / "statistics",
                estimator=self.spec.fisher_estimator,
                seed=self.spec.seed,
            )
            for opened in self.opened
        )

    @property
    def statistics_notes(self) -> list[str]:
        """What a reader should know about the statistics, said once for all parents."""
        calibration = self.session.calibration
        source = self.spec.calibration or "the held-out items"
        notes = [note for own in self.statistics for note in own.notes]
        return [
            f"{self.method.needs} read {calibration.tokens} tokens of {source}"
            f" in {len(calibration.documents)} documents.",
            *dict.fromkeys(notes),
        ]

    def blend(self, recipe: Recipe) -> Blend | None:
        """How the statistics mix the tensors; None for the plain weighted sum."""
        if recipe.method == "linear":
            return None
        return blend(self.statistics, scale=self.spec.regmean_scale)

    def check(self) -> None:
        """Refuse settings that the method cannot run with, before anything is evaluated.

        Raises:
            SpecError: too many versions for a search, a wrong budget, no calibration text.
        """
        spec, space, count = self.spec, self.space, len(self.opened)
        if self.method.needs:
            self.key  # noqa: B018  # reads and checks the text
            check_writable(cache_folder() / "statistics", CACHE_ENV)
        if spec.scheduled and count > LONGEST:
            raise SpecError(
                f"a schedule takes at most {LONGEST} versions, not {count}",
                where="--versions or --last",
                fix=f"leave out old or intermediate versions, or ask for --last {LONGEST}",
            )
        if not self.method.searches:
            return
        if count > MOST and not spec.scheduled:
            raise SpecError(
                f"--method {spec.method} cannot search the weights of {count} versions",
                where=f"--versions, with --method {spec.method}",
                fix=f"name at most {MOST} versions, because checkpoints far apart merge badly; for "
                "those of one run, use --space schedule; or --method uniform or greedy",
            )
        least = len(space.start()) + 1
        if spec.budget < least:
            first = "those that it begins with"
            if not spec.scheduled:
                first = f"{count} parents, the uniform soup"
            raise SpecError(
                f"--trials {spec.budget} is too small",
                where="--trials, or the model's tag soup.trials",
                fix=f"set at least {least}: {first}, and one more",
            )
        if spec.method == "grid" and len(lattice(space, spec.budget)) == count:
            raise SpecError(
                f"a grid of {spec.budget} trials contains nothing but the {count} parents",
                where="--trials, or the model's tag soup.trials",
                fix=f"set --trials to at least {2 * count - 1}",
            )
        known = (*space.start(), *space.ends())
        choice = {*(recipe.lam for recipe in known), *map(tuple, space.candidates().tolist())}
        if len(choice) < spec.budget:
            raise SpecError(
                f"{spec.budget} trials need as many different λ, but there are only {len(choice)}",
                where=f"--trials and --alpha: [{space.alpha}, 1] has steps of 1e-4",
                fix="lower --trials or --alpha",
            )


def settle(spec: Spec, refs: Sequence[VersionRef]) -> tuple[Store, str, Spec]:
    """The store, the name of the registered model, and the spec with the model's policy.

    Raises:
        SpecError: there is no model, or a policy tag cannot be read.
    """
    client = connect(60.0 * spec.store_patience)
    name = find_model(client, spec.model, refs)
    return client, name, spec.settle(policy(client, name))


def open_session(
    client: Store,
    name: str,
    spec: Spec,
    groups: Sequence[Sequence[VersionRef]],
    where: str,
) -> tuple[Session, list[list[Version]]]:
    """Check a request against the store, the tasks and the parents. Nothing is changed.

    Args:
        client: the store's client.
        name: the registered model.
        spec: a settled spec.
        groups: the versions that the request names, oldest first; the versions of one group are
            merged together. Ignored if `spec.last` is set: the last versions are looked up.
        where: the option that names the versions, for errors.

    Returns:
        The session, and the versions of each group.

    Raises:
        SpecError: the request is wrong.
        ParentError: a version is missing, damaged, or does not match another.
    """
    check_machine(spec)
    if spec.last:
        resolved = [last(client, name, spec.last)]
    else:
        at = {ref: resolve(client, name, ref) for group in groups for ref in group}
        resolved = [[at[ref] for ref in group] for group in groups]
        for group, versions in zip(groups, resolved, strict=True):
            _check_distinct(group, versions, where)
            _check_order(client, versions, where)
    suites = load_suites(spec)
    distinct = dict.fromkeys(version for versions in resolved for version in versions)
    opened = {version: open_version(client, version) for version in distinct}
    check_compatible([o.checkpoint for o in opened.values()])
    bench = set_up(spec, opened[resolved[-1][-1]], suites)
    return Session(client, spec, name, opened, bench), resolved


def _check_distinct(refs: Sequence[VersionRef], versions: Sequence[Version], where: str) -> None:
    """Refuse a version that is named twice, for example by its number and by an alias."""
    for i, version in enumerate(versions):
        if version in versions[:i]:
            raise SpecError(
                f"{refs[versions.index(version)]} and {refs[i]} are the same version, {version}",
                where=where,
                fix="name each version once",
            )


def _check_order(client: Store, versions: Sequence[Version], where: str) -> None:
    """Warn if checkpoints are not named by age. The number of a soup says nothing about its age."""
    by_age = sorted(versions, key=lambda version: version.number)
    if list(versions) == by_age or any(
        naming.DIGEST in tags_of(client, version) for version in versions
    ):
        return
    said, meant = (",".join(f"v{v.number}" for v in group) for group in (versions, by_age))
    logger.warning(
        "%s %s is not by age: λ is the weight of the last version, v%d. Did you mean %s %s?",
        *(where, said, versions[-1].number, where, meant),
    )
