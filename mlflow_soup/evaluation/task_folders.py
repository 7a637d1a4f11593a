"""Read a user's folders of task YAMLs: plain data pass, code needs an allowed digest.

A policy tag may name such a folder. A person who can write tags or the folder must not be able to
run code here. Plain YAML is only data for lm-eval: prompts are templates in a sandbox, and items
come from JSON, CSV, text or Parquet. So this module reads the YAML itself, without executing
anything, and lm-eval builds each task from what was read. Before that, includes and the changes
that groups make are resolved, and the result is judged: it may not hold Python functions and
classes; metrics, prompts and generation settings that libraries fetch as code; or data from outside
the folder.

A folder whose digest is allowed is copied first. The digest is that of the copy, and lm-eval loads
the copy.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets.packaged_modules
import jinja2
import lm_eval.api.metrics  # private door; the import fills the registry
import lm_eval.api.registry  # private door
from lm_eval.tasks import _index  # private door
from lm_eval.tasks._factory import TaskFactory  # private door

from mlflow_soup.errors import ObjectiveError, SoupError, SpecError, brief
from mlflow_soup.evaluation.task_data import LOCAL, Empty, Reader, texts
from mlflow_soup.files.durable import check_writable, scratch
from mlflow_soup.files.untrusted import (
    LARGEST_YAML,
    Function,
    open_regular,
    parse_yaml,
    read_regular,
)

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
_WHOLE = {
    *("num_beams", "top_k", "max_gen_toks", "max_tokens", "max_length", "max_new_tokens"),
    *("max_completion_tokens", "min_new_tokens", "no_repeat_ngram_size"),
}
# keys that could give trusted functions other data, or switch off a warning
NOT_IN_GROUPS = ("dataset_path", "dataset_kwargs", "unsafe_code")
MOST_REPEATS = 1000  # answers to one item
MOST_BEAMS = MOST_STOPS = 64  # of generation
# bytes of all YAML of a folder: an included file counts each time, and each file with 1 KiB more
LARGEST_YAMLS = 128 << 20
LARGEST_FOLDER = 8 << 30  # bytes that a digest covers
# (value, the task that holds it, all folders) → reasons to refuse it
_Check = Callable[[Any, Mapping[Any, Any], Sequence[Path]], Iterator[str]]
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?")
_GLOB = frozenset("*?[{")
_ELSEWHERE = re.compile(r"^[/~]|:|[*?\[{]")  # absolute paths, addresses, and patterns
# private door: datasets.packaged_modules._PACKAGED_DATASETS_MODULES
_FORMATS = set(datasets.packaged_modules._PACKAGED_DATASETS_MODULES)
_CACHES = "__pycache__"

logger = logging.getLogger("mlflow_soup")
_COPIES = contextlib.ExitStack()  # of folders with a leave: their code may read them at any time
atexit.register(_COPIES.close)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of task YAMLs as it was read."""

    path: Path  # where it was read; of a folder with leave, the copy
    source: Path  # where the user has it
    entries: Mapping[str, Any]  # task, group or tag → lm-eval's entry, includes resolved
    unreadable: Mapping[Path, str]  # YAML → reason
    trusted: bool  # its code may run


def read_folders(include_path: str, allowed: Collection[str]) -> list[Folder]:
    """Read folders of task YAMLs; nothing in them is executed.

    Args:
        include_path: folders, separated as in PATH.
        allowed: digests of folders whose code may run; these are copied.

    Raises:
        SpecError: a folder whose digest is to be compared holds links, or files that are no files.
    """
    paths = [Path(name) for name in include_path.split(os.pathsep) if name]
    return [_copied(path, allowed) or _read(path) for path in paths]


def read_files(
    folder: Path, files: Collection[Path], allowed: Collection[str]
) -> tuple[Folder, dict[Path, list[str]]]:
    """Read single YAML files of a folder, and leave out its other tasks.

    Args:
        folder: the folder.
        files: YAML files, some of which are in the folder.
        allowed: as for `read_folders`.

    Returns:
        The folder, and file → the names of its task or group.

    Raises:
        SpecError: a file defines neither a task nor a group, or as `read_folders`.
    """
    own = [file for file in files if file.parent == folder]
    whole = _copied(folder, allowed) or _read(folder, own)
    entries: dict[str, Any] = {}
    defines: dict[Path, list[str]] = {}
    for file in own:
        path = whole.path / file.name  # a copy has another place
        found = {name: e for name, e in whole.entries.items() if e.yaml_path == path}
        if not found:
            raise SpecError(
                f"{file} defines no task: {whole.unreadable.get(path, 'it has no key task')}",
                where=f"task folder {folder}",
                fix="correct the file, or name another one",
            )
        entries |= found
        defines[file] = list(found)
    return dataclasses.replace(whole, entries=entries, unreadable={}), defines


