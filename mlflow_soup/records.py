"""The records that the stages pass to each other; all are frozen.

`Trial` has no out-of-domain (OOD) score, so no OOD score can reach the search. Only `Evidence`,
which the gate reads, has them. Neither of the two has a score on the test set: only `Unbiased` has,
and only reports read it.
"""

import math
import operator
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, order=True)
class Version:
    """One version of a registered model, by number; aliases are already resolved."""

    name: str
    number: int

    @property
    def short(self) -> str:
        """`v12`, as a user names it within its model."""
        return f"v{self.number}"

    @property
    def uri(self) -> str:
        """The version's MLflow URI, `models:/name/12`."""
        return f"models:/{self.name}/{self.number}"

    @property
    def options(self) -> str:
        """The options of a command that name it, for a shell."""
        return f"--model {shlex.quote(self.name)} --version {self.short}"

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"


def listed(versions: Sequence[object]) -> str:
    """Versions in words: each of a few, or the first and the last of many, oldest first."""
    if len(versions) <= 4:
        return " and ".join(map(str, versions))
    return f"{versions[0]} to {versions[-1]} ({len(versions)} versions)"


@dataclass(frozen=True)
class Parent:
    """A registered version with its files on this machine.

    Attributes:
        version: the registered version.
        digest: the canonical digest of its tensors, `sha256:…`.
        folder: its artifact tree on this machine; read-only.
        model_id: the ID of its MLflow logged model; None if it was registered without one.
    """

    version: Version
    digest: str
    folder: Path
    model_id: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How to merge the parents. A trial adds a held-out score; a soup adds the merged files."""

    method: str  # how tensors are mixed: `linear`, or the statistics `fisher` or `regmean`
    lam: tuple[float, ...]  # merge weights λ, one per parent, oldest parent first; they sum to 1

    def __str__(self) -> str:
        """The recipe for people.

        For a pair, λ, the weight of the newer parent; for more parents, all weights; of more than
        eight, those from the first weight on. A method other than `linear` is shown by its name.
        """
        if self.method != "linear":
            return self.method
        shown = [f"{weight:g}" for weight in self.lam]
        if len(shown) == 2:
            return shown[-1]
        if len(shown) > 8:
            first = next(i for i, weight in enumerate(self.lam) if weight)
            shown = [f"last {len(shown) - first}:", *shown[first:]]
            shown = [*shown[:4], "…", *shown[-3:]] if len(shown) > 9 else shown
            return f"{shown[0]} {', '.join(shown[1:])}"
        return ", ".join(shown)

    @property
    def label(self) -> str:
        """The recipe as a label, `λ = 0.7` or `fisher`."""
        return f"λ = {self}" if self.method == "linear" else str(self)


@dataclass(frozen=True)
class Digests:
    """The digests that identify the bytes of a checkpoint.

    Attributes:
        canonical: one digest over all tensors, independent of the files' layout; `sha256:…`.
        tensors: tensor name on disk → SHA-256 of the tensor's bytes.
        files: weight file → SHA-256.
    """

    canonical: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Mismatch:
    """A tensor of a soup that differs from the mix of the parents.

    Attributes:
        tensor: its name.
        count: how many of its elements differ; 0 if the dtype or the shape differs.
        index: the index of the first element that differs; empty if the dtype or the shape differs.
        expected, found: the bits of that element, or the dtype and the shape.
    """

    tensor: str
    count: int
    index: tuple[int, ...]
    expected: str
    found: str


@dataclass(frozen=True)
class LayerDistance:
    """The squared norms and squared distances of n parents in one layer.

    All distances and angles between the parents follow from them.

    Attributes:
        name: `layer 7`, `embedding`, `head` or `other`; `whole` for all layers together.
        norms: ‖Θ_i‖² of each parent, oldest first.
        squares: ‖Θ_j − Θ_i‖², n × n, symmetric. They are computed from the differences; from inner
            products, the distances of close parents would be lost to rounding.
    """

    name: str
    norms: tuple[float, ...]
    squares: tuple[tuple[float, ...], ...]

    def relative(self, i: int, j: int) -> float:
        """Relative L2 distance ‖Θ_j − Θ_i‖ / ‖Θ_i‖; infinite if only Θ_i is zero."""
        if not self.squares[i][j]:
            return 0.0
        return math.sqrt(self.squares[i][j] / self.norms[i]) if self.norms[i] else math.inf

    def cosine(self, i: int, j: int) -> float:
        """Cosine between Θ_i and Θ_j; 0 if only one of them is zero."""
        if not self.squares[i][j]:
            return 1.0
        return -_turn(self.norms[i], self.norms[j], self.squares[i][j])

    def delta_cosine(self, i: int, j: int) -> float:
        """Cosine between Θ_i and the delta Θ_j − Θ_i; negative if the delta shrinks the weights."""
        return _turn(self.norms[i], self.squares[i][j], self.norms[j])

    def turn(self, i: int, j: int, k: int) -> float:
        """Cosine between the deltas Θ_j − Θ_i and Θ_k − Θ_j: 1 is straight on, −1 straight back."""
        return _turn(self.squares[i][j], self.squares[j][k], self.squares[i][k])


def _turn(first: float, second: float, both: float) -> float:
    """Cosine between two steps, by the law of cosines; 0 if a step has length 0.

    Args:
        first: the squared length of the first step.
        second: the squared length of the second step.
        both: the squared length of their sum.
    """
    if not first or not second:
        return 0.0
    cosine = (both - first - second) / (2.0 * math.sqrt(first) * math.sqrt(second))
    return min(max(cosine, -1.0), 1.0)


@dataclass(frozen=True)
class Distance:
    """How far apart the parents are, layer by layer from input to output."""

    layers: tuple[LayerDistance, ...]

    @property
    def whole(self) -> LayerDistance:
        """All layers as one vector."""
        norms = zip(*(layer.norms for layer in self.layers), strict=True)
        rows = zip(*(layer.squares for layer in self.layers), strict=True)
        return LayerDistance(
            "whole",
            tuple(map(math.fsum, norms)),
            tuple(tuple(map(math.fsum, zip(*row, strict=True))) for row in rows),
        )


@dataclass(frozen=True)
class Source:
    """A parent as described in a soup's manifest.

    Attributes:
        uri: `models:/name/12`, or the path of a folder.
        lam: its merge weight λ.
        digests: the digests of its files and tensors; None if they were not computed.
        run_id: the MLflow run that logged it.
        location: where its files are, according to the registry.
    """

    uri: str
    lam: float
    digests: Digests | None
    run_id: str = ""
    location: str = ""


@dataclass(frozen=True)
class Manifest:
    """The parents of a soup and how they were mixed: everything needed to mix them again.

    Attributes:
        model: the registered model that the soup was made for; empty for a merge without search.
        method: how the tensors were mixed: `linear`, `fisher` or `regmean`.
        sources: the parents, oldest first.
        digests: the soup's own digests; None if they were not computed.
        inherited: file copied from the newest parent (configs, tokenizer) → SHA-256.
        search: key, run, evaluator and scores of the search that chose λ; empty without a search.
        versions: library → its version when the soup was made.
    """

    model: str
    method: str
    sources: tuple[Source, ...]
    digests: Digests | None
    inherited: Mapping[str, str]
    search: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def scheduled(self) -> bool:
        """Whether the parents were merged by a schedule; then it names all versions searched."""
        return "versions" in self.search


@dataclass(frozen=True)
class Finding:
    """The result of one check by `verify`.

    Attributes:
        what: the thing that was checked.
        verdict: `ok`, `MISMATCH`, `missing`, or `skipped` if there was nothing to compare with.
        details: the findings, one line each.
    """

    what: str
    verdict: str
    details: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True unless the check found something wrong or missing."""
        return self.verdict in ("ok", "skipped")


