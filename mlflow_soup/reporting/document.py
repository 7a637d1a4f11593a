"""Records as plain dicts, for `--format json`: one function for each command, and for its parts.

docs/reference/json.md describes every key. Keys may be added; whatever else changes needs another
number in `mlflow_soup.output.SCHEMA`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow_soup.decision import pairing
from mlflow_soup.records import (
    Check,
    Difference,
    Examination,
    Finding,
    Manifest,
    Outcome,
    Power,
    Promotion,
    Score,
    Table,
    Verdict,
    Version,
    Window,
)

if TYPE_CHECKING:
    from mlflow_soup.reporting.card import Exported

CONFIDENCE = 0.95  # of the intervals of differences

Document = dict[str, Any]


# -- parts -----------------------------------------------------------------------------------------


def version(of: Version) -> Document:
    """A version, by URI and by name and number."""
    return {"uri": of.uri, "name": of.name, "version": of.number}


def score(of: Score) -> Document:
    """A score with its standard error, and lm-eval's numbers."""
    return {
        "value": of.value,
        "stderr": of.stderr,
        "noise": of.noise,
        "items": sum(len(items.ids) for items in of.items),
        "metrics": [
            {
                "key": metric.key,
                "task": metric.task,
                "metric": metric.metric,
                "value": metric.value,
                "stderr": metric.stderr,
                "higher_is_better": metric.higher_is_better,
            }
            for metric in of.metrics
        ],
    }


def difference(of: Difference) -> Document:
    """A paired difference with its interval."""
    low, high = pairing.interval(of, CONFIDENCE)
    return {
        "value": of.value,
        "stderr": of.stderr,
        "low": low,
        "high": high,
        "confidence": CONFIDENCE,
        "items": of.count,
        "clusters": of.clusters,
        "design_effect": of.effect,
    }


def gains(of: Mapping[Version, Difference]) -> list[Document]:
    """What a soup gains over some versions, in their order."""
    return [{"against": version(rival), **difference(gain)} for rival, gain in of.items()]


def check(of: Check) -> Document:
    """One check of the gate."""
    return {
        "name": of.name,
        "tasks": of.tasks,
        "against": version(of.against),
        "passed": of.passed,
        "difference": difference(of.difference),
        "side": of.side or None,
        "bound": of.bound,
        "required": of.required,
        "margin": of.margin or None,
        "allowed": of.allowed,
    }


def verdict(of: Verdict) -> Document:
    """The gate's verdict, with its rules and each check."""
    return {
        "passed": of.passed,
        "rules": {
            "margin": of.rules.margin,
            "confidence": of.rules.confidence,
            "min_items": of.rules.min_items,
            "tasks": of.rules.tasks,
        },
        "checks": [check(one) for one in of.checks],
    }


def power(of: Power) -> Document:
    """How likely the gate passes a soup that is exactly as good as its rivals."""
    return {
        "margin": of.margin,
        "confidence": of.confidence,
        "items": of.items,
        "unknown": of.unknown,
        "chances": [{"discordance": share, "passes": p} for share, p in of.chances.items()],
    }


def window(of: Window) -> Document:
    """The window that was merged."""
    return {
        "duration": of.duration,
        "power": of.power,
        "time_tag": of.time_tag or None,
        "average": score(of.average) if of.average is not None else None,
    }


def examination(of: Examination) -> Document:
    """The held-out and OOD scores of a soup and its rivals."""
    return {
        "run_id": of.run_id,
        "models": [
            {
                "role": role.split()[0],
                "version": version(evidence.version),
                "digest": evidence.digest,
                "held_out": score(evidence.held_out),
                "ood": {task: score(its) for task, its in evidence.ood},
            }
            for role, evidence in of.roles.items()
        ],
    }


def promotion(of: Promotion) -> Document:
    """What was promoted, and what it replaced."""
    return {
        "target": of.target,
        "version": version(of.version),
        "previous": version(of.previous) if of.previous is not None else None,
        "at": of.at,
    }


def checkpoint(uri: str) -> Document:
    """A registered version or a folder, as a manifest names it."""
    name, _, number = uri.removeprefix("models:/").rpartition("/")
    registered = uri.startswith("models:/") and bool(name) and number.isdecimal()
    return {"uri": uri, "version": version(Version(name, int(number))) if registered else None}


def parent(uri: str, weight: float, digest: str | None, alone: Score | None = None) -> Document:
    """A parent of a soup; `alone` is its own held-out score."""
    held_out = score(alone) if alone is not None else None
    return {**checkpoint(uri), "weight": weight, "digest": digest, "held_out": held_out}


