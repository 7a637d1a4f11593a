"""Merge folders or registered versions with given weights, without a search."""

import os
import re
from collections.abc import Sequence
from math import fsum
from pathlib import Path

from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.files.durable import staged
from mlflow_soup.records import Manifest
from mlflow_soup.redaction import redacting
from mlflow_soup.request.names import parse_uri
from mlflow_soup.weights.checkpoint import readable
from mlflow_soup.weights.compatibility import check_compatible
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.provenance import Origin, make

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def fetch(text: str, where: str, *, fresh: bool = False) -> Origin:
    """What a user names: a folder, or `models:/name/12`, which is pulled.

    Args:
        text: what the user wrote.
        where: which argument that was, for errors.
        fresh: as the store holds it now, not as a cache does.

    Raises:
        SpecError: it is neither.
        ParentError: it is not there.
    """
    if not text.isprintable():
        raise SpecError(
            f"{text!r} cannot be printed", where=where, fix="rename it to letters that can be"
        )
    if text.startswith("models:"):
        name, ref = parse_uri(text, where)
        # mlflow takes longer to import than folders of a gigabyte to merge
        from mlflow_soup.registry import store
        from mlflow_soup.registry.pull import pull
        from mlflow_soup.registry.versions import find_model, origin_of, resolve, tags_of

        client = store.connect()
        version = resolve(client, find_model(client, name, [ref]), ref)
        folder = pull(client, version, fresh=fresh)
        run_id, location = origin_of(client, version)
        tags = tags_of(client, version)
        return Origin(folder, version.uri, run_id, location, tags)
    folder, fix = Path(text), "name a checkpoint folder, or a version: models:/my-llm/12"
    if _URI.match(text):
        raise SpecError(f"{text} is neither a folder nor a version", where=where, fix=fix)
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
    """Merge checkpoints with given weights, without search: Σ λ_i·Θ_i.

    The soup has the files, names and dtypes of the last parent. `out` appears when it is complete.

    Args:
        parents: folders or `models:/` URIs, oldest first.
        weights: λ, one per parent, each in [0, 1], summing to 1.
        out: a folder that is not there yet.
        digests: record those of all files and tensors, so that `verify` can tell which of them
            changed; takes longer than the merge itself.

    Returns:
        What `soup_manifest.json` in `out` says.

    Raises:
        SpecError: the weights are none, or `out` is there.
        ParentError: a parent is missing, damaged or unlike the others.
        StoreError: the disk is full, or a store cannot be reached.
    """
    if isinstance(parents, str | os.PathLike):
        raise SpecError(
            f"the parents are {parents!r}",
            where="merge_checkpoints(parents, …)",
            fix="a list of at least two: [older, newer]",
        )
    names = [os.fspath(parent) for parent in parents]
    lam = [float(weight) for weight in weights]
    _check_weights(names, lam)
    if _URI.match(os.fspath(out)):
        raise SpecError(f"{os.fspath(out)} is no folder", where="--out", fix="name a folder")
    origins = [fetch(name, "PARENT") for name in names]
    checkpoints = [
        find_checkpoint(origin.folder, name, with_tokenizer=False)
        for origin, name in zip(origins, names, strict=True)
    ]
    check_compatible(checkpoints)
    for origin in origins:
        if Path(out).resolve().is_relative_to(origin.folder.resolve()):
            raise SpecError(
                f"the soup would lie inside its parent {origin.uri}",
                where=f"--out {os.fspath(out)}",
                fix="name a folder beside it",
            )
    with staged(Path(out)) as folder:
        return make(checkpoints, origins, lam, folder, digests=digests)


def _check_weights(parents: Sequence[str], lam: Sequence[float]) -> None:
    where = "--weights " + ",".join(f"{weight:g}" for weight in lam)
    if len(parents) < 2:
        raise SpecError(
            f"a merge needs two parents, and there are {len(parents)}",
            where="PARENT",
            fix="name two or more folders or versions, oldest first",
        )
    if len(lam) != len(parents):
        raise SpecError(
            f"the number of weights is {len(lam)}, and that of parents {len(parents)}",
            where=where,
            fix="one weight for each parent, in their order",
        )
    if not all(0.0 <= weight <= 1.0 for weight in lam):
        raise SpecError("a weight is not between 0 and 1", where=where, fix="weights from 0 to 1")
    total = fsum(lam)
    if abs(total - 1.0) > 1e-6:
        fix = "weights that sum to 1"
        if total > 0.0:
            fix += ": " + ",".join(f"{weight / total:.10g}" for weight in lam)
        raise SpecError(f"the weights sum to {total:g}", where=where, fix=fix)
