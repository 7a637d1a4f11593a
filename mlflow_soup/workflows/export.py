"""Write a soup or a registered version as one flat Hugging Face folder, with a model card.

What a soup's manifest says is checked first, as `verify` does, and the card says what was checked.
The manifest itself stays behind: it names folders of the store, and describes the tree there.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_soup.decision import gate as gates
from mlflow_soup.errors import MismatchError, ParentError
from mlflow_soup.files.durable import check_absent, check_writable, on_disk, staged
from mlflow_soup.files.signing import Verifier, open_verifier
from mlflow_soup.records import Evidence, Examination, Finding, Manifest, Score
from mlflow_soup.redaction import redact, redacting
from mlflow_soup.registry import naming
from mlflow_soup.registry.evaluations import examinations_of
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.trust import Trust, trust_of
from mlflow_soup.reporting.card import Exported, card, check_base_models
from mlflow_soup.request.names import parse_uri
from mlflow_soup.request.spec import Spec
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.flat import flatten
from mlflow_soup.weights.manifest import CARD, MANIFEST
from mlflow_soup.weights.provenance import Origin
from mlflow_soup.weights.signature import check_tree
from mlflow_soup.workflows.merge import check_local, check_outside, fetch
from mlflow_soup.workflows.verify import inspect, mismatch, read_manifest, signature_finding


@dataclass(frozen=True)
class _Checked:
    """What was checked, and what could not be, in sentences; file in the tree → its SHA-256."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)


@redacting()
@asking("export the version")
def export(
    text: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base_models: Sequence[str] = (),
    experiment: str = "",
    public_key: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "",
    allow_missing: bool = False,
) -> Exported:
    """Write a version of any layout as one flat folder, with a model card that the Hub takes.

    `from_pretrained`, `lm_eval`, `vllm serve` and `hf upload` take the folder. It appears once it
    is complete. No code of the version is loaded or copied.

    Args:
        text: `models:/my-llm@champion`, or a folder; a soup or any other checkpoint.
        out: a folder that does not exist yet.
        base_models: ids on the Hugging Face Hub that the card names as base models.
        experiment: the MLflow experiment whose scores count; empty for MLflow's choice.
        public_key: PEM files; one of these keys must have signed all files, and only scores that
            one of them signed count.
        allow_missing: export a soup whose parents are gone, too.

    Returns:
        What the model card tells.

    Raises:
        SpecError: `out` exists, a base model is no id, or a public key cannot be read.
        MismatchError: the soup is not what its manifest says, or is not signed.
        ParentError: the version does not exist, is damaged or needs code; or a parent is gone.
        StoreError: the disk is full, or a store cannot be reached.
    """
    name, out = os.fspath(text), Path(out)
    check_base_models(base_models)
    check_local(out)
    check_absent(out)
    check_writable(out)
    spec = Spec(experiment=experiment, public_key=public_key)
    client = connect() if name.startswith("models:") else None
    checked = _Checked()
    origin = fetch(name, "URI", client=client, fresh=True)
    check_outside(out, origin, name)
    checkpoint = find_checkpoint(origin.folder, origin.uri)
    checkpoint.tell_passed_over()
    if spec.public_keys:
        _check_signature(origin, open_verifier(spec.public_keys), checked)
    manifest = _manifest_of(origin)
    if manifest is None:
        checked.left.append("It is no soup, so there is no manifest to compare it with.")
    else:
        _check_soup(origin, manifest, client, checked, allow_missing=allow_missing)
        if manifest.digests is not None:
            below = checkpoint.weights.relative_to(checkpoint.root)
            files = manifest.digests.files.items()
            checked.expected.update({(below / k).as_posix(): v for k, v in files})
    recorded = manifest.digests if manifest is not None else None
    found = recorded.canonical if recorded is not None else digest(checkpoint)
    evidence: Evidence | None = None
    unscored = "only soups have scores that name their exact weights"
    if manifest is not None and client is not None:
        evidence, unscored = _scores(trust_of(client, spec), manifest, found)
    with staged(out) as folder:
        copies = flatten(checkpoint, folder)
        _compare(copies, checkpoint, checked)
        _check_flat(folder, checkpoint)
        told = Exported(
            origin.uri if client is not None else Path(name).name,
            _title(origin),
            manifest,
            tuple(checked.done),
            tuple(checked.left),
            dict(evidence.ood) if evidence is not None else {},
            unscored,
            found,
            _dtype(checkpoint),
            {file: copies[checkpoint.weights / file] for file in checkpoint.files()},
            tuple(base_models),
            evidence.held_out if evidence is not None and _is_told(evidence.held_out) else None,
        )
        with on_disk(folder / CARD):
            (folder / CARD).write_text(redact(card(told)), encoding="utf-8")
    return told


def _title(origin: Origin) -> str:
    """`my-llm v14`, or the name of a folder."""
    if not origin.uri.startswith("models:"):
        return Path(origin.uri).name
    name, ref = parse_uri(origin.uri)
    return f"{name} v{ref.number}"


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most elements."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += math.prod(info.shape)
    return max(counts, key=lambda dtype: counts[dtype])


