"""Soup ↔ what MLflow and the checkpoint folder say of it: every name in one table.

Renaming anything here breaks pipelines that read it; it is a breaking change.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mlflow_soup.records import Digests, Manifest, Recipe, Source, Version

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

# the manifest
SCHEMA = 1
MIXINGS = ("linear", "fisher", "regmean")  # how weights enter: only the first can be made again
KERNEL = "fp32 products and sums, separate, in parent order; one rounding, to nearest even"

_PAPERS = {  # by mixing
    "linear": 'Liu et al., "Checkpoint Merging via Bayesian Optimization in LLM Pretraining",\n'
    "arXiv:2403.19390",
    "fisher": 'Matena & Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832',
    "regmean": 'Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",\n'
    "arXiv:2212.09849",
}

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


def format_manifest(manifest: Manifest) -> dict[str, Any]:
    """What goes into `soup_manifest.json`; λ as hex floats, to be exact.

    `parse_manifest` is its inverse.
    """
    return {
        "schema": SCHEMA,
        "model": manifest.model,
        "method": manifest.method,
        "kernel": KERNEL,
        "parents": [
            {
                "uri": source.uri,
                "lambda": float(source.lam).hex(),
                "run_id": source.run_id,
                "location": source.location,
                **_format_digests(source.digests),
            }
            for source in manifest.sources
        ],
        **_format_digests(manifest.digests),
        "inherited": dict(manifest.inherited),
        "search": dict(manifest.search),
        "versions": dict(manifest.versions),
    }


def parse_manifest(content: Any) -> Manifest:
    """The manifest that `format_manifest` wrote.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: it is none, or of another
            schema.
    """
    for field, known in (("schema", (SCHEMA,)), ("method", MIXINGS), ("kernel", (KERNEL,))):
        if content[field] not in known:
            raise ValueError(f"{field} {content[field]!r}, and this version knows {known}")
    sources = tuple(
        Source(
            str(parent["uri"]),
            float.fromhex(parent["lambda"]),
            _parse_digests(parent),
            str(parent["run_id"]),
            str(parent["location"]),
        )
        for parent in content["parents"]
    )
    if len(sources) < 2 or not all(0.0 <= source.lam <= 1.0 for source in sources):
        raise ValueError("it takes two parents, and weights from 0 to 1")
    if not all(source.uri.isprintable() for source in sources):
        raise ValueError("a parent's name cannot be printed")
    return Manifest(
        str(content["model"]),
        str(content["method"]),
        sources,
        _parse_digests(content),
        _texts(content["inherited"]),
        dict(content["search"]),
        _texts(content["versions"]),
    )


def _format_digests(digests: Digests | None) -> dict[str, Any]:
    if digests is None:
        return {"digest": None}
    files, tensors = dict(digests.files), dict(digests.tensors)
    return {"digest": digests.canonical, "files": files, "tensors": tensors}


def _parse_digests(content: Mapping[str, Any]) -> Digests | None:
    if content["digest"] is None:
        return None
    return Digests(str(content["digest"]), _texts(content["tensors"]), _texts(content["files"]))


def _texts(content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise TypeError("an object of texts is expected")
    return content


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


def card(manifest: Manifest) -> str:
    """The model card: front matter that Hugging Face tools read, and the recipe in words."""
    # a folder's place on the machine that merged it is nobody else's concern
    uris = [source.uri for source in manifest.sources]
    names = [uri if uri.startswith("models:/") else PurePath(uri).name for uri in uris]
    base = "\n".join(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)
    weights = (source.lam for source in manifest.sources)
    shares = ", ".join(f"{lam:g} × `{name}`" for lam, name in zip(weights, names, strict=True))
    how = (
        "Weighted average of checkpoints"
        if manifest.method == "linear"
        else (f"Checkpoints merged by {manifest.method}, which refines equal weights by statistics")
    )
    return f"""---
library_name: transformers
base_model:
{base}
base_model_relation: merge
tags:
- merge
- mlflow-soup
---

# {manifest.model or "Soup"}: {" and ".join(f"`{name}`" for name in names)}

{how}: {shares}. Exact weights: `soup_manifest.json`.
Method: {_PAPERS[manifest.method]}.
"""
