"""Every name that we write in MLflow (tags, params, metrics, artifacts), and the format of values.

A pipeline may read any of these names, so renaming one is a breaking change.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from mlflow_soup.records import Recipe, Version

# tags of model versions
PARENTS = "soup.parents"  # "12,13" (same model) or "a/12,b/3", oldest first; %2C is a comma
LAMBDA = "soup.lambda"  # weight of the newest parent, as a decimal
WEIGHTS = "soup.weights"  # "0.3,0.7": the weight of each parent, oldest first
METHOD = "soup.method"  # the method that found the soup: bayesopt, greedy, …; also on search runs
KEY = "soup.key"  # digest of parents, method and settings; also on search and trial runs
REQUEST = "soup.request"  # digest of that and of the search's end: one request, one version
DIGEST = "soup.digest"  # canonical digest of the soup's tensors
GATE = "soup.gate"  # passed or refused; also on search runs
GATE_RUN = "soup.gate_run_id"  # the OOD run whose evidence the gate read
PROMOTED_TO = "soup.promoted_to"  # "alias champion": the last target
PROMOTIONS = "soup.promotions"  # "alias champion 2026-…; stage Production 2026-…": all, and when
# tags of runs
GATE_RULES = "soup.gate_rules"  # JSON: margin, confidence, OOD tasks, items; on search and OOD runs
ROLE = "soup.role"  # search, trial, ood, test, study, track, look or ledger
NUMBER = "soup.number"  # the trial's number, from 0
FAILED = "soup.failed"  # the reason why a trial has no score
CHOSEN = "soup.chosen"  # yes on the trial whose recipe the search chose
MEASURED = "soup.measured"  # digest of a trial's weights and evaluation; finds its score again
ITEMS_RUN = "soup.items_run"  # the trial whose score this one reuses
EVALUATOR = "soup.evaluator"  # fingerprint of an evaluator's requests and settings
POINT_OF = "soup.point_of"  # raw or merged: the curve of a track run that a child is a point of
TIME_TAG = "soup.time_tag"  # the version tag with the times that a search for a schedule used
ORIGINAL = "soup.original"  # "my-llm/13": the parent whose weights the chosen soup has
VERSION = "soup.version"  # "my-llm/14": what a search made, or an OOD or test run scored
CONDITIONS = "soup.conditions"  # digest of all that OOD evidence depends on except the weights
MODEL = "soup.model"  # the registered model of a search, a study or an upload
STUDY = "soup.study"  # the study run that a search belongs to
ATTEMPT = "soup.attempt"  # names one attempt to create something; it finds what a lost answer made
NOTE = "soup.note"  # digest of our description; the words of others are kept
ORPHANED_BY = "soup.orphaned_by"  # the run that continues this one, which was cut short
# tag of registered models; the policy has one for each knob besides
ON_VERSION = "soup.on_version"  # what `watch` does when a checkpoint arrives: "run --last 2"
# tag of the experiment of a registered model's ledger: the ledger's run
LEDGER = "soup.ledger"
# metrics of search runs
SEARCH_OBJECTIVE = "search/objective"  # the score of each trial, by step
SEARCH_LAMBDA = "search/lambda"  # the newest parent's weight, by step; in the end, the chosen one
SEARCH_BEST = "search/best"  # the best score so far, by step; in the end, that of the chosen λ
GAIN = "search/gain"  # the soup's held-out score minus that of its better parent
GAIN_STDERR = "search/gain_stderr"  # the paired standard error of the gain
GAIN_LOW = "search/gain_low"  # the lower end of its 95 % interval, on the points of a track run
GAIN_HIGH = "search/gain_high"  # the upper end
TEST_OBJECTIVE = "test/objective"  # the score on the test set, the mean over tasks
TEST_GAIN = "test/gain"  # the soup's score on the test set minus that of its better parent
TEST_GAIN_STDERR = "test/gain_stderr"  # the paired standard error of that gain
CHOSEN_LAMBDA = "search/chosen_lambda"  # the newest parent's weight in the soup
DURATION = "search/duration"  # of the chosen schedule: the length of the window
POWER = "search/power"  # of the chosen schedule: p of its decay 1 − x^p
KL_RATIO = "search/kl_ratio"  # λ² of the paper's theory
CURVE = "curve/objective"  # the score over λ of a pair; the step is round(1000·λ)
RELATIVE_L2 = "distance/relative_l2"  # between the oldest and the newest parent
COSINE = "distance/cosine"  # between the oldest and the newest parent
# metrics of trial, search, OOD and test runs; below dev, ood and test, tasks have `<task>/<metric>`
HELD_OUT, OOD, TEST = "dev", "ood", "test"
OBJECTIVE = "dev/objective"  # the held-out score, the mean over tasks
STDERR = "dev/stderr"  # its standard error
TRUNCATED = "dev/truncated"  # number of requests that were cut to the longest input
SECONDS_MERGE = "seconds/merge"  # time of a trial to set the weights
SECONDS_EVALUATE = "seconds/evaluate"  # time of a trial to score them
# artifacts
ITEMS = "items.parquet"
EVIDENCE = "evidence.json"
REPORT = "report.md"
INTERACTIVE = "report.html"  # the landscape to explore: scores of every task, items that flip
LANDSCAPE = "landscape"  # .png and .svg
DISTANCES = "distances.png"  # between the parents, by layer
PASSED, REFUSED = "passed", "refused"
# the tags of a version that its copy in another registered model gets too
COPIED = (LAMBDA, WEIGHTS, METHOD, KEY, REQUEST)


def format_parents(name: str, versions: tuple[Version, ...]) -> str:
    """The value of `soup.parents`; versions of `name` itself are bare numbers.

    `parse_parents` is its inverse.
    """
    return ",".join(
        str(v.number) if v.name == name else f"{_without_commas(v.name)}/{v.number}"
        for v in versions
    )


def _without_commas(name: str) -> str:
    return name.replace("%", "%25").replace(",", "%2C")


def parse_parents(name: str, text: str) -> tuple[Version, ...]:
    """The parents that `soup.parents` names on a version of `name`."""
    parts = [part.rpartition("/") for part in text.split(",")]
    return tuple(Version(unquote(owner) or name, int(number)) for owner, _, number in parts)


def format_weights(lam: Sequence[float]) -> str:
    """The value of `soup.weights`; `parse_weights` is its inverse for weights in steps of 1e-4."""
    return ",".join(f"{weight:g}" for weight in lam)


def parse_weights(text: str) -> tuple[float, ...]:
    """The weights that a value of `soup.weights` names.

    Raises:
        ValueError: the text is not a list of numbers in [0, 1].
    """
    weights = tuple(map(float, text.split(",")))
    if not all(0.0 <= weight <= 1.0 for weight in weights):  # nan fails this test
        raise ValueError(f"{text!r} is not a list of merge weights")
    return weights


def ledger_name(name: str) -> str:
    """The name of the experiment that holds a registered model's ledger."""
    return f"soup-ledger/{name}"


def run_name(words: str) -> str:
    """The name of a run, cut to MLflow's column."""
    return words[:250]


def key_of(request: Mapping[str, Any]) -> str:
    """The digest of a request; the order of its fields does not matter."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def version_tags(
    soup_parents: str, recipe: Recipe, method: str, key: str, request: str, digest: str
) -> dict[str, str]:
    """The tags that a soup's version is created with, in one transaction.

    They are what people read and what finds the version again; the manifest holds the rest.
    """
    return {
        PARENTS: soup_parents,
        LAMBDA: f"{recipe.lam[-1]:g}",
        WEIGHTS: format_weights(recipe.lam),
        METHOD: method,
        KEY: key,
        REQUEST: request,
        DIGEST: digest,
    }
