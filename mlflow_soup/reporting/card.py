"""The model card of an exported version, for the Hugging Face Hub and for people.

The Hub reads the front matter, and refuses a push if it does not like it: `base_model` must hold
ids of the Hub, and the type of a data set in `model-index` must look like one. `ModelCard.validate`
asks the Hub itself. Without a network there are the parser of huggingface_hub, and these rules.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mlflow_soup.errors import SpecError
from mlflow_soup.records import Manifest, Score

_PAPERS = {  # method of a manifest → what it is, and the paper
    "linear": "a weighted average of checkpoints "
    "([arXiv:2403.19390](https://arxiv.org/abs/2403.19390))",
    "fisher": "a merge by Fisher information "
    "([arXiv:2111.09832](https://arxiv.org/abs/2111.09832))",
    "regmean": "a merge by RegMean ([arXiv:2212.09849](https://arxiv.org/abs/2212.09849))",
}
_MERGEKIT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# what mergekit's configuration can say about a soup, and what it cannot
_APPROXIMATE = """\
# approximate: mergekit adds in a dtype and in an order of its own, so that some elements differ
# from the soup by one rounding; put in place of each models:/ URI a folder that
# `mlflow-soup export` wrote
"""


@dataclass(frozen=True)
class Exported:
    """What a model card tells.

    Attributes:
        name: what was exported, `models:/my-llm/14`, or the name of a folder.
        title: the same as a name for people.
        manifest: the parents and their weights; None for a version that is no soup.
        checked: what was found to be in order, one sentence each.
        unchecked: what could not be checked, and why, one sentence each.
        scores: OOD task → score in the gate's examination; empty for none.
        held_out: the score by which the search chose the weights; None if it is not known.
        unscored: why there are no scores, in words; empty if there are some.
        digest: the digest of all tensors, `sha256:…`.
        dtype: the dtype of most elements, as safetensors calls it.
        weights: weight file → its SHA-256.
        base_models: ids on the Hub that the user named.
    """

    name: str
    title: str
    manifest: Manifest | None
    checked: Sequence[str]
    unchecked: Sequence[str]
    scores: Mapping[str, Score]
    unscored: str
    digest: str
    dtype: str
    weights: Mapping[str, str]
    base_models: Sequence[str] = ()
    held_out: Score | None = None


def check_base_models(ids: Sequence[str]) -> None:
    """Refuse what cannot be the id of a model on the Hub; whether there is one, only the Hub knows.

    Raises:
        SpecError: one is no id.
    """
    for name in ids:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise SpecError(
                f"{name!r} is not the id of a model on the Hugging Face Hub",
                where="--base-model",
                fix="name models as their pages do: EleutherAI/pythia-160m; or leave the option "
                "out: the card then names the parents in its text only",
            ) from error


def card(told: Exported) -> str:
    """The model card, the content of README.md."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mlflow-soup"] if told.manifest is None else ["merge", "mlflow-soup"],
        base_model=list(told.base_models) or None,
        model_name=told.title if told.scores else None,
        eval_results=_results(told.scores) or None,
    )
    if told.manifest is not None and told.base_models:
        data["base_model_relation"] = "merge"
    parts = [f"# {_text(told.title)}", _recipe(told), _mergekit(told), _scores(told)]
    parts += [_held_out(told), _checks(told), _files(told)]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _results(scores: Mapping[str, Score]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            # the Hub's pattern for it: /^(?:[\w-]+\/)?[\w-.]+$/
            dataset_type=re.sub(r"[^A-Za-z0-9_.-]", "-", metric.task),
            dataset_name=metric.task,
            metric_type=metric.metric.partition(",")[0],
            metric_name=metric.metric,
            metric_value=metric.value,
        )
        for score in scores.values()
        for metric in score.metrics
    ]


def _code(text: str) -> str:
    """A text in a fixed-width font; backticks in it cannot end it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(text: str) -> str:
    """The same for a table, where a bar ends the cell."""
    return _code(text).replace("|", "\\|")


def _text(text: str) -> str:
    """A text in Markdown without meaning to Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|&!])", r"\\\1", text)


def _parent(uri: str) -> str:
    # of a folder only the name is shown: its full path would reveal the machine's layout
    return uri if uri.startswith("models:/") else PurePath(uri).name


def _recipe(told: Exported) -> str:
    if told.manifest is None:
        return f"The checkpoint {_code(told.name)} of an MLflow registry."
    sources = told.manifest.sources
    rows = [f"| {_cell(_parent(source.uri))} | {source.lam!r} |" for source in sources]
    how = (
        "The products and sums are computed in float32, in this order, and rounded once."
        if told.manifest.method == "linear"
        else "Statistics of the parents refine these weights in each tensor."
    )
    return (
        f"{_code(told.name)} is {_PAPERS[told.manifest.method]}. The parents, oldest first:\n\n"
        "| parent | weight |\n|---|---|\n" + "\n".join(rows) + f"\n\n{how}"
    )


def _mergekit(told: Exported) -> str:
    if told.manifest is None or told.manifest.method != "linear":
        return ""
    content = {
        "merge_method": "linear",
        "models": [
            {"model": _parent(source.uri), "parameters": {"weight": source.lam}}
            for source in told.manifest.sources
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": _MERGEKIT_DTYPES.get(told.dtype, "float32"),
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=2) + 1)
    return f"The same for mergekit, approximately:\n\n{fence}yaml\n{_APPROXIMATE}{text}{fence}"


def _scores(told: Exported) -> str:
    if not told.scores:
        return f"## Scores\n\nNone: {told.unscored}." if told.unscored else ""
    return (
        "## Scores\n\nOut-of-domain tasks of lm-eval, from the gate's examination. Each score is "
        "the sum of the items that were stored for exactly these weights, config and tokenizer. "
        "The search did not see these tasks, but the gate judged the soup by them.\n\n"
        + _table([*told.scores.values()])
    )


def _held_out(told: Exported) -> str:
    """The scores that chose the weights, apart from the others: they are no results of a test."""
    if told.held_out is None:
        return ""
    return (
        "### Held-out scores of the search: no test results\n\nThe search scored several "
        "choices of weights on these tasks, and took these. So the scores flatter the soup. Do not "
        "compare them with those of other models; `model-index` does not hold them.\n\n"
        + _table([told.held_out])
    )


def _table(scores: Sequence[Score]) -> str:
    """The numbers of lm-eval, with the number of items of each task."""
    rows = [
        f"| {_text(m.task)} | {_text(m.metric)} | {m.value:.4f} | {m.stderr:.4f} "
        f"| {_count(score, m.task)} |"
        for score in scores
        for m in score.metrics
    ]
    head = "| task | metric | value | standard error | items |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def _count(score: Score, task: str) -> int | str:
    """The number of items of a task; of a group, only if the score is of nothing else."""
    own = [items for items in score.items if items.task == task]
    if not own and len(score.metrics) > 1:
        return ""
    return sum(len(items.ids) for items in own or score.items)


def _checks(told: Exported) -> str:
    lines = [f"- {words}" for words in told.checked]
    lines += [f"- **Not checked**: {words}" for words in told.unchecked]
    return "## What was checked before the export\n\n" + "\n".join(lines)


def _files(told: Exported) -> str:
    rows = [f"| {_cell(file)} | {_code(sha256)} |" for file, sha256 in told.weights.items()]
    return (
        "## Files\n\nThe digest of all tensors, whatever files hold them, is "
        f"{_code(told.digest)}.\n\n| file | SHA-256 |\n|---|---|\n" + "\n".join(rows)
    )
