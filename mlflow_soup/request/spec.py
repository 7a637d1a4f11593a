"""Every knob a user can turn, with its default and its help: the single source.

The command line, the YAML file of `--spec`, MLproject and the policy tags of a registered model all
take their names from the fields below.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from mlflow_soup.errors import SpecError
from mlflow_soup.request import knobs, margins
from mlflow_soup.request.knobs import (
    ALL_OF,
    AT_LEAST,
    NO_LOOSER,
    SAME,
    Range,
    Written,
    finite,
    kind,
    knob,
    whole,
)
from mlflow_soup.request.names import (
    VersionRef,
    check_alias,
    check_name,
    parse_pair,
    parse_pairs,
    parse_target,
    parse_version,
    parse_versions,
    parse_workers,
)

# a test compares this with `search.belief.CHOICES`; to import that here would cost a second
ACQUISITIONS = ("landscape", "gp-hedge", "ei", "pi", "ucb")
MOST = 8  # versions: the simplex has 2ⁿ faces
LONGEST = 64  # versions of a schedule
FEW = 4  # versions whose weights are searched one by one, unless --space says so
SPACES = ("auto", "simplex", "schedule")
DECAYS = ("linear", "cosine", "minus-sqrt")  # a test compares this with `search.schedule.DECAYS`
PARENTS_IN = ("mmap", "memory", "device")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # as accelerate calls them
EVALUATORS = ("prepared", "lm-eval")
# a test compares this with `search.methods.METHODS`
METHODS = (
    *("bayesopt", "uniform", "wma", "ema", "wsm", "greedy", "fisher", "regmean"),
    *("grid", "random", "best"),
)
# methods for checkpoints of one run, which know when each was saved
WINDOWS = ("wma", "ema", "wsm")
# The paper names greedy for the studies `pairs` and `count`, but its Fig. 1 shows soups that score
# below their parents. Greedy soups never do, so these are plain averages. Averages also show which
# checkpoints are close to each other.
PILOT = "uniform"
SCHEDULED = ("bayesopt", *WINDOWS)  # methods that know schedules
EVIDENCE = ("experiment", "own", "signed")
TIES = ("add", "drop")
ESTIMATORS = ("empirical", "sampled")
STUDIES = {
    "pairs": "Which pairs gain? All pairs of the versions, as a heat map.",
    "count": "How many parents? Soups of the last 2, 3, 4 … of the versions.",
    "landscape": "Which λ? Equally spaced λ from 0 to 1, with a paired band.",
    "schedule": "Which window, which decay? Merges of windows of several lengths, as a heat map.",
    "heldout": "How many held-out items are enough? The λ that shares of the items would choose.",
    "alpha": "Which search space? Searches in [α, 1] for several α.",
    "ood": "What does a soup lose on tasks that did not choose it? Each method.",
    "methods": "Which method? Each method on all tasks, with paired intervals.",
}
_ALL = f"{' '.join(STUDIES)} track"  # commands that only measure
NAMINGS = ("pair", "versions", "last")  # ways to say which versions to merge; one at a time
# groups of options, in the order of `--help`
MERGE, SEARCH, SCORE = "Which versions", "How to search", "How to score"
GATE, MACHINE = "Gate and promotion", "Machine"
_STEPS = 10_000  # of λ from 0 to 1
_SEARCHING = "run pairs count alpha ood methods"  # commands that search by some method


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One request. Policy tags of the registered model may set the knobs that it does not name.

    Raises:
        SpecError: a value is out of its range or cannot be read.
    """

    model: str = knob(
        MERGE,
        "",
        "Registered model. Default: MLFLOW_SOUP_MODEL, or the only model that has these versions.",
        f"run watch evaluate gate sign promote {_ALL}",
    )
    pair: Written[Sequence[str | int]] = knob(
        MERGE,
        "",
        "Two versions, the older first: v12,v13 or @champion,v13.",
        "run landscape heldout alpha",
        several=",",
        parts=(int,),
    )
    versions: Written[Sequence[str | int]] = knob(
        MERGE,
        "",
        "Two or more versions, the newest last: v11,v12,v13. The simplex takes at most eight, a "
        "schedule 64.",
        "run pairs count schedule track",
        several=",",
        parts=(int,),
    )
    last: int | None = knob(
        MERGE,
        None,
        "Take the newest k versions that are not soups, instead of naming them. track scores "
        "these; without it, all.",
        "run pairs count schedule track",
        range=whole(2),
    )
    pairs: Written[Sequence[str | Sequence[str | int]]] = knob(
        MERGE,
        "",
        "One or more pairs: 'v11,v12 v12,v13'.",
        "ood methods",
        several=" ,",
        parts=(int,),
    )
    method: str = knob(
        MERGE,
        "bayesopt",
        "How one model is made of several.",
        "run pairs count",
        defaults={"pairs": PILOT, "count": PILOT},
        policy=True,
        choices=METHODS,
    )
    methods: Written[Sequence[str]] = knob(
        MERGE,
        ",".join(method for method in METHODS[:-1] if method not in WINDOWS),
        "The methods to compare, separated by commas.",
        "ood methods",
        several=",",
    )
    version: Written[int] = knob(
        MERGE,
        "",
        "The version of the soup: v14 or @alias.",
        "evaluate gate sign promote",
        parts=(int,),
    )
    alpha: float | None = knob(
        SEARCH,
        None,
        "Smallest weight λ of the newest version. Default: 0.5 for a pair, 1/n for n versions, 0 "
        "for a schedule.",
        "run pairs count ood methods",
        policy=True,
        range=Range(lambda value: 0.0 <= value < 1.0, "give a number from 0 to below 1"),
    )
    space: str = knob(
        SEARCH,
        "auto",
        "What bayesopt searches: simplex, the weight of each version; or schedule, for checkpoints "
        "of one run: how long the merged window is, and how the weights fall with age. auto: "
        "simplex for up to four versions, schedule for more.",
        "run count",
        policy=True,
        choices=SPACES,
    )
    time_tag: str = knob(
        SEARCH,
        "tokens_seen",
        "Version tag that says when a checkpoint was saved, in tokens. If no version has it, they "
        "count as equally spaced. For schedules and wma, wsm.",
        "run count ood methods schedule track",
        policy=True,
    )
    ema: float = knob(
        SEARCH,
        0.7,
        "Weight of a checkpoint relative to the next one, for the method ema.",
        "run count ood methods",
        policy=True,
        range=Range(lambda value: 0.0 < value < 1.0, "give a number between 0 and 1"),
    )
    decay: str = knob(
        SEARCH,
        "linear",
        "Decay of the learning rate that the method wsm stands for: linear, cosine, minus-sqrt, or "
        "the number p of 1 − x^p.",
        "run count ood methods track",
        policy=True,
    )
    window: int | None = knob(
        SEARCH,
        None,
        "Number of checkpoints that are merged at each place. Default: the schedule that the last "
        "search for one chose, or the last 5 if there is none, or --decay is named.",
        "track",
        policy=True,
        range=whole(2, LONGEST),
    )
    trials: int | None = knob(
        SEARCH,
        None,
        "Largest number of evaluations, including those of the parents and the uniform soup. "
        "Default: 8 for a pair, 4 more for each further version; with the acquisition landscape up "
        "to twice as many while the curve is uncertain. 10 for a schedule.",
        _SEARCHING,
        policy=True,
        range=whole(4),
    )
    stop: float = knob(
        SEARCH,
        0.02,
        "End the search when one more evaluation is expected to gain less than this share of the "
        "paired standard error. 0 uses all trials.",
        _SEARCHING,
        policy=True,
        range=finite(),
    )
    acquisition: str = knob(
        SEARCH,
        "landscape",
        "How bayesopt chooses the next λ.",
        _SEARCHING,
        policy=True,
        choices=ACQUISITIONS,
    )
    seed: int = knob(
        SEARCH,
        0,
        "Seed of all random draws.",
        f"watch heldout {_SEARCHING}",
        range=whole(0),
    )
    greedy_tie: str = knob(
        SEARCH,
        "add",
        "Whether greedy adds or drops a parent that does not change the score.",
        "run pairs count ood methods",
        policy=True,
        choices=TIES,
    )
    calibration: Written[os.PathLike[str]] = knob(
        SEARCH,
        "",
        "Text file for Fisher and RegMean: .jsonl with a field text, or plain text. "
        "Default: the held-out items.",
        "run watch pairs count ood methods",
        policy=True,
        parts=(os.PathLike,),
    )
    calibration_tokens: int = knob(
        SEARCH,
        65536,
        "Largest number of calibration tokens that are read.",
        "run pairs count ood methods",
        policy=True,
        range=whole(2),
    )
    fisher_estimator: str = knob(
        SEARCH,
        "empirical",
        "Fisher information of the text itself, or of tokens that the parent samples.",
        "run pairs count ood methods",
        policy=True,
        choices=ESTIMATORS,
    )
    regmean_scale: float = knob(
        SEARCH,
        0.9,
        "Factor on the off-diagonal elements of RegMean's Gram matrices.",
        "run pairs count ood methods",
        policy=True,
        range=Range(lambda value: 0.0 <= value <= 1.0, "give a number from 0 to 1"),
    )
    points: int = knob(
        SEARCH,
        21,
        "Number of λ from 0 to 1 that are evaluated.",
        "landscape heldout",
        range=whole(4, _STEPS + 1),
    )
    windows: Written[int | Sequence[str | int]] = knob(
        SEARCH,
        "2,3,4,5,6,8,10,12,16,24,32,48,64",
        "Numbers of checkpoints in a window; those that exceed the versions are left out.",
        "schedule",
        several=",",
        parts=(int,),
    )
    powers: Written[float | Sequence[str | float]] = knob(
        SEARCH,
        "1/2,1,2,4",
        "Powers p of the decay 1 − x^p: 1/2 is minus-sqrt, 1 the plain average, 2 wma.",
        "schedule",
        several=",",
        parts=(int, float),
    )
    alphas: Written[float | Sequence[str | float]] = knob(
        SEARCH,
        "0,0.5,0.7,0.9",
        "Lower ends α of the search spaces.",
        "alpha",
        several=",",
        parts=(int, float),
    )
    fractions: Written[float | Sequence[str | float]] = knob(
        SEARCH,
        "1/4,1/2,3/4,1",
        "Shares of the held-out items.",
        "heldout",
        several=",",
        parts=(int, float),
    )
    tasks: Written[Sequence[str]] = knob(
        SCORE,
        "",
        "Held-out lm-eval tasks, separated by commas, each task[:metric[,filter]]. A task may be a "
        "pattern of names, or the path of a YAML file.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        several=",",
    )
    ood_tasks: Written[Sequence[str]] = knob(
        SCORE,
        "",
        "Out-of-domain lm-eval tasks for the gate, in the form of --tasks.",
        "run evaluate gate sign promote heldout ood methods",
        policy=True,
        rule=ALL_OF,
        several=",",
    )
    test_tasks: Written[Sequence[str]] = knob(
        SCORE,
        "",
        "Tasks in the form of --tasks that neither the search nor the gate reads. They are scored "
        "once in the end, for the unbiased gain.",
        "run methods",
        policy=True,
        several=",",
    )
    include_path: Written[os.PathLike[str] | Sequence[str | os.PathLike[str]]] = knob(
        SCORE,
        "",
        "Folder with your own lm-eval task YAMLs; several are separated as in PATH. Those of the "
        "model's tag come in addition.",
        f"run watch evaluate gate sign promote {_ALL}",
        policy=True,
        several=os.pathsep,
        parts=(os.PathLike,),
    )
    allow_task_code: Written[Sequence[str]] = knob(
        SCORE,
        "",
        "SHA-256 of the task folders whose Python code may run, separated by commas. A refusal "
        "prints the digest.",
        f"run watch evaluate gate sign promote {_ALL}",
        several=",",
    )
    num_fewshot: int | None = knob(
        SCORE,
        None,
        "Number of few-shot examples, where the task does not fix it.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        range=whole(0),
        rule=SAME,
    )
    apply_chat_template: bool = knob(
        SCORE,
        False,
        "Write each prompt as a conversation, by the chat template of the tokenizer.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        rule=SAME,
    )
    fewshot_as_multiturn: bool | None = knob(
        SCORE,
        None,
        "With a chat template: make each few-shot example two turns, or put all into one. "
        "Default: yes.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        rule=SAME,
    )
    system_instruction: str = knob(
        SCORE,
        "",
        "Text before each prompt; with a chat template, the turn of the system.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        rule=SAME,
    )
    gen_kwargs: str = knob(
        SCORE,
        "",
        "Settings of generation that replace those of the tasks: temperature=0.7,top_p=0.9, "
        "or JSON.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        rule=SAME,
    )
    cluster: str = knob(
        SCORE,
        "",
        "Field of the documents; items with the same value in it go together, such as questions of "
        "one topic. Questions on one passage are found without it.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        rule=SAME,
    )
    evaluator: str = knob(
        SCORE,
        "prepared",
        "prepared batches the requests once for all λ; lm-eval batches as the lm_eval command.",
        f"run evaluate {_ALL}",
        policy=True,
        choices=EVALUATORS,
    )
    batch_size: int = knob(
        SCORE,
        32,
        "Largest evaluation batch size.",
        f"run evaluate {_ALL}",
        policy=True,
        range=whole(1),
    )
    max_length: int | None = knob(
        SCORE,
        None,
        "Longest input in tokens. Default: that of the model.",
        f"run evaluate gate sign promote {_ALL}",
        policy=True,
        range=whole(2),
        rule=SAME,
    )
    limit: int | None = knob(
        SCORE,
        None,
        "Use only the first items of each task, for a quick try. Such a run cannot promote.",
        f"run watch evaluate {_ALL}",
        range=whole(1),
    )
    margin: Written[float] = knob(
        GATE,
        margins.DEFAULT,
        "Allowed loss on the OOD tasks, in units of their metric (0.01 = one accuracy point), or "
        "as a share of the rival's score (2%). Tasks and metrics may have their own: 0.01,piqa=0. "
        "A task that is named must hold alone (piqa=alone), the others together. "
        f"Perplexities have {margins.WITHOUT_SCALE} unless they are named.",
        "run gate sign promote",
        policy=True,
        parts=(int, float),
        rule=NO_LOOSER,
    )
    confidence: float = knob(
        GATE,
        0.95,
        "Confidence of the lower bounds that a soup must show.",
        "run gate sign promote",
        policy=True,
        range=Range(
            lambda value: 0.5 < value < 1.0, "give a number between 0.5 and 1, such as 0.95"
        ),
        rule=AT_LEAST,
    )
    min_items: int = knob(
        GATE,
        1,
        "Smallest number of items of each OOD task.",
        "run gate sign promote",
        policy=True,
        range=whole(1),
        rule=AT_LEAST,
    )
    power: bool = knob(
        GATE,
        False,
        "Judge nothing: say how likely the gate passes a soup as good as its rivals, by the number "
        "of items and the margin.",
        "gate",
    )
    champion: str = knob(
        GATE,
        "champion",
        "Alias of the version that the soup must not be worse than.",
        "run evaluate gate sign promote",
        policy=True,
        rule=SAME,
    )
    evidence: str = knob(
        GATE,
        "experiment",
        "Which stored scores count: those of the runs in --experiment, none (own: all is measured "
        "anew), or only those that a --public-key signed.",
        "run watch evaluate gate sign promote",
        choices=EVIDENCE,
    )
    public_key: Written[os.PathLike[str] | Sequence[str | os.PathLike[str]]] = knob(
        GATE,
        "",
        "PEM files with the public keys that count, separated by commas.",
        "run watch evaluate gate sign promote",
        several=",",
        parts=(os.PathLike,),
    )
    promote: str = knob(
        GATE,
        "",
        "Target of the promotion: alias:NAME, stage:NAME or model:NAME@ALIAS. Only run and promote "
        "move it, if the gate passes; elsewhere it says whose rules hold. Default: nowhere.",
        "run evaluate gate sign promote",
    )
    register_copies: bool = knob(
        GATE,
        False,
        "Also register a soup that has the same weights as one of its parents.",
        "run",
        policy=True,
    )
    device: str = knob(
        MACHINE,
        "auto",
        "cpu, cuda, cuda:1 … auto uses a GPU if there is one.",
        f"run watch evaluate {_ALL}",
    )
    device_map: Written[os.PathLike[str]] = knob(
        MACHINE,
        "",
        "For models larger than one GPU, in place of --device: auto, balanced, balanced_low_0 or "
        "sequential, as accelerate spreads layers; or a JSON file, module: device. The GPUs work "
        "one after the other, so k of them give no more speed than one.",
        f"run watch evaluate {_ALL}",
        parts=(os.PathLike,),
    )
    parents_in: str = knob(
        MACHINE,
        "mmap",
        "Where the parents lie during the search: mmap, in their files; memory; device, beside the "
        "model on its GPU, which needs memory for all of them and then switches λ in its own "
        "memory.",
        f"run watch {_ALL}",
        choices=PARENTS_IN,
    )
    workers: Written[int] = knob(
        MACHINE,
        "",
        "Score with N processes of this machine, at most one per GPU, or per CPU without GPUs; or "
        "ray, ray:N, with N workers of a Ray cluster. Default: this process.",
        f"run watch evaluate {_ALL}",
        parts=(int,),
    )
    worker_patience: float = knob(
        MACHINE,
        60.0,
        "Minutes to wait for the answer of a worker. Then it is ended, and another takes over.",
        f"run watch evaluate {_ALL}",
        range=Range(lambda value: 0.0 < value < float("inf"), "give minutes, more than 0"),
    )
    experiment: str = knob(
        MACHINE,
        "",
        "MLflow experiment. Default: MLFLOW_EXPERIMENT_NAME, or the experiment Default.",
        f"run watch evaluate gate sign promote {_ALL}",
    )
    store_patience: float = knob(
        MACHINE,
        30.0,
        "Minutes to wait for an MLflow store that does not answer. Then the command ends with exit "
        "code 6; run it again to continue.",
        f"run watch evaluate gate sign promote {_ALL}",
        range=finite("minutes"),
    )
    out: Written[os.PathLike[str]] = knob(
        MACHINE,
        "",
        "Folder for copies of the table and the figure.",
        f"watch {_ALL}",
        parts=(os.PathLike,),
    )

    def __new__(cls, **named: Any) -> Self:
        """Remember which knobs the caller named: policy tags may set the others."""
        self = super().__new__(cls)
        object.__setattr__(self, "_named", frozenset(named))
        return self

    @property
    def named(self) -> frozenset[str]:
        """The knobs that the caller named."""
        named: frozenset[str] = self._named  # type: ignore[attr-defined]
        return named

    @property
    def stated(self) -> frozenset[str]:
        """The knobs that the caller named, or that a policy tag set."""
        return getattr(self, "_stated", self.named)

    def __post_init__(self) -> None:
        for knob_ in fields(self):
            value = knobs.as_written(knob_, getattr(self, knob_.name))
            knobs.check(knob_, value)
            if kind(knob_) is float and value is not None:  # 0 and 0.0: one request
                value = float(value)
            object.__setattr__(self, knob_.name, value)
        object.__setattr__(self, "margin", self._margin())
        self._check_names()
        self._check_decay()
        self._check_paths()

    def _margin(self) -> str:
        """The margins in their one way of writing: 0 and 0.0 are one request."""
        try:
            return str(margins.parse_margins(self.margin))
        except ValueError as error:
            raise SpecError(
                f"--margin {self.margin} cannot be read: {error}",
                where=knobs.place(self._knob("margin")),
                fix="give numbers from 0, or shares such as 2%, for all tasks, or for tasks and "
                "metrics by their names: 0.01,acc=0.005,perplexity=2%",
            ) from error

    def _check_names(self) -> None:
        """Refuse names of models, versions, targets and methods that nothing can have."""
        named = [option for option in NAMINGS if getattr(self, option)]
        if len(named) > 1:
            options = " and ".join(f"--{o}" for o in named)
            raise SpecError(
                f"{len(named)} options say which versions to merge",
                where=f"{options}, on the command line or in the file of --spec",
                fix="keep only one of these options",
            )
        check_name(self.model)
        if self.champion:
            check_alias(self.champion, "--champion, or tag soup.champion of the model")
        # these raise if they cannot be read
        self.parents, self.couples, self.shares, self.ends, self.lengths, self.exponents  # noqa: B018
        parse_workers(self.workers)
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

    def _check_decay(self) -> None:
        """Refuse a decay that is neither named nor a number."""
        try:
            known = self.decay in DECAYS or 0.0 < float(self.decay) < float("inf")
        except ValueError:
            known = False
        if not known:
            fix = f"name one of {', '.join(DECAYS)}, or give the number p > 0 of 1 − x^p"
            raise knobs.out_of_range(self._knob("decay"), self.decay, fix)

    def check_space(self, asked: str) -> None:
        """Refuse a schedule that a user asked for, if the method does not know any.

        A policy's holds for the methods that do.

        Args:
            asked: the value of `space` that the user named; empty if none.

        Raises:
            SpecError: the method does not know schedules.
        """
        if asked == "schedule" and self.method not in SCHEDULED:
            raise SpecError(
                f"the method {self.method} does not know schedules",
                where=f"--space schedule with --method {self.method}",
                fix=f"leave --space out, or choose one of {', '.join(SCHEDULED)}",
            )

    def _check_paths(self) -> None:
        """Refuse files and folders that are not there."""
        if self.calibration and not Path(self.calibration).is_file():
            raise SpecError(
                f"there is no file {self.calibration}",
                where=knobs.place(self._knob("calibration")),
                fix="name a text file; without this option the held-out items are read",
            )
        for file in self.public_keys:
            if not file.is_file():
                raise SpecError(
                    f"there is no file {file}",
                    where="--public-key",
                    fix="name a PEM file with a public key",
                )
        if self.device_map and self.device != "auto":
            raise SpecError(
                "--device and --device-map both say where the model lies",
                where=f"--device {self.device} with --device-map {self.device_map}",
                fix="keep only one of these options",
            )
        if self.device_map and parse_workers(self.workers) is not None:
            raise SpecError(
                "a model that a device map spreads takes no workers",
                where=f"--device-map {self.device_map} with --workers {self.workers}",
                fix="keep one of the two: each worker holds the whole model on its own GPU",
            )
        if self.device_map not in ("", *DEVICE_MAPS) and not Path(self.device_map).is_file():
            raise SpecError(
                f"there is no file {self.device_map}",
                where=knobs.place(self._knob("device_map")),
                fix=f"name one of {', '.join(DEVICE_MAPS)}, or a JSON file that gives a device to "
                "each module",
            )
        if self.evidence == "signed" and not self.public_key:
            raise SpecError(
                "no public key was named",
                where="--evidence signed",
                fix="name the keys whose signatures count: --public-key gate.pub.pem",
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
    def public_keys(self) -> tuple[Path, ...]:
        """The files with the public keys whose signatures count."""
        return tuple(Path(part.strip()) for part in self.public_key.split(",") if part.strip())

    @property
    def believed(self) -> str:
        """Which stored scores count, one of `EVIDENCE`: with a public key, the signed ones."""
        return "signed" if self.public_key and self.evidence == "experiment" else self.evidence

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the held-out items to study, ascending."""
        return knobs.numbers(self._knob("fractions"), self.fractions, 0.001, 1.0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of checkpoints in a window to study, ascending."""
        found = knobs.numbers(self._knob("windows"), self.windows, 2.0, LONGEST)
        if not all(number.is_integer() for number in found):
            fix = f"give whole numbers from 2 to {LONGEST}, separated by commas: 2,4,8"
            raise knobs.out_of_range(self._knob("windows"), self.windows, fix)
        return tuple(map(int, found))

    @property
    def exponents(self) -> tuple[float, ...]:
        """The powers p of the decay to study, ascending."""
        return knobs.numbers(self._knob("powers"), self.powers, 0.1, 16.0)

    @property
    def ends(self) -> tuple[float, ...]:
        """The lower ends α of the search spaces to study, ascending."""
        return knobs.numbers(self._knob("alphas"), self.alphas, 0.0, 0.999)

    @property
    def least(self) -> float:
        """The smallest weight of the newest version: α, or its weight in the uniform soup.

        A schedule has no such limit of its own.
        """
        if self.alpha is not None:
            return self.alpha
        return 0.0 if self.scheduled else 1.0 / max(len(self.parents), 2)

    @property
    def scheduled(self) -> bool:
        """Whether the versions are merged by a schedule, with the newest as the only reference."""
        wanted = len(self.parents) > FEW if self.space == "auto" else self.space == "schedule"
        return wanted and self.method in SCHEDULED

    @property
    def budget(self) -> int:
        """The largest number of evaluations of a search."""
        if self.trials is not None:
            return self.trials
        return 10 if self.scheduled else 4 * len(self.parents)

    @property
    def reserve(self) -> int:
        """The largest number of evaluations after the budget, while the curve is uncertain.

        A number of trials that the user or the policy set is a limit, and so is that of a schedule.
        """
        return self.budget if self.trials is None and not self.scheduled else 0

    def with_defaults_of(self, command: str) -> "Spec":
        """The spec, with a command's own defaults of knobs that the caller did not name."""
        every = {knob_.name: knob_.metadata["defaults"] for knob_ in fields(self)}
        own = {name: its[command] for name, its in every.items() if command in its}
        named = {name: getattr(self, name) for name in self.named}
        return Spec(**(own | named)) if own else self

    def settle(self, policy: Mapping[str, str], owner: str = "") -> "Spec":
        """The spec, with the knobs that the caller did not name set by policy tags.

        Args:
            policy: the tags that hold for the request; only `soup.<knob>` are read.
            owner: the registered model whose tags state the rules of the gate: the caller may not
                name looser ones. Empty for a request that the gate does not judge.

        Raises:
            SpecError: a policy tag cannot be read, or the caller named a looser rule.
        """
        taken = {}
        # a search without OOD tasks asks for no verdict, so it may leave the rules aside
        aside = "ood_tasks" in self.named and not (self.ood_tasks or self.version or self.promote)
        for knob_ in fields(self):
            text = policy.get(f"soup.{knob_.name}")
            if text is None or not knob_.metadata["policy"]:
                continue
            if knob_.name not in self.named:
                taken[knob_.name] = knobs.read(knob_, text)
            elif knob_.name == "include_path" and self.include_path:
                # the policy's last: of two tasks with one name, the last counts
                policys = text.strip().split(os.pathsep)
                ours = [f for f in self.include_path.split(os.pathsep) if f not in policys]
                taken[knob_.name] = os.pathsep.join([*ours, *policys])
            elif owner and knob_.metadata["rule"] is not None and not aside:
                stated = replace(self, **{knob_.name: knobs.read(knob_, text)})
                value = getattr(stated, knob_.name)
                knobs.check_rule(knob_, getattr(self, knob_.name), value, owner)
        settled = replace(self, **taken)
        object.__setattr__(settled, "_stated", self.stated | taken.keys())
        return settled

    def words_of(self, command: str, *others: str) -> str:
        """The options of another command that repeat what the caller named, for a shell.

        Args:
            command: the other command; knobs that it does not take are left out.
            others: knobs that are left out, too.
        """
        words = [
            f"{knobs.option(knob_)} {shlex.quote(str(value))}"
            for knob_ in fields(self)
            if knob_.name in self.named and knob_.name not in others
            if command in knob_.metadata["commands"]
            if (value := getattr(self, knob_.name)) not in ("", None)
        ]
        return " ".join(words)

    def judge_alone(self, tasks: Iterable[str]) -> "Spec":
        """The spec, by whose margins the gate judges each of these OOD tasks alone."""
        apart = margins.parse_margins(self.margin).alone(tasks)
        settled = replace(self, margin=str(apart))
        object.__setattr__(settled, "_stated", self.stated)
        return settled


def policy_for(candidates: Mapping[str, str], target: Mapping[str, str]) -> dict[str, str]:
    """The tags that hold for a promotion to an alias of another registered model.

    That model alone states the rules of the gate, and how it scores: whoever writes to the
    candidates must not choose easier items, or cut them short. The candidates' model states the
    rest.

    Args:
        candidates: the tags of the soup's model.
        target: the tags of the model that owns the alias.
    """
    its = {
        f"soup.{knob_.name}"
        for knob_ in fields(Spec)
        if knob_.metadata["rule"] is not None or knob_.metadata["group"] == SCORE
    }
    rest = {name: text for name, text in candidates.items() if name not in its}
    return rest | {name: text for name, text in target.items() if name in its}


def unread(tags: Iterable[str], ours: Collection[str]) -> Iterator[str]:
    """Which tags of a registered model look like policy tags and set nothing, in words.

    Args:
        tags: the names of the tags.
        ours: the names that mlflow-soup writes itself.
    """
    known = {knob_.name: knob_ for knob_ in fields(Spec)}
    for tag in sorted(set(tags) - set(ours)):
        if (match := re.fullmatch(r"soups?[^a-z0-9]+(.*)", tag, re.I | re.S)) is None:
            continue
        name = re.sub(r"[^a-z0-9]+", "_", match[1].lower())
        near = next(iter(get_close_matches(name, known, n=1)), "")
        if not near:
            yield f"tag {tag} sets nothing: no knob has this name"
        elif not known[near].metadata["policy"]:
            yield f"tag {tag} sets nothing: no tag can set {knobs.option(known[near])}"
        elif tag != f"soup.{near}":
            yield f"tag {tag} sets nothing; did you mean soup.{near}?"
