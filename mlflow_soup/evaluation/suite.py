"""Load lm-eval tasks by name, and break each metric down into contributions of single items.

A `Suite` holds the loaded tasks and the metrics that are asked for. It needs no model.
"""

import difflib
import fnmatch
import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api import metrics as aggregations  # private door
from lm_eval.api.group import Group  # private door
from lm_eval.tasks import TaskManager

from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.library import library
from mlflow_soup.evaluation.loading import quiet
from mlflow_soup.evaluation.task_folders import Factory, Folder, read_files, read_folders
from mlflow_soup.evaluation.templates import RENDERER
from mlflow_soup.request.margins import has_scale

logger = logging.getLogger("mlflow_soup")
_PIECE = re.compile(r"(?P<name>[^\s,:]+)(?::(?P<metric>[A-Za-z0-9_.+-]+))?")
_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class Asked:
    """One term of an objective: a task or group, and one of its metrics."""

    name: str
    metric: str  # lm-eval's key, such as `acc,none`

    def __str__(self) -> str:
        return f"{self.name}:{self.metric.removesuffix(',none')}"


@dataclass(frozen=True)
class Suite:
    """Loaded tasks, and the terms to score on them.

    Attributes:
        terms: the terms.
        loaded: lm-eval's `TaskDict`.
        include_path: the folders with more task YAMLs that were searched, separated as in PATH.
    """

    terms: tuple[Asked, ...]
    loaded: Mapping[str, Any]
    include_path: str = ""

    def leaves(self, term: Asked) -> list[Any]:
        """The lm-eval tasks of a term that have its metric; a group has several."""
        group = self.loaded["groups"].get(term.name)
        tasks = group.get_all_tasks() if group is not None else [self.loaded["tasks"][term.name]]
        return [task for task in tasks if term.metric in _metrics(task)]

    def averages(self, term: Asked) -> bool:
        """Whether the value of a term is the mean over its items, as for right or wrong answers."""
        name = term.metric.split(",")[0]
        return all(t.aggregation()[name] is aggregations.mean for t in self.leaves(term))

    def fields(self) -> set[str]:
        """The names of the fields that the first document of a task has, of all tasks."""
        firsts: list[Any] = [
            next(iter(task.eval_docs), {}) for task in self.loaded["tasks"].values()
        ]
        return {str(name) for first in firsts if isinstance(first, dict) for name in first}

    def documents(self) -> dict[str, str]:
        """The hash of every document that will be scored → the name of its task."""
        return {
            _hash(json.dumps(doc, sort_keys=True, default=str)): name
            for name, task in self.loaded["tasks"].items()
            for doc in task.eval_docs
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metrics(task: Any) -> list[str]:
    """The keys `metric,filter` of a task, in lm-eval's order."""
    filters = [f["name"] for f in task.get_config("filter_list") or [{"name": "none"}]]
    return [f"{metric},{filter_name}" for filter_name in filters for metric in task.aggregation()]


def _open_manager(names: Sequence[str], folders: Sequence[Folder], where: str) -> TaskManager:
    """lm-eval's manager of its own tasks and those of the folders.

    Raises:
        SpecError: a name is that of a YAML in a user's folder which cannot be read.
    """
    manager = library()
    for folder in folders:
        # private door: lm_eval.tasks.TaskManager.task_index
        manager.task_index.update(folder.entries)
    for name in names:
        having = [folder for folder in folders if name in folder.entries]
        if len({folder.entries[name].yaml_path for folder in having}) > 1:
            places = [str(folder.path) for folder in having]
            logger.warning("task %s is in %s: the last one counts", name, " and ".join(places))
    for folder in folders:
        for path, reason in folder.unreadable.items():
            if path.stem in names and path.stem not in manager.task_index:
                raise SpecError(
                    f"{path} cannot be read: {reason}",
                    where=f"{where}: task folder {folder.path}",
                    fix=f"correct {path}, or name another task",
                )
    # private door: lm_eval.tasks._factory.TaskFactory
    manager._factory = Factory(folders, where)
    return manager


def _split(text: str, where: str) -> list[tuple[str, str | None]]:
    """Split text at commas and spaces into pieces: (name, metric), or (name, None)."""
    pieces = []
    for piece in re.split(r"[,\s]+", text.strip().strip(",")):
        match = _PIECE.fullmatch(piece)
        if match is None:
            raise SpecError(
                f"{piece!r} is not an lm-eval task",
                where=where,
                fix="write tasks as task, task:metric or task:metric,filter",
            )
        pieces.append((match["name"], match["metric"]))
    return pieces


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


Named = tuple[str, str | None, str | None]  # task, metric, filter; as far as they are named


def named_terms(
    text: str, *, include_path: str = "", allowed: Collection[str] = (), where: str = "--tasks"
) -> list[Named]:
    """The terms that a text names, as `load_suite` reads it; no data are loaded.

    Raises:
        SpecError: a task is unknown, or a folder cannot be read.
    """
    manager, asked = _find(text, include_path, allowed, where)
    return [
        (name, metric, chosen) for tag, metric, chosen in asked for name in _untag(manager, tag)
    ]


def replaced_by(
    stated: str,
    text: str,
    include_path: str,
    *,
    besides: str,
    allowed: Collection[str] = (),
    where: str,
) -> list[str]:
    """Which tasks that a policy asks for, folders and YAML files of a command line would replace.

    A folder of the policy comes after those of the command line, so its tasks stay.

    Args:
        stated: the tasks of the policy.
        text: the tasks of the command line, some of which may be YAML files.
        include_path: the folders of both, separated as in PATH.
        besides: the folders of the policy.
        allowed: as for `load_suite`.
        where: the option of the text, for errors.

    Returns:
        `FOLDER defines TASK`, for each.
    """
    policy = _open(_split(stated, where), besides, allowed, where)
    request = _open(_split(text, where), include_path, allowed, where)
    named = [task for name, _ in _split(stated, where) for task in policy.tasks_of(name)]
    return [
        f"{request.folder_of(name)} defines {name}"
        for name in sorted(_reachable(named, policy.index))
        if name in request.index and request.origin_of(name) != policy.origin_of(name)
    ]


def _reachable(names: Sequence[str], index: Mapping[str, Any]) -> set[str]:
    """The names, and those of all members of their groups and tags."""
    found: set[str] = set()
    left = [name for name in names if name in index]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        entry = index[name]
        kind, config = entry.kind.name, entry.cfg or {}
        if kind == "GROUP" and not config:
            return {*index}  # its members are not known here
        members = entry.tags if kind == "TAG" else config.get("task") if kind == "GROUP" else ()
        for member in members if isinstance(members, list | set | tuple) else ():
            inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
            if isinstance(inner, str) and inner in index:
                left.append(inner)
    return found


def _may_be_filter(pieces: Sequence[tuple[str, str | None]], i: int) -> bool:
    """Whether a piece stands where the filter of the piece before may stand."""
    return bool(i and pieces[i - 1][1] and not pieces[i][1])


@dataclass(frozen=True)
class _Opened:
    """lm-eval's manager of its own tasks and those of folders and files.

    Attributes:
        manager: the manager.
        folders: the folders, and the parents of the files; of two tasks with one name, the last
            counts.
        files: the path or pattern of files → the tasks and groups that they define.
    """

    manager: TaskManager
    folders: Sequence[Folder]
    files: Mapping[str, Sequence[str]]

    @property
    def index(self) -> Mapping[str, Any]:
        """The name of a task, group or tag → lm-eval's entry."""
        # private door: lm_eval.tasks.TaskManager.task_index
        index: Mapping[str, Any] = self.manager.task_index
        return index

    def tasks_of(self, name: str) -> Sequence[str]:
        """The tasks that a name, a pattern of names, or the path of files stands for."""
        if name in self.files:
            return self.files[name]
        if name in self.index:
            return [name]
        return sorted(fnmatch.filter(self.index, name)) if _PATTERN & {*name} else []

    def folder_of(self, name: str) -> Path | None:
        """The folder whose task of this name counts; None for one of lm-eval's own."""
        having = [folder.source for folder in self.folders if name in folder.entries]
        return having[-1] if having else None

    def origin_of(self, name: str) -> object:
        """What tells a task from others with its name: its file, or the members of a tag."""
        entry = self.index[name]
        if entry.yaml_path is None:
            return sorted(entry.tags)
        path = Path(entry.yaml_path)
        for folder in self.folders:
            if path.is_relative_to(folder.path):
                return folder.source.resolve() / path.relative_to(folder.path)
        return path


def _open(
    pieces: Sequence[tuple[str, str | None]],
    include_path: str,
    allowed: Collection[str],
    where: str,
) -> _Opened:
    """Read the folders, and the files that pieces of a text name."""
    files = {name: _glob(name, where) for name, _ in pieces if name.endswith(".yaml")}
    folders = read_folders(include_path, allowed)
    defines: dict[Path, list[str]] = {}
    every = list(itertools.chain.from_iterable(files.values()))
    for parent in dict.fromkeys(file.parent for file in every):
        folder, own = read_files(parent, every, allowed)
        folders.append(folder)
        defines |= own
    names = [name for i, (name, _) in enumerate(pieces) if not _may_be_filter(pieces, i)]
    manager = _open_manager(names, folders, "--include-path, or tag soup.include_path")
    for file, defined in defines.items():
        _check_members(manager, file, defined, where)
    tasks = {
        name: [task for file in found for task in defines[file]] for name, found in files.items()
    }
    return _Opened(manager, folders, tasks)


def _find(
    text: str, include_path: str, allowed: Collection[str], where: str
) -> tuple[TaskManager, list[Named]]:
    pieces = _split(text, where)
    opened = _open(pieces, include_path, allowed, where)
    asked: list[list[Named]] = []  # by piece
    for i, (name, metric) in enumerate(pieces):
        if tasks := opened.tasks_of(name):
            asked.append([(task, metric, None) for task in tasks])
        elif _may_be_filter(pieces, i):
            asked[-1] = [(task, its_metric, name) for task, its_metric, _ in asked[-1]]
        else:
            raise _unknown(name, opened.manager, opened.folders, where)
    return opened.manager, list(itertools.chain.from_iterable(asked))


def _check_members(manager: TaskManager, file: Path, names: Sequence[str], where: str) -> None:
    """Refuse the file of a group whose members are not known."""
    for name in names:
        members = (manager.task_index[name].cfg or {}).get("task", [])
        for member in members if isinstance(members, list) else []:
            if isinstance(member, str) and member not in manager.task_index:
                raise SpecError(
                    f"the group {name} in {file} has the member {member}, which lm-eval lacks",
                    where=where,
                    fix=f"name the folder that has it, too: --include-path {file.parent}",
                )


def _glob(pattern: str, where: str) -> list[Path]:
    """The YAML files that a path or a pattern of paths names.

    Raises:
        SpecError: there are none.
    """
    folder, name = Path(pattern).parent.absolute(), Path(pattern).name
    if _PATTERN & {*str(folder)} and not folder.is_dir():
        raise SpecError(
            f"{pattern} is a pattern of folders",
            where=where,
            fix="use a pattern only for the name of the file, my-tasks/*.yaml, or name the folder "
            "with --include-path",
        )
    # listed by name, and not by glob: a pattern of folders could visit the whole disk
    listed = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in listed if file.name == name or fnmatch.fnmatchcase(file.name, name)]
    if not files:
        raise SpecError(
            f"there is no task file {pattern}",
            where=where,
            fix="name the YAML file of a task, or the task; a relative path starts in the folder "
            f"{Path.cwd()}",
        )
    return files


