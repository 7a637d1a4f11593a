"""Make a soup that says what it is made of, and check whether one is what it says."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from math import fsum
from pathlib import Path
from typing import Any

from mlflow_soup import lineage, soup
from mlflow_soup.checkpoint import Checkpoint, find
from mlflow_soup.compatibility import check_compatible
from mlflow_soup.digests import digest_all, of_file
from mlflow_soup.durable import staged
from mlflow_soup.errors import MismatchError, ParentError, SpecError
from mlflow_soup.records import Digests, Finding, Manifest, Mismatch, Source
from mlflow_soup.spec import parse_uri

_LIBRARIES = ("mlflow-soup", "mlflow", "torch", "transformers", "safetensors", "lm-eval")
# written when a version is registered or served: not what the newest parent had
_OF_MLFLOW = ("MLmodel", "registered_model_meta")
_SHOWN = 10  # tensors named in a finding


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: its files at hand, and what the registry says of it."""

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
) -> Manifest:
    """Write a soup with its manifest and its model card.

    Args:
        parents: oldest first, already found compatible.
        origins: of each parent.
        lam: merge weights λ, one per parent, summing to 1.
        folder: where the artifact tree goes; exists and is empty.
        method: how the weights enter.
        model: the registered model it is made for.
        search: what the manifest tells of the search that chose λ.
        digests: take those of soup and parents on the way.

    Raises:
        ParentError, StoreError: as `soup.write`.
    """
    written = soup.write(parents, lam, folder, digests=digests)
    manifest = Manifest(
        model,
        method,
        tuple(
            Source(origin.uri, weight, own, origin.run_id, origin.location)
            for origin, weight, own in zip(origins, lam, written.parents, strict=True)
        ),
        written.digests,
        {name: of_file(path) for name, path in _inherited(written.checkpoint)},
        search or {},
        {library: version_of(library) for library in _LIBRARIES},
    )
    text = json.dumps(lineage.format_manifest(manifest), indent=2, ensure_ascii=False)
    (folder / soup.MANIFEST).write_text(text + "\n", encoding="utf-8")
    (folder / soup.CARD).write_text(lineage.card(manifest), encoding="utf-8")
    return manifest


