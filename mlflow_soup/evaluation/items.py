"""Build the requests of tasks once, and name the items that they ask about.

The name of an item is made of the hashes of its document and of its prompt, as lm-eval logs them,
and of the hash of its passage, if several items share one.
Stored scores are compared with these names, so no model needs to be loaded to learn whether a score
is one of all items of a task.
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from lm_eval.utils import handle_non_serializable  # private door

from mlflow_soup.errors import SoupError
from mlflow_soup.evaluation.limits import LimitError, try_within
from mlflow_soup.evaluation.loading import quiet
from mlflow_soup.evaluation.prompts import GENERATION, Prompting
from mlflow_soup.evaluation.suite import Suite
from mlflow_soup.evaluation.task_data import Reader
from mlflow_soup.evaluation.task_folders import broken
from mlflow_soup.evaluation.templates import RENDERER
from mlflow_soup.records import Dataset, Score

# the seeds of the lm_eval command for random, numpy, torch and few-shot sampling
SEEDS = (0, 1234, 1234, 1234)

MOST_CHARACTERS = 1 << 31  # of all prompts and answers of a task
CHARACTERS_EACH = 1 << 12  # that a request counts as, besides its texts
SECONDS = 30  # of processor time for filters and metrics, and 1 more for 100 items

# fields with the passage of a question
PASSAGES = ("passage", "context", "article", "paragraph", "story", "document", "dialogue")
LONG, FEWEST = 100, 10  # characters of a passage on average; number of passages

Part = tuple[str, str, tuple[str, ...]]  # leaf task, metric, names of its items
# fields of a task that make a prompt of a document
_PROMPT = (
    *("description", "doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix"),
    *("target_delimiter", "fewshot_delimiter", "num_fewshot", "fewshot_split", "fewshot_config"),
)
Asking = Mapping[str, tuple[Part, ...]]  # term → the items that its score is the mean of


def freeze(task: Any, prompting: Prompting, limit: int | None) -> None:
    """Build a task's requests once; lm-eval would draw new few-shot examples at every call.

    Raises:
        SpecError: the task's templates or code fail.
        ParentError: the chat template fails.
    """
    prompting.configure(task)
    from_folder = isinstance(task.get_config("custom_dataset"), Reader)
    if from_folder:
        _limit_scoring(task)

    def build(**options: Any) -> None:
        if from_folder:
            _limit_requests(task)
        # private door: lm_eval.api.task.Task
        task.set_fewshot_seed(SEEDS[3])
        task.build_all_requests(limit=limit, **options)

    try:
        with quiet():
            documents = list(itertools.islice(task.eval_docs, limit))
            _render_ahead(task, documents)
            task.doc_iterator = lambda **_: enumerate(documents)  # they are decoded once
            prompting.build(build)
    except SoupError:
        raise
    except Exception as error:  # templates, code and documents can raise anything
        where = f"the requests of task {task.config.task}"
        raise broken(task.config.task, "could not build its requests", where, error) from error
    finally:
        task.__dict__.pop("doc_iterator", None)
    task.clusters = _clusters(documents, prompting.cluster)
    frozen = task.instances

    def rebuild(**_: Any) -> None:
        for request in frozen:
            request.resps, request.filtered_resps = [], {}
        task._instances = frozen

    task.build_all_requests = rebuild


def _clusters(documents: Sequence[Any], field: str) -> list[str]:
    """The cluster of each document, as a hash; empty for a document that is one by itself.

    Documents with one text in a field such as `passage` ask about the same passage. Such a field
    counts if that is certain: long texts, some of which are repeated, and not just a few. Else the
    field that a user names counts: it cannot break passages up.

    Args:
        documents: the documents of a task.
        field: the field that names the cluster; empty for none.
    """
    for name in (*PASSAGES, field):
        texts = [d.get(name) if isinstance(d, dict) else None for d in documents]
        texts = [None if text in (None, "") else text for text in texts]
        if name == field or _are_passages([text for text in texts if text is not None]):
            return ["" if t is None else _hash(json.dumps(t, default=str))[:16] for t in texts]
    return [""] * len(documents)


def _are_passages(texts: Sequence[Any]) -> bool:
    if not all(isinstance(text, str) for text in texts):
        return False
    different = {*texts}
    long = sum(map(len, different)) >= LONG * len(different)
    return long and FEWEST <= len(different) < len(texts)


def _limit_requests(task: Any) -> None:
    """Stop a task whose requests would fill the memory, by long examples or many choices."""
    task.__dict__.pop("construct_requests", None)  # of an earlier build
    construct, left = task.construct_requests, MOST_CHARACTERS

    def construct_within(doc: Any, ctx: Any, **options: Any) -> Any:
        nonlocal left
        left -= len(ctx) if isinstance(ctx, str) else sum(map(len, ctx))
        made = construct(doc=doc, ctx=ctx, **options)
        for request in made if isinstance(made, list) else [made]:
            answer = request.args[-1]  # the prompt is one text for all answers
            left -= CHARACTERS_EACH + (len(answer) if isinstance(answer, str) else 0)
        if left < 0:
            raise SecurityError(
                f"its prompts and answers have more than {MOST_CHARACTERS} characters in all, with "
                f"{CHARACTERS_EACH} for each answer"
            )
        return made

    task.construct_requests = construct_within


def _limit_scoring(task: Any) -> None:
    """Stop a task whose regular expressions do not come to an end on what a model answered."""
    generates = task.OUTPUT_TYPE == GENERATION  # only then a metric can hold a pattern
    if not generates and not task.get_config("filter_list"):
        return
    apply = task.apply_filters

    def score() -> None:
        apply()
        for request in task.instances if generates else ():
            for filtered in request.filtered_resps.values():
                task.process_results(request.doc, [filtered])

    def apply_within() -> Any:
        seconds = SECONDS + len(task.instances) // 100
        try:
            try_within(score, seconds=seconds, memory=1 << 30, file_size=0)
        except LimitError as error:
            raise SecurityError(f"its filters and metrics do not end: {error}") from error
        return apply()

    task.apply_filters = apply_within


def _render_ahead(task: Any, documents: Sequence[Any]) -> None:
    """Render the templates of a task for all documents that will be scored."""
    fields = ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix")
    texts = [text for field in fields if isinstance(text := task.get_config(field), str)]
    # a template that is the name of a column stands for the column
    RENDERER.render_ahead((text for text in texts if text not in task.features), documents)


def items_of(suite: Suite) -> dict[str, tuple[Part, ...]]:
    """The items of a suite whose tasks are frozen."""
    named = {name: _names(task) for name, task in suite.loaded["tasks"].items()}
    return {
        str(term): tuple(
            (task.config.task, term.metric, named[task.config.task]) for task in suite.leaves(term)
        )
        for term in suite.terms
    }


def datasets_of(suite: Suite) -> dict[str, Dataset]:
    """Task or group → its items; the tasks are frozen.

    A dataset is what a task asks, of whatever model: documents, templates and few-shot examples.
    The metric is no part of it, nor are the passages that `--cluster` names, a chat template and a
    system instruction.
    """
    found = {}
    for term, parts in zip(suite.terms, items_of(suite).values(), strict=True):
        configs = [task.dump_config() for task in suite.leaves(term)]
        items = [
            [
                task,
                {key: config.get(key) for key in _PROMPT},
                [name.split(":")[0] for name in names],
            ]
            for (task, _, names), config in zip(parts, configs, strict=True)
        ]
        source = {"tasks": term.name, "include_path": suite.include_path}
        found[term.name] = Dataset(
            term.name,
            _hash(json.dumps(items, default=str))[:8],  # as long as MLflow's own
            sum(len(names) for *_, names in parts),
            {key: value for key, value in source.items() if value},
        )
    return found


def asked(suite: Suite) -> dict[str, str]:
    """Term → digest of all that its score depends on, except the model; the tasks are frozen.

    Two tasks of one name and with the same documents can still score otherwise.
    """
    return {
        str(term): _hash(json.dumps([str(term), *map(asked_of, suite.leaves(term))]))
        for term in suite.terms
    }


def asked_of(task: Any) -> str:
    """A digest of all that the score of a frozen task depends on, except the model."""
    # where the documents lie does not matter
    left_out = ("metadata", "dataset_path", "dataset_kwargs", "custom_dataset")
    config = {k: v for k, v in task.dump_config().items() if k not in left_out}
    digest = hashlib.sha256(json.dumps([task.VERSION, config], default=str).encode())
    if any(task.clusters):
        digest.update(json.dumps(task.clusters).encode())
    for request in task.instances:  # a document holds the right answer
        line = [request.request_type, request.doc_id, request.args, request.doc]
        digest.update(json.dumps(line, default=str).encode())
    return digest.hexdigest()


def all_items(suite: Suite, prompting: Prompting) -> dict[str, tuple[Part, ...]]:
    """All items of a suite; its tasks are frozen for it.

    Raises:
        SpecError: the templates or the code of a task fail.
        ParentError: the chat template fails.
    """
    for task in suite.loaded["tasks"].values():
        freeze(task, prompting, None)
    return items_of(suite)


def name_of(doc_hash: str, prompt_hash: str, cluster: str) -> str:
    """The name of an item from the hashes that lm-eval logs, and from its cluster, if any."""
    name = f"{doc_hash[:16]}:{prompt_hash[:16]}"
    return f"{name}:{cluster}" if cluster else name


def _names(task: Any) -> tuple[str, ...]:
    requests = defaultdict(list)
    for request in task.instances:
        requests[request.doc_id].append(request)
    names = []
    for doc_id in sorted(requests):
        first = min(requests[doc_id], key=lambda request: request.idx)
        # private door: lm_eval.evaluator.evaluate: samples
        default = handle_non_serializable
        text = json.dumps(first.doc, indent=2, default=default, ensure_ascii=False)
        names.append(name_of(_hash(text), _hash(first.arguments[0]), task.clusters[doc_id]))
    return tuple(names)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_of(score: Score, parts: Sequence[Part]) -> bool:
    """Whether a score is one of these items, all of them, finite, and the sum of its items."""
    asked_for = [(i.task, i.metric, i.ids) for i in score.items] == list(parts)
    return asked_for and not score.flaw