@dataclass(frozen=True)
class Items:
    """The results of one model on one lm-eval task, item by item.

    The task's value, as lm-eval prints it, is Σ share·value. A score is Σ weight·(task's value).

    Attributes:
        task: lm-eval's name of the leaf task.
        metric: lm-eval's key, `acc,none`.
        weight: the weight of this task in the score; negative if a smaller value is better.
        ids: N names, `document:prompt` or `document:prompt:cluster`, each part a hash; items of two
            models are paired by them.
        values: N values, one per item, in the metric's own units.
        shares: N shares of the items in the task's value; they sum to 1.
        log_likelihoods: N tuples, one number per choice; empty tuples for generation.
        gold: N indices of the right choice, for metrics that pick the choice with the largest
            log-likelihood per size; −1 if no choice or several choices are right. Empty if the
            right choices are not known.
        sizes: N tuples, one number per choice: the log-likelihood is divided by it before choices
            are compared. For `acc_norm` it is the length of the choice. Empty if all sizes are 1.
    """

    task: str
    metric: str
    weight: float
    ids: tuple[str, ...]
    values: tuple[float, ...]
    shares: tuple[float, ...]
    log_likelihoods: tuple[tuple[float, ...], ...] = ()
    gold: tuple[int, ...] = ()
    sizes: tuple[tuple[float, ...], ...] = ()

    @property
    def clusters(self) -> list[str]:
        """The cluster of each item: items of one passage go together; others by themselves."""
        return [name.split(":", 2)[2] if name.count(":") > 1 else name for name in self.ids]