def _inherited(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """A soup's files that are its newest parent's, by their path in the tree."""
    own = (soup.MANIFEST, soup.CARD, *_OF_MLFLOW)
    for path in sorted(checkpoint.root.rglob("*")):
        name = path.relative_to(checkpoint.root).as_posix()
        if path.is_file() and path.suffix != ".safetensors" and name not in own:
            yield name, path


def fetch(text: str, *, fresh: bool = False) -> Origin:
    """What a user names: a folder, or `models:/name/12`, which is pulled.

    Args:
        text: what the user wrote.
        fresh: as the store holds it now, not as a cache does.

    Raises:
        SpecError: it is neither.
        ParentError: it is not there.
    """
    if text.startswith("models:"):
        name, ref = parse_uri(text)
        # mlflow takes longer to import than folders of a gigabyte to merge
        from mlflow_soup import registry, tracking

        client = tracking.connect()
        version = registry.resolve(client, registry.find_model(client, name, [ref]), ref)
        folder = registry.pull(client, version, fresh=fresh)
        run_id, location = registry.origin(client, version)
        tags = registry.tags_of(client, version)
        return Origin(folder, version.uri, run_id, location, tags)
    folder = Path(text)
    if not folder.is_dir():
        raise ParentError(
            f"there is no folder {text}",
            where=str(folder.absolute()),
            fix="name a checkpoint folder, or a registered version: models:/my-llm/12",
        )
    return Origin(folder, str(folder.resolve()))


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
    names = [os.fspath(parent) for parent in parents]
    lam = [float(weight) for weight in weights]
    _check_weights(names, lam)
    origins = [fetch(name) for name in names]
    checkpoints = [
        find(origin.folder, name, with_tokenizer=False)
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
    where, total = "--weights " + ",".join(f"{weight:g}" for weight in lam), fsum(lam)
    if len(parents) < 2:
        raise SpecError(
            f"a merge needs two parents, and there are {len(parents)}",
            where="PARENT",
            fix="name two folders or versions, oldest first",
        )
    if len(lam) != len(parents):
        raise SpecError(
            f"{len(lam)} weights for {len(parents)} parents",
            where=where,
            fix="one weight for each parent, in their order",
        )
    if not all(0.0 <= weight <= 1.0 for weight in lam):
        raise SpecError("a weight is not between 0 and 1", where=where, fix="weights from 0 to 1")
    if abs(total - 1.0) > 1e-6:
        fix = "weights that sum to 1"
        if total > 0.0:
            fix += ": " + ",".join(f"{weight / total:.6g}" for weight in lam)
        raise SpecError(f"the weights sum to {total:g}", where=where, fix=fix)


def verify(text: str) -> list[Finding]:
    """Pull a soup and its parents, mix them again and compare everything the manifest tells.

    Args:
        text: `models:/my-llm/14`, or a folder that `merge_checkpoints` wrote.

    Returns:
        What was checked; the soup is what it says when all of them hold.

    Raises:
        SpecError: it is no soup.
        ParentError: it, or a parent, is missing or damaged.
    """
    origin = fetch(text, fresh=True)
    manifest = _read_manifest(origin)
    origins = [fetch(source.uri, fresh=True) for source in manifest.sources]
    findings = _check_tags(origin, manifest)
    try:
        stored = find(origin.folder, text, with_tokenizer=False)
        findings += _check_soup(stored, manifest)
        parents = [find(parent.folder, parent.uri, with_tokenizer=False) for parent in origins]
        findings += [
            _compare_digests(f"parent {source.uri}", parent, source.digests)
            for parent, source in zip(parents, manifest.sources, strict=True)
        ]
        check_compatible(parents)
    except ParentError as error:  # it was a checkpoint when the soup was made
        return [*findings, Finding("files", False, f"{error.what} ({error.where})")]
    return [*findings, _merge_again(parents, manifest, stored)]


def _read_manifest(origin: Origin) -> Manifest:
    path = origin.folder / soup.MANIFEST
    if not path.is_file():
        raise SpecError(
            f"{origin.uri} is no soup: it has no {soup.MANIFEST}",
            where=str(origin.folder),
            fix="name a version that mlflow-soup run registered, or a folder that merge wrote",
        )
    try:
        return lineage.parse_manifest(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MismatchError(
            f"{soup.MANIFEST} of {origin.uri} cannot be read: {type(error).__name__} {error}",
            where=str(path),
            fix="do not use this soup: it was changed, or made by another version of this tool",
        ) from error


def _check_tags(origin: Origin, manifest: Manifest) -> list[Finding]:
    """The version's tags against the manifest, as far as there are both."""
    if not origin.uri.startswith("models:"):
        return []
    name = origin.uri.removeprefix("models:/").rpartition("/")[0]
    said = dict.fromkeys((lineage.PARENTS, lineage.LAMBDA, lineage.DIGEST), "")
    said |= {tag: origin.tags.get(tag, "") for tag in said}
    try:
        versions = lineage.parse_parents(name, said[lineage.PARENTS])
        said[lineage.PARENTS] = ",".join(version.uri for version in versions)
    except ValueError:
        pass  # shown as it is
    meant = {
        lineage.PARENTS: ",".join(source.uri for source in manifest.sources),
        lineage.LAMBDA: f"{manifest.sources[-1].lam:g}",
        lineage.DIGEST: manifest.digests.canonical if manifest.digests else "",
    }
    wrong = [
        f"{k} is {said[k]!r}, the manifest says {meant[k]!r}" for k in said if said[k] != meant[k]
    ]
    return [Finding("tags", not wrong, "; ".join(wrong) or ", ".join(said))]


def _check_soup(stored: Checkpoint, manifest: Manifest) -> list[Finding]:
    """The soup's own files against what the manifest says of them."""
    now = {name: of_file(path) for name, path in _inherited(stored)}
    wrong = _differing(now, manifest.inherited)
    detail = ", ".join(wrong[:_SHOWN]) or f"{len(now)} files"
    findings = [Finding("config and tokenizer", not wrong, detail)]
    return [*findings, _compare_digests("soup", stored, manifest.digests, files=True)]


def _differing(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    names = sorted({*now, *then})
    return [
        f"{name} is {'missing' if name not in now else 'new' if name not in then else 'changed'}"
        for name in names
        if now.get(name) != then.get(name)
    ]


def _compare_digests(
    what: str, checkpoint: Checkpoint, recorded: Digests | None, *, files: bool = False
) -> Finding:
    """The tensors of a checkpoint, and its files too if asked, against recorded digests."""
    if recorded is None:
        return Finding(what, True, "no digests were recorded")
    now = digest_all(checkpoint)
    wrong = _differing(now.tensors, recorded.tensors)
    relaid = _differing(now.files, recorded.files)
    if not wrong and now.canonical != recorded.canonical:
        wrong = [f"its digest is {now.canonical}, recorded {recorded.canonical}"]
    if files:
        wrong = wrong or relaid
    if wrong:
        return Finding(what, False, ", ".join(wrong[:_SHOWN]))
    note = ", in other files than then" if relaid else ""
    return Finding(what, True, f"{len(now.tensors)} tensors, {now.canonical}{note}")


def _merge_again(parents: Sequence[Checkpoint], manifest: Manifest, stored: Checkpoint) -> Finding:
    lam = [source.lam for source in manifest.sources]
    wrong = [_format_mismatch(found) for found in soup.compare(parents, lam, stored)]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more tensors" if len(wrong) > _SHOWN else ""
        return Finding("merged again", False, "; ".join(wrong[:_SHOWN]) + more)
    words = " + ".join(
        f"{weight:g} × {s.uri}" for weight, s in zip(lam, manifest.sources, strict=True)
    )
    return Finding("merged again", True, f"{words} gives its bytes")


def _format_mismatch(found: Mismatch) -> str:
    if not found.count:
        return f"{found.tensor} is {found.found}, its parents give {found.expected}"
    return (
        f"{found.tensor}{list(found.index)} is {found.found}, its parents give {found.expected}"
        f" ({found.count} element{'s' if found.count > 1 else ''} of this tensor differ)"
    )