def _mixture(of: Manifest) -> Document:
    """How a soup was mixed."""
    return {
        "mixing": of.method,
        "parents": [
            parent(its.uri, its.lam, its.digests.canonical if its.digests is not None else None)
            for its in of.sources
        ],
    }


def _digest(of: Manifest) -> str | None:
    return of.digests.canonical if of.digests is not None else None


# -- commands --------------------------------------------------------------------------------------


def run(outcome: Outcome) -> Document:
    """The document of `run`."""
    soup, tested = outcome.soup, outcome.tested
    return {
        "version": version(soup.version),
        "registered": soup.registered,
        "digest": soup.digest,
        "method": outcome.method,
        "mixing": soup.recipe.method,
        "lambda": soup.lam[-1],
        "parents": [
            parent(its.version.uri, weight, its.digest, outcome.alone.get(its.version))
            for its, weight in zip(soup.parents, soup.lam, strict=True)
        ],
        "window": window(outcome.window) if outcome.window is not None else None,
        "held_out": score(soup.held_out),
        "gains": gains(outcome.gains),
        "test": {
            "models": [
                {
                    "role": role.split()[0],
                    "version": version(its.version),
                    "score": score(its.score),
                }
                for role, its in tested.items()
            ],
            "gains": gains(outcome.test_gains),
        }
        if tested
        else None,
        "ood": examination(outcome.examination) if outcome.examination is not None else None,
        "power": power(outcome.power) if outcome.power is not None else None,
        "verdict": verdict(outcome.verdict) if outcome.verdict is not None else None,
        "target": outcome.target or None,
        "promotion": promotion(outcome.promotion) if outcome.promotion is not None else None,
        "run_id": outcome.run_id,
        "versions": [version(its) for its in outcome.versions],
        "trials": [
            {
                "number": trial.number,
                "weights": trial.recipe.lam,
                "held_out": score(trial.held_out) if trial.held_out is not None else None,
                "run_id": trial.run_id,
            }
            for trial in outcome.trials
        ],
    }


def evaluate(of: Examination) -> Document:
    """The document of `evaluate`."""
    return {"version": version(of.roles["soup"].version), "ood": examination(of)}


def gate(soup: Version, judged: Verdict, by: Examination) -> Document:
    """The document of `gate`."""
    return {"version": version(soup), "verdict": verdict(judged), "ood": examination(by)}


def gate_power(of: Power) -> Document:
    """The document of `gate --power`."""
    return {"power": power(of)}


def promote(soup: Version, judged: Verdict, by: Examination, made: Promotion) -> Document:
    """The document of `promote`."""
    return {**gate(soup, judged, by), "promotion": promotion(made)}


def sign(soup: Version, key: str) -> Document:
    """The document of `sign`."""
    return {"version": version(soup), "key": key}


def study(title: str, table: Table, notes: Sequence[str], run_id: str) -> Document:
    """The document of `study` and of `track`."""
    return {
        "title": title,
        "table": {"columns": table.columns, "rows": table.rows},
        "notes": list(notes),
        "run_id": run_id,
    }


def merge(out: str, manifest: Manifest) -> Document:
    """The document of `merge`."""
    return {"out": out, "digest": _digest(manifest), **_mixture(manifest)}


def export(out: str, told: "Exported") -> Document:
    """The document of `export`."""
    manifest = told.manifest
    return {
        "out": out,
        **checkpoint(told.name),
        "digest": told.digest,
        "dtype": told.dtype,
        "files": told.weights,
        **(_mixture(manifest) if manifest is not None else {"mixing": None, "parents": []}),
        "checked": told.checked,
        "unchecked": told.unchecked,
        "scores": {task: score(its) for task, its in told.scores.items()},
        "unscored": told.unscored or None,
        "held_out": score(told.held_out) if told.held_out is not None else None,
        "base_models": told.base_models,
    }


def verify(uri: str, status: str, findings: Sequence[Finding], manifest: Manifest) -> Document:
    """The document of `verify`.

    Args:
        uri: the soup; an alias is resolved to the version that was checked.
        status: what all findings come to.
        findings: the findings.
        manifest: the soup's manifest.
    """
    return {
        **checkpoint(uri),
        "status": status,
        "findings": [
            {"what": its.what, "verdict": its.verdict.lower(), "details": its.details}
            for its in findings
        ],
        "digest": _digest(manifest),
        **_mixture(manifest),
    }
