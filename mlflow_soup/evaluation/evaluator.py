"""Score a live model with lm-eval.

An `Evaluator` freezes the requests of a suite: it draws few-shot examples once and tokenises text
once. It then scores the live model's current weights with lm-eval's own scoring and aggregation, so
the `lm_eval` command gives the same numbers. The module `prepared` sends the requests to the model.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.utils import maybe_delimit  # private door
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from mlflow_soup.errors import ObjectiveError
from mlflow_soup.evaluation.compatibility import function_of
from mlflow_soup.evaluation.frozen import (
    Answered,
    FrozenLM,
    arguments_of,
    seeded,
)
from mlflow_soup.evaluation.items import (
    Asking,
    asked,
    asked_of,
    datasets_of,
    freeze,
    is_of,
    items_of,
    name_of,
)
from mlflow_soup.evaluation.live import LiveModel, hardware, not_finite
from mlflow_soup.evaluation.loading import quiet, rules_of
from mlflow_soup.evaluation.prepared import PreparedLM
from mlflow_soup.evaluation.prompts import GENERATION, PLAIN, Prompting
from mlflow_soup.evaluation.suite import (
    Asked,
    Suite,
    choice_sizes,
    contributions,
    right_choice,
)
from mlflow_soup.evaluation.task_folders import blaming
from mlflow_soup.records import Dataset, Items, Metric, Score

logger = logging.getLogger("mlflow_soup")
Answers = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]  # gold, sizes, as in `Items`


class Evaluator:
    """Scores a live model on a suite, always in the same way.

    Args:
        live: the model. Only its weights may change between calls.
        suite: the tasks and metrics to score it on.
        evaluator: `prepared`, or `lm-eval` to forward the model as the `lm_eval` command does.
        batch_size: the number of sequences in a batch. It is fixed, because the last digits of
            log-likelihoods depend on it. `prepared` lowers it before the first evaluation where an
            accelerator has too little memory.
        max_length: the longest input in tokens; None for the model's own limit.
        prompting: how the requests are built.
        limit: the number of items to score of each task, from the first; None for all items.

    Attributes:
        lm: what answers the requests.
        fingerprint: digest of all that a score depends on, except the weights.

    Raises:
        SpecError: a task's templates or code fail when its requests are built.
        ParentError: the chat template fails.
        ObjectiveError: a request does not fit the model, or memory runs out.
    """

    def __init__(
        self,
        live: LiveModel,
        suite: Suite,
        *,
        evaluator: str = "prepared",
        batch_size: int = 32,
        max_length: int | None = None,
        prompting: Prompting = PLAIN,
        limit: int | None = None,
    ) -> None:
        self._live, self._suite, self._limit = live, suite, limit
        self._evaluator, self._batch_size = evaluator, batch_size
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        settings = {"batch_size": batch_size, "max_length": max_length}
        arguments = arguments_of(live, settings)
        if evaluator == "prepared":
            accelerated = live.model.device.type != "cpu"
            self.lm: FrozenLM = PreparedLM(**arguments, probes=accelerated)
        else:
            self.lm = FrozenLM(**arguments)
        requests: dict[str, list[Any]] = defaultdict(list)
        for task in suite.loaded["tasks"].values():
            freeze(task, prompting, limit)
            for request in task.instances:
                requests[request.request_type] += [request] * request.repeats
        with self.lm.enough_memory(), quiet():
            self.lm.prepare(requests)
        self._sampled = {
            task.config.task for task in suite.loaded["tasks"].values() if _samples(task)
        }
        if self._sampled:
            logger.warning(
                "%s: the answers are sampled (do_sample), with the seed of lm-eval. So two λ also "
                "differ by chance, and the search expects noise",
                ", ".join(sorted(self._sampled)),
            )
        self.fingerprint = self._fingerprint()
        self._answers: dict[tuple[str, str], Answers] = {}

    @property
    def truncated(self) -> int:
        """The number of requests in the last evaluation that were cut to `max_length`."""
        return self.lm.truncated

    @functools.cached_property
    def items(self) -> Asking:
        """The items that are scored."""
        return items_of(self._suite)

    @functools.cached_property
    def datasets(self) -> dict[str, Dataset]:
        """Task or group → its items, as MLflow shows them."""
        return datasets_of(self._suite)

    @functools.cached_property
    def asked(self) -> dict[str, str]:
        """Term → digest of all that its score depends on, except the model."""
        return asked(self._suite)

    def fits(self, score: Score) -> bool:
        """Whether a stored score of all terms is one of these items, and adds up."""
        return self._shows(score, self._suite.terms) and is_of(
            score, [part for parts in self.items.values() for part in parts]
        )

    def _shows(self, score: Score, terms: Sequence[Asked]) -> bool:
        return [(m.task, m.metric) for m in score.metrics] == [(t.name, t.metric) for t in terms]

    def fits_each(self, of: Mapping[str, Score]) -> bool:
        """Whether stored scores, one for each term, are of these items, and add up."""
        return list(of) == list(self.items) and all(
            self._shows(score, [term]) and is_of(score, self.items[str(term)])
            for term, score in zip(self._suite.terms, of.values(), strict=True)
        )

    def settings(self) -> dict[str, Any]:
        """The settings that scores depend on, besides weights and requests."""
        versions = ("lm_eval", "torch", "transformers")
        return {
            "evaluator": self._evaluator,
            "batch_size": self.lm.batch_size,
            "max_length": self.lm.max_length,
            "dtype": str(self._live.model.dtype),
            "softmax_dtype": "float32",
            "device": self._live.model.device.type,
            **({"device_map": self._live.placement} if self._live.placement else {}),
            "hardware": hardware(self._live.model.device),
            **{name: importlib.metadata.version(name) for name in versions},
        }

    def _fingerprint(self) -> str:
        # the requested batch size, so that the amount of free memory does not change the search
        settings = self.settings() | {"batch_size": self._batch_size}
        # config: the same tensors under another config are another model
        settings["model"] = function_of(self._live.config)
        # the same text gives other tokens by other rules
        settings["tokenizer"] = rules_of(self._live.tokenizer)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for term in self._suite.terms:
            digest.update(str(term).encode())
        for name, task in sorted(self._suite.loaded["tasks"].items()):
            digest.update(json.dumps([name, asked_of(task)]).encode())
        return digest.hexdigest()

    def ask(self) -> Answered:
        """What the current weights answer to all requests.

        Raises:
            NonFiniteError: a logit that text is generated from is not finite.
            ObjectiveError: memory ran out.
            SpecError: lm-eval cannot ask an item.
        """
        (portions,) = self.lm.portions(1)
        return self.lm.forward(portions)

    def evaluate(self, *parts: Answered) -> tuple[tuple[str, Score], ...]:
        """One score per term, oriented so that larger is better.

        Args:
            parts: the answers to all requests, by this model or by others with the same weights;
                without them, this model is asked.

        Raises:
            NonFiniteError: a score or a log-likelihood is not finite. Without this check, a model
                full of NaN can score well.
            ObjectiveError: memory ran out, or lm-eval aggregated the items in an unknown way.
            SpecError: lm-eval cannot score or aggregate the items: one is empty, or a metric or a
                template fails.
        """
        answered = parts or (self.ask(),)
        with self._faults(), quiet(), seeded(self._live.model.device):
            replay = _Replay(self.lm.answers(answered))
            results = evaluate(replay, self._suite.loaded, limit=self._limit, bootstrap_iters=0)
        assert results is not None
        return tuple((str(term), self._score(term, results)) for term in self._suite.terms)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Say which task an odd item, a metric or a template is of."""
        where = "while lm-eval scored the items and computed all metrics of its tasks"
        with blaming(" or ".join(self._suite.loaded["tasks"]), "could not be scored", where):
            try:
                yield
            except OverflowError as error:  # a perplexity too large for float64
                what = f"a score is too large for a float: {error}"
                raise not_finite(what, "while lm-eval averaged the items of a task") from error

    def texts(self) -> Iterator[str]:
        """The text of every item that has a right answer, as the model reads it.

        - A multiple-choice item gives the prompt with the right choice.
        - A document gives the document.
        - A generation item gives the prompt with the reference answer, the first of several.

        An item without a right answer is left out.
        """
        for task in self._suite.loaded["tasks"].values():
            metric = next(iter(task.aggregation()))
            by_document: dict[int, list[Any]] = defaultdict(list)
            for request in task.instances:
                by_document[request.doc_id].append(request)
            for requests in by_document.values():
                right = requests[0]
                if task.OUTPUT_TYPE == "multiple_choice":
                    gold = right_choice(task, metric, right.doc, len(requests))
                    if gold < 0:
                        continue
                    right = requests[gold]
                text = "".join(part for part in right.args if isinstance(part, str))
                if task.OUTPUT_TYPE == GENERATION:
                    reference = _reference(task, right.doc)
                    if not reference:
                        continue
                    text = maybe_delimit(text, reference, task.config.target_delimiter)
                yield text

    def score(self, *parts: Answered) -> Score:
        """The mean score over all terms, which is the objective (Liu et al. 2024, eq. 3)."""
        return mean_score([score for _, score in self.evaluate(*parts)])

    def _score(self, term: Asked, results: Mapping[str, Any]) -> Score:
        metric, filter_name = term.metric.split(",")
        leaves = self._suite.leaves(term)
        rows = {
            task.config.task: [
                row
                # private door: lm_eval.evaluator.evaluate: samples
                for row in results["samples"][task.config.task]
                if row["filter"] == filter_name and metric in row["metrics"]
            ]
            for task in leaves
        }
        sign = 1.0 if leaves[0].higher_is_better()[metric] else -1.0
        weights = self._weights(term, {name: len(r) for name, r in rows.items()})
        items = tuple(
            _items(
                task,
                term.metric,
                sign * weights[task.config.task],
                rows[task.config.task],
                self._answered(task, term.metric, rows[task.config.task]),
            )
            for task in leaves
        )
        value = math.fsum(i.weight * math.fsum(np.multiply(i.shares, i.values)) for i in items)
        stderr = math.sqrt(math.fsum((i.weight * _stderr(i)) ** 2 for i in items))
        printed = float(results["results"][term.name][term.metric])
        if not math.isclose(sign * value, printed, rel_tol=1e-9, abs_tol=1e-12):
            raise ObjectiveError(
                f"lm-eval gives {printed} for {term}, but its items add up to {sign * value}",
                where="aggregation of the lm-eval results",
                fix="choose another metric, and report this task: mlflow-soup does not know how "
                "lm-eval aggregates it",
            )
        shown = Metric(term.name, term.metric, printed, stderr, higher_is_better=sign > 0)
        sampled = (i.weight * _stderr(i) for i in items if i.task in self._sampled)
        return Score(sign * printed, stderr, items, (shown,), math.hypot(*sampled))

    def _answered(self, task: Any, metric: str, rows: Sequence[Mapping[str, Any]]) -> Answers:
        """The right choices and sizes of a task's items, computed once: no weights change them."""
        key = (task.config.task, metric)
        if key not in self._answers:
            self._answers[key] = _answers(task, metric, rows)
        return self._answers[key]

    def _weights(self, term: Asked, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each leaf task in the term: equal, or by item count, as the group says."""
        group = self._suite.loaded["groups"].get(term.name)
        by_size = group is None or any(
            m.weight_by_size
            for m in group.aggregate_metric_list or ()
            if m.metric == term.metric.split(",")[0]
        )
        total = sum(sizes.values())
        return {name: n / total if by_size else 1.0 / len(sizes) for name, n in sizes.items()}


def _samples(task: Any) -> bool:
    """Whether a frozen task draws its answers at random."""
    return any(
        # private door: lm_eval.models.utils.normalize_gen_kwargs
        normalize_gen_kwargs(request.args[1]).get("do_sample")
        for request in task.instances
        if request.request_type == GENERATION
    )


class _Replay(LM):  # type: ignore[misc]
    """A model for lm-eval that has answered everything already."""

    def __init__(self, answers: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """The answers to the requests for log-likelihoods of continuations."""
        return self._answers["loglikelihood"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """The answers to the requests for log-likelihoods of documents."""
        return self._answers["loglikelihood_rolling"]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """The generated texts."""
        return self._answers[GENERATION]


def _reference(task: Any, doc: Any) -> str:
    """The reference answer as lm-eval writes it into few-shot examples; empty if there is none."""
    target = task.doc_to_target(doc)
    if isinstance(target, list):  # every entry is a right answer
        target = target[0] if target else ""
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return str(target)


def _answers(task: Any, metric: str, rows: Sequence[Mapping[str, Any]]) -> Answers:
    """The right choices and sizes of each item; empty for a task without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return (), ()
    docs = [(row["doc"], len(row["resps"])) for row in rows]
    gold = tuple(right_choice(task, metric, doc, count) for doc, count in docs)
    return gold, tuple(choice_sizes(task, metric, doc) for doc, _ in docs)


def _items(
    task: Any, metric: str, weight: float, rows: Sequence[Mapping[str, Any]], answers: Answers
) -> Items:
    likelihoods = tuple(tuple(_likelihoods(row["resps"])) for row in rows)
    name = metric.split(",")[0]
    values, shares = contributions(task, metric, [row[name] for row in rows])
    if not all(map(math.isfinite, values)) or not all(
        math.isfinite(number) for row in likelihoods for number in row
    ):
        raise not_finite(
            f"task {task.config.task} gave log-likelihoods or scores that are not finite",
            f"metric {metric} of {len(rows)} items",
        )
    return Items(
        task.config.task,
        metric,
        weight,
        tuple(
            name_of(row["doc_hash"], row["prompt_hash"], task.clusters[row["doc_id"]])
            for row in rows
        ),
        tuple(map(float, values)),
        tuple(map(float, shares)),
        likelihoods,
        *answers,
    )


def _likelihoods(responses: Sequence[Any]) -> Iterator[float]:
    """The log-likelihoods of an item: one per choice or document, none for generated text."""
    for response in responses:
        first = response[0][0] if isinstance(response[0], tuple) else response[0]
        if isinstance(first, int | float):
            yield float(first)


def _stderr(items: Items) -> float:
    """The standard error of Σ share·value over items; it equals lm-eval's for plain means."""
    shares, values = np.array(items.shares), np.array(items.values)
    count = len(values)
    if count < 2:
        return 0.0
    spread = shares**2 @ (values - shares @ values) ** 2
    return float(np.sqrt(spread * count / (count - 1)))


def mean_score(scores: Sequence[Score]) -> Score:
    """The unweighted mean of scores; it keeps the items and metrics of all of them."""
    share = 1.0 / len(scores)
    return Score(
        value=math.fsum(score.value for score in scores) * share,
        stderr=math.sqrt(math.fsum(score.stderr**2 for score in scores)) * share,
        items=tuple(replace(i, weight=i.weight * share) for s in scores for i in s.items),
        metrics=tuple(metric for score in scores for metric in score.metrics),
        noise=math.hypot(*(score.noise for score in scores)) * share,
    )
