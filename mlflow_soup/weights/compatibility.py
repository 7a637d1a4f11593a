"""Whether checkpoints may be averaged, from their headers and configs: before a tensor is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_soup.errors import ParentError
from mlflow_soup.weights.checkpoint import Checkpoint, shorten
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.find import load_json

# fields that parents may disagree on, and why they may
CONFIG_MAY_DIFFER = {
    "_name_or_path": "where it was loaded from",
    "transformers_version": "who wrote it",
    "use_cache": "how fast it generates",
}
TOKENIZER_MAY_DIFFER = {
    "name_or_path": "where it was loaded from",
    "transformers_version": "who wrote it",
    "is_local": "where it was loaded from",
    "local_files_only": "how it was loaded",
}
# transformers 5 writes `dtype` where transformers 4 wrote `torch_dtype`
RENAMED = {"torch_dtype": "dtype"}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "added_tokens.json", "chat_template.jinja"),
)
_ABSENT = "absent"


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json decides what the model computes."""
    return {key: value for key, value in config.items() if key not in CONFIG_MAY_DIFFER}


def _digest_of(path: Path) -> str:
    return f"sha256 {of_file(path)[:12]}" if path.is_file() else _ABSENT


def _fields(
    file: str, first: Mapping[str, Any], second: Mapping[str, Any], may_differ: Mapping[str, str]
) -> list[str]:
    """The fields two JSON objects disagree on, nested ones by their path."""
    ours = {RENAMED.get(key, key): value for key, value in first.items()}
    theirs = {RENAMED.get(key, key): value for key, value in second.items()}
    lines = []
    for field in sorted({*ours, *theirs} - set(may_differ)):
        a, b = ours.get(field), theirs.get(field)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _fields(f"{file}: {field}", a, b, may_differ)
        elif a != b or (field in ours) != (field in theirs):
            words = [
                repr(fields[field]) if field in fields else _ABSENT for fields in (ours, theirs)
            ]
            lines.append(f"{file}: {field} is {words[0]} against {words[1]}")
    return lines


def _tokenizer_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.tokenizer / "tokenizer_config.json"
    return load_json(path, checkpoint.label) if path.is_file() else {}


def differences(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Why two checkpoints cannot be mixed, one line each; empty when they can.

    Each line names the file, the field or tensor in it, and both values, `first`'s before
    `second`'s. No tensor is read.
    """
    lines = _fields("config.json", first.config, second.config, CONFIG_MAY_DIFFER)
    for name in sorted({*first.tensors, *second.tensors}):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            holder, info = (second, b) if a is None else (first, a)
            assert info is not None
            lines.append(f"{info.file}: {name}, {info}, is only in {holder.label}")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(f"{a.file}: {name} is {a} against {b}")
    for file in TOKENIZER_FILES:
        ours, theirs = (_digest_of(c.tokenizer / file) for c in (first, second))
        if ours != theirs:
            lines.append(f"{file}: {ours} against {theirs}")
    return lines + _fields(
        "tokenizer_config.json",
        _tokenizer_config(first),
        _tokenizer_config(second),
        TOKENIZER_MAY_DIFFER,
    )


def check_compatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse parents that differ in anything but their weights' values.

    Raises:
        ParentError: with the differences of all parents from the first, in one report.
    """
    first, *others = checkpoints
    found = {other.label: lines for other in others if (lines := differences(first, other))}
    if found:
        report = [
            line if len(others) == 1 else f"{label}: {line}"
            for label, lines in found.items()
            for line in lines
        ]
        raise ParentError(
            f"{first.label} and {', '.join(found)} are not checkpoints of one model:\n    "
            + "\n    ".join(shorten(report)),
            where=f"{first.label} against {', '.join(found)}",
            fix="merge versions of one training run: same architecture, tokenizer and dtype",
        )
