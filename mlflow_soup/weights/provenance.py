"""Write a soup together with its manifest and model card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from mlflow_soup.files.durable import on_disk
from mlflow_soup.records import Manifest, Source
from mlflow_soup.weights import soup
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.manifest import CARD, MANIFEST, UNSIGNED, card, format_manifest

_LIBRARIES = ("mlflow-soup", "mlflow", "torch", "transformers", "safetensors", "lm-eval")
# MLflow and `sign` write these after the soup was made
_LATER = ("MLmodel", *UNSIGNED)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        folder: its files on this machine.
        uri: `models:/name/12`, or the path of a folder.
        run_id: the MLflow run that logged it; empty if there is none.
        location: where its files are, according to the registry.
        tags: the tags of the registered version.
    """

    folder: Path
    uri: str
    run_id: str = ""
    location: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


def make(
    parents: Sequence[Checkpoint],
    origins: Sequence[Origin],
    lam: Sequence[float],
    folder: Path,
    *,
    method: str = "linear",
    model: str = "",
    search: Mapping[str, Any] | None = None,
    digests: bool = True,
    blend: soup.Blend | None = None,
) -> Manifest:
    """Write a soup with its manifest and its model card; return the manifest.

    Args:
        parents: the checkpoints, oldest first, already checked to be compatible.
        origins: where each parent comes from, in the same order.
        lam: merge weights λ, one per parent; they sum to 1.
        folder: the folder for the artifact tree; exists and is empty.
        method: how the tensors are mixed: `linear`, `fisher` or `regmean`.
        model: the registered model that the soup is made for.
        search: the manifest's entry for the search that chose λ.
        digests: if True, compute the digests of the soup and the parents while writing.
        blend: as for `soup.write`.

    Raises:
        ParentError, StoreError: as `soup.write`.
    """
    written = soup.write(parents, lam, folder, digests=digests, blend=blend)
    manifest = Manifest(
        model,
        method,
        tuple(
            Source(origin.uri, weight, own, origin.run_id, origin.location)
            for origin, weight, own in zip(origins, lam, written.parents, strict=True)
        ),
        written.digests,
        {name: of_file(path) for name, path in inherited(written.checkpoint)},
        search or {},
        {library: version_of(library) for library in _LIBRARIES},
    )
    text = json.dumps(format_manifest(manifest), indent=2, ensure_ascii=False) + "\n"
    for name, content in ((MANIFEST, text), (CARD, card(manifest))):
        with on_disk(folder / name):
            (folder / name).write_text(content, encoding="utf-8")
    return manifest


def inherited(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """The files that a soup takes from its newest parent: path in the tree, and path on disk."""
    own = {checkpoint.root / name for name in (MANIFEST, CARD, *_LATER)}
    own |= {checkpoint.weights / file for file in checkpoint.files()}
    for path in sorted(checkpoint.root.rglob("*")):
        if path.is_file() and path not in own:
            yield path.relative_to(checkpoint.root).as_posix(), path
