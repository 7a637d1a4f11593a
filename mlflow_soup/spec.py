"""Every knob a user can turn, with its default and its help: the single source.

The command line, the YAML file of `--spec`, MLproject and the policy tags of a registered model all
take their names from the fields below.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, get_args

from mlflow_soup.errors import SpecError

_VERSION = re.compile(r"v?(?P<number>[1-9][0-9]*)|@(?P<alias>[A-Za-z0-9_-]{1,255})")
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?=v?[0-9])|(?=@))(?P<version>[^/]+)")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,127}")
_PROMOTE = re.compile(
    r"(?:(?P<kind>alias|stage):)?(?P<name>[A-Za-z0-9_-]+)"
    r"|model:(?P<model>[A-Za-z0-9][A-Za-z0-9_. -]{0,127})@(?P<alias>[A-Za-z0-9_-]+)"
)
STAGES = ("Staging", "Production")  # Archived is where the others go
# in step with `search.CHOICES`, which a test compares; importing it here would cost a second
ACQUISITIONS = ("landscape", "gp-hedge", "ei", "pi", "ucb")
MOST = 8  # versions: the simplex has 2ⁿ faces
PARENTS_IN = ("mmap", "memory")
EVALUATORS = ("prepared", "lm-eval")


def knob(
    default: Any, help: str, commands: str, *, policy: bool = False, choices: tuple[str, ...] = ()
) -> Any:
    """A field that is an option of the named commands and, perhaps, a policy tag of the model."""
    metadata = {
        "help": help,
        "commands": frozenset(commands.split()),
        "policy": policy,
        "choices": choices,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class VersionRef:
    """A version as the user names it: a number or an alias."""

    number: int | None
    alias: str | None

    def __str__(self) -> str:
        return f"@{self.alias}" if self.alias else f"v{self.number}"


def parse_version(text: str, where: str = "--version") -> VersionRef:
    """`v12`, `12` or `@champion`; `where` says for errors which option it came from.

    Raises:
        SpecError: it is none of them.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text.strip()!r} names no version",
            where=where,
            fix="write a version as v12, 12 or @alias",
        )
    number = match["number"]
    return VersionRef(int(number) if number else None, match["alias"])


def parse_uri(text: str, where: str = "argument URI") -> tuple[str, VersionRef]:
    """Model and version of `models:/my-llm/14`, `models:/my-llm/v14` or `models:/my-llm@champion`.

    Raises:
        SpecError: it is none of them; a logged model and a stage are not.
    """
    text = text.strip()
    match = _URI.fullmatch(text)
    if match is None:
        fix = "write models:/my-llm/14 or models:/my-llm@champion"
        if re.fullmatch(r"models:/m-[0-9a-f]+", text):
            fix = f"it is a logged model: register it, then {fix}"
        elif re.fullmatch(r"(?i)models:/[^/]+/(none|staging|production|archived|latest)", text):
            fix = f"stages and latest move from version to version: {fix}"
        raise SpecError(f"{text!r} names no registered version", where=where, fix=fix)
    check_name(match["name"], where)
    return match["name"], parse_version(match["version"], where)


def parse_pair(text: str) -> tuple[VersionRef, ...]:
    """`older,newer`, two different versions.

    Raises:
        SpecError: there are not two, or they are the same.
    """
    refs = _parse_refs(text, "--pair")
    if len(refs) != 2:
        raise SpecError(
            f"a pair is two versions, and {text!r} names {len(refs)}",
            where="--pair",
            fix="name the older, then the newer: --pair v12,v13; more than two: --versions",
        )
    return refs


def parse_versions(text: str) -> tuple[VersionRef, ...]:
    """`v11,v12,v13`: two to `MOST` different versions, the newest last.

    Raises:
        SpecError: there are fewer or more, or one is named twice.
    """
    refs = _parse_refs(text, "--versions")
    if len(refs) < 2:
        raise SpecError(
            f"a soup needs two versions at least, and {text!r} names {len(refs)}",
            where="--versions",
            fix="name them by age, the newest last: --versions v11,v12,v13",
        )
    if len(refs) > MOST:
        raise SpecError(
            f"{len(refs)} versions are too many to be weighed against each other",
            where="--versions",
            fix=f"name at most {MOST}: checkpoints far apart do not merge well",
        )
    return refs


def _parse_refs(text: str, where: str) -> tuple[VersionRef, ...]:
    refs = tuple(parse_version(part, where) for part in text.split(",") if part.strip())
    twice = next((ref for ref in refs if refs.count(ref) > 1), None)
    if twice is not None:
        raise SpecError(
            f"{twice} is named twice", where=where, fix="name each version once: v12,v13"
        )
    return refs


