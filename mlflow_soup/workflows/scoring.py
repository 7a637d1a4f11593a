"""Score registered versions on tasks that the caller names: MLflow's evaluator asks for this.

No policy of a registered model has a say, and nothing is written to MLflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mlflow_soup.decision.pairing import lower_bound, paired
from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.items import datasets_of, freeze
from mlflow_soup.evaluation.prompts import Prompting
from mlflow_soup.evaluation.suite import Suite, load_suite
from mlflow_soup.records import Dataset, Score, Version
from mlflow_soup.registry import scores as files
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import model_id, registered_as, resolve
from mlflow_soup.request.margins import parse_margins
from mlflow_soup.request.names import parse_uri
from mlflow_soup.request.spec import Spec
from mlflow_soup.workflows.bench import (
    Suites,
    check_machine,
    measured_key,
    mixture_of,
    open_version,
    set_up,
)


@dataclass(frozen=True)
class Scored:
    """A registered version with its scores, and those of the version it is compared with.

    Attributes:
        version: the version.
        model_id: its logged model; None if it was registered without one.
        scores: term → score, as lm-eval gives it.
        baseline: the same of the other version; None if there is no other.
    """

    version: Version
    model_id: str | None
    scores: Mapping[str, Score]
    baseline: Mapping[str, Score] | None


def datasets(spec: Spec) -> list[Dataset]:
    """The items of the tasks of a spec, one dataset for each task or group.

    Raises:
        SpecError: a task is unknown, or its requests cannot be built.
        ObjectiveError: the data of a task cannot be loaded.
    """
    suite = _load(spec)
    for task in suite.loaded["tasks"].values():
        freeze(task, Prompting(spec.num_fewshot), spec.limit)
    return [*datasets_of(suite).values()]


def _load(spec: Spec) -> Suite:
    return load_suite(spec.tasks, include_path=spec.include_path, allowed=spec.allowed_code)


def score_registered(client: Store, named: str, baseline: str, spec: Spec) -> Scored:
    """Score a version, and another one to compare it with.

    Args:
        client: the store's client.
        named: `models:/NAME/3`, `models:/NAME@ALIAS`, or the id of a logged model that is the
            source of a version.
        baseline: the same of the other version; empty for none.
        spec: the tasks, and how they are scored.

    Raises:
        SpecError: a name is wrong, or a task cannot be scored.
        ParentError: a version is missing or damaged.
        NonFiniteError: a score is not finite.
    """
    check_machine(spec)
    texts = {"model": named, "baseline": baseline}
    versions = {what: _find(client, text, what) for what, text in texts.items() if text}
    scores: dict[Version, Mapping[str, Score]] = {}
    left = dict.fromkeys(versions.values())
    for version in tqdm(left, desc="lm-eval", unit="model", disable=None):
        opened = open_version(client, version)
        bench = set_up(spec, opened, Suites(_load(spec)))
        name = measured_key(bench.held_out, [(opened.parent.digest, 1.0)])
        answers = bench.engine.answer(name, bench.held_out, mixture_of([opened]))
        scores[version] = dict(bench.held_out.evaluate(*answers.parts))
    found, other = versions["model"], versions.get("baseline")
    return Scored(found, model_id(client, found), scores[found], scores[other] if other else None)


def _find(client: Store, text: str, what: str) -> Version:
    """The version that a URI or the id of a logged model names."""
    if not text.startswith("m-"):
        name, ref = parse_uri(text, f"evaluator_config, {what}")
        return resolve(client, name, ref)
    if found := registered_as(client, text):
        return found[0]
    raise SpecError(
        f"the logged model {text} is the source of no registered version",
        where="model_id" if what == "model" else what,
        fix=f'register it: mlflow.register_model("models:/{text}", NAME)',
    )


def metrics_of(scored: Scored, spec: Spec) -> dict[str, float]:
    """lm-eval's numbers, and with a baseline the gain on each task and its lower bound.

    The bound is the one that the gate uses where it judges a task alone.

    Args:
        scored: the scores.
        spec: its margin and its confidence decide the bound.

    Raises:
        ObjectiveError: the two versions were not scored on the same items.
    """
    metrics: dict[str, float] = {}
    for term, score in scored.scores.items():
        (shown,) = score.metrics
        metrics[shown.key] = shown.value
        metrics[f"{shown.key}_stderr"] = shown.stderr
        if scored.baseline is not None:
            theirs = scored.baseline[term]
            loss = parse_margins(spec.margin).at(term).of(theirs.value)
            gain = paired(score, theirs, [loss] * len(score.items))
            metrics[f"{shown.key}/gain"] = gain.value
            metrics[f"{shown.key}/gain_lower"] = lower_bound(gain, spec.confidence)
    return metrics


def write_items(scored: Scored, folder: Path) -> Path:
    """Write the answers to all items, and return the file: `my-llm-v3.parquet`."""
    version = scored.version
    path = folder / f"{version.name}-{version.short}.parquet"
    files.write(files.Scores(scored.scores), path)
    return path