@dataclass(frozen=True)
class Dataset:
    """The items of a task, as MLflow shows them beside the scores of a model.

    Attributes:
        task: lm-eval's name of the task or group.
        digest: of the items' documents, and of the task's templates and few-shot examples. Settings
            of the evaluator make no other dataset, such as a chat template.
        count: how many items there are.
        source: what loads them again: the task, and the folders with its YAML.
    """

    task: str
    digest: str
    count: int
    source: Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """One number as lm-eval prints it."""

    task: str
    metric: str  # lm-eval's key, `acc,none`
    value: float
    stderr: float
    higher_is_better: bool

    @property
    def key(self) -> str:
        """MLflow's name of it, `piqa/acc` or `gsm8k/exact_match.strict-match` (`,` is refused)."""
        metric, _, filter_name = self.metric.partition(",")
        suffix = "" if filter_name in ("", "none") else f".{filter_name}"
        return f"{self.task}/{metric}{suffix}".replace("::", "/")


@dataclass(frozen=True)
class Score:
    """The mean over tasks; each task counts so that larger is better.

    Attributes:
        value: the score, in metric units (1.0 = 100 accuracy points).
        stderr: its marginal standard error. The errors of different λ are highly correlated.
        items: the items of each task, for paired comparison; may be empty.
        metrics: the lm-eval numbers that the score is computed from.
        noise: how much the score would vary, as a standard deviation, if the answers were sampled
            again; an upper bound. 0 if no task samples its answers.
    """

    value: float
    stderr: float
    items: tuple[Items, ...] = ()
    metrics: tuple[Metric, ...] = ()
    noise: float = 0.0

    @property
    def flaw(self) -> str:
        """Why a stored score is not the sum of its items, in words; empty if it is."""
        if any(abs(math.fsum(i.shares) - 1.0) > 1e-6 for i in self.items):
            return "the shares of its items do not add up to 1"
        if not 0.0 <= self.noise <= self.stderr * (1.0 + 1e-9):
            return "its noise is no part of its standard error"
        sums = [i.weight * math.fsum(map(operator.mul, i.shares, i.values)) for i in self.items]
        total = math.fsum(sums)
        if math.isfinite(total) and math.isclose(total, self.value, rel_tol=1e-9, abs_tol=1e-12):
            return ""
        return "its items do not add up to it"


@dataclass(frozen=True)
class Trial:
    """A recipe and its held-out score; the score is None if the evaluation failed."""

    number: int
    recipe: Recipe
    held_out: Score | None
    run_id: str = ""


