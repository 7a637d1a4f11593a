"""Every knob a user can turn, with its default and its help: the single source.

The command line, the YAML file of `--spec`, MLproject and the policy tags of a registered model all
take their names from the fields below.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from mlflow_soup.errors import SpecError
from mlflow_soup.request import knobs
from mlflow_soup.request.knobs import Range, finite, kind, knob, whole
from mlflow_soup.request.names import (
    VersionRef,
    check_alias,
    check_name,
    parse_pair,
    parse_pairs,
    parse_target,
    parse_version,
    parse_versions,
)

# in step with `search.CHOICES`, which a test compares; importing it here would cost a second
ACQUISITIONS = ("landscape", "gp-hedge", "ei", "pi", "ucb")
MOST = 8  # versions: the simplex has 2ⁿ faces
PARENTS_IN = ("mmap", "memory")
EVALUATORS = ("prepared", "lm-eval")
# in step with `methods.METHODS`, which a test compares
METHODS = ("bayesopt", "uniform", "greedy", "fisher", "regmean", "grid", "random", "best")
TIES = ("add", "drop")
ESTIMATORS = ("empirical", "sampled")
STUDIES = {
    "pairs": "Which pairs gain? All pairs of the versions, as a heat map.",
    "count": "How many parents? Soups of the last 2, 3, 4 … of the versions.",
    "landscape": "Which λ? Equally spaced ones from 0 to 1, with a paired band.",
    "heldout": "How many held-out items are enough? What shares of them would have chosen.",
    "alpha": "Which space? Searches in [α, 1].",
    "ood": "What does a soup lose on tasks it was not found on? By every method.",
    "methods": "Which method? All of them on all tasks, with paired intervals.",
}
_ALL = " ".join(STUDIES)
_STEPS = 10_000  # of λ from 0 to 1
_SEARCHING = "run pairs count alpha ood methods"  # commands that search by some method


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One request. What the caller does not name may come from the model's policy tags.

    Raises:
        SpecError: a value is out of its range or cannot be read.
    """

    model: str = knob(
        "",
        "Registered model; default: MLFLOW_SOUP_MODEL, or the only model with these versions.",
        f"run evaluate gate promote {_ALL}",
    )
    pair: str = knob(
        "", "Two versions, older first: v12,v13 or @champion,v13.", "run landscape heldout alpha"
    )
    versions: str = knob(
        "",
        "Two versions or more, the newest last: v11,v12,v13; a search takes eight at most.",
        "run pairs count",
    )
    last: int | None = knob(
        None,
        "Instead of naming them, the last k versions that are no soups.",
        "run pairs count",
        range=whole(2),
    )
    pairs: str = knob("", "One pair or more: 'v11,v12 v12,v13'.", "ood methods")
    method: str = knob(
        "bayesopt",
        "How one model is made of several; in studies of pairs and count: uniform, unless named.",
        "run pairs count",
        policy=True,
        choices=METHODS,
    )
    methods: str = knob(
        ",".join(METHODS[:-1]), "Methods to compare, comma-separated.", "ood methods"
    )
    version: str = knob("", "The soup: v14 or @alias.", "evaluate gate promote")
    tasks: str = knob(
        "",
        "Held-out lm-eval tasks, comma-separated, each task[:metric[,filter]].",
        f"run evaluate {_ALL}",
        policy=True,
    )
    ood_tasks: str = knob(
        "",
        "Out-of-domain lm-eval tasks for the gate, as --tasks.",
        "run evaluate heldout ood methods",
        policy=True,
    )
    include_path: str = knob(
        "", "Folder with lm-eval task YAMLs of your own.", f"run evaluate {_ALL}", policy=True
    )
    allow_task_code: str = knob(
        "",
        "SHA-256 of task folders whose Python code may run, comma-separated; a refusal names it.",
        f"run evaluate {_ALL}",
    )
    alpha: float | None = knob(
        None,
        "Smallest weight λ of the newest version; default: 0.5 for a pair, 1/n for n versions.",
        "run pairs count ood methods",
        policy=True,
        range=Range(lambda value: 0.0 <= value < 1.0, "give a number from 0 to below 1"),
    )
    trials: int | None = knob(
        None,
        "Evaluations at most, parents and uniform soup included; default: 8 for a pair, 4 more for "
        "each further version.",
        _SEARCHING,
        policy=True,
        range=whole(4),
    )
    stop: float = knob(
        0.02,
        "End when one more evaluation is expected to gain less than this share of the paired "
        "standard error; 0: never early.",
        _SEARCHING,
        policy=True,
        range=finite(),
    )
    acquisition: str = knob(
        "landscape", "How the next λ is chosen.", _SEARCHING, policy=True, choices=ACQUISITIONS
    )
    seed: int = knob(
        0,
        "Seed of all that is drawn.",
        f"heldout {_SEARCHING}",
        range=whole(0),
    )
    greedy_tie: str = knob(
        "add",
        "What the greedy soup does with a parent that makes it neither better nor worse.",
        "run pairs count ood methods",
        policy=True,
        choices=TIES,
    )
    calibration: str = knob(
        "",
        "File of text for Fisher and RegMean, .jsonl with a field text or plain; default: the "
        "held-out items.",
        "run pairs count ood methods",
        policy=True,
    )
    calibration_tokens: int = knob(
        65536,
        "How much of that text is read, at most.",
        "run pairs count ood methods",
        policy=True,
        range=whole(1),
    )
    fisher_estimator: str = knob(
        "empirical",
        "Gradients of the text as it is, or of tokens that the parent itself draws.",
        "run pairs count ood methods",
        policy=True,
        choices=ESTIMATORS,
    )
    regmean_scale: float = knob(
        0.9,
        "What RegMean multiplies the off-diagonal elements of Gram matrices by.",
        "run pairs count ood methods",
        policy=True,
        range=Range(lambda value: 0.0 <= value <= 1.0, "give a number from 0 to 1"),
    )
    points: int = knob(
        21,
        "How many λ from 0 to 1 are evaluated.",
        "landscape heldout",
        range=whole(4, _STEPS + 1),
    )
    alphas: str = knob("0,0.5,0.7,0.9", "Lower ends of the spaces to search.", "alpha")
    fractions: str = knob("1/4,1/2,3/4,1", "Shares of the held-out items.", "heldout")
    margin: float = knob(
        0.01,
        "Loss allowed on each OOD task, in the metric's units (0.01 = one accuracy point).",
        "run gate",
        policy=True,
        range=finite(),
    )
    confidence: float = knob(
        0.95,
        "Confidence of the gate's one-sided bounds.",
        "run gate",
        policy=True,
        range=Range(
            lambda value: 0.5 < value < 1.0, "give a number between 0.5 and 1, such as 0.95"
        ),
    )
    champion: str = knob(
        "champion", "Alias the soup must not fall behind.", "run evaluate gate", policy=True
    )
    promote: str = knob(
        "",
        "Where to promote when the gate passes: alias:NAME, stage:NAME or model:NAME@ALIAS.",
        "run evaluate gate promote",
    )
    num_fewshot: int | None = knob(
        None,
        "Few-shot examples, where the task does not fix them.",
        f"run evaluate {_ALL}",
        policy=True,
        range=whole(0),
    )
    evaluator: str = knob(
        "prepared",
        "How the model is asked: requests batched beforehand, or as the lm_eval command does it.",
        f"run evaluate {_ALL}",
        policy=True,
        choices=EVALUATORS,
    )
    batch_size: int = knob(
        32,
        "Evaluation batch size, at most.",
        f"run evaluate {_ALL}",
        policy=True,
        range=whole(1),
    )
    max_length: int | None = knob(
        None,
        "Longest input in tokens; default: the model's own.",
        f"run evaluate {_ALL}",
        policy=True,
        range=whole(2),
    )
    limit: int | None = knob(
        None,
        "First items of each task only, for a quick try.",
        f"run evaluate {_ALL}",
        range=whole(1),
    )
    device: str = knob(
        "auto", "cpu, cuda, cuda:1 …; auto takes a GPU if there is one.", f"run evaluate {_ALL}"
    )
    parents_in: str = knob(
        "mmap",
        "Where parents stay during the search: mapped from their files, or read into memory.",
        f"run {_ALL}",
        choices=PARENTS_IN,
    )
    experiment: str = knob(
        "",
        "MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, or Default.",
        f"run evaluate {_ALL}",
    )
    store_patience: float = knob(
        30.0,
        "Minutes that MLflow's store may be away before the run gives up; it continues later.",
        f"run evaluate gate promote {_ALL}",
        range=finite("minutes"),
    )
    out: str = knob("", "Folder for table and figure, besides MLflow.", _ALL)

    def __new__(cls, **named: Any) -> Self:
        """Note which knobs the caller named: the others are the policy's to set."""
        self = super().__new__(cls)
        object.__setattr__(self, "_named", frozenset(named))
        return self

    @property
    def named(self) -> frozenset[str]:
        """The knobs that the caller named."""
        named: frozenset[str] = self._named  # type: ignore[attr-defined]
        return named

    def __post_init__(self) -> None:
        for knob_ in fields(self):
            value = getattr(self, knob_.name)
            knobs.check(knob_, value)
            if kind(knob_) is float and value is not None:  # 0 and 0.0: one request
                object.__setattr__(self, knob_.name, float(value))
        self._check_names()
        self._check_paths()

    def _check_names(self) -> None:
        """Refuse names of models, versions, targets and methods that nothing can have."""
        named = [option for option in ("pair", "versions", "last") if getattr(self, option)]
        if len(named) > 1:
            raise SpecError(
                "the versions are named twice",
                where=" and ".join(f"--{o}" for o in named) + ", here or in the file of --spec",
                fix="keep only one of these options",
            )
        check_name(self.model)
        if self.champion:
            check_alias(self.champion, "--champion, or tag soup.champion of the model")
        self.parents, self.couples, self.shares, self.ends  # noqa: B018  # raise if unreadable
        if self.version:
            parse_version(self.version)
        if self.promote:
            parse_target(self.promote)
        for name in self.compared:
            if name not in METHODS or self.compared.count(name) > 1:
                raise SpecError(
                    f"{name!r} is named twice" if name in METHODS else f"{name!r} is not a method",
                    where="--methods",
                    fix=f"name each method once, separated by commas: {','.join(METHODS)}",
                )
        for digest in self.allowed_code:
            if not re.fullmatch("[0-9a-f]{64}", digest):
                fix = "give the 64 hexadecimal digits that the refusal printed"
                raise knobs.out_of_range(self._knob("allow_task_code"), digest, fix)

    def _check_paths(self) -> None:
        """Refuse files and folders that are not there."""
        if self.calibration and not Path(self.calibration).is_file():
            raise SpecError(
                f"there is no file {self.calibration}",
                where=knobs.place(self._knob("calibration")),
                fix="name a text file; without this option the held-out items are read",
            )
        for folder in filter(None, self.include_path.split(os.pathsep)):
            if not Path(folder).is_dir():
                raise SpecError(
                    f"there is no folder {folder}",
                    where=knobs.place(self._knob("include_path")),
                    fix="name a folder that holds lm-eval task YAMLs",
                )

    def _knob(self, name: str) -> Field[Any]:
        return next(knob_ for knob_ in fields(self) if knob_.name == name)

    @property
    def parents(self) -> tuple[VersionRef, ...]:
        """The versions to merge, oldest first; empty when none were named."""
        if self.versions:
            return parse_versions(self.versions)
        return parse_pair(self.pair) if self.pair else ()

    @property
    def couples(self) -> tuple[tuple[VersionRef, ...], ...]:
        """The pairs to study."""
        return parse_pairs(self.pairs)

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods to study."""
        return tuple(part.strip() for part in self.methods.split(","))

    @property
    def allowed_code(self) -> tuple[str, ...]:
        """Digests of the task folders whose code may run."""
        return tuple(part.strip() for part in self.allow_task_code.split(",") if part.strip())

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the held-out items to study, ascending."""
        return knobs.numbers(self._knob("fractions"), self.fractions, 0.001, 1.0)

    @property
    def ends(self) -> tuple[float, ...]:
        """The lower ends α of the search spaces to study, ascending."""
        return knobs.numbers(self._knob("alphas"), self.alphas, 0.0, 0.999)

    @property
    def least(self) -> float:
        """How much the newest version weighs at least: α, or that of the uniform soup."""
        return 1.0 / max(len(self.parents), 2) if self.alpha is None else self.alpha

    @property
    def budget(self) -> int:
        """How many evaluations a search may take."""
        return 4 * len(self.parents) if self.trials is None else self.trials

    def settle(self, policy: Mapping[str, str]) -> "Spec":
        """The spec with what its caller left open taken from a registered model's policy tags.

        Args:
            policy: the model's tags; only `soup.<knob>` are read.

        Raises:
            SpecError: a policy tag cannot be read.
        """
        taken = {}
        for knob_ in fields(self):
            text = policy.get(f"soup.{knob_.name}")
            if text is not None and knob_.metadata["policy"] and knob_.name not in self.named:
                taken[knob_.name] = knobs.read(knob_, text)
        return replace(self, **taken)
