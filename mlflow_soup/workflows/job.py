"""A request found sound: versions opened, tasks frozen, and one key of all that decides on it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version as version_of
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.files.durable import check_writable
from mlflow_soup.records import Recipe, Version
from mlflow_soup.registry import naming
from mlflow_soup.registry.cache import CACHE_ENV, cache_folder
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.versions import find_model, last, policy, resolve, tags_of
from mlflow_soup.request.names import VersionRef
from mlflow_soup.request.spec import MOST, Spec
from mlflow_soup.search.methods import METHODS, Method, lattice
from mlflow_soup.search.space import Space
from mlflow_soup.statistics.calibration import Calibration, calibrate, read_texts
from mlflow_soup.statistics.measure import Statistics, blend, measure
from mlflow_soup.weights.compatibility import check_compatible
from mlflow_soup.weights.soup import Blend
from mlflow_soup.workflows.bench import (
    Bench,
    Opened,
    aim,
    load_suites,
    open_journal,
    open_version,
    set_up,
)

logger = logging.getLogger("mlflow_soup")


def _plain(text: str) -> str:
    """A text whatever its white space."""
    return " ".join(text.split())


@dataclass(frozen=True)
class Session:
    """What requests about one registered model share: its versions at hand, and a bench.

    `spec` is settled: what its caller left open came from the model's policy.
    """

    client: Store
    spec: Spec
    name: str
    opened: Mapping[Version, Opened]
    bench: Bench

    @cached_property
    def journal(self) -> Journal:
        """Of what the store was not told yet."""
        return open_journal()

    @cached_property
    def calibration(self) -> Calibration:
        """The text that statistics are taken from.

        Raises:
            SpecError: there is none, or it holds an out-of-domain item.
        """
        spec, bench = self.spec, self.bench
        if not spec.calibration:
            texts = list(bench.held_out.texts())
        else:
            texts = read_texts(Path(spec.calibration))
            read = _plain("\n".join(texts))
            items = map(_plain, bench.ood.texts()) if bench.ood is not None else ()
            if seen := sum(item in read for item in items if item):
                raise SpecError(
                    f"{seen} out-of-domain items are in the calibration text",
                    where=f"--calibration {spec.calibration}",
                    fix="the gate must judge on items that no method saw: drop them",
                )
        return calibrate(
            texts, bench.live, tokens=spec.calibration_tokens, max_length=spec.max_length
        )

    def on(self, task: str) -> "Session":
        """The same versions, scored on one task alone; the task is no longer out of domain."""
        spec = replace(self.spec, tasks=task, ood_tasks="")
        return replace(self, spec=spec, bench=aim(self.bench, task))

    def job(self, versions: Sequence[Version], spec: Spec | None = None) -> "Job":
        """One request about some of the versions.

        Args:
            versions: the parents, oldest first.
            spec: the session's, with what this request has of its own.

        Raises:
            SpecError: the method cannot do what is asked.
        """
        numbers = ",".join(f"v{version.number}" for version in versions)
        spec = replace(spec or self.spec, pair="", versions=numbers, last=None, pairs="")
        job = Job(self, spec, tuple(self.opened[version] for version in versions))
        job.check()
        return job


@dataclass(frozen=True)
class Job:
    """Parents, and a method to make one model of them.

    Attributes:
        session: where they were opened.
        spec: the session's, with what this request has of its own.
        opened: the parents, oldest first.
    """

    session: Session
    spec: Spec
    opened: tuple[Opened, ...]

    @property
    def client(self) -> Store:
        """Of the store."""
        return self.session.client

    @property
    def bench(self) -> Bench:
        """The session's live model and evaluators."""
        return self.session.bench

    @property
    def journal(self) -> Journal:
        """The session's."""
        return self.session.journal

    @property
    def versions(self) -> tuple[Version, ...]:
        """The parents, oldest first."""
        return tuple(opened.parent.version for opened in self.opened)

    @property
    def method(self) -> Method:
        """The row of the table of methods."""
        return METHODS[self.spec.method]

    @property
    def space(self) -> Space:
        """The merge weights that may be chosen."""
        return Space.simplex(len(self.opened), self.spec.least)

    @cached_property
    def key(self) -> str:
        """Digest of all that decides what is evaluated, but for when it ends."""
        spec, space = self.spec, self.space
        own = {"alpha": space.alpha, "trials": spec.budget}
        knobs = {name: own.get(name, getattr(spec, name)) for name in self.method.knobs}
        if self.method.needs:
            knobs["calibration"] = self.session.calibration.digest
        if knobs.get("fisher_estimator") == "sampled":
            knobs["seed"] = spec.seed
        searched = {
            "parents": [o.parent.digest for o in self.opened],
            "evaluator": self.bench.held_out.fingerprint,
            "method": spec.method,
            "code": version_of("mlflow-soup"),
        }
        return naming.key_of(searched | knobs)

    @cached_property
    def request(self) -> str:
        """Digest of that and of when it ends: one request registers one version."""
        return naming.key_of({"key": self.key, "trials": self.spec.budget, "stop": self.spec.stop})

    def recipe(self, lam: Sequence[float]) -> Recipe:
        """The recipe that the method makes of chosen weights."""
        return replace(self.space.recipe(lam), method=self.method.needs or "linear")

    @cached_property
    def statistics(self) -> tuple[Statistics, ...]:
        """Of each parent, for the methods that need them; measured once and kept on disk."""
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
        """What a reader should know of the statistics, once for all parents."""
        calibration = self.session.calibration
        source = self.spec.calibration or "the held-out items"
        notes = [note for own in self.statistics for note in own.notes]
        return [
            f"{self.method.needs} read {calibration.tokens} tokens of {source}"
            f" in {len(calibration.documents)} documents.",
            *dict.fromkeys(notes),
        ]

    def blend(self, recipe: Recipe) -> Blend | None:
        """How tensors are mixed by statistics; None for the plain weighted sum."""
        if recipe.method == "linear":
            return None
        return blend(self.statistics, scale=self.spec.regmean_scale)

    def check(self) -> None:
        """Refuse what the method cannot do, before anything is evaluated.

        Raises:
            SpecError: too many versions for a search, a wrong budget, no text to calibrate on.
        """
        spec, space, count = self.spec, self.space, len(self.opened)
        if self.method.needs:
            self.key  # noqa: B018  # reads the text
            check_writable(cache_folder() / "statistics", CACHE_ENV)
        if not self.method.searches:
            return
        if count > MOST:
            raise SpecError(
                f"{count} versions are too many to be weighed against each other",
                where=f"--versions, with --method {spec.method}",
                fix=f"name at most {MOST}: checkpoints far apart do not merge well; or take "
                "--method uniform or greedy",
            )
        if spec.budget < count + 2:
            raise SpecError(
                f"--trials {spec.budget} is out of range",
                where="--trials, or tag soup.trials of the model",
                fix=f"at least {count + 2}: {count} parents, uniform soup, one more",
            )
        if spec.method == "grid" and len(lattice(space, spec.budget)) == count:
            raise SpecError(
                f"--trials {spec.budget} leave nothing for a grid but its {count} parents",
                where="--trials, or tag soup.trials of the model",
                fix=f"at least {2 * count - 1}",
            )
        known = (*space.start(), *space.ends())
        choice = {*(recipe.lam for recipe in known), *map(tuple, space.candidates().tolist())}
        if len(choice) < spec.budget:
            raise SpecError(
                f"there are only {len(choice)} different λ for {spec.budget} trials",
                where=f"--trials and --alpha: [{space.alpha}, 1] in steps of 1e-4",
                fix="lower --trials or --alpha",
            )


