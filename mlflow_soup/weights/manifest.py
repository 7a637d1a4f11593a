"""The manifest and the model card of a soup: both describe its parents and how they were mixed."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mlflow_soup.records import Digests, Manifest, Source

MANIFEST = "soup_manifest.json"
CARD = "README.md"
LARGEST = 64 << 20  # bytes of a manifest; the digests of 90 000 tensors take 15 MB
SIGNATURE = "model.sig"
# no signature covers itself, nor what MLflow adds to a copy that it downloads
# private door: mlflow: registered_model_meta
UNSIGNED = (SIGNATURE, "registered_model_meta")
SCHEMA = 1  # the version of the manifest's format
# values of `method`; `verify` can merge the parents again only for `linear`
MIXINGS = ("linear", "fisher", "regmean")
KERNEL = "fp32 products and sums, separate, in parent order; one rounding, to nearest even"
_PAPERS = {  # method → the paper that the model card cites
    "linear": 'Liu et al., "Checkpoint Merging via Bayesian Optimization in LLM Pretraining",\n'
    "arXiv:2403.19390",
    "fisher": 'Matena & Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832',
    "regmean": 'Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models",\n'
    "arXiv:2212.09849",
}


def format_manifest(manifest: Manifest) -> dict[str, Any]:
    """The content of `soup_manifest.json`; λ is written as a hexadecimal float, which is exact.

    `parse_manifest` is the inverse.
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
    """The manifest from the content that `format_manifest` wrote.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: the content is not a
            manifest, or has another schema, method or kernel.
    """
    for field, known in (("schema", (SCHEMA,)), ("method", MIXINGS), ("kernel", (KERNEL,))):
        if content[field] not in known:
            wanted = " or ".join(map(repr, known))
            raise ValueError(f"its {field} is {content[field]!r}, but only {wanted} is known")
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
    if not sources or not all(0.0 <= source.lam <= 1.0 for source in sources):
        raise ValueError("it must have parents, with weights from 0 to 1")
    if not all(source.uri.isprintable() for source in sources):
        raise ValueError("the URI of a parent cannot be printed")
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
        raise TypeError("an object of strings was expected")
    return content


def card(manifest: Manifest) -> str:
    """The model card: front matter for Hugging Face tools, and the recipe in words."""
    # of a folder only the name is shown: its full path would reveal the machine's layout
    uris = [source.uri for source in manifest.sources]
    names = [uri if uri.startswith("models:/") else PurePath(uri).name for uri in uris]
    base = "\n".join(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)
    weights = (source.lam for source in manifest.sources)
    shares = ", ".join(f"{lam:g} × `{name}`" for lam, name in zip(weights, names, strict=True))
    how = (
        "A weighted average of checkpoints"
        if manifest.method == "linear"
        else f"Checkpoints merged with {manifest.method}, which refines equal weights with "
        "statistics of the parents"
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

{how}: {shares}. The exact weights are in `soup_manifest.json`.
Method: {_PAPERS[manifest.method]}.
"""
