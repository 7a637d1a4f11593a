"""Sign a soup that the gate has passed, and ask for that signature before a promotion.

The gate's verdict is a tag, which no signature covers. So only what passed is signed, and a
signature then means: these files, with this manifest and these parents, have passed.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlflow_soup.errors import MismatchError, StoreError
from mlflow_soup.files.signing import Signer, Verifier
from mlflow_soup.files.untrusted import UNREADABLE, parse_json, read_regular
from mlflow_soup.records import Finding, Version
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.trees import Tree, add_file, read_file
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import LARGEST, MANIFEST, SIGNATURE, parse_manifest
from mlflow_soup.weights.signature import check_tree, sign_tree
from mlflow_soup.workflows.proof import Decision
from mlflow_soup.workflows.verify import signature_finding


def add_signature(client: Store, decision: Decision, tree: Tree, signer: Signer) -> None:
    """Sign the files that passed, and add the signature to the version's artifact tree.

    Args:
        client: the store's client.
        decision: the verdict, which is passed.
        tree: the version's artifact tree; an earlier signature there is replaced.
        signer: signs.

    Raises:
        MismatchError: the files are no longer those that were judged.
        StoreError: the store returns another signature.
    """
    version = decision.proven.version
    folder = pull(client, version)  # what `prove` fetched
    own = Verifier((signer.key.public_key(),))
    signature = sign_tree(folder, signer)
    _require(decision, folder, own, signature)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / SIGNATURE
        file.write_bytes(signature)
        add_file(client, tree, file)
    stored = read_file(client, version, SIGNATURE)
    if stored != signature:
        raise StoreError(
            f"the store returns another {SIGNATURE} of {version} than it was given",
            where=version.uri,
            fix="find out who else signs this version, then run the same command again",
        )
    _require(decision, pull(client, version), own, stored)


def require_signature(client: Store, decision: Decision, verifier: Verifier) -> None:
    """Refuse a soup that no key of the verifier has signed, with all of its files.

    Raises:
        MismatchError: it has no signature, or one that does not hold.
    """
    _require(decision, pull(client, decision.proven.version), verifier)


def _require(
    decision: Decision, folder: Path, verifier: Verifier, signature: bytes | None = None
) -> None:
    version = decision.proven.version
    checked = check_tree(folder, verifier, signature)
    finding = signature_finding(checked)
    if checked is None or finding.verdict != "ok":
        raise _unsigned(version, finding)
    if wrong := _unlike(decision, folder, checked.digests):
        raise _unsigned(version, Finding("signature", "MISMATCH", (f"{wrong} is not as judged",)))


def _unlike(decision: Decision, folder: Path, signed: Mapping[str, str]) -> str:
    """The first file whose signed digest is not what was proven; empty if there is none.

    In a local store somebody could replace a file after it was proven and before it is signed.
    """
    manifest = decision.proven.manifest
    weights = find_checkpoint(folder, str(decision.proven.version), with_tokenizer=False)
    assert manifest.digests is not None
    proven = dict(manifest.inherited)
    for name, digest in manifest.digests.files.items():
        proven[(weights.weights / name).relative_to(weights.root).as_posix()] = digest
    try:
        content = read_regular(folder / MANIFEST, LARGEST)
        if parse_manifest(parse_json(content)) == manifest:
            proven[MANIFEST] = hashlib.sha256(content).hexdigest()
    except UNREADABLE:
        pass
    proven.setdefault(MANIFEST, "")
    return next((name for name in sorted(proven) if signed.get(name) != proven[name]), "")


def _unsigned(version: Version, finding: Finding) -> MismatchError:
    return MismatchError(
        f"{version} is not signed as a whole: {'; '.join(finding.details[:3])}",
        where=version.uri,
        fix=f"mlflow-soup sign {version.options}, with the key "
        "that belongs to --public-key; if somebody changed a file, do not use this version",
    )
