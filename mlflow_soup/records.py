"""The nouns: frozen records that the stages hand to each other.

Held-out and OOD scores live in different records (`Trial`, `Evidence`), so that no
out-of-domain number can reach the search.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, order=True)
class Version:
    """One registered model version; aliases are resolved already."""

    name: str
    number: int

    @property
    def uri(self) -> str:
        """MLflow's name for it, `models:/name/12`."""
        return f"models:/{self.name}/{self.number}"

    def __str__(self) -> str:
        return f"{self.name} v{self.number}"


@dataclass(frozen=True)
class Parent:
    """A registered version whose files are at hand.

    Attributes:
        version: the registered version.
        digest: canonical digest of its tensors, `sha256:…`.
        folder: its artifact tree on this machine; read only.
        model_id: its MLflow logged model, or None for versions registered without one.
    """

    version: Version
    digest: str
    folder: Path
    model_id: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A proposal. Trial = recipe + held-out score; Soup = recipe + checkpoint + lineage."""

    method: str  # how tensors are mixed: linear, or by statistics that refine equal weights
    lam: tuple[float, ...]  # merge weights λ, one per parent, in parent order, oldest first; sum 1

    def __str__(self) -> str:
        """As people read it: λ of a pair, which the newer weighs; all weights of more parents.

        Where statistics decide the weights, what statistics.
        """
        if self.method != "linear":
            return self.method
        shown = self.lam[-1:] if len(self.lam) == 2 else self.lam
        return ", ".join(f"{weight:g}" for weight in shown)

    @property
    def label(self) -> str:
        """The recipe with its name, `λ = 0.7` or `fisher`."""
        return f"λ = {self}" if self.method == "linear" else str(self)


@dataclass(frozen=True)
class Digests:
    """What identifies a checkpoint's bytes.

    Attributes:
        canonical: of all tensors, however they are laid out in files; `sha256:…`.
        tensors: name on disk → SHA-256 of its bytes.
        files: weight file → SHA-256.
    """

    canonical: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Mismatch:
    """A tensor of a soup that is not what its parents give.

    Attributes:
        tensor: its name.
        count: how many of its elements differ; 0 where dtype or shape do.
        index: of the first of them.
        expected, found: that element's bits; or dtype and shape.
    """

    tensor: str
    count: int
    index: tuple[int, ...]
    expected: str
    found: str


@dataclass(frozen=True)
class LayerDistance:
    """How parents lie to each other in one layer: all that distances and angles follow from.

    Attributes:
        name: `layer 7`, `embedding`, `head`, `other`; `whole` for all of them together.
        norms: ‖Θ_i‖² of each parent, oldest first.
        squares: ‖Θ_j − Θ_i‖², n × n, symmetric. Measured on the differences: from inner products
            they could not be told where parents are close, as neighbours are.
    """

    name: str
    norms: tuple[float, ...]
    squares: tuple[tuple[float, ...], ...]

    def relative(self, i: int, j: int) -> float:
        """Relative L2 distance ‖Θ_j − Θ_i‖ / ‖Θ_i‖; infinite from a Θ_i of zeros."""
        if not self.squares[i][j]:
            return 0.0
        return math.sqrt(self.squares[i][j] / self.norms[i]) if self.norms[i] else math.inf

    def cosine(self, i: int, j: int) -> float:
        """Cosine between Θ_i and Θ_j; 0 where only one of them is zeros."""
        if not self.squares[i][j]:
            return 1.0
        return -_turn(self.norms[i], self.norms[j], self.squares[i][j])

    def delta_cosine(self, i: int, j: int) -> float:
        """Cosine between Θ_i and the delta Θ_j − Θ_i: below 0 where it shrinks the weights."""
        return _turn(self.norms[i], self.squares[i][j], self.norms[j])

    def turn(self, i: int, j: int, k: int) -> float:
        """Cosine between the deltas Θ_j − Θ_i and Θ_k − Θ_j: 1 straight on, −1 straight back."""
        return _turn(self.squares[i][j], self.squares[j][k], self.squares[i][k])


def _turn(first: float, second: float, both: float) -> float:
    """Cosine between two steps by the law of cosines, from squared lengths; 0 where one is none."""
    if not first or not second:
        return 0.0
    cosine = (both - first - second) / (2.0 * math.sqrt(first) * math.sqrt(second))
    return min(max(cosine, -1.0), 1.0)


@dataclass(frozen=True)
class Distance:
    """How far apart parents are, layer by layer in the order of the network."""

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
    """A parent as a soup's manifest tells of it.

    Attributes:
        uri: `models:/name/12`, or a folder.
        lam: its weight λ.
        digests: of its files and tensors; None when none were taken.
        run_id: the MLflow run that logged it.
        location: where the registry said that its files are.
    """

    uri: str
    lam: float
    digests: Digests | None
    run_id: str = ""
    location: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a soup is made of, and how: all that is needed to make it again.

    Attributes:
        model: the registered model it was made for; empty for a merge without search.
        method: how the weights enter, `linear`.
        sources: the parents, oldest first.
        digests: the soup's own; None when none were taken.
        inherited: file of the newest parent → SHA-256, for configs and tokenizer.
        search: key, run, evaluator and scores of the search that chose λ; empty without one.
        versions: of the libraries that made it.
    """

    model: str
    method: str
    sources: tuple[Source, ...]
    digests: Digests | None
    inherited: Mapping[str, str]
    search: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` looked at.

    Attributes:
        what: was looked at.
        verdict: `ok`, `MISMATCH`, `missing`, or `skipped` where there is nothing to compare with.
        details: what was found, in lines.
    """

    what: str
    verdict: str
    details: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the soup may still be what it says."""
        return self.verdict in ("ok", "skipped")


@dataclass(frozen=True)
class Items:
    """What one lm-eval task said of one model, item by item.

    The task's value as lm-eval prints it is Σ share·value; a score is Σ weight·(task's value).

    Attributes:
        task: lm-eval's name of the leaf task.
        metric: lm-eval's key, `acc,none`.
        weight: of this task in the score; negative where smaller is better.
        ids: N identities (hash of document and prompt), the key for pairing.
        values: N contributions in the metric's own units.
        shares: N shares of the items in the task's value; they sum to 1.
        log_likelihoods: N tuples, one number per choice; empty tuples for generation.
        gold: N indices of the choice that is right, where the choice with the largest
            log-likelihood per size decides; -1 where none or several are. Empty where nothing is
            known.
        sizes: N tuples of what each log-likelihood is divided by before choices are compared, such
            as their lengths for `acc_norm`; empty for 1.
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
        """Its MLflow name, `piqa/acc` or `gsm8k/exact_match.strict-match` (MLflow refuses `,`)."""
        metric, _, filter_name = self.metric.partition(",")
        suffix = "" if filter_name in ("", "none") else f".{filter_name}"
        return f"{self.task}/{metric}{suffix}".replace("::", "/")


@dataclass(frozen=True)
class Score:
    """The mean over tasks, each oriented so that larger is better.

    Attributes:
        value: the score, in metric units (1.0 = 100 accuracy points).
        stderr: its marginal standard error; errors of different λ are highly correlated.
        items: per-task item rows, for paired comparison; may be empty.
        metrics: the lm-eval numbers the value is made of.
    """

    value: float
    stderr: float
    items: tuple[Items, ...] = ()
    metrics: tuple[Metric, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A recipe and what the held-out set says of it; None when its evaluation failed."""

    number: int
    recipe: Recipe
    held_out: Score | None
    run_id: str = ""


@dataclass(frozen=True)
class Found:
    """What a method makes of some parents: a soup that is not written yet.

    Attributes:
        method: its name.
        versions: the parents, oldest first.
        recipe: what it chose.
        score: of that, held-out.
        alone: of each parent.
        trials: all that was evaluated, in order.
    """

    method: str
    versions: tuple[Version, ...]
    recipe: Recipe
    score: Score
    alone: tuple[Score, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Soup:
    """A merged checkpoint that is a registered version."""

    version: Version
    recipe: Recipe
    parents: tuple[Parent, ...]
    held_out: Score
    digest: str


@dataclass(frozen=True)
class Evidence:
    """All that the gate may read of one model: its held-out score and one score per OOD task."""

    version: Version
    digest: str
    held_out: Score
    ood: tuple[tuple[str, Score], ...]


@dataclass(frozen=True)
class Difference:
    """A paired difference between two models on the same items.

    Attributes:
        value: first minus second, larger is better for the first.
        stderr: its paired standard error.
        count: how many items it rests on.
    """

    value: float
    stderr: float
    count: int


@dataclass(frozen=True)
class Check:
    """One rule of the gate, with its numbers, also when it passes."""

    name: str
    against: Version
    difference: Difference
    bound: float  # lower confidence bound of the difference where the rule is non-inferiority
    required: float  # the rule: `bound` must not be below this
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, and every check it rests on."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True when every check passed, and there was at least one."""
        return bool(self.checks) and all(check.passed for check in self.checks)


Cell = str | float | int | None  # None where there is no number, such as a failed evaluation


@dataclass(frozen=True)
class Table:
    """What an experiment found.

    Attributes:
        columns: their names; differences are called `Δ…` or `gain…` and shown with their sign.
        rows: each with one cell per column.
        best: column → whether larger is better, for columns whose best numbers are to stand out.
        group: column within whose equal cells the best is sought; empty for the whole table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    best: Mapping[str, bool] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run of the main job did; `exit_code` and `summary` are what its command says.

    Attributes:
        soup: the registered soup.
        trials: the whole search, in order.
        gain: paired held-out difference between the soup and its better parent.
        verdict: the gate's decision, or None when no OOD tasks were given.
        promoted: what was moved to the soup, e.g. `alias champion`; empty when nothing was.
        run_id: the search run.
        summary: what happened, in words, with links.
    """

    soup: Soup
    trials: Sequence[Trial]
    gain: Difference
    verdict: Verdict | None
    promoted: str
    run_id: str
    summary: str

    @property
    def exit_code(self) -> int:
        """0 done, 3 refused by the gate."""
        return 3 if self.verdict is not None and not self.verdict.passed else 0