@dataclass(frozen=True)
class Target:
    """Where a promotion points: an alias, a stage, or an alias of another registered model."""

    kind: str  # alias, stage or model
    name: str  # of the alias or stage
    model: str = ""  # kind `model` only

    def __str__(self) -> str:
        return f"{self.model}@{self.name}" if self.model else f"{self.kind} {self.name}"


def parse_target(text: str) -> Target:
    """`alias:champion` (or just `champion`), `stage:Production`, `model:prod-llm@champion`.

    Raises:
        SpecError: it is none of them, the stage is not one of MLflow's, or the alias is reserved.
    """
    match = _PROMOTE.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text!r} is nowhere a version can be promoted to",
            where="--promote",
            fix="write alias:champion, stage:Production or model:prod-llm@champion",
        )
    if match["kind"] != "stage":
        _check_alias(match["alias"] or match["name"], "--promote")
    if match["model"]:
        return Target("model", match["alias"], match["model"])
    if match["kind"] == "stage":
        stage = match["name"].capitalize()
        if stage not in STAGES:
            raise SpecError(
                f"{match['name']!r} is no stage to promote to",
                where="--promote",
                fix=f"one of {', '.join(STAGES)}; or an alias: alias:champion",
            )
        return Target("stage", stage)
    return Target("alias", match["name"])


def _check_alias(alias: str, where: str) -> None:
    """Refuse what MLflow does not take as an alias."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise SpecError(
            f"{alias!r} cannot be an alias",
            where=where,
            fix="letters, digits, _ and -, up to 255; MLflow reserves latest and v1, v2, …",
        )


def check_name(model: str, where: str = "--model, or MLFLOW_SOUP_MODEL") -> None:
    """Refuse names of registered models that cannot be put into MLflow's search filters."""
    if model and not _MODEL.fullmatch(model):
        raise SpecError(
            f"{model!r} is not taken as the name of a registered model",
            where=where,
            fix="letters, digits, spaces and _.- only, a letter or digit first",
        )