def _read(folder: Path, files: Collection[Path] | None = None) -> Folder:
    """Read the YAML files of a folder; with `files`, only these and what they include."""
    entries: dict[str, Any] = {}
    unreadable: dict[Path, str] = {}
    reading = _Reading(folder)
    # the order and the folders left out are lm-eval's
    every = folder.rglob("*.yaml") if files is None else files
    for path in sorted(every, key=Path.as_posix):
        if {_CACHES, ".ipynb_checkpoints"} & set(path.parts):
            continue
        try:
            config = reading.resolve(path, ())
            if not config.keys() & {"task", "group", "class"}:
                continue  # a file to be included
            _check_names(config)
            _index.TaskIndex.process_cfg(config, path, entries)
        except (OSError, ValueError, TypeError, KeyError) as error:
            unreadable[path] = str(error) or type(error).__name__
            logger.warning("task YAML %s is left out: %s", path, unreadable[path])
    return Folder(folder, folder, entries, unreadable, trusted=False)


class _Reading:
    """Reads the YAML of a folder, within a limit for all of it: includes can multiply a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._left = folder, LARGEST_YAMLS

    def resolve(self, path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
        """What a YAML says together with the files that it includes, merged as lm-eval does.

        Raises:
            ValueError: a file is not plain YAML with keys, or lies outside the folder.
            OSError: a file cannot be read.
            SpecError: all that was read is more than the limit.
        """
        if path in within:
            raise ValueError(f"it includes itself, by {path}")
        content = read_regular(path, LARGEST_YAML)
        self._left -= len(content) + 1024
        if self._left < 0:
            raise SpecError(
                f"the YAML files in {self._folder} have more than {LARGEST_YAMLS >> 20} MiB, an "
                "included file counted each time",
                where=f"task folder {self._folder}",
                fix="remove files that no task needs, or include fewer files",
            )
        config = parse_yaml(content)
        if not isinstance(config, dict):
            return {}
        included = config.pop("include", [])
        merged: dict[str, Any] = {}
        for name in included if isinstance(included, list) else [included]:
            target = path.parent / str(name)
            if not _inside(target, [self._folder]):
                raise ValueError(f"{path} includes {str(name)!r}, which is outside its folder")
            inner = self.resolve(target.resolve(), (*within, path))
            inner.pop("task_list", None)
            merged |= inner
        return merged | config


def _check_names(config: Mapping[str, Any]) -> None:
    for key in ("task", "group", "tag"):  # lm-eval sorts these names, so each must be text
        value = config.get(key, [])
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str | dict):
                raise ValueError(f"it has a {key} named {name!r}, which is not text")


def _copied(folder: Path, allowed: Collection[str]) -> Folder | None:
    """The copy of a folder whose digest is allowed, as lm-eval reads it; None if it is not."""
    if not allowed or not folder.is_dir():
        return None
    with contextlib.ExitStack() as made:
        copied = made.enter_context(scratch()) / folder.resolve().name
        _copy(folder, copied)
        if digest(copied) not in allowed:
            return None
        _check_covered(copied)
        _COPIES.push(made.pop_all())
    return Folder(copied, folder, _index.TaskIndex.build([copied]), {}, trusted=True)


def _copy(folder: Path, copied: Path) -> None:
    for path in _files(folder):
        target = copied / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path) as file, target.open("wb") as out:
                shutil.copyfileobj(file, out)


def digest(folder: Path) -> str:
    """The SHA-256 of all names and contents in a folder, except `__pycache__`.

    Raises:
        SpecError: the folder holds a link, or something that is no file.
    """
    whole = hashlib.sha256()
    for path in _files(folder):
        kind, content = "folder", ""
        if not path.is_dir():
            with open_regular(path) as file:
                kind, content = "folder file", hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{kind} {path.relative_to(folder).as_posix()!r} {content!r}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """The files and folders in a folder, all of which a digest covers."""
    size = 0
    for path in sorted(folder.rglob("*")):
        if _CACHES in path.relative_to(folder).parts:
            continue
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise SpecError(
                f"{path} is a link, a pipe or a device, so no digest covers what it leads to",
                where=f"task folder {folder}",
                fix=f"replace {path} by the file itself, or remove it",
            )
        size += 0 if path.is_dir() else path.stat().st_size
        if size > LARGEST_FOLDER:
            raise SpecError(
                f"{folder} has more than {LARGEST_FOLDER >> 30} GiB, so no digest covers it",
                where=f"task folder {folder}",
                fix="move large files that no task needs out of the folder",
            )
        yield path


def _check_covered(folder: Path) -> None:
    """Refuse a folder that loads YAML or functions which its digest does not cover."""
    for path in folder.rglob("*.yaml"):
        try:
            content = parse_yaml(read_regular(path, LARGEST_YAML))
        except ValueError:
            continue  # lm-eval leaves it out, too
        odd = [name for name in _includes(content) if not _inside(path.parent / name, [folder])]
        for function in _functions(content):
            # private door: lm_eval: a function is sought beside its YAML first
            module = path.parent / (function.rpartition(".")[0].replace(".", "/") + ".py")
            odd += [function] if module.exists() and not _inside(module, [folder]) else []
        if odd:
            raise SpecError(
                f"{path.relative_to(folder)} loads {odd[0]!r}, which is outside its folder, so the "
                "digest does not cover it",
                where=f"task folder {folder.name}",
                fix="copy into the folder what its YAML files name, and allow the new digest",
            )


def _includes(content: Any) -> list[str]:
    return list(texts(content.get("include"))) if isinstance(content, dict) else []


class Factory(TaskFactory):  # type: ignore[misc]
    """lm-eval's builder of tasks, which judges what comes from folders without leave.

    Args:
        folders: all folders that tasks may come from, besides lm-eval's own.
        where: the option or tag that names the folders, for errors.
    """

    def __init__(self, folders: Sequence[Folder], where: str) -> None:
        super().__init__()
        self._of = {
            entry.yaml_path: folder
            for folder in folders
            for entry in folder.entries.values()
            if entry.yaml_path is not None and not folder.trusted
        }
        self._paths = [folder.path for folder in folders]
        self._where = where
        self._group: Path | None = None  # the YAML of the group being built, if it has no leave

    def build(self, entry: Any, **arguments: Any) -> Any:
        """The task, the group or the tasks of a tag.

        Raises:
            SpecError: it is more than data, and its folder has no leave; or it has no items, or its
                YAML or code fails.
            ObjectiveError: its data cannot be loaded.
        """
        outer = self._group
        if entry.kind.name == "GROUP":
            self._group = entry.yaml_path if entry.yaml_path in self._of else None
        try:
            return super().build(entry, **arguments)
        except SoupError:
            raise
        except OSError as error:  # datasets found the data neither on disk nor on the Hub
            cache = Path(datasets.config.HF_DATASETS_CACHE)
            check_writable(cache, "HF_HOME, which datasets writes to")
            # private door: datasets: errors for data that is not there are OSErrors
            raise ObjectiveError(
                f"the data of {entry.name} could not be loaded: {brief(error)}",
                where=_place(entry),
                fix="for local files, check data_files in the task's YAML; for a dataset of the "
                "Hugging Face Hub, allow access to the Hub, or load the dataset into the local "
                "cache first",
            ) from error
        except (Empty, StopIteration) as error:  # lm-eval looks at the first item
            raise SpecError(
                f"task {entry.name} has no items",
                where=_place(entry),
                fix="check its data and the splits that it names, or leave the task out",
            ) from error
        except Exception as error:  # a task's YAML and code can raise anything
            where = _place(entry)
            raise broken(entry.name, "could not be loaded", where, error) from error
        finally:
            self._group = outer

    def _build_group_members(
        self, member_list: Any, group_name: str, overrides: Any, registry: Any
    ) -> Any:
        if self._group is not None:
            member_list = [
                self._member(member, self._group, overrides or {}, registry)
                for member in member_list
            ]
        return super()._build_group_members(member_list, group_name, overrides, registry)

    def _member(self, member: Any, yaml: Path, overrides: Any, registry: Any) -> Any:
        """A member of a group: with a reader for its data if it is a task without a YAML."""
        if not isinstance(member, dict):
            return member
        _check_names(member)
        known = member.get("group", member.get("task")) in registry
        if known and set(member.get("metadata") or ()) - {"version"}:
            self._refuse(yaml, "gives its members metadata, which functions take as arguments")
        if known or "group" in member:
            self._judge(member, yaml, in_group=True)
            return member
        return self._plain({**overrides, **member}, yaml)

    def _load_full_config(self, entry: Any, overrides: Any = None) -> Any:
        yaml = entry.yaml_path
        if yaml not in self._of:
            config = super()._load_full_config(entry, overrides)
            if yaml is not None and _inside(Path(yaml), self._paths):  # a folder with leave
                return _anchored(config, Path(yaml))
            return config
        # without its path, lm-eval takes what was read, and does not read the file again
        config = super()._load_full_config(dataclasses.replace(entry, yaml_path=None), overrides)
        config["metadata"]["config_source"] = str(yaml)
        if entry.kind.name == "GROUP":
            self._judge(config, yaml, in_group=True)
            return config
        return self._plain(config, yaml)

    def _plain(self, config: dict[str, Any], yaml: Path) -> dict[str, Any]:
        """The configuration of a task that is data only, with a reader for its data set."""
        config = _anchored(config, yaml)
        self._judge(config, yaml, in_group=False)
        kind, name = str(config.get("dataset_path")), config.get("dataset_name")
        return {**config, "custom_dataset": Reader(kind, name, _options(config), str(yaml))}

    def _judge(self, config: Any, yaml: Path, *, in_group: bool) -> None:
        # whoever names a folder above both must not read what is beside another's YAML
        reason = next(_reasons(config, [yaml.parent], in_group=in_group), None)
        if reason is not None:
            self._refuse(yaml, reason)

    def _refuse(self, yaml: Path, reason: str) -> NoReturn:
        folder = self._of[yaml].path
        fix = "remove this from the folder"
        try:
            leave = f"--allow-task-code {digest(folder)}"
            fix += f"; or read all its files, and if you trust them, give {leave}"
        except SpecError as error:
            fix += f"; its code cannot be allowed as it is: {error.what}"
        raise SpecError(f"{yaml} {reason}", where=f"{self._where}: task folder {folder}", fix=fix)


def _anchored(config: dict[str, Any], yaml: Path) -> dict[str, Any]:
    """A task's configuration whose relative data files are beside its YAML, if they are there.

    datasets would look for them in the working directory only.

    Raises:
        SpecError: a file is neither beside the YAML nor in the working directory.
    """
    options = config.get("dataset_kwargs")
    if config.get("dataset_path") not in LOCAL or not isinstance(options, dict):
        return config

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: beside(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [beside(inner) for inner in value]
        if not isinstance(value, str) or not value or _ELSEWHERE.search(value):
            return value
        if (path := yaml.parent / value).exists():
            return str(path)
        if not Path(value).exists():
            raise SpecError(
                f"{yaml} takes its data from {value}, which is not there",
                where=f"data_files in {yaml}",
                fix="put the file beside the YAML, or write its absolute path; a relative path "
                f"starts beside the YAML, or else in the working directory, {Path.cwd()}",
            )
        return value

    keys = ("data_dir",) if options.get("data_dir") else ("data_files",)
    anchored = {key: beside(value) for key, value in options.items() if key in keys}
    return {**config, "dataset_kwargs": {**options, **anchored}}


def _place(entry: Any) -> str:
    return str(entry.yaml_path or f"task {entry.name} of lm-eval")


# what a metric, a template or an odd item makes lm-eval raise; a device raises RuntimeError
_FAULTS = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    jinja2.exceptions.TemplateError,
)


@contextlib.contextmanager
def blaming(names: str, what: str, where: str) -> Iterator[None]:
    """Raise what the YAML, the templates, the code or the items of tasks cause as a SpecError."""
    try:
        yield
    except SoupError:
        raise
    except _FAULTS as error:
        raise broken(names, what, where, error) from error


def broken(name: str, what: str, where: str, error: Exception) -> SpecError:
    """The error for a task whose own YAML, templates or code raised an error."""
    fix = (
        "correct the task's YAML or code; to see the whole error, run `lm_eval run --model dummy "
        "--tasks NAME --include_path FOLDER --limit 1`"
    )
    if isinstance(error, jinja2.exceptions.SecurityError):
        fix = (
            "correct the task's YAML: a template may only format a document, and neither templates "
            "nor patterns may run for long"
        )
    return SpecError(f"task {name} {what}: {brief(error)}", where=where, fix=fix)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of load_dataset that a task sets."""
    options = config.get("dataset_kwargs") or {}
    return {key: value for key, value in options.items() if key != "trust_remote_code"}


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _functions(part)


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    path = path.resolve()
    return any(path.is_relative_to(folder.resolve()) for folder in folders)


