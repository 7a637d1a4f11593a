"""Check a soup against its manifest: its files, its tags, its parents, and their mixture."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_soup.errors import MismatchError, ParentError, SpecError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.files.signing import Verifier, open_verifier
from mlflow_soup.files.untrusted import (
    LARGEST_YAML,
    UNREADABLE,
    parse_json,
    parse_yaml,
    read_regular,
)
from mlflow_soup.records import Digests, Finding, Manifest, Mismatch, Version
from mlflow_soup.redaction import redacting
from mlflow_soup.registry import naming
from mlflow_soup.request.names import parse_uri
from mlflow_soup.request.spec import Spec
from mlflow_soup.weights import soup
from mlflow_soup.weights.checkpoint import Checkpoint, shorten
from mlflow_soup.weights.digests import digest_all, of_file
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.inherit import digest_of_copy
from mlflow_soup.weights.manifest import LARGEST, MANIFEST, SIGNATURE, parse_manifest
from mlflow_soup.weights.provenance import Origin, inherited
from mlflow_soup.weights.signature import Checked, check_library, check_tree
from mlflow_soup.workflows.merge import fetch

if TYPE_CHECKING:
    from mlflow_soup.registry.store import Store

_SHOWN = 10  # number of tensors or files that a finding names


def verify(
    text: str | os.PathLike[str],
    *,
    public_key: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "",
    promoted: bool = False,
) -> Iterator[Finding]:
    """Pull a soup and its parents, merge them again, and compare all with the manifest.

    Args:
        text: `models:/my-llm/14`, or a folder that `merge_checkpoints` wrote.
        public_key: PEM files, as in a `Spec`; one of these keys must have signed all files.
        promoted: also ask whether `mlflow-soup` promoted the soup to the alias that `text` names;
            with public keys, one of them must have signed the ledger's entry.

    Yields:
        One finding for each check. The soup matches its manifest if no finding is a mismatch. With
        public keys, the first finding is about the signature, which may also be missing.

    Raises:
        SpecError: the version or folder is not a soup; or a public key cannot be read, or the
            extra `sign` is not installed; or `promoted` is asked of what is no alias.
        MismatchError: the soup's manifest cannot be read.
        ParentError: the version or folder does not exist.
    """
    _, _, findings = open_soup(text, public_key=public_key, promoted=promoted)
    yield from findings


@redacting()
def open_soup(
    text: str | os.PathLike[str],
    *,
    public_key: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "",
    promoted: bool = False,
) -> tuple[Origin, Manifest, Iterator[Finding]]:
    """Pull a soup, and read its manifest; arguments and errors are those of `verify`.

    Returns:
        Where the soup came from, with an alias resolved; its manifest; and the findings of
        `verify`, which are made one after the other.
    """
    files = Spec(public_key=public_key).public_keys
    verifier = open_verifier(files) if files else None
    if verifier is not None:
        check_library()
    name = os.fspath(text)
    alias = _alias_of(name) if promoted else ""
    origin = fetch(name, "SOUP", fresh=True)
    manifest = read_manifest(origin)
    return origin, manifest, _findings(origin, manifest, verifier, alias)


def _alias_of(text: str) -> str:
    alias = parse_uri(text, "SOUP")[1].alias if text.startswith("models:") else None
    if not alias:
        raise SpecError(
            f"{text} names no alias, so no promotion can be asked for",
            where="--promoted",
            fix="name the alias: mlflow-soup verify models:/my-llm@champion --promoted",
        )
    return alias


def _findings(
    origin: Origin, manifest: Manifest, verifier: Verifier | None, alias: str
) -> Iterator[Finding]:
    with redacting():
        if verifier is not None:
            yield signature_finding(check_tree(origin.folder, verifier))
        if alias:
            yield _check_promotion(origin, manifest, verifier, alias)
        yield from inspect(origin, manifest)


def _check_promotion(
    origin: Origin, manifest: Manifest, verifier: Verifier | None, alias: str
) -> Finding:
    """Compare where an alias points with the ledger: somebody may have moved it by hand."""
    from mlflow_soup.registry import promotion, store  # only here: importing mlflow takes seconds

    name, ref = parse_uri(origin.uri)
    version = Version(name, ref.number or 0)
    digest = manifest.digests.canonical if manifest.digests else ""
    wrong = promotion.objection(store.connect(), version, alias, digest, verifier)
    return _finding("promotion", [wrong] if wrong else [], f"{version} was promoted to @{alias}")


def status(findings: Sequence[Finding]) -> str:
    """What all findings come to: the worst of them, in one word.

    Returns:
        `unsigned`, `mismatch`, `missing` (a parent), `unpromoted` (nothing else is wrong),
        `recorded` (nothing is wrong, but the parents were not merged again) or `verified`.
    """
    about_it = [finding for finding in findings if finding.what != "promotion"]
    verdicts = {finding.verdict for finding in about_it}
    if any(finding.what == "signature" and finding.verdict != "ok" for finding in findings):
        return "unsigned"
    if not verdicts.isdisjoint({"MISMATCH", "missing"}):
        return "mismatch" if "MISMATCH" in verdicts else "missing"
    if not all(finding.holds for finding in findings):
        return "unpromoted"
    last = findings[-1]  # about the mixture
    return "verified" if (last.what, last.verdict) == ("merged again", "ok") else "recorded"


def signature_finding(checked: Checked | None) -> Finding:
    """A check of a soup's signature, in words; None: it has none."""
    if checked is None:
        return Finding("signature", "missing", (f"there is no {SIGNATURE}",))
    return _finding(
        "signature", checked.wrong, f"{len(checked.digests)} files, by the key {checked.key}"
    )


