"""A live model → `Score`, through lm-eval: the only place that knows it.

A `Suite` is a set of tasks, loaded once and without a model. An `Evaluator` freezes their requests
(few-shot examples drawn once, text tokenised once) and scores whatever weights the live model has,
with lm-eval's own scoring and aggregation: the `lm_eval` command gives the same numbers.
"""

import copy
import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api import metrics as aggregations
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mlflow_soup.errors import ObjectiveError, SpecError
from mlflow_soup.live import LiveModel, quiet
from mlflow_soup.records import Items, Metric, Score

# what the lm_eval command seeds few-shot sampling with
FEWSHOT_SEED = 1234
_PIECE = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?::(?P<metric>[A-Za-z0-9_.+-]+))?")


@dataclass(frozen=True)
class Asked:
    """One term of an objective: a task or group, and which of its numbers."""

    name: str
    metric: str  # lm-eval's key, `acc,none`

    def __str__(self) -> str:
        return f"{self.name}:{self.metric.removesuffix(',none')}"


@dataclass(frozen=True)
class Suite:
    """Loaded tasks and the terms that are asked of them."""

    terms: tuple[Asked, ...]
    loaded: Mapping[str, Any]  # lm_eval.tasks.TaskDict

    def leaves(self, term: Asked) -> list[Any]:
        """The lm-eval tasks below a term that have its metric."""
        group = self.loaded["groups"].get(term.name)
        tasks = group.get_all_tasks() if group is not None else [self.loaded["tasks"][term.name]]
        return [task for task in tasks if term.metric in _metrics(task)]

    def documents(self) -> dict[str, str]:
        """Hash of every document that will be scored → the task it is in."""
        return {
            _hash(json.dumps(doc, sort_keys=True, default=str)): name
            for name, task in self.loaded["tasks"].items()
            for doc in task.eval_docs
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metrics(task: Any) -> list[str]:
    """lm-eval's keys of a task, `metric,filter`, in its own order."""
    filters = [f["name"] for f in task.get_config("filter_list") or [{"name": "none"}]]
    return [f"{metric},{filter_name}" for filter_name in filters for metric in task.aggregation()]


def _folders(names: Sequence[str]) -> list[str]:
    """The folders of lm-eval's task library that the names point to (`arc_easy` → `arc`).

    Indexing all fourteen thousand shipped YAMLs takes 6 s; these take 0.2 s at most.
    """
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    return [
        str(folder)
        for folder in sorted(root.iterdir())
        if folder.is_dir()
        and any(re.match(re.escape(folder.name) + r"($|[_:-])", name) for name in names)
    ]


def _open_manager(names: Sequence[str], include_path: str) -> TaskManager:
    """lm-eval's index of tasks; complete only where the names do not say which folder is theirs."""
    own = [path for path in include_path.split(os.pathsep) if path]
    manager = TaskManager(include_defaults=False, include_path=[*_folders(names), *own])
    if all(name in manager.task_index for name in names):
        return manager
    return TaskManager(include_path=own)


def _split(text: str, where: str) -> list[tuple[str, str | None]]:
    """Comma- or space-separated pieces, each a name and perhaps a metric."""
    pieces = []
    for piece in re.split(r"[,\s]+", text.strip().strip(",")):
        match = _PIECE.fullmatch(piece)
        if match is None:
            raise SpecError(
                f"{piece!r} is no lm-eval task",
                where=where,
                fix="write tasks as task, task:metric or task:metric,filter",
            )
        pieces.append((match["name"], match["metric"]))
    return pieces


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


def load_suite(text: str, *, include_path: str = "", where: str = "--tasks") -> Suite:
    """Load tasks by lm-eval name: `task[:metric[,filter]]`, several separated by commas.

    Without a metric the task's first is taken. A piece after `task:metric,` that names no task is
    that task's filter (`gsm8k:exact_match,flexible-extract`).

    Args:
        text: what the user wrote.
        include_path: folders with more task YAMLs, separated as in PATH.
        where: which option it came from, for errors.

    Raises:
        SpecError: an unknown task, metric or filter; the nearest names are given.
        ObjectiveError: a task's data cannot be loaded.
    """
    pieces = _split(text, where)
    # a lone piece after `task:metric` may be a filter, which no folder is named after
    maybe_filter = {i for i in range(1, len(pieces)) if pieces[i - 1][1] and not pieces[i][1]}
    names = [name for i, (name, _) in enumerate(pieces) if i not in maybe_filter]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _open_manager(names, include_path)
    asked: list[tuple[str, str | None, str | None]] = []
    for i, (name, metric) in enumerate(pieces):
        if i in maybe_filter and name not in manager.task_index:
            before, its_metric, _ = asked.pop()
            asked.append((before, its_metric, name))
        elif name in manager.task_index:
            asked.append((name, metric, None))
        else:
            raise SpecError(
                f"lm-eval knows no task {name!r}",
                where=where,
                fix=_near(name, manager.all_tasks) + "own YAMLs: --include-path FOLDER",
            )
    loaded = _load(manager, list(dict.fromkeys(name for name, _, _ in asked)), where)
    suite = Suite((), loaded)
    terms = [
        _settle(suite, name, metric, chosen, where)
        for tagged, metric, chosen in asked
        for name in _untag(manager, tagged)
    ]
    return replace(suite, terms=tuple(terms))


def _untag(manager: TaskManager, name: str) -> list[str]:
    """The tasks under a tag; any other name itself."""
    entry = manager.task_index[name]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _load(manager: TaskManager, names: Sequence[str], where: str) -> Mapping[str, Any]:
    try:
        with quiet():
            loaded: Mapping[str, Any] = manager.load(list(names))
            return loaded
    except OSError as error:  # datasets' errors for what is neither on disk nor reachable
        raise ObjectiveError(
            f"the data of {', '.join(names)} could not be loaded: {error}",
            where=where,
            fix="allow access to the Hugging Face Hub, or load the dataset once into its cache",
        ) from error
    except ValueError as error:  # "Duplicate task": a group and its own member
        raise SpecError(str(error), where=where, fix="name each task once") from error


def _settle(suite: Suite, name: str, metric: str | None, chosen: str | None, where: str) -> Asked:
    """Complete a term with its metric and filter, checking that both exist and can be paired."""
    group: Group | None = suite.loaded["groups"].get(name)
    if group is None:
        available = _metrics(suite.loaded["tasks"][name])
    else:
        wanted = [m.metric for m in group.aggregate_metric_list or ()]
        union = dict.fromkeys(m for task in group.get_all_tasks() for m in _metrics(task))
        available = [m for m in union if m.split(",")[0] in wanted]
        if not available:
            raise SpecError(
                f"group {name} has no score of its own",
                where=where,
                fix=f"name its members: {', '.join(group.child_names[:5])} …",
            )
    chosen_metrics = [m for m in available if metric in (None, m.split(",")[0])]
    if not chosen_metrics:
        names = list(dict.fromkeys(m.split(",")[0] for m in available))
        raise SpecError(
            f"task {name} has no metric {metric!r}",
            where=where,
            fix=_near(str(metric), names) + f"it has {', '.join(names)}",
        )
    settled = [m for m in chosen_metrics if chosen in (None, m.split(",")[1])]
    if not settled:
        names = [m.split(",")[1] for m in chosen_metrics]
        raise SpecError(
            f"metric {metric} of task {name} has no filter {chosen!r}, and no task is named so",
            where=where,
            fix=_near(str(chosen), names) + f"it has {', '.join(names)}",
        )
    term = Asked(name, settled[0])
    for task in suite.leaves(term):
        _contributions(task, term.metric, [])  # refuses metrics that are no sum over items
    return term


def _contributions(
    task: Any, metric: str, rows: Sequence[Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Per-item values v and shares s with Σ s·v = the task's value.

    Perplexities are not sums over items; they are linearised around their value (delta method), so
    the sum still is exact and its spread is right to first order.

    Raises:
        SpecError: the metric has no such form.
    """
    aggregate = task.aggregation()[metric.split(",")[0]]
    if aggregate is aggregations.mean:
        return np.array(rows, float), np.full(len(rows), 1.0 / max(len(rows), 1))
    if aggregate is aggregations.perplexity:
        rows = [(row, 1.0) for row in rows]
    elif aggregate not in (aggregations.bits_per_byte, aggregations.weighted_perplexity):
        raise SpecError(
            f"metric {metric} of task {task.config.task} is no sum over items and cannot be paired",
            where="the task's metric_list",
            fix="choose a metric that is averaged over items, such as acc or exact_match",
        )
    likelihood, size = np.array(rows, float).reshape(-1, 2).T
    shares = size / max(float(size.sum()), 1.0)
    loss = -likelihood / size
    if aggregate is aggregations.bits_per_byte:
        return loss / math.log(2), shares
    mean = float(shares @ loss)
    return math.exp(mean) * (1.0 + loss - mean), shares


class _FrozenLM(HFLM):  # type: ignore[misc]
    """lm-eval's model with tokenisation remembered (the text never changes) and cuts counted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pairs: dict[tuple[str, str], Any] = {}
        self._encoded: dict[Any, list[int]] = {}
        self.truncated = 0  # requests of the last evaluation that were cut to max_length

    def _encode_pair(self, context: str, continuation: str) -> Any:
        key = (context, continuation)
        if key not in self._pairs:
            self._pairs[key] = super()._encode_pair(context, continuation)
        return self._pairs[key]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        key = (string, add_special_tokens, *sorted(kwargs.items()))
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens, **kwargs)
        return list(self._encoded[key])

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        # the last token is only predicted, never read
        self.truncated += sum(len(c) + len(k) - 1 > self.max_length for _, c, k in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> Any:
        if left_truncate_len:
            self.truncated += sum(len(self.tok_encode(s)) > left_truncate_len for s in strings)
        return super().tok_batch_encode(
            strings, *args, left_truncate_len=left_truncate_len, **kwargs
        )


class Evaluator:
    """Scores a live model on a suite, always in the same way.

    Args:
        live: the model; its weights may change between calls, nothing else.
        suite: what to score it on.
        batch_size: fixed, because log-likelihoods depend on it in the last digits.
        max_length: longest input in tokens; None for the model's own.
        num_fewshot: for tasks that leave it open.
        limit: first items of each task only.
    """

    def __init__(
        self,
        live: LiveModel,
        suite: Suite,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> None:
        self._live, self._suite, self._limit = live, suite, limit
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._lm = _FrozenLM(
            pretrained=live.model,
            tokenizer=copy.deepcopy(live.tokenizer),  # HFLM sets its pad token
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        for task in suite.loaded["tasks"].values():
            _freeze(task, num_fewshot, limit)
        self.fingerprint = self._fingerprint()

    @property
    def truncated(self) -> int:
        """Requests of the last evaluation that were cut to the longest input."""
        return self._lm.truncated

    def settings(self) -> dict[str, Any]:
        """What scores depend on besides weights and requests."""
        versions = ("lm_eval", "torch", "transformers")
        return {
            "batch_size": self._lm.batch_size,
            "max_length": self._lm.max_length,
            "dtype": str(self._live.model.dtype),
            "softmax_dtype": "float32",
            "device": self._live.model.device.type,
            **{name: importlib.metadata.version(name) for name in versions},
        }

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for term in self._suite.terms:
            digest.update(str(term).encode())
        for name, task in sorted(self._suite.loaded["tasks"].items()):
            digest.update(f"{name} {task.VERSION}".encode())
            for request in task.instances:
                line = [request.request_type, request.doc_id, request.args]
                digest.update(json.dumps(line, default=str).encode())
        return digest.hexdigest()

    def evaluate(self) -> tuple[tuple[str, Score], ...]:
        """One score per term, oriented so that larger is better, for the weights as they are.

        Raises:
            ObjectiveError: a log-likelihood is not finite (NaN models score well otherwise), or
                lm-eval failed.
        """
        self._lm.truncated = 0
        try:
            with quiet():
                results = evaluator.evaluate(
                    self._lm, self._suite.loaded, limit=self._limit, bootstrap_iters=0
                )
        except torch.OutOfMemoryError as error:
            raise ObjectiveError(
                f"no memory left for the evaluation: {error}",
                where=f"batch size {self._lm.batch_size}",
                fix="lower --batch-size",
            ) from error
        assert results is not None
        return tuple((str(term), self._score(term, results)) for term in self._suite.terms)

    def score(self) -> Score:
        """The mean over terms: the objective (Liu et al. 2024, eq. 3)."""
        return mean_score([score for _, score in self.evaluate()])

    def _score(self, term: Asked, results: Mapping[str, Any]) -> Score:
        metric, filter_name = term.metric.split(",")
        leaves = self._suite.leaves(term)
        rows = {
            task.config.task: [
                row
                for row in results["samples"][task.config.task]
                if row["filter"] == filter_name and metric in row["metrics"]
            ]
            for task in leaves
        }
        sign = 1.0 if leaves[0].higher_is_better()[metric] else -1.0
        weights = self._weights(term, {name: len(r) for name, r in rows.items()})
        items = tuple(
            _items(task, term.metric, sign * weights[task.config.task], rows[task.config.task])
            for task in leaves
        )
        value = math.fsum(i.weight * math.fsum(np.multiply(i.shares, i.values)) for i in items)
        stderr = math.sqrt(math.fsum((i.weight * _stderr(i)) ** 2 for i in items))
        printed = float(results["results"][term.name][term.metric])
        if not math.isclose(sign * value, printed, rel_tol=1e-9, abs_tol=1e-12):
            raise ObjectiveError(
                f"{term} is {printed} in lm-eval, but its items sum to {sign * value}",
                where="aggregation of lm-eval results",
                fix="report this: mlflow-soup does not know this task's aggregation",
            )
        shown = Metric(term.name, term.metric, printed, stderr, higher_is_better=sign > 0)
        return Score(sign * printed, stderr, items, (shown,))

    def _weights(self, term: Asked, sizes: Mapping[str, int]) -> dict[str, float]:
        """Each leaf's weight in the term: by size or equal, as the group says."""
        group = self._suite.loaded["groups"].get(term.name)
        by_size = group is None or any(
            m.weight_by_size
            for m in group.aggregate_metric_list or ()
            if m.metric == term.metric.split(",")[0]
        )
        total = sum(sizes.values())
        return {name: n / total if by_size else 1.0 / len(sizes) for name, n in sizes.items()}


def _freeze(task: Any, num_fewshot: int | None, limit: int | None) -> None:
    """Build a task's requests once; lm-eval would draw other few-shot examples at every call."""
    fixed = task.get_config("num_fewshot")
    if num_fewshot is not None and fixed != 0:  # as lm-eval: 0 in a YAML is meant
        task.set_config("num_fewshot", num_fewshot)
    elif fixed is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    with quiet():
        task.build_all_requests(limit=limit)
    frozen = task.instances

    def rebuild(**_: Any) -> None:
        for request in frozen:
            request.resps, request.filtered_resps = [], {}
        task._instances = frozen

    task.build_all_requests = rebuild


def _items(task: Any, metric: str, weight: float, rows: Sequence[Mapping[str, Any]]) -> Items:
    likelihoods = tuple(tuple(_likelihoods(row["resps"])) for row in rows)
    name = metric.split(",")[0]
    values, shares = _contributions(task, metric, [row[name] for row in rows])
    if not all(map(math.isfinite, values)) or not all(
        math.isfinite(number) for row in likelihoods for number in row
    ):
        raise ObjectiveError(
            f"{task.config.task} gave log-likelihoods or scores that are not finite",
            where=f"{len(rows)} items, metric {metric}",
            fix="the merged weights overflow: narrow the search with --alpha, or merge in F32",
        )
    return Items(
        task.config.task,
        metric,
        weight,
        tuple(f"{row['doc_hash'][:16]}:{row['prompt_hash'][:16]}" for row in rows),
        tuple(map(float, values)),
        tuple(map(float, shares)),
        likelihoods,
    )


def _likelihoods(responses: Sequence[Any]) -> Iterator[float]:
    """The numbers among an item's responses: one per choice or document, none for text."""
    for response in responses:
        first = response[0][0] if isinstance(response[0], tuple) else response[0]
        if isinstance(first, int | float):
            yield float(first)


def _stderr(items: Items) -> float:
    """Standard error of Σ share·value over its items; lm-eval's own for plain means."""
    shares, values = np.array(items.shares), np.array(items.values)
    count = len(values)
    if count < 2:
        return 0.0
    spread = shares**2 @ (values - shares @ values) ** 2
    return float(np.sqrt(spread * count / (count - 1)))


def mean_score(scores: Sequence[Score]) -> Score:
    """The unweighted mean of scores, its items and metrics those of all."""
    share = 1.0 / len(scores)
    return Score(
        value=math.fsum(score.value for score in scores) * share,
        stderr=math.sqrt(math.fsum(score.stderr**2 for score in scores)) * share,
        items=tuple(replace(i, weight=i.weight * share) for s in scores for i in s.items),
        metrics=tuple(metric for score in scores for metric in score.metrics),
    )
