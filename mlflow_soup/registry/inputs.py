"""Show in MLflow which items and which models a run read: datasets and logged models.

MLflow finds runs by the datasets that they name, and compares models that were scored on one.
"""

import json
import logging
from collections.abc import Mapping, Sequence

from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT  # private door

from mlflow_soup.records import Dataset
from mlflow_soup.redaction import redact
from mlflow_soup.registry.outages import is_forbidden
from mlflow_soup.registry.store import Store

logger = logging.getLogger("mlflow_soup")

SOURCE_TYPE = "lm_eval"
# what a run uses a dataset for
HELD_OUT, OOD, TEST = "held-out", "ood", "test"


def link(
    client: Store,
    run_id: str,
    datasets: Mapping[str, Sequence[Dataset]],
    models: Sequence[str | None] = (),
) -> None:
    """Make datasets and logged models inputs of a run; a second time changes nothing.

    Args:
        client: the store's client.
        run_id: the run.
        datasets: what the run used them for (`held-out`, `ood` or `test`) → datasets.
        models: the ids of logged models; None for a version that was registered without one.
    """
    data = [
        DatasetInput(_entity(dataset), [InputTag(MLFLOW_DATASET_CONTEXT, context)])
        for context, used in datasets.items()
        for dataset in used
    ]
    read = [LoggedModelInput(model_id) for model_id in dict.fromkeys(models) if model_id]
    try:
        _log(client, run_id, data, read)
        return
    except MlflowException as error:
        if not read or not is_forbidden(error):
            raise
    _log(client, run_id, data)
    left = []
    for model in read:
        try:
            client.log_inputs(run_id, models=[model])
        except MlflowException as error:
            if not is_forbidden(error):
                raise
            left.append(model.model_id)
    if left:
        logger.warning(
            "run %s is not linked to the logged models %s: that needs EDIT on their experiment",
            *(run_id, ", ".join(left)),
        )


def _log(
    client: Store,
    run_id: str,
    datasets: Sequence[DatasetInput],
    models: Sequence[LoggedModelInput] = (),
) -> None:
    """Log inputs; once more if another process made one of the datasets at the same moment."""
    try:
        client.log_inputs(run_id, datasets=list(datasets), models=list(models))
    except MlflowException as error:
        if is_forbidden(error):
            raise
        client.log_inputs(run_id, datasets=list(datasets), models=list(models))


def _entity(dataset: Dataset) -> MlflowDataset:
    return MlflowDataset(
        name=redact(dataset.task)[:500],  # MLflow's column
        digest=dataset.digest,
        source_type=SOURCE_TYPE,
        source=json.dumps({key: redact(value) for key, value in dataset.source.items()}),
        profile=json.dumps({"num_rows": dataset.count}),
    )
