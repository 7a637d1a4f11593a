"""lm-eval as an evaluator of `mlflow.models.evaluate`."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.data.evaluation_dataset import EvaluationDataset  # private door

# from this module: `mlflow.models` is still being imported when it imports this one
# private door: mlflow.models.evaluation.base.EvaluationArtifact
# private door: mlflow.models.evaluation.base.EvaluationResult
# private door: mlflow.models.evaluation.base.ModelEvaluator
from mlflow.models.evaluation.base import EvaluationArtifact, EvaluationResult, ModelEvaluator

from mlflow_soup.errors import SpecError
from mlflow_soup.plugin.dataset import HOW, Carried, LmEvalDataset
from mlflow_soup.plugin.words import OF_DATASET, OF_EVALUATOR, in_python

if TYPE_CHECKING:
    from mlflow_soup.registry.store import Store
    from mlflow_soup.request.spec import Spec
    from mlflow_soup.workflows.scoring import Scored

MODEL_TYPE = "causal-lm"


class LmEvalEvaluator(ModelEvaluator):
    """Scores a registered version on lm-eval tasks; it runs no code of the registry.

    The metrics are `<task>/<metric>`, with lm-eval's digits, and `<task>/<metric>_stderr`. With
    `evaluator_config={"baseline": "models:/my-llm@champion"}` there are also `…/gain`, the paired
    difference to that version, positive if the model is better, and `…/gain_lower`, its one-sided
    lower bound. A threshold of minus the margin on `gain_lower` is the gate's rule for a task that
    is judged alone.
    """

    @classmethod
    def can_evaluate(
        cls, *, model_type: str, evaluator_config: Mapping[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the model is a causal language model, in the words of `model_type`."""
        return model_type == MODEL_TYPE

    @in_python()
    def evaluate(
        self,
        *,
        model_type: str,
        dataset: EvaluationDataset,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Score the model, and log the answers to every item as an artifact of the run.

        Args:
            model_type: `causal-lm`.
            dataset: from `mlflow.data.from_lm_eval`.
            run_id: the run.
            evaluator_config: `model` in place of `model_id`, `baseline`, and settings of the
                evaluator, named as the options of mlflow-soup.
            model: must be None: MLflow would load it as a pyfunc model, and run its code.
            extra_metrics: must be None.
            custom_artifacts: must be None.
            predictions: must be None.
            model_id: the logged model, which must be the source of a registered version.
            kwargs: what later versions of MLflow may add.

        Raises:
            SoupError: the request is wrong, a model cannot be read, or it cannot be scored.
        """
        if not isinstance(dataset, Carried):
            raise SpecError("the data is not that of lm-eval tasks", where="data", fix=HOW)
        if model is not None:
            raise SpecError(
                "the model would be loaded with code from the registry", where="model", fix=HOW
            )
        for what, said in (
            ("extra_metrics", extra_metrics),
            ("custom_artifacts", custom_artifacts),
            ("predictions", predictions),
        ):
            if said:
                fix = "leave it out; name metrics with the tasks: arc_easy:acc_norm"
                raise SpecError("lm-eval has metrics of its own", where=what, fix=fix)
        from mlflow_soup.registry.store import connect
        from mlflow_soup.workflows.scoring import metrics_of, score_registered

        wanted = dict(evaluator_config)
        uri, baseline = str(wanted.pop("model", "")), str(wanted.pop("baseline", ""))
        if bool(uri) == bool(model_id):
            what = "the model is named twice" if uri else "no model is named"
            raise SpecError(what, where="model_id and evaluator_config", fix=HOW)
        spec = _spec(dataset.dataset, wanted)
        client = connect(60.0 * spec.store_patience)
        scored = score_registered(client, uri or str(model_id), baseline, spec)
        metrics = metrics_of(scored, spec)
        items = _log_items(client, run_id, scored)
        if model_id is None:  # otherwise MLflow logs them itself
            _log_metrics(client, run_id, metrics, scored.model_id, dataset.dataset)
        return EvaluationResult(metrics, {"items": items})


def _spec(dataset: LmEvalDataset, settings: Mapping[str, Any]) -> "Spec":
    """The request: the tasks of the dataset, and the settings of the evaluator.

    Raises:
        SpecError: there is no such setting, or its value is out of range.
    """
    from mlflow_soup.request.spec import Spec

    if unknown := sorted(settings.keys() - {*OF_EVALUATOR}):
        of_dataset = [key for key in unknown if key in OF_DATASET]
        raise SpecError(
            f"there is no setting {', '.join(unknown)}",
            where="evaluator_config",
            fix=f"give {', '.join(of_dataset)} to mlflow.data.from_lm_eval"
            if of_dataset
            else f"choose from model, baseline, {', '.join(OF_EVALUATOR)}",
        )
    return Spec(**dataset.asked, **settings)


def _log_metrics(
    client: "Store",
    run_id: str,
    metrics: Mapping[str, float],
    model_id: str | None,
    dataset: LmEvalDataset,
) -> None:
    """Log metrics to the run, and where the user may, to the page of the logged model."""
    from mlflow_soup.registry.evaluations import log_of_models
    from mlflow_soup.registry.inputs import link
    from mlflow_soup.registry.tracking import metric

    about: dict[str, Any] = {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    told = [metric(key, value, model_id=model_id, **about) for key, value in metrics.items()]
    log_of_models(client, run_id, {"model": told}, "model")
    link(client, run_id, {}, [model_id])


def _log_items(client: "Store", run_id: str, scored: "Scored") -> EvaluationArtifact:
    """Log the answers to all items as an artifact of the run."""
    # private door: mlflow.models.evaluation.artifacts.ParquetEvaluationArtifact
    from mlflow.models.evaluation.artifacts import ParquetEvaluationArtifact
    from pyarrow import parquet as pq

    from mlflow_soup.registry.inputs import SOURCE_TYPE
    from mlflow_soup.workflows.scoring import write_items

    with tempfile.TemporaryDirectory() as folder:
        path = write_items(scored, Path(folder))
        client.log_artifact(run_id, str(path), SOURCE_TYPE)
        place = client.get_run(run_id).info.artifact_uri
        uri = f"{place}/{SOURCE_TYPE}/{path.name}"
        return ParquetEvaluationArtifact(uri, pq.read_table(path).to_pandas())
