"""Check a user's folders of task YAMLs: plain data pass, code needs an allowed digest.

A policy tag may name such a folder. A person who can write tags or the folder must not be able to
run code here. Plain YAML is only data for lm-eval: prompts are templates in a sandbox, and items
come from JSON, CSV, text or Parquet. This module finds everything else before lm-eval sees it. It
reads the YAML without executing anything, and looks for Python functions and classes; for metrics,
prompts and generation settings that libraries fetch as code; and for data and YAML from outside the
folder.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # private door; the import fills the registry
import lm_eval.api.registry  # private door

from mlflow_soup.errors import SpecError
from mlflow_soup.files.untrusted import LARGEST_YAML, Function, parse_yaml, read_regular

# arguments of datasets.load_dataset and of a model's generate that hold only numbers and names
DATASET_KWARGS = {
    *("data_files", "data_dir", "field", "revision", "encoding", "sep", "delimiter"),
    *("column_names", "split", "keep_linebreaks", "sample_by"),
}
GENERATION_KWARGS = {
    *("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams"),
    *("max_gen_toks", "max_tokens", "max_length", "max_new_tokens", "max_completion_tokens"),
    *("min_new_tokens", "length_penalty", "early_stopping", "repetition_penalty"),
    "no_repeat_ngram_size",
}
# keys that could give trusted functions other data, or switch off a warning
NOT_IN_GROUPS = ("dataset_path", "dataset_kwargs", "unsafe_code")
# (value, the entry that holds it, all folders) → reasons to refuse it
_Check = Callable[[Any, Mapping[Any, Any], Sequence[Path]], Iterator[str]]
_FILES = ("json", "csv", "text", "parquet")
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?")
_GLOB = frozenset("*?[{")


def check(include_path: str, allowed: Collection[str], where: str) -> bool:
    """Refuse folders that hold more than data, unless their digest is allowed.

    Args:
        include_path: folders, separated as in PATH.
        allowed: digests of folders whose code may run.
        where: the option or tag that names the folders, for errors.

    Returns:
        True when a folder holds code that may run.

    Raises:
        SpecError: a folder holds code that is not allowed (the error gives its digest and the
            option that allows it), or YAML that cannot be read.
    """
    found = False
    folders = [Path(name) for name in include_path.split(os.pathsep) if name]
    for folder in folders:
        reason = next(_reasons(folder, folders), None)
        if reason is None:
            continue
        found, its = True, digest(folder)
        if its not in allowed:
            raise SpecError(
                reason,
                where=f"{where}: task folder {folder}",
                fix="remove this from the folder; or read all its files, and if you trust "
                f"them, give --allow-task-code {its}",
            )
    return found


def digest(folder: Path) -> str:
    """The SHA-256 of all names and contents in a folder, `__pycache__` included."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind, content = "folder", ""
        if path.is_symlink():
            kind, content = "link", os.readlink(path)
        if path.is_file():
            with path.open("rb") as file:
                content += hashlib.file_digest(file, "sha256").hexdigest()
            kind += " file"
        whole.update(f"{kind} {path.relative_to(folder).as_posix()!r} {content!r}\n".encode())
    return whole.hexdigest()


def _reasons(folder: Path, folders: Sequence[Path]) -> Iterator[str]:
    """The reasons why a folder holds more than data, one reason per finding."""
    pending = sorted(folder.rglob("*.yaml"))
    seen = set(pending)
    for path in pending:  # the list grows when a YAML includes another file
        try:
            content = parse_yaml(read_regular(path, LARGEST_YAML))
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{path} cannot be read: {error}",
                where=f"task folder {folder}",
                fix=f"correct {path}, or move it out of the folder",
            ) from error
        for function in _functions(content):
            yield f"{path} runs a Python function, {function}"
        if not isinstance(content, dict):
            continue  # lm-eval does not take it for a task
        for reason in _of_entry(content, folders, "group" in content):
            yield f"{path} {reason}"
        for included in _texts(content.get("include")):
            target = path.parent / included
            if not _inside(target, [folder]):
                yield f"{path} includes {included!r}, which is outside its folder"
            elif target not in seen:
                seen.add(target)
                pending.append(target)


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    path = path.resolve()
    return any(path.is_relative_to(folder.resolve()) for folder in folders)