@dataclass(frozen=True)
class Found:
    """The recipe that a method chose for some parents; the soup is not written yet.

    Attributes:
        method: the method's name.
        versions: the parents, oldest first.
        recipe: the chosen recipe.
        score: its held-out score.
        references: the parents that were scored alone, oldest first: all, or of a schedule the
            newest.
        alone: the held-out score of each reference.
        trials: all trials, in order.
    """

    method: str
    versions: tuple[Version, ...]
    recipe: Recipe
    score: Score
    references: tuple[Version, ...]
    alone: tuple[Score, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Soup:
    """A merged checkpoint, and the version that holds it.

    Attributes:
        version: the version that was registered for the soup; a parent's version if the soup has
            its weights and was not registered again.
        recipe: the weights of all versions of the request.
        parents: the versions that were merged, oldest first; of a schedule, those with a weight.
        held_out: the held-out score.
        digest: the digest of the tensors.
    """

    version: Version
    recipe: Recipe
    parents: tuple[Parent, ...]
    held_out: Score
    digest: str

    @property
    def lam(self) -> tuple[float, ...]:
        """The merge weight of each parent, oldest first."""
        lam = self.recipe.lam
        return lam if len(lam) == len(self.parents) else tuple(filter(None, lam))

    @property
    def original(self) -> Version | None:
        """The newest parent that has the same weights; None if no parent has."""
        same = [parent.version for parent in self.parents if parent.digest == self.digest]
        return same[-1] if same else None

    @property
    def registered(self) -> bool:
        """Whether the soup is a version of its own."""
        return self.version != self.original


@dataclass(frozen=True)
class Evidence:
    """The scores of one model that the gate reads: its held-out score and one per OOD task."""

    version: Version
    digest: str
    held_out: Score
    ood: tuple[tuple[str, Score], ...]


@dataclass(frozen=True)
class Examination:
    """What one OOD run measured: the evidence of a soup and of the models it is compared with.

    Attributes:
        run_id: the OOD run.
        roles: `soup`, `parent 0`, `parent 1` …, `champion 0` … → evidence.
        settings: how all of them were scored: the evaluator's settings, `limit`, and the
            fingerprints of the held-out and the OOD evaluator.
    """

    run_id: str
    roles: Mapping[str, Evidence]
    settings: Mapping[str, Any]

    def of(self, digest: str) -> Evidence | None:
        """The evidence of the model with these tensors."""
        return next((e for e in self.roles.values() if e.digest == digest), None)


@dataclass(frozen=True)
class Unbiased:
    """A version's score on the test set, which neither the search nor the gate reads."""

    version: Version
    score: Score


@dataclass(frozen=True)
class Difference:
    """A paired difference between two models on the same items.

    Attributes:
        value: the first model's score minus the second's; positive if the first is better.
        stderr: its paired standard error.
        count: the number of items.
        clusters: the number of clusters of items that go together; 0 if each item is its own.
        effect: the design effect: the squared standard error, divided by that of as many items that
            do not go together.
        degrees: the degrees of freedom; 0 for the number of items, less one.
    """

    value: float
    stderr: float
    count: int
    clusters: int = 0
    effect: float = 1.0
    degrees: float = 0.0

    @property
    def freedom(self) -> float:
        """The degrees of freedom of the standard error."""
        return self.degrees or max(self.count - 1, 1)


@dataclass(frozen=True)
class Check:
    """One check of the gate, with its numbers; passed checks are kept too.

    Attributes:
        tasks: the OOD tasks that are judged together; empty for the held-out score.
        against: the rival.
        difference: the soup's score minus the rival's; the mean over several tasks, as a share of
            the rival's scores if the margin is one.
        side: which bound of the difference counts, `lower` or `upper`; empty for the difference
            itself.
        bound: the bound.
        required: the rule: `bound` must not be below this.
        passed: whether it is not.
        margin: the allowed loss, as the rules say it.
        allowed: the allowed loss, in the units of the difference.
    """

    tasks: tuple[str, ...]
    against: Version
    difference: Difference
    side: str
    bound: float
    required: float
    passed: bool
    margin: str
    allowed: float = 0.0

    @property
    def name(self) -> str:
        """What was judged, in words."""
        if len(self.tasks) > 1:
            return f"{len(self.tasks)} OOD tasks together"
        return self.tasks[0] if self.tasks else "held-out"


@dataclass(frozen=True)
class Rules:
    """The rules of the gate.

    Attributes:
        margin: the allowed loss on the OOD tasks, as `request.margins` reads it.
        confidence: the confidence of the one-sided bounds, in (0.5, 1).
        min_items: the smallest number of items of each OOD task.
        tasks: the OOD tasks to judge on, as `task:metric`; empty for those of the evidence.
    """

    margin: str
    confidence: float
    min_items: int = 1
    tasks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The rules in words, without the tasks."""
        items = f", at least {self.min_items} items" if self.min_items > 1 else ""
        return f"margin {self.margin}, confidence {self.confidence:g}{items}"


@dataclass(frozen=True)
class Verdict:
    """The gate's decision: its checks, and the rules that they follow."""

    checks: tuple[Check, ...]
    rules: Rules

    @property
    def passed(self) -> bool:
        """True if there is at least one check and every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Promotion:
    """A promotion that was made.

    Attributes:
        target: what was moved, in words: `alias champion`, `stage Production`, `prod-llm@champion`.
        version: what it points to now: the soup, or its copy in another registered model.
        previous: what it pointed to before this version was promoted; None for nothing.
        at: when, UTC in ISO 8601; empty if the ledger does not say it.
    """

    target: str
    version: Version
    previous: Version | None
    at: str = ""

    def __str__(self) -> str:
        return f"{self.target} → {self.version}"


Cell = str | float | int | None  # None: there is no number, for example a failed evaluation


@dataclass(frozen=True)
class Table:
    """The result of an experiment as a table.

    Attributes:
        columns: the names of the columns. A name `Δ…` or `gain…` marks differences; their cells are
            printed with a sign.
        rows: the rows, with one cell per column.
        best: column → True if larger is better. The best numbers of these columns are highlighted.
        group: a column. Rows with equal cells in it form a group, and each group has its own best
            numbers; empty if the whole table is one group.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    best: Mapping[str, bool] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Power:
    """How likely the gate passes a soup that is exactly as good as its rivals, before any score.

    Attributes:
        margin: the margins, as `--margin` takes them.
        confidence: the confidence of the rules.
        items: OOD task → number of its items.
        unknown: the tasks whose errors nobody knows yet; they count as passed.
        chances: share of the answers that differ between two models → the chance, from 0 to 1.
    """

    margin: str
    confidence: float
    items: Mapping[str, int]
    unknown: tuple[str, ...]
    chances: Mapping[float, float]


@dataclass(frozen=True)
class Window:
    """The window of a run's checkpoints that a soup merges.

    Attributes:
        duration: its length; in checkpoints if there is no tag.
        power: p of the decay 1 − x^p that its weights follow; None for another decay.
        time_tag: the version tag that says when each was saved; empty if they count as equally
            spaced.
        average: the held-out score of the plain average of the same checkpoints; None if that was
            not evaluated.
    """

    duration: float
    power: float | None
    time_tag: str
    average: Score | None


@dataclass(frozen=True)
class Outcome:
    """The result of one run of the main job.

    Attributes:
        soup: the soup, and its version.
        method: the name of the method that found the soup.
        versions: the versions of the request, oldest first.
        trials: all trials of the search, in order.
        alone: parent → its held-out score; those that were scored alone, oldest first.
        gains: the same parents → the paired held-out difference between the soup and the parent;
            the better parent first.
        verdict: the gate's decision; None if no OOD tasks were given, or no soup was registered.
        target: where the request promotes the soup to; empty for nowhere.
        promotion: the promotion; None if nothing was promoted.
        run_id: the search run.
        summary: the text that the command prints, with links.
        examination: the OOD scores that the verdict was computed from; None without a verdict.
        tested: `soup`, `parent 0`, `parent 1` …, `champion 0` … → score on the test set; empty
            without test tasks, and if no soup was registered.
        test_gains: parents, then champions → the paired difference on the test set between the soup
            and that version. The first is the better parent, as the held-out items rank the
            parents.
        power: what the gate's chance was before anything was scored; None without OOD tasks.
        window: the merged window; None of a soup of no window, and of the newest checkpoint alone.
    """

    soup: Soup
    method: str
    versions: tuple[Version, ...]
    trials: Sequence[Trial]
    alone: Mapping[Version, Score]
    gains: Mapping[Version, Difference]
    verdict: Verdict | None
    target: str
    promotion: Promotion | None
    run_id: str
    summary: str
    examination: Examination | None = None
    tested: Mapping[str, Unbiased] = field(default_factory=dict)
    test_gains: Mapping[Version, Difference] = field(default_factory=dict)
    power: Power | None = None
    window: Window | None = None

    @property
    def gain(self) -> Difference:
        """The paired held-out difference between the soup and the better parent."""
        return next(iter(self.gains.values()))

    @property
    def test_gain(self) -> Difference | None:
        """The paired difference on the test set to the same parent; None without test scores."""
        return next(iter(self.test_gains.values()), None)

    @property
    def promoted(self) -> str:
        """What was moved to the soup, `alias champion → my-llm v14`; empty if nothing was."""
        return str(self.promotion or "")

    @property
    def exit_code(self) -> int:
        """The command's exit code: 0 for done, 3 if the gate refused or had nothing to judge."""
        refused = self.verdict is not None and not self.verdict.passed
        return 3 if refused or (self.target and not self.promoted) else 0