def settle(spec: Spec, refs: Sequence[VersionRef]) -> tuple[Store, str, Spec]:
    """The store, the registered model that is meant, and the spec with its policy.

    Raises:
        SpecError: no model, or a policy tag that cannot be read.
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
    """Check a request against the store, the tasks and the parents; nothing is touched.

    Args:
        client: of the store.
        name: the registered model.
        spec: settled.
        groups: the versions it names, oldest first, those that are merged together in one group;
            with `spec.last` they are looked up.
        where: the option that names them, for errors.

    Returns:
        The session, and the groups resolved.

    Raises:
        SpecError: the request is wrong.
        ParentError: a version is missing, damaged, or unlike another.
    """
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
    bench = set_up(spec, opened[resolved[-1][-1]].checkpoint, suites)
    return Session(client, spec, name, opened, bench), resolved


def _check_distinct(refs: Sequence[VersionRef], versions: Sequence[Version], where: str) -> None:
    """Refuse a version that was named twice, once by an alias perhaps."""
    for i, version in enumerate(versions):
        if version in versions[:i]:
            raise SpecError(
                f"{refs[versions.index(version)]} and {refs[i]} are the same version, {version}",
                where=where,
                fix="name different versions",
            )


def _check_order(client: Store, versions: Sequence[Version], where: str) -> None:
    """Say aloud that checkpoints were not named by age; of soups, numbers say nothing."""
    by_age = sorted(versions, key=lambda version: version.number)
    if list(versions) == by_age or any(
        naming.DIGEST in tags_of(client, version) for version in versions
    ):
        return
    said, meant = (",".join(f"v{v.number}" for v in group) for group in (versions, by_age))
    logger.warning(
        "%s %s is not by age: λ weighs the last one, v%d. Did you mean %s %s?",
        *(where, said, versions[-1].number, where, meant),
    )