def _manifest_of(origin: Origin) -> Manifest | None:
    """The manifest of a soup; None for another checkpoint.

    Raises:
        MismatchError: it cannot be read; or the version has a soup's tags, and no manifest.
    """
    if os.path.lexists(origin.folder / MANIFEST):
        return read_manifest(origin)
    if naming.DIGEST in origin.tags:
        gone = Finding(
            "manifest", "MISMATCH", (f"its tags are those of a soup, without {MANIFEST}",)
        )
        raise mismatch(origin.uri, origin.uri, [gone])
    return None


def _check_signature(origin: Origin, verifier: Verifier, checked: _Checked) -> None:
    """Refuse what no key of the verifier has signed, with all of its files.

    Raises:
        MismatchError: it has no signature, or one that does not hold.
        SpecError: model-signing is not installed.
    """
    signature = check_tree(origin.folder, verifier)
    finding = signature_finding(signature)
    if signature is None or finding.verdict != "ok":
        raise MismatchError(
            f"{origin.uri} is not signed as a whole: {'; '.join(finding.details[:3])}",
            where=origin.uri,
            fix="let the holder of a key of --public-key sign it: mlflow-soup sign; if somebody "
            "changed a file, do not use this version",
        )
    checked.expected.update(signature.digests)
    checked.done.append(f"All of its files are signed by the key `{signature.key}`.")


def _check_soup(
    origin: Origin,
    manifest: Manifest,
    client: Store | None,
    checked: _Checked,
    *,
    allow_missing: bool,
) -> None:
    """Compare a soup with its manifest, as `verify` does.

    Raises:
        MismatchError: it is not what its manifest says.
        ParentError: a parent is gone, and `allow_missing` is False.
    """
    findings = list(inspect(origin, manifest, client=client))
    if wrong := [finding for finding in findings if finding.verdict == "MISMATCH"]:
        raise mismatch(origin.uri, origin.uri, wrong)
    gone = [finding for finding in findings if finding.verdict == "missing"]
    if gone and not allow_missing:
        raise ParentError(
            f"{origin.uri} cannot be verified: {gone[0].what} is missing: {gone[0].details[0]}",
            where=origin.uri,
            fix="restore the parent; or give --allow-missing, and the card says that the parents "
            "were not merged again",
        )
    if manifest.digests is None:
        checked.left.append("Its manifest records no digests of its files and tensors.")
    else:
        checked.done.append("Its files and tensors have the digests of its manifest.")
    checked.expected.update(manifest.inherited)
    if findings[-1].verdict == "ok":  # the last is about the mixture
        checked.done.append("Its parents were merged again, and gave exactly these weights.")
        checked.done.append("Config, tokenizer and licences are those of its newest parent.")
    elif gone:
        checked.left.append("Its parents were not merged again: a parent is missing.")
    else:
        why = f"the statistics of {manifest.method} are not stored"
        checked.left.append(f"Its parents were not merged again: {why}.")


def _scores(trust: Trust, manifest: Manifest, of: str) -> tuple[Evidence | None, str]:
    """The scores of a soup that count, or the reason why there are none.

    They are computed from items that name these weights, this config and this tokenizer. Scores on
    a test set do not name the config, and are not told.
    """
    why = "no out-of-domain scores of it are stored where they count"
    for examination in examinations_of(trust, of):
        evidence = examination.of(of)
        if evidence is None:
            continue
        reason = _unfit(examination, manifest)
        if not reason:
            return evidence, ""
        why = reason
    return None, why


def _unfit(examination: Examination, manifest: Manifest) -> str:
    """Why the scores of an examination are not told, in words; empty if they are."""
    if examination.settings["inherited"] != naming.key_of(manifest.inherited):
        return "it was scored with another config or tokenizer"
    if examination.settings["limit"] is not None:
        return "it was scored on the first items of each task only"
    if reason := gates.inconsistent(examination):
        return reason
    ood = examination.roles["soup"].ood
    return "" if all(_is_told(score) for _, score in ood) else "its metrics are not its scores"


def _is_told(score: Score) -> bool:
    """Whether the numbers of lm-eval in a score are the score that its items add up to."""
    signed = [m.value if m.higher_is_better else -m.value for m in score.metrics]
    mean = math.fsum(signed) / max(len(signed), 1)
    return bool(signed) and math.isclose(mean, score.value, rel_tol=1e-9, abs_tol=1e-12)


def _compare(copies: Mapping[Path, str], checkpoint: Checkpoint, checked: _Checked) -> None:
    """Refuse copies that are not the files that were checked.

    Raises:
        MismatchError: a file was changed between the check and the copy.
    """
    for path, sha256 in copies.items():
        file = path.relative_to(checkpoint.root).as_posix()
        if sha256 != checked.expected.get(file, sha256):
            changed = Finding(file, "MISMATCH", ("it was changed while it was exported",))
            raise mismatch(checkpoint.label, checkpoint.label, [changed])


def _check_flat(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse a flat folder that is no checkpoint, or whose tokenizer reads texts in another way.

    Raises:
        ParentError: it is.
    """
    flat = find_checkpoint(folder, checkpoint.label)
    if checkpoint.tokenizer == checkpoint.weights:
        return
    # importing transformers takes longer than the export of a gigabyte
    from mlflow_soup.evaluation.loading import reads_alike

    if not reads_alike(checkpoint, flat):
        raise ParentError(
            f"the tokenizer of {checkpoint.label} makes other tokens beside the model's config "
            "than in its own folder",
            where=str(checkpoint.tokenizer),
            fix="name the tokenizer's class in tokenizer_config.json, and register the version "
            "again",
        )