def _of_entry(entry: Mapping[Any, Any], folders: Sequence[Path], in_group: bool) -> Iterator[str]:
    """The reasons to refuse a task or group: what it does besides reading its own data."""
    for key, value in entry.items():
        if key in _CHECKS:
            yield from _CHECKS[key](value, entry, folders)
        if in_group and key in NOT_IN_GROUPS:
            yield f"replaces the {key} of its tasks"
        if key in ("task", "group", "tag"):  # lm-eval sorts these names, so each must be text
            names = value if isinstance(value, list) else [value]
            for odd in (name for name in names if not isinstance(name, str | dict)):
                yield f"has a {key} named {odd!r}, which is not text"
        if isinstance(value, list) and key in ("task", "task_list"):
            for member in value:
                if isinstance(member, dict):
                    yield from _of_entry(member, folders, True)


def _runs(what: str) -> _Check:
    def check(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
        yield f"{what} ({value})"

    return check


def _of_metrics(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    for entry in value if isinstance(value, list) else []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if isinstance(entry, dict) and entry.get("hf_evaluate"):
            yield f"takes metric {name!r} from the evaluate library, which downloads code"
        elif (
            not isinstance(name, Function) and str(name) not in lm_eval.api.registry.METRIC_REGISTRY
        ):
            yield f"has metric {name!r}, which lm-eval does not have and would download as code"


def _of_generation(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    odd = sorted(map(str, value.keys() - GENERATION_KWARGS)) if isinstance(value, dict) else []
    if odd:
        yield f"generates with {', '.join(odd)}, which could name code"


def _of_unsafe(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if value is not True:  # `load_suite` refuses tasks with unsafe_code: true
        yield "declares its code safe (unsafe_code)"


def _of_path(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if not isinstance(value, str) or value in _FILES:
        return
    if not _HUB.fullmatch(value) or os.path.lexists(value):
        yield f"takes its data from {value!r}, which is not {', '.join(_FILES)} or a Hub dataset"


def _of_dataset(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    odd = sorted(map(str, value.keys() - DATASET_KWARGS - {"trust_remote_code"}))
    if value.get("trust_remote_code"):
        odd.append("trust_remote_code")
    if odd:
        yield f"loads its data with {', '.join(odd)}"
    place = str(value.get("data_dir") or "")
    if place:
        if "://" in place or not _inside(Path(place).expanduser(), folders):
            yield f"takes its data from {place!r}, which is outside its folder"
        elif any(path.is_symlink() for path in Path(place).expanduser().rglob("*")):
            yield f"takes its data from {place!r}, which contains links"
    for file in _texts(value.get("data_files")):
        on_the_hub = "/" in str(task.get("dataset_path", "")) and ".." not in file
        if "://" in file or "::" in file or _GLOB & set(file):
            yield f"takes its data from {file!r}, which is not a plain file"
        elif not (on_the_hub and not os.path.isabs(file) and not place) and not _inside(
            Path(place).expanduser() / file, folders
        ):
            yield f"takes its data from {file!r}, which is outside its folder"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif value is not None:
        yield str(value)


_CHECKS: dict[str, _Check] = {
    "class": _runs("is a Python class"),
    "custom_dataset": _runs("makes its data with code"),
    "use_prompt": _runs("takes prompts from another place"),
    "metric_list": _of_metrics,
    "generation_kwargs": _of_generation,
    "unsafe_code": _of_unsafe,
    "dataset_path": _of_path,
    "dataset_kwargs": _of_dataset,
}
