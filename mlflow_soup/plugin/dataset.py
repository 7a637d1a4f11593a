"""The items of lm-eval tasks as an MLflow dataset, for `mlflow.models.evaluate`.

MLflow imports this module while it is being imported itself.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource

# private door: mlflow.data.pyfunc_dataset_mixin.PyFuncConvertibleDatasetMixin
# private door: mlflow.data.pyfunc_dataset_mixin.PyFuncInputsOutputs
from mlflow.data.evaluation_dataset import EvaluationDataset  # private door
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs

HOW = (
    "call evaluate(data=mlflow.data.from_lm_eval(TASKS), model_id=ID, model_type='causal-lm'), or "
    "give evaluator_config={'model': 'models:/NAME/3'} in place of model_id"
)


class LmEvalSource(DatasetSource):
    """Where the items of lm-eval tasks come from: the tasks' names, and the folders of their YAMLs.

    Args:
        asked: the arguments of `from_lm_eval` that decide the items; those not set are left out.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.asked = {key: value for key, value in asked.items() if value not in ("", None)}

    # private door: mlflow.data.dataset_source.DatasetSource._get_source_type
    @staticmethod
    def _get_source_type() -> str:
        from mlflow_soup.registry.inputs import SOURCE_TYPE

        return SOURCE_TYPE

    def load(self, *, allow_task_code: str = "", **_: Any) -> "LmEvalDataset":
        """The dataset, made of the tasks as they are now.

        Args:
            allow_task_code: as for `from_lm_eval`. Whoever loads gives the leave: anybody may have
                written what MLflow stores.
        """
        return from_lm_eval(**{**self.asked, "allow_task_code": allow_task_code})

    # private door: mlflow.data.dataset_source.DatasetSource._can_resolve
    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False

    # private door: mlflow.data.dataset_source.DatasetSource._resolve
    @classmethod
    def _resolve(cls, raw_source: Any) -> "LmEvalSource":
        raise NotImplementedError("mlflow.data.from_lm_eval makes this source")

    def to_dict(self) -> dict[Any, Any]:
        """What the source was made of, without secrets."""
        from mlflow_soup.plugin.words import STORED
        from mlflow_soup.redaction import redact

        stored = {key: self.asked[key] for key in STORED if key in self.asked}
        return {k: redact(v) if isinstance(v, str) else v for k, v in stored.items()}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "LmEvalSource":
        """The inverse of `to_dict`."""
        from mlflow_soup.plugin.words import STORED

        return cls({key: source_dict[key] for key in STORED if key in source_dict})


class LmEvalDataset(Dataset, PyFuncConvertibleDatasetMixin):
    """The items of lm-eval tasks.

    Args:
        source: what loads the items.
        count: how many items there are.
        name: the dataset's name.
        digest: the dataset's digest.
    """

    def __init__(self, source: LmEvalSource, count: int, name: str, digest: str) -> None:
        self.asked = source.asked
        self._count = count
        super().__init__(source, name, digest)

    # private door: mlflow.data.dataset.Dataset._compute_digest
    def _compute_digest(self) -> str:
        raise NotImplementedError("mlflow.data.from_lm_eval gives the digest")

    def to_dict(self) -> dict[str, str]:
        """Name, digest, source, source type and profile, as MLflow stores them."""
        return {**super().to_dict(), "profile": json.dumps(self.profile)}

    @property
    def profile(self) -> dict[str, int]:
        """The number of items."""
        return {"num_rows": self._count}

    @property
    def schema(self) -> None:
        """None: the documents of tasks have different fields."""
        return None

    def to_pyfunc(self) -> PyFuncInputsOutputs:
        """Not possible: the items are requests for log-likelihoods, or for text.

        Raises:
            SpecError: always.
        """
        from mlflow_soup.errors import SpecError

        raise SpecError("lm-eval asks a language model, and no pyfunc model", where="data", fix=HOW)

    def to_evaluation_dataset(
        self, path: str | None = None, feature_names: list[str] | None = None
    ) -> EvaluationDataset:
        """This dataset in the shape that `mlflow.models.evaluate` hands on."""
        return Carried(self, path)


class Carried(EvaluationDataset):
    """An `LmEvalDataset` in the shape that `mlflow.models.evaluate` hands to an evaluator.

    Args:
        dataset: the dataset.
        path: what the caller of MLflow named as its path.
    """

    def __init__(self, dataset: LmEvalDataset, path: str | None) -> None:
        # MLflow demands rows, and reads none of them
        super().__init__(  # type: ignore[no-untyped-call]
            [[dataset.name]], name=dataset.name, path=path, digest=dataset.digest
        )
        self.dataset = dataset


def from_lm_eval(
    tasks: str,
    *,
    include_path: str = "",
    allow_task_code: str = "",
    num_fewshot: int | None = None,
    limit: int | None = None,
    name: str | None = None,
    digest: str | None = None,
) -> LmEvalDataset:
    """The items of lm-eval tasks as an MLflow dataset.

    Args:
        tasks: lm-eval names, `task[:metric[,filter]]`, several separated by commas.
        include_path: folders with more task YAMLs, separated as in PATH.
        allow_task_code: digests of the task folders whose code may run, separated by commas.
        num_fewshot: the number of examples in each prompt; None for what each task says.
        limit: score only so many items of each task, the first ones.
        name: the dataset's name; by default, the names of the tasks.
        digest: the dataset's digest; by default, that of the items.

    Raises:
        SpecError: a task or metric is unknown, or a folder holds code that is not allowed.
        ObjectiveError: the data of a task cannot be loaded.
    """
    from mlflow_soup.plugin.words import in_python
    from mlflow_soup.request.spec import Spec
    from mlflow_soup.workflows.scoring import datasets

    asked: dict[str, Any] = {
        "tasks": tasks,
        "include_path": include_path,
        "allow_task_code": allow_task_code,
        "num_fewshot": num_fewshot,
        "limit": limit,
    }
    with in_python():
        found = datasets(Spec(**asked))
    its = found[0].digest
    if len(found) > 1:
        text = json.dumps([[one.task, one.digest] for one in found])
        its = hashlib.sha256(text.encode()).hexdigest()[:8]
    words = name or ",".join(one.task for one in found)[:500]  # MLflow's column
    count = sum(one.count for one in found)
    return LmEvalDataset(LmEvalSource(asked), count, words, digest or its)