def load_suite(
    text: str,
    *,
    include_path: str = "",
    allowed: Collection[str] = (),
    where: str = "--tasks",
) -> Suite:
    """Load tasks by lm-eval name: `task[:metric[,filter]]`, several separated by commas.

    As for the `lm_eval` command, a name may be a pattern such as `blimp_*`, or the path of a YAML
    file, which may be a pattern, too.

    A task without a metric gets its first metric that is no perplexity, if it has one. A piece
    after `task:metric,` that is not the name of a task is the filter of that task
    (`gsm8k:exact_match,flexible-extract`).

    Args:
        text: the user's text.
        include_path: folders with more task YAMLs, separated as in PATH.
        allowed: digests of the folders whose code may run, from `task_folders.digest`.
        where: the option that the text came from, for errors.

    Raises:
        SpecError: a task, metric or filter is unknown (the error gives similar names), a task is
            unusable, or a folder holds code that is not allowed.
        ObjectiveError: a task's data cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    RENDERER.start()
    manager, asked = _find(text, include_path, allowed, where)
    loaded = _load(manager, list(dict.fromkeys(name for name, _, _ in asked)), where)
    suite = Suite((), loaded, include_path)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SpecError(
                f"task {name} runs code that the model writes",
                where=where,
                fix="choose another task; score this one elsewhere, in a sandbox",
            )
    terms = [
        _settle(suite, name, metric, chosen, where)
        for tagged, metric, chosen in asked
        for name in _untag(manager, tagged)
    ]
    if len(set(terms)) < len(terms):
        twice = next(term for term in terms if terms.count(term) > 1)
        raise SpecError(f"{twice} is named twice", where=where, fix="name each task once")
    return replace(suite, terms=tuple(terms))


def _unknown(name: str, manager: TaskManager, folders: Sequence[Folder], where: str) -> SpecError:
    for folder in folders:
        for path, reason in folder.unreadable.items():
            return SpecError(
                f"lm-eval has no task {name!r}, and {path} cannot be read: {reason}",
                where=where,
                fix=f"check the name; or correct {path}",
            )
    return SpecError(
        f"lm-eval has no task {name!r}",
        where=where,
        fix=_near(name, sorted(manager.task_index))
        + "check the name; give the folder of your own YAMLs with --include-path FOLDER",
    )


def _untag(manager: TaskManager, name: str) -> list[str]:
    """The tasks under a tag; for a task or group, its own name."""
    entry = manager.task_index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _load(manager: TaskManager, names: Sequence[str], where: str) -> Mapping[str, Any]:
    try:
        with quiet():
            # private door: lm_eval.tasks.TaskManager.load
            loaded: Mapping[str, Any] = manager.load(list(names))
            return loaded
    except ValueError as error:
        # private door: lm_eval: Duplicate task
        if str(error).startswith("Duplicate task"):
            fix = "name each task once, either by itself or by a group that holds it"
            raise SpecError(str(error), where=where, fix=fix) from error
        raise


def _settle(suite: Suite, name: str, metric: str | None, chosen: str | None, where: str) -> Asked:
    """Complete a term with its metric and filter; check that they exist and can be paired."""
    group: Group | None = suite.loaded["groups"].get(name)
    if group is None:
        available = _metrics(suite.loaded["tasks"][name])
    else:
        wanted = [m.metric for m in group.aggregate_metric_list or ()]
        union = dict.fromkeys(m for task in group.get_all_tasks() for m in _metrics(task))
        available = [m for m in union if m.split(",")[0] in wanted]
        if not available:
            raise SpecError(
                f"lm-eval computes no score for the group {name} as a whole",
                where=where,
                fix=f"name its members instead: {', '.join(group.child_names[:5])} …",
            )
    chosen_metrics = [m for m in available if metric in (None, m.split(",")[0])]
    if not chosen_metrics:
        names = list(dict.fromkeys(m.split(",")[0] for m in available))
        raise SpecError(
            f"task {name} has no metric {metric!r}",
            where=where,
            fix=_near(str(metric), names) + f"choose one of: {', '.join(names)}",
        )
    settled = [m for m in chosen_metrics if chosen in (None, m.split(",")[1])]
    if not settled:
        names = [m.split(",")[1] for m in chosen_metrics]
        raise SpecError(
            f"{chosen!r} is neither an lm-eval task nor a filter of {name}:{metric}",
            where=where,
            fix=_near(str(chosen), names)
            + f"correct the task's name, or choose a filter: {', '.join(names)}",
        )
    # where none is named: accuracies and bits, whose differences have a scale, before perplexities
    first = settled[0] if metric else next(filter(has_scale, settled), settled[0])
    term = Asked(name, first)
    for task in suite.leaves(term):
        contributions(task, term.metric, [])  # refuses a metric that is not a sum over items
    return term


def right_choice(task: Any, metric: str, doc: Any, count: int) -> int:
    """The index of the right choice of an item; lm-eval itself scores every choice.

    Args:
        task: the lm-eval task.
        metric: lm-eval's key, such as `acc,none`.
        doc: the item.
        count: the number of its choices.

    Returns:
        The index of the choice that scores 1 while all others score 0; -1 if there is none.
    """
    sure = np.full((count, count), -1e6)
    np.fill_diagonal(sure, 0.0)
    values = [
        task.process_results(doc, [(likelihood, False) for likelihood in row]).get(
            metric.split(",")[0]
        )
        for row in sure.tolist()
    ]
    return values.index(1.0) if sorted(values) == [0.0] * (count - 1) + [1.0] else -1


def choice_sizes(task: Any, metric: str, doc: Any) -> tuple[float, ...]:
    """The size of each choice, by which lm-eval divides the choice's log-likelihood.

    It is the number of characters for `acc_norm`, of bytes for `acc_bytes`, and 1 otherwise.
    """
    name = metric.split(",")[0]
    choices = task.doc_to_choice(doc)
    if name == "acc_norm":
        return tuple(float(len(choice)) for choice in choices)
    if name == "acc_bytes":
        return tuple(float(len(choice.encode())) for choice in choices)
    return (1.0,) * len(choices)


def contributions(
    task: Any, metric: str, rows: Sequence[Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The value v and share s of each item, with Σ s·v = the task's value.

    A perplexity is not a sum over items. It is linearised around its value (delta method): the sum
    is still exact, and its standard error is correct to first order.

    Args:
        task: the lm-eval task.
        metric: lm-eval's key, such as `acc,none`.
        rows: N results of the metric, one per item.

    Returns:
        The values and the shares, float64, shape (N,) each.

    Raises:
        SpecError: the metric is not a sum over items.
    """
    aggregate = task.aggregation()[metric.split(",")[0]]
    if aggregate is aggregations.mean:
        return np.array(rows, float), np.full(len(rows), 1.0 / max(len(rows), 1))
    if aggregate is aggregations.perplexity:
        rows = [(row, 1.0) for row in rows]
    elif aggregate not in (aggregations.bits_per_byte, aggregations.weighted_perplexity):
        raise SpecError(
            f"metric {metric} of task {task.config.task} is not a sum over items, so mlflow-soup "
            "cannot compare two models item by item",
            where="the task's metric_list",
            fix="choose a metric that is averaged over items, such as acc or exact_match",
        )
    likelihood, size = np.array(rows, float).reshape(-1, 2).T
    shares = size / max(float(size.sum()), 1.0)
    # an empty text has no share, whatever its loss
    loss = np.divide(-likelihood, size, out=np.zeros_like(size), where=size > 0)
    if aggregate is aggregations.bits_per_byte:
        return loss / math.log(2), shares
    mean = float(shares @ loss)
    return math.exp(mean) * (1.0 + loss - mean), shares