def inspect(
    origin: Origin,
    manifest: Manifest,
    *,
    client: "Store | None" = None,
    at_hand: Mapping[str, Origin] | None = None,
    blend: soup.Blend | None = None,
) -> Iterator[Finding]:
    """Compare a soup that was fetched with its manifest.

    Args:
        origin: the soup.
        manifest: its manifest.
        client: the store's client; a new one without patience by default.
        at_hand: URI → parents that were fetched already; the others are fetched anew.
        blend: how statistics mix the tensors, if the manifest's method needs statistics and they
            are at hand; the linear methods need none.

    Yields:
        One finding for each check; the last is about the mixture.
    """
    name, at_hand = origin.uri, at_hand or {}
    yield _check_tags(origin, manifest)
    stored = _open(origin, name)
    if isinstance(stored, Finding):
        yield stored
    else:
        yield _check_inherited(stored, manifest)
        yield _check_digests("soup", stored, manifest.digests, files=True)
    parents = []
    for source in manifest.sources:
        try:
            found = at_hand.get(source.uri) or _fetch_parent(origin, source.uri, client)
            parent = _open(found, source.uri)
        except ParentError as error:
            parent = Finding(f"parent {source.uri}", "missing", (error.what,))
        except SpecError as error:
            parent = Finding(f"parent {source.uri}", "MISMATCH", (error.what,))
        if isinstance(parent, Finding):
            yield parent
        else:
            yield _check_digests(f"parent {source.uri}", parent, source.digests)
            parents.append(parent)
    if isinstance(stored, Finding) or len(parents) < len(manifest.sources):
        yield Finding("merged again", "skipped", ("a checkpoint is missing or damaged",))
        return
    yield _check_donor(stored, parents[-1])
    yield _check_flavors(stored, parents[-1])
    if manifest.method == "linear" or blend is not None:
        yield _merge_again(parents, manifest, stored, blend)
    else:
        why = f"{manifest.method} needs statistics that are not stored with the soup"
        yield Finding("merged again", "skipped", (why,))


