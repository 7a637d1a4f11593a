"""Whether checkpoints can be averaged, decided from headers and configs without the tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_soup.errors import ParentError
from mlflow_soup.weights.checkpoint import Checkpoint, shorten
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.find import load_json

# fields in which parents may differ, with what each field says
CONFIG_MAY_DIFFER = {
    "_name_or_path": "where the model was loaded from",
    "transformers_version": "which version wrote the file",
    "use_cache": "whether generation uses a cache",
}
TOKENIZER_MAY_DIFFER = {
    "name_or_path": "where the tokenizer was loaded from",
    "transformers_version": "which version wrote the file",
    "is_local": "where the tokenizer was loaded from",
    "local_files_only": "how the tokenizer was loaded",
}
# transformers 5 writes `dtype` where transformers 4 wrote `torch_dtype`
RENAMED = {"torch_dtype": "dtype"}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "added_tokens.json", "chat_template.jinja"),
)
_ABSENT = "absent"


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that decide what the model computes."""
    return {key: value for key, value in config.items() if key not in CONFIG_MAY_DIFFER}


def _digest_of(path: Path) -> str:
    return f"sha256 {of_file(path)[:12]}" if path.is_file() else _ABSENT


def _fields(
    file: str, first: Mapping[str, Any], second: Mapping[str, Any], may_differ: Mapping[str, str]
) -> list[str]:
    """One line for each field in which two JSON objects differ; a nested field has its path."""
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
    """The differences that keep two checkpoints from being mixed; empty if they can be mixed.

    Each line names a file, the field or tensor in it, and both values, the one of `first` before
    the one of `second`. No tensor is read.
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
    """Refuse parents that differ in anything but the values of their weights.

    Raises:
        ParentError: parents differ; the report lists how each parent differs from the first.
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
            fix="merge versions of one training run, with one architecture, tokenizer and dtype",
        )
