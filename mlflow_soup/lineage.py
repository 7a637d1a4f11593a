"""Soup ↔ what MLflow and the checkpoint folder say of it: every name in one table.

Renaming anything here breaks pipelines that read it; it is a breaking change.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlflow_soup.records import Recipe, Version

# tags of model versions
PARENTS = "soup.parents"  # "12,13" (same model) or "a/12,b/3", oldest first
LAMBDA = "soup.lambda"  # weight of the newest parent, as a decimal
KEY = "soup.key"  # digest of the search request; also on search and trial runs
DIGEST = "soup.digest"  # canonical digest of the soup's tensors
GATE = "soup.gate"  # passed or refused; also on search runs
RUN_ID = "soup.run_id"  # the search run
GATE_RUN = "soup.gate_run_id"  # the OOD run the gate read
PROMOTED_TO = "soup.promoted_to"  # "alias champion"
PROMOTED_AT = "soup.promoted_at"  # UTC, ISO 8601
PREVIOUS = "soup.previous"  # the version that was there before
# tags of runs
ROLE = "soup.role"  # search, trial or ood
NUMBER = "soup.number"  # of the trial, from 0
FAILED = "soup.failed"  # why a trial has no score
EVALUATOR = "soup.evaluator"  # fingerprint of requests and settings
VERSION = "soup.version"  # "my-llm/14": the soup that a search made or an OOD run examined
CONDITIONS = "soup.conditions"  # digest of what OOD evidence depends on besides the weights
# metrics and artifacts
OBJECTIVE = "dev/objective"
TRUNCATED = "dev/truncated"  # requests that were cut to the longest input
ITEMS = "items.parquet"
EVIDENCE = "evidence.json"
REPORT = "report.md"
LANDSCAPE = "landscape"  # .png and .svg

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


def key_of(request: Mapping[str, Any]) -> str:
    """Digest of a request: equal requests have equal keys, in any order of fields."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def manifest(
    name: str, recipe: Recipe, parents: Mapping[Version, str], key: str, run_id: str, digest: str
) -> dict[str, Any]:
    """What a soup is made of, for `soup_manifest.json`; λ as hex floats, to be exact.

    Args:
        name: the registered model it goes to.
        recipe: method and merge weights.
        parents: version → tensor digest, oldest first.
        key: the search key.
        run_id: the search run.
        digest: the soup's own tensor digest.
    """
    return {
        "schema": 1,
        "model": name,
        "method": recipe.method,
        "parents": [
            {"uri": version.uri, "digest": parent_digest, "lambda": float(lam).hex()}
            for (version, parent_digest), lam in zip(parents.items(), recipe.lam, strict=True)
        ],
        "digest": digest,
        "search_key": key,
        "run_id": run_id,
    }


def version_tags(
    soup_parents: str, recipe: Recipe, key: str, run_id: str, digest: str
) -> dict[str, str]:
    """The tags a soup's version is created with, all in one transaction."""
    return {
        PARENTS: soup_parents,
        LAMBDA: f"{recipe.lam[-1]:g}",
        KEY: key,
        RUN_ID: run_id,
        DIGEST: digest,
    }


def card(name: str, recipe: Recipe, parents: tuple[Version, ...]) -> str:
    """The model card: front matter that Hugging Face tools read, and the recipe in words."""
    base = "\n".join(f"- {json.dumps(version.uri)}" for version in parents)
    shares = ", ".join(f"{lam:g} × {v}" for lam, v in zip(recipe.lam, parents, strict=True))
    return f"""---
library_name: transformers
base_model:
{base}
base_model_relation: merge
tags:
- merge
- mlflow-soup
---

# {name}: a soup of {" and ".join(map(str, parents))}

Weighted average of checkpoints: {shares}. Exact weights and digests: `soup_manifest.json`.
Method: Liu et al., "Checkpoint Merging via Bayesian Optimization in LLM Pretraining",
arXiv:2403.19390.
"""