def _reasons(
    config: Mapping[Any, Any], folders: Sequence[Path], *, in_group: bool
) -> Iterator[str]:
    """The reasons to refuse a task, or what a group changes: it does more than read its own data.

    Members of a group are judged on their own.
    """
    for function in _functions(config):
        yield f"runs a Python function, {function}"
    for key, value in config.items():
        if in_group and key in NOT_IN_GROUPS:
            yield f"replaces the {key} of its tasks"
        if key in _CHECKS:
            yield from _CHECKS[key](value, config, folders)


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
    if isinstance(value, dict):
        yield from generation_problems(value)


def generation_problems(value: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with settings of generation: they could name code, or take too much."""
    odd = sorted(map(str, value.keys() - GENERATION_KWARGS))
    if odd:
        yield f"generates with {', '.join(odd)}, which could name code"
    for key, setting in value.items():
        number = isinstance(setting, int | float) and not isinstance(setting, bool)
        if key == "until":
            stops = setting if isinstance(setting, list) else [setting]
            if not all(isinstance(stop, str) for stop in stops):
                yield "stops at something that is not a text"
            elif len(stops) > MOST_STOPS:
                yield f"stops at {len(stops)} texts, but {MOST_STOPS} are the most"
        elif key in ("do_sample", "early_stopping"):
            if not isinstance(setting, bool | None):
                yield f"generates with {key} = {setting!r}, which is not true or false"
        elif setting is None:
            continue
        elif key in _WHOLE:
            if not isinstance(setting, int) or not number or not 0 <= setting < 1 << 31:
                yield f"generates with {key} = {setting!r:.40}, which is not a whole number"
            elif key == "num_beams" and not 1 <= setting <= MOST_BEAMS:
                yield f"generates with num_beams = {setting}, but {MOST_BEAMS} are the most"
        elif not number or not math.isfinite(setting):
            yield f"generates with {key} = {setting!r:.40}, which is not a number"


def _of_unsafe(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if value is not True:  # `load_suite` refuses tasks with unsafe_code: true
        yield "declares its code safe (unsafe_code)"


def _of_path(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if value in LOCAL:
        options = task.get("dataset_kwargs") or {}
        if not any(options.get(key) for key in ("data_files", "data_dir")):
            yield "names no data_files"  # datasets would search the working directory
        return
    if value in _FORMATS or not _HUB.fullmatch(str(value)) or os.path.lexists(str(value)):
        yield f"takes its data from {value!r}, which is not {', '.join(LOCAL)} or a Hub dataset"


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
    for file in texts(value.get("data_files")):
        on_the_hub = "/" in str(task.get("dataset_path", "")) and ".." not in file
        if "://" in file or "::" in file or _GLOB & set(file):
            yield f"takes its data from {file!r}, which is not a plain file"
        elif not (on_the_hub and not os.path.isabs(file) and not place) and not _inside(
            Path(place).expanduser() / file, folders
        ):
            yield f"takes its data from {file!r}, which is outside its folder"


def _of_repeats(value: Any, task: Mapping[Any, Any], folders: Sequence[Path]) -> Iterator[str]:
    if not isinstance(value, int) or value > MOST_REPEATS:
        yield f"asks each item {value} times, but {MOST_REPEATS} times is the most"


_CHECKS: dict[str, _Check] = {
    "repeats": _of_repeats,
    "class": _runs("is a Python class"),
    "custom_dataset": _runs("makes its data with code"),
    "use_prompt": _runs("takes prompts from another place"),
    "metric_list": _of_metrics,
    "generation_kwargs": _of_generation,
    "unsafe_code": _of_unsafe,
    "dataset_path": _of_path,
    "dataset_kwargs": _of_dataset,
}
