"""Every name that we write in MLflow: tags, params, metrics, artifacts; and how values are written.

A pipeline may read any of these names, so renaming one is a breaking change.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_soup.records import Recipe, Version

# tags of model versions
PARENTS = "soup.parents"  # "12,13" (same model) or "a/12,b/3", oldest first
LAMBDA = "soup.lambda"  # weight of the newest parent, as a decimal
WEIGHTS = "soup.weights"  # "0.3,0.7": of every parent, oldest first
METHOD = "soup.method"  # how the soup was found: bayesopt, greedy, …; also on search runs
KEY = "soup.key"  # digest of what is searched and how; also on search and trial runs
REQUEST = "soup.request"  # digest of that and of when it ends: one request, one version
DIGEST = "soup.digest"  # canonical digest of the soup's tensors
GATE = "soup.gate"  # passed or refused; also on search runs
RUN_ID = "soup.run_id"  # the search run
GATE_RUN = "soup.gate_run_id"  # the OOD run the gate read
PROMOTED_TO = "soup.promoted_to"  # "alias champion"
PROMOTED_AT = "soup.promoted_at"  # UTC, ISO 8601
PREVIOUS = "soup.previous"  # the version that was there before
# tags of runs
ROLE = "soup.role"  # search, trial, ood, study, look or ledger
NUMBER = "soup.number"  # of the trial, from 0
FAILED = "soup.failed"  # why a trial has no score
MEASURED = "soup.measured"  # digest of what a trial scored, and how: the same is not scored twice
ITEMS_RUN = "soup.items_run"  # the trial that was scored, where this one took its score over
EVALUATOR = "soup.evaluator"  # fingerprint of requests and settings
VERSION = "soup.version"  # "my-llm/14": the soup that a search made or an OOD run examined
CONDITIONS = "soup.conditions"  # digest of what OOD evidence depends on besides the weights
MODEL = "soup.model"  # registered model that a search, a study or an upload is about
STUDY = "soup.study"  # the study run that a search is a part of
ATTEMPT = "soup.attempt"  # names one try to create something, to find it where the answer was lost
ORPHANED_BY = "soup.orphaned_by"  # the run that went on where this one was cut short
# tag of the experiment that holds a registered model's ledger: its run
LEDGER = "soup.ledger"
# metrics and artifacts
OBJECTIVE = "dev/objective"
TRUNCATED = "dev/truncated"  # requests that were cut to the longest input
ITEMS = "items.parquet"
EVIDENCE = "evidence.json"
REPORT = "report.md"
LANDSCAPE = "landscape"  # .png and .svg
DISTANCES = "distances.png"  # of the parents, by layer
PASSED, REFUSED = "passed", "refused"


def format_parents(name: str, versions: tuple[Version, ...]) -> str:
    """Value of `soup.parents`: bare numbers where they are versions of `name` itself.

    `parse_parents` is its inverse.
    """
    return ",".join(str(v.number) if v.name == name else f"{v.name}/{v.number}" for v in versions)


def parse_parents(name: str, text: str) -> tuple[Version, ...]:
    """The versions that `soup.parents` of a version of `name` stands for."""
    parts = [part.rpartition("/") for part in text.split(",")]
    return tuple(Version(owner or name, int(number)) for owner, _, number in parts)


def format_weights(lam: Sequence[float]) -> str:
    """Value of `soup.weights`; `parse_weights` is its inverse for weights in steps of 1e-4."""
    return ",".join(f"{weight:g}" for weight in lam)


def parse_weights(text: str) -> tuple[float, ...]:
    """The weights that `soup.weights` stands for.

    Raises:
        ValueError: it is none.
    """
    weights = tuple(map(float, text.split(",")))
    if not all(0.0 <= weight <= 1.0 for weight in weights):  # nan is not
        raise ValueError(f"{text!r} are no merge weights")
    return weights


def ledger_name(name: str) -> str:
    """The experiment that holds the ledger of a registered model."""
    return f"soup-ledger/{name}"


def key_of(request: Mapping[str, Any]) -> str:
    """Digest of a request: equal requests have equal keys, in any order of fields."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def version_tags(
    soup_parents: str, recipe: Recipe, key: str, request: str, run_id: str, digest: str
) -> dict[str, str]:
    """The tags a soup's version is created with, all in one transaction."""
    return {
        PARENTS: soup_parents,
        LAMBDA: f"{recipe.lam[-1]:g}",
        WEIGHTS: format_weights(recipe.lam),
        KEY: key,
        REQUEST: request,
        RUN_ID: run_id,
        DIGEST: digest,
    }
