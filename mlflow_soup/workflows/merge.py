"""Merge folders or registered versions with given weights, without a search."""

import os
import re
from collections.abc import Sequence
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.files.durable import staged
from mlflow_soup.records import Manifest
from mlflow_soup.redaction import redacting
from mlflow_soup.request.names import parse_uri
from mlflow_soup.weights.checkpoint import readable
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.provenance import Origin, make

if TYPE_CHECKING:
    from mlflow_soup.registry.store import Store

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def fetch(text: str, where: str, *, client: "Store | None" = None, fresh: bool = False) -> Origin:
    """The folder or the registered version that a text names. A version is pulled.

    Args:
        text: a folder's path, or a URI such as `models:/name/12`.
        where: the argument that the text came from, for errors.
        client: the store's client, for a version; a new one without patience by default.
        fresh: read the version from the store, not from the cache.

    Raises:
        SpecError: the text is neither a folder nor a version.
        ParentError: the folder or version does not exist.
    """
    if not text.isprintable():
        raise SpecError(
            f"{text!r} contains characters that cannot be printed",
            where=where,
            fix="rename the folder or version, with printable characters only",
        )
    if text.startswith("models:"):
        name, ref = parse_uri(text, where)
        # importing mlflow takes longer than merging folders of a gigabyte
        from mlflow_soup.registry import store
        from mlflow_soup.registry.pull import pull
        from mlflow_soup.registry.versions import find_model, origin_of, resolve, tags_of

        client = client or store.connect()
        version = resolve(client, find_model(client, name, [ref]), ref)
        folder = pull(client, version, fresh=fresh)
        run_id, location = origin_of(client, version)
        tags = tags_of(client, version)
        return Origin(folder, version.uri, run_id, location, tags)
    folder, fix = Path(text), "name a checkpoint folder, or a version: models:/my-llm/12"
    if _URI.match(text):
        raise SpecError(
            f"{text} is neither a folder nor a registered version", where=where, fix=fix
        )
    with readable(text):
        if not folder.is_dir():
            what = f"{text} is a file" if folder.exists() else f"there is no folder {text}"
            raise ParentError(what, where=str(folder.absolute()), fix=fix)
    return Origin(folder, str(folder.resolve()))


@redacting()
def merge_checkpoints(
    parents: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    *,
    digests: bool = False,
) -> Manifest:
    """Merge checkpoints with given weights, without a search: Σ λ_i·Θ_i.

    The soup has the files, names and dtypes of the last parent. The folder `out` appears once the
    soup is complete.

    Args:
        parents: folders or `models:/` URIs, oldest first.
        weights: λ, one per parent, each in [0, 1], summing to 1.
        out: a folder that does not exist yet.
        digests: record the digests of all files and tensors, so that `verify` can say which ones
            changed. This takes longer than the merge itself.

    Returns:
        The content of `soup_manifest.json` in `out`.

    Raises:
        SpecError: the weights are invalid, or `out` exists.
        ParentError: a parent is missing, damaged, or does not match the others.
        StoreError: the disk is full, or a store cannot be reached.
    """
    if isinstance(parents, str | os.PathLike):
        raise SpecError(
            f"the parents are not a list but {parents!r}",
            where="merge_checkpoints(parents, …)",
            fix="give a list of at least two parents: [older, newer]",
        )
    names = [os.fspath(parent) for parent in parents]
    lam = [float(weight) for weight in weights]
    _check_weights(names, lam)
    check_local(out)
    origins = [fetch(name, "PARENT") for name in names]
    checkpoints = [
        find_checkpoint(origin.folder, name, with_tokenizer=False)
        for origin, name in zip(origins, names, strict=True)
    ]
    for checkpoint in checkpoints:
        checkpoint.tell_passed_over()
    check_compatible(checkpoints)
    for origin in origins:
        check_outside(out, origin, f"parent {origin.uri}")
    with staged(Path(out)) as folder:
        return make(checkpoints, origins, lam, folder, digests=digests)


def check_local(out: str | os.PathLike[str]) -> None:
    """Refuse a URI where a local folder is to be written.

    Raises:
        SpecError: it is one.
    """
    if _URI.match(os.fspath(out)):
        raise SpecError(
            f"{os.fspath(out)} is not a folder", where="--out", fix="name a local folder"
        )


def check_outside(out: str | os.PathLike[str], origin: Origin, what: str) -> None:
    """Refuse to write into the folder of a checkpoint, which may be the store's own.

    Args:
        out: the folder to write.
        origin: the checkpoint.
        what: what it is, in words.

    Raises:
        SpecError: `out` is inside it.
    """
    if Path(out).resolve().is_relative_to(origin.folder.resolve()):
        raise SpecError(
            f"--out is inside the folder of {what}",
            where=f"--out {os.fspath(out)}",
            fix="name a folder outside it",
        )


def _check_weights(parents: Sequence[str], lam: Sequence[float]) -> None:
    where = "--weights " + ",".join(f"{weight:g}" for weight in lam)
    if len(parents) < 2:
        raise SpecError(
            f"a merge needs at least two parents; {len(parents)} given",
            where="PARENT",
            fix="name two or more folders or versions, oldest first",
        )
    if len(lam) != len(parents):
        raise SpecError(
            f"{len(parents)} parents need {len(parents)} weights, not {len(lam)}",
            where=where,
            fix="give one weight for each parent, in the order of the parents",
        )
    if not all(0.0 <= weight <= 1.0 for weight in lam):
        raise SpecError(
            "a weight is not between 0 and 1", where=where, fix="give weights from 0 to 1"
        )
    total = fsum(lam)
    if abs(total - 1.0) > 1e-6:
        fix = "give weights that sum to 1"
        if total > 0.0:
            fix += ": " + ",".join(f"{weight / total:.10g}" for weight in lam)
        raise SpecError(f"the weights sum to {total:g}", where=where, fix=fix)