def _open(origin: Origin, name: str) -> Checkpoint | Finding:
    """The checkpoint, or a finding if it is no longer a valid one."""
    try:
        return find_checkpoint(origin.folder, name, with_tokenizer=False)
    except ParentError as error:
        return Finding(name, "MISMATCH", (error.what, error.where))


def _fetch_parent(origin: Origin, uri: str, client: "Store | None") -> Origin:
    if origin.uri.startswith("models:") and not uri.startswith("models:"):
        # a manifest from the registry must not choose which local folders are read
        raise ParentError(
            "a local folder of the machine that merged the soup",
            where=uri,
            fix="merge registered versions, so that the soup can be verified from the registry",
        )
    return fetch(uri, "parents of the manifest", client=client, fresh=True)


def read_manifest(origin: Origin) -> Manifest:
    """The manifest of a soup that was fetched.

    Raises:
        SpecError: it has none, so it is not a soup.
        MismatchError: it cannot be read.
    """
    path = origin.folder / MANIFEST
    if not path.is_file():
        raise SpecError(
            f"{origin.uri} is not a soup: it has no {MANIFEST}",
            where=str(origin.folder),
            fix="name a version that mlflow-soup run registered, or a folder that mlflow-soup "
            "merge wrote",
        )
    try:
        return parse_manifest(parse_json(read_regular(path, LARGEST)))
    except UNREADABLE as error:
        raise MismatchError(
            f"{MANIFEST} of {origin.uri} cannot be read: {type(error).__name__} {error}",
            where=str(path),
            fix="do not use this soup: someone changed it, or another version of mlflow-soup "
            "made it",
        ) from error


def mismatch(name: str, uri: str, wrong: Sequence[Finding]) -> MismatchError:
    """The error for a soup that is not what its manifest says.

    Args:
        name: the soup, in words.
        uri: what `verify` takes.
        wrong: the findings that say so.
    """
    said = [f"{f.what}: {'; '.join(f.details[:3])}" for f in wrong]
    return MismatchError(
        f"{name} is not what its manifest says: {' | '.join(said)}",
        where=uri,
        fix="do not use this version: somebody changed its files, tags or parents; mlflow-soup "
        f"verify {shlex.quote(uri)} shows all differences",
    )


def _finding(what: str, wrong: Sequence[str], *sound: str) -> Finding:
    return Finding(what, "MISMATCH" if wrong else "ok", tuple(shorten(wrong, _SHOWN)) or sound)


def _check_tags(origin: Origin, manifest: Manifest) -> Finding:
    """Compare the version's tags with the manifest."""
    names = (naming.PARENTS, naming.LAMBDA, naming.WEIGHTS, naming.DIGEST)
    said = {tag: origin.tags[tag] for tag in names if tag in origin.tags}
    if not said:
        return Finding("tags", "skipped", ("mlflow-soup run did not register this soup",))
    model = origin.uri.removeprefix("models:/").rpartition("/")[0]
    parents = tuple(source.uri for source in manifest.sources)
    meant = {
        naming.PARENTS: parents,
        naming.LAMBDA: f"{manifest.sources[-1].lam:g}",
        naming.WEIGHTS: naming.format_weights([source.lam for source in manifest.sources]),
        naming.DIGEST: manifest.digests.canonical if manifest.digests else None,
    }
    read: dict[str, Any] = {**dict.fromkeys(names), **said}
    try:
        versions = naming.parse_parents(model, said.get(naming.PARENTS, ""))
        read[naming.PARENTS] = tuple(version.uri for version in versions)
    except ValueError:
        pass  # the finding shows the text of the tag
    wrong = [
        f"{tag} is {said.get(tag)!r}, but the manifest says {meant[tag]!r}"
        for tag in names
        if read[tag] != meant[tag]
    ]
    return _finding("tags", wrong, ", ".join(names))