def _refuse(name: str, value: object, rule: str) -> SpecError:
    option = "--" + name.replace("_", "-")
    return SpecError(
        f"{option} {value} is out of range",
        where=f"{option}, or tag soup.{name} of the model",
        fix=rule,
    )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One request. What the caller does not name may come from the model's policy tags.

    Raises:
        SpecError: a value is out of its range or cannot be read.
    """

    model: str = knob(
        "",
        "Registered model; default: MLFLOW_SOUP_MODEL, or the only model with these versions.",
        "run evaluate gate promote",
    )
    pair: str = knob("", "Two versions, older first: v12,v13 or @champion,v13.", "run")
    versions: str = knob("", "Two to eight versions, the newest last: v11,v12,v13.", "run")
    version: str = knob("", "The soup: v14 or @alias.", "evaluate gate promote")
    tasks: str = knob(
        "",
        "Held-out lm-eval tasks, comma-separated, each task[:metric[,filter]].",
        "run evaluate",
        policy=True,
    )
    ood_tasks: str = knob(
        "", "Out-of-domain lm-eval tasks for the gate, as --tasks.", "run evaluate", policy=True
    )
    include_path: str = knob(
        "", "Folder with lm-eval task YAMLs of your own.", "run evaluate", policy=True
    )
    alpha: float | None = knob(
        None,
        "Smallest weight λ of the newest version; default: 0.5 for a pair, 1/n for n versions.",
        "run",
        policy=True,
    )
    trials: int | None = knob(
        None,
        "Evaluations at most, parents and uniform soup included; default: 8 for a pair, 4 more for "
        "each further version.",
        "run",
        policy=True,
    )
    stop: float = knob(
        0.02,
        "End when one more evaluation is expected to gain less than this share of the paired "
        "standard error; 0: never early.",
        "run",
        policy=True,
    )
    acquisition: str = knob(
        "landscape", "How the next λ is chosen.", "run", policy=True, choices=ACQUISITIONS
    )
    seed: int = knob(0, "Seed of the search.", "run")
    margin: float = knob(
        0.01,
        "Loss allowed on each OOD task, in the metric's units (0.01 = one accuracy point).",
        "run gate",
        policy=True,
    )
    confidence: float = knob(
        0.95, "Confidence of the gate's one-sided bounds.", "run gate", policy=True
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
        None, "Few-shot examples, where the task does not fix them.", "run evaluate", policy=True
    )
    evaluator: str = knob(
        "prepared",
        "How the model is asked: requests batched beforehand, or as the lm_eval command does it.",
        "run evaluate",
        policy=True,
        choices=EVALUATORS,
    )
    batch_size: int = knob(32, "Evaluation batch size, at most.", "run evaluate", policy=True)
    max_length: int | None = knob(
        None, "Longest input in tokens; default: the model's own.", "run evaluate", policy=True
    )
    limit: int | None = knob(
        None, "First items of each task only, for a quick try.", "run evaluate"
    )
    device: str = knob(
        "auto", "cpu, cuda, cuda:1 …; auto takes a GPU if there is one.", "run evaluate"
    )
    parents_in: str = knob(
        "mmap",
        "Where parents stay during the search: mapped from their files, or read into memory.",
        "run",
        choices=PARENTS_IN,
    )
    experiment: str = knob(
        "", "MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, or Default.", "run evaluate"
    )

    def __new__(cls, **named: Any) -> Self:
        """Note which knobs the caller named: the others are the policy's to set."""
        self = super().__new__(cls)
        object.__setattr__(self, "named", frozenset(named))
        return self

    def __post_init__(self) -> None:
        if self.alpha is not None:
            object.__setattr__(self, "alpha", float(self.alpha))
        for name in ("stop", "margin", "confidence"):  # 0 and 0.0 are one request
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.champion:
            _check_alias(self.champion, "--champion, or tag soup.champion of the model")
        if self.pair and self.versions:
            raise SpecError(
                "a pair and several versions were named",
                where="--pair and --versions, here or in the file of --spec",
                fix="drop one of them",
            )
        least = max(len(self.parents), 2) + 2
        if self.trials is not None and self.trials < least:
            rule = f"at least {least}: {least - 2} parents, uniform soup, one more"
            raise _refuse("trials", self.trials, rule)
        if self.version:
            parse_version(self.version)
        if self.promote:
            parse_target(self.promote)
        check_name(self.model)
        if self.alpha is not None and not 0.0 <= self.alpha < 1.0:
            raise _refuse("alpha", self.alpha, "a number from 0 up to, not including, 1")
        if not 0.0 <= self.stop < float("inf"):
            raise _refuse("stop", self.stop, "a finite number from 0")
        if self.acquisition not in ACQUISITIONS:
            raise _refuse("acquisition", self.acquisition, f"one of {', '.join(ACQUISITIONS)}")
        if self.evaluator not in EVALUATORS:
            raise _refuse("evaluator", self.evaluator, f"one of {', '.join(EVALUATORS)}")
        if self.parents_in not in PARENTS_IN:
            raise _refuse("parents_in", self.parents_in, f"one of {', '.join(PARENTS_IN)}")
        if not 0.0 <= self.margin < float("inf"):
            raise _refuse("margin", self.margin, "a finite number from 0")
        if not 0.5 < self.confidence < 1.0:
            raise _refuse("confidence", self.confidence, "a number between 0.5 and 1, say 0.95")
        if self.seed < 0:
            raise _refuse("seed", self.seed, "a whole number from 0")
        for name, least in (("batch_size", 1), ("limit", 1), ("max_length", 2), ("num_fewshot", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _refuse(name, value, f"a whole number from {least}")
        for folder in filter(None, self.include_path.split(os.pathsep)):
            if not Path(folder).is_dir():
                raise SpecError(
                    f"there is no folder {folder}",
                    where="--include-path, or tag soup.include_path of the model",
                    fix="name a folder with lm-eval task YAMLs",
                )

    @property
    def parents(self) -> tuple[VersionRef, ...]:
        """The versions to merge, oldest first; empty when none were named."""
        if self.versions:
            return parse_versions(self.versions)
        return parse_pair(self.pair) if self.pair else ()

    @property
    def least(self) -> float:
        """How much the newest version weighs at least: α, or that of the uniform soup."""
        return 1.0 / max(len(self.parents), 2) if self.alpha is None else self.alpha

    @property
    def budget(self) -> int:
        """How many evaluations the search may take."""
        return 4 * len(self.parents) if self.trials is None else self.trials

    def settle(self, policy: Mapping[str, str]) -> "Spec":
        """The spec with what its caller left open taken from a registered model's policy tags.

        Args:
            policy: the model's tags; only `soup.<knob>` are read.

        Raises:
            SpecError: a policy tag cannot be read.
        """
        named: frozenset[str] = self.named  # type: ignore[attr-defined]
        taken = {}
        for knob_ in fields(self):
            text = policy.get(f"soup.{knob_.name}")
            if text is not None and knob_.metadata["policy"] and knob_.name not in named:
                taken[knob_.name] = _read(knob_, text)
        return replace(self, **taken)


def kind(knob_: Field[Any]) -> type:
    """The type a knob's text is read as: str, int or float."""
    named = get_args(knob_.type) or (knob_.type,)  # `int | None` is read as an int
    assert isinstance(named[0], type)
    return named[0]


def _read(knob_: Field[Any], text: str) -> Any:
    try:
        return kind(knob_)(text.strip())
    except ValueError as error:
        raise SpecError(
            f"policy tag soup.{knob_.name} = {text!r} is no {kind(knob_).__name__}",
            where="tags of the registered model",
            fix=f"set a {kind(knob_).__name__}, or pass --{knob_.name.replace('_', '-')}",
        ) from error
