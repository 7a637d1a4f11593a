"""Whether checkpoints can be averaged, decided from headers, configs and tokenizers alone."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlflow_soup.errors import ParentError
from mlflow_soup.weights.checkpoint import Checkpoint, shorten
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.find import load_json
from mlflow_soup.weights.inherit import AUTO_MAP, TEMPLATES, is_of_tokenizer

# fields in which parents may differ, with what each field says
CONFIG_MAY_DIFFER = {
    "_name_or_path": "where the model was loaded from",
    "transformers_version": "which version wrote the file",
    "use_cache": "whether generation uses a cache",
    AUTO_MAP: "code; it counts only where transformers has none, which `find_checkpoint` refuses",
}
TOKENIZER_MAY_DIFFER = {
    "name_or_path": "where the tokenizer was loaded from",
    "transformers_version": "which version wrote the file",
    "is_local": "where the tokenizer was loaded from",
    "local_files_only": "how the tokenizer was loaded",
    AUTO_MAP: "code, as above",
}
# transformers 5 writes `dtype` where transformers 4 wrote `torch_dtype`
RENAMED = {"torch_dtype": "dtype"}
_CONFIG = "tokenizer_config.json"
_ABSENT = "absent"
_LONGEST = 200  # characters of a value in a report


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that decide what the model computes."""
    return {key: value for key, value in config.items() if key not in CONFIG_MAY_DIFFER}


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
                _shown(fields[field]) if field in fields else _ABSENT for fields in (ours, theirs)
            ]
            lines.append(f"{file}: {field} is {words[0]} against {words[1]}")
    return lines


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _tokenizer_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.tokenizer / _CONFIG
    return load_json(path, checkpoint.label) if path.is_file() else {}


def differences(first: Checkpoint, second: Checkpoint) -> list[str]:
    """The differences that keep two checkpoints from being mixed; empty if they can be mixed.

    Each line names a file, the field or tensor in it, and both values, the one of `first` before
    the one of `second`. No tensor is read. Where configs or tokenizers have other bytes, what
    transformers loads is compared: other versions of it write the same model in another way.
    """
    configs = _fields("config.json", first.config, second.config, CONFIG_MAY_DIFFER)
    tokenizers = _tokenizer_files(first, second)
    if configs or tokenizers:
        # importing transformers takes longer than merging folders of a gigabyte
        from mlflow_soup.evaluation.loading import config_as_loaded, tokenizer_as_loaded

        if configs:
            configs = _as_loaded("config.json", config_as_loaded, first, second, configs)
        if tokenizers:
            tokenizers = _as_loaded("tokenizer", tokenizer_as_loaded, first, second, tokenizers)
    return configs + _tensors(first, second) + tokenizers


def _as_loaded(
    what: str,
    load: Callable[[Checkpoint], Mapping[str, Any] | None],
    first: Checkpoint,
    second: Checkpoint,
    in_text: list[str],
) -> list[str]:
    """The differences between what transformers loads; those in the text if it cannot load both."""
    ours, theirs = load(first), load(second)
    if ours is None or theirs is None:
        return in_text
    return _fields(what, ours, theirs, CONFIG_MAY_DIFFER)


def _tensors(first: Checkpoint, second: Checkpoint) -> list[str]:
    """One line for each kind of difference, with the first tensor that has it."""
    kinds = defaultdict[tuple[str, ...], list[str]](list)
    for name in sorted({*first.tensors, *second.tensors}):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            holder, info = (second, b) if a is None else (first, a)
            assert info is not None
            kinds["only", holder.label].append(
                f"{info.file}: {name}, {info}, is only in {holder.label}"
            )
        elif a.shape != b.shape:
            kinds["shape",].append(f"{a.file}: {name} is {a} against {b}")
        elif a.dtype != b.dtype:
            kinds[a.dtype, b.dtype].append(f"{a.file}: {name} is {a} against {b}")
    return [
        lines[0] + (f"; {len(lines) - 1} more tensors differ in this way" if lines[1:] else "")
        for lines in kinds.values()
    ]


def _tokenizer_files(first: Checkpoint, second: Checkpoint) -> list[str]:
    """One line for each file of the tokenizers that differs, or for each field of their config."""
    ours, theirs = (_digests(checkpoint) for checkpoint in (first, second))
    lines = [
        f"{name}: {ours.get(name, _ABSENT)} against {theirs.get(name, _ABSENT)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    return lines + _fields(
        "tokenizer_config.json",
        _tokenizer_config(first),
        _tokenizer_config(second),
        TOKENIZER_MAY_DIFFER,
    )


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Each file that a tokenizer may load, but its config → its digest, in short."""
    home = checkpoint.tokenizer
    paths = [*home.iterdir(), *(home / TEMPLATES).glob("*")]
    return {
        path.relative_to(home).as_posix(): f"sha256 {of_file(path)[:12]}"
        for path in paths
        if path.is_file() and is_of_tokenizer(path.name) and path.name != _CONFIG
    }


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