def _check_inherited(stored: Checkpoint, manifest: Manifest) -> Finding:
    """Compare the files that come from the newest parent with their recorded digests."""
    now = {name: of_file(path) for name, path in inherited(stored)}
    # 0.1.0 let a soup inherit its parent's signature
    then = {name: digest for name, digest in manifest.inherited.items() if name != SIGNATURE}
    return _finding("other files", _differing(now, then), f"{len(now)} files")


def _check_donor(stored: Checkpoint, donor: Checkpoint) -> Finding:
    """Compare the files that come from the newest parent with the parent's own.

    The manifest alone does not vouch for them: whoever changes a config can change it, too.
    """
    ours = {name: of_file(path) for name, path in inherited(stored)}
    # what a soup leaves out, such as pickles, is not even read
    theirs = {
        name: digest_of_copy(path, donor.label) for name, path in inherited(donor) if name in ours
    }
    wrong = [
        f"{name} is {'not in' if name not in theirs else 'unlike that of'} the newest parent"
        for name, digest in ours.items()
        if theirs.get(name) != digest
    ]
    return _finding("inherited files", wrong, f"{len(ours)} files, as in the newest parent")


def _differing(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    names = sorted({*now, *then})
    return [
        f"{name} is {'missing' if name not in now else 'new' if name not in then else 'changed'}"
        for name in names
        if now.get(name) != then.get(name)
    ]


def _check_digests(
    what: str, checkpoint: Checkpoint, recorded: Digests | None, *, files: bool = False
) -> Finding:
    """Compare the tensors of a checkpoint, and with `files` its files too, with their digests."""
    if recorded is None:
        return Finding(what, "skipped", ("no digests were recorded",))
    now = digest_all(checkpoint)
    wrong = _differing(now.tensors, recorded.tensors)
    laid_out_anew = _differing(now.files, recorded.files)
    if not wrong and now.canonical != recorded.canonical:
        wrong = [f"the digest is {now.canonical}, but {recorded.canonical} was recorded"]
    if files and not wrong:
        wrong = laid_out_anew
    note = ", in other files than recorded" if laid_out_anew else ""
    return _finding(what, wrong, f"{len(now.tensors)} tensors, {now.canonical}{note}")


def _check_flavors(stored: Checkpoint, donor: Checkpoint) -> Finding:
    """Compare how MLflow loads the soup with how it loads the newest parent."""
    ours, theirs = (_read_mlmodel(checkpoint.root / "MLmodel") for checkpoint in (stored, donor))
    fields = ("flavors", "signature", "loader_module")
    wrong = [f"{field} of MLmodel" for field in fields if ours.get(field) != theirs.get(field)]
    return _finding("flavours", wrong, ", ".join(ours.get("flavors") or ()) or "a plain folder")


def _read_mlmodel(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_yaml(read_regular(path, LARGEST_YAML))
    except (OSError, ValueError) as error:
        return {"flavors": {f"unreadable: {error}": None}}
    return content if isinstance(content, dict) else {"flavors": {"unreadable": None}}


def _merge_again(
    parents: Sequence[Checkpoint],
    manifest: Manifest,
    stored: Checkpoint,
    blend: soup.Blend | None,
) -> Finding:
    lam = [source.lam for source in manifest.sources]
    try:
        check_compatible(parents)
        wrong = [_format(found) for found in soup.compare(parents, lam, stored, blend=blend)]
    except ParentError as error:  # a parent changed after the merge
        wrong = [error.what]
    pairs = zip(lam, manifest.sources, strict=True)
    return _finding(
        "merged again",
        wrong,
        " + ".join(f"{weight:g} × {source.uri}" for weight, source in pairs) + " gives its bytes",
    )


def _format(found: Mismatch) -> str:
    if not found.count:
        return f"{found.tensor} is {found.found}, but its parents give {found.expected}"
    return (
        f"{found.tensor}{list(found.index)} is {found.found}, but its parents give {found.expected}"
        f" ({found.count} element{'s' if found.count > 1 else ''} of this tensor differ)"
    )
