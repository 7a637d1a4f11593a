"""MLflow's own `evaluate` on lm-eval tasks, as a user of MLflow calls it."""

import os
import subprocess
import sys

import lm_eval
import mlflow
import pytest
from lm_eval.tasks import TaskManager
from mlflow.models import MetricThreshold
from mlflow.models.evaluation.validation import ModelValidationFailedException
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import MODEL
from mlflow_soup import SoupError, Spec
from mlflow_soup.registry import tracking
from mlflow_soup.workflows.release import gate

TASKS = "toy_digits,toy_digits_bpb:bits_per_byte"
CHAMPION = f"models:/{MODEL}@champion"


@pytest.fixture
def data(client, tasks):
    return mlflow.data.from_lm_eval(TASKS, include_path=str(tasks))


def evaluate(data, **told):
    return mlflow.models.evaluate(data=data, model_type="causal-lm", **told)


def model_id_of(client, number):
    return client.get_model_version(MODEL, str(number)).source.removeprefix("models:/")


def by_lm_eval(number, tasks):
    """Metric → the number that lm-eval itself prints for a version."""
    folder = mlflow.artifacts.download_artifacts(f"models:/{MODEL}/{number}")
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={folder},softmax_dtype=float32",
        tasks=["toy_digits", "toy_digits_bpb"],
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=32,
        device="cpu",
    )["results"]
    return {
        "toy_digits/acc": found["toy_digits"]["acc,none"],
        "toy_digits/acc_stderr": found["toy_digits"]["acc_stderr,none"],
        "toy_digits_bpb/bits_per_byte": found["toy_digits_bpb"]["bits_per_byte,none"],
    }


def test_it_gives_the_digits_of_lm_eval_and_of_the_ood_run(client, outcome, data, tasks):
    for number in (1, 4):
        metrics = evaluate(data, model_id=model_id_of(client, number)).metrics
        told = by_lm_eval(number, tasks)
        assert {key: metrics[key] for key in told} == pytest.approx(told, rel=1e-12)
    (ood,) = tracking.find_runs(client, {"soup.role": "ood"})
    shown = client.get_run(ood.info.run_id).data.metrics
    for key in ("toy_digits/acc", "toy_digits_bpb/bits_per_byte"):
        assert metrics[key] == shown[f"ood/{key}"]


def test_run_model_and_dataset_are_linked_and_each_metric_is_there_once(client, outcome, data):
    for told in (
        {"model_id": model_id_of(client, 4)},
        {"evaluator_config": {"model": CHAMPION}},
        {"evaluator_config": {"lm-eval": {"model": f"models:/{MODEL}/4", "batch_size": 8}}},
    ):
        before = client.get_logged_model(model_id_of(client, 4)).metrics or []
        with mlflow.start_run() as run:
            found = evaluate(data, **told)
        run = client.get_run(run.info.run_id)
        assert [m.model_id for m in run.inputs.model_inputs] == [model_id_of(client, 4)]
        (used,) = run.inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == (data.name, data.digest)
        assert run.data.metrics == found.metrics
        metrics = client.get_logged_model(model_id_of(client, 4)).metrics
        added = [m for m in metrics if m.run_id == run.info.run_id]
        assert {m.key: m.value for m in added} == found.metrics
        assert len(metrics) == len(before) + len(found.metrics)
        assert {(m.dataset_name, m.dataset_digest) for m in added} == {(data.name, data.digest)}


def test_one_task_is_the_dataset_that_the_gate_used(client, outcome, tasks):
    data = mlflow.data.from_lm_eval("toy_digits", include_path=str(tasks))
    (ood,) = tracking.find_runs(client, {"soup.role": "ood"})
    inputs = client.get_run(ood.info.run_id).inputs.dataset_inputs
    assert data.digest in {d.dataset.digest for d in inputs if d.dataset.name == "toy_digits"}
    for one in (*(d for d in inputs if d.dataset.name == "toy_digits"), data):
        again = mlflow.data.get_source(one).load()
        assert (again.name, again.digest, again.profile) == (data.name, data.digest, data.profile)
    few = mlflow.data.from_lm_eval("toy_digits", include_path=str(tasks), limit=10)
    assert (few.profile, few.digest == data.digest) == ({"num_rows": 10}, False)


def test_with_a_baseline_mlflows_validation_is_the_gate_of_a_task_alone(client, outcome, data):
    config = {"baseline": f"models:/{MODEL}/2", "margin": "0.05"}
    found = evaluate(data, model_id=model_id_of(client, 4), evaluator_config=config)
    verdict = gate(Spec(version="v4", margin="0.05,acc=alone", champion="nobody")).verdict
    (check,) = (
        c
        for c in verdict.checks
        if c.tasks == ("toy_digits:acc",) and c.side == "lower" and c.against.number == 2
    )
    assert found.metrics["toy_digits/acc/gain"] == check.difference.value
    assert found.metrics["toy_digits/acc/gain_lower"] == check.bound

    def validate(least):
        thresholds = {
            "toy_digits/acc/gain_lower": MetricThreshold(threshold=least, greater_is_better=True)
        }
        mlflow.validate_evaluation_results(thresholds, found)

    validate(check.bound - 1e-9)
    with pytest.raises(ModelValidationFailedException, match="gain_lower value threshold"):
        validate(check.bound + 1e-9)


def test_a_version_equals_itself_and_a_smaller_metric_is_a_gain_where_it_is_better(
    client, outcome, data
):
    itself = evaluate(data, evaluator_config={"model": CHAMPION, "baseline": CHAMPION}).metrics
    assert itself["toy_digits/acc/gain"] == itself["toy_digits/acc/gain_lower"] == 0.0
    both = {"model": f"models:/{MODEL}/3", "baseline": f"models:/{MODEL}/2"}
    damaged = evaluate(data, evaluator_config=both).metrics  # v3 is v2, blind to digits
    before = evaluate(data, evaluator_config={"model": f"models:/{MODEL}/2"}).metrics
    loss = damaged["toy_digits_bpb/bits_per_byte"] - before["toy_digits_bpb/bits_per_byte"]
    assert loss > 0
    assert damaged["toy_digits_bpb/bits_per_byte/gain"] == pytest.approx(-loss)
    assert (
        damaged["toy_digits_bpb/bits_per_byte/gain_lower"]
        < damaged["toy_digits_bpb/bits_per_byte/gain"]
    )


def test_the_answers_to_all_items_are_an_artifact(client, outcome, data):
    with mlflow.start_run():
        found = evaluate(data, evaluator_config={"model": CHAMPION})
    rows = found.artifacts["items"].content
    assert len(rows) == data.profile["num_rows"]
    acc = rows[rows.task == "toy_digits"]
    assert (acc.value * acc.share).sum() == pytest.approx(found.metrics["toy_digits/acc"])
    folder = mlflow.artifacts.download_artifacts(found.artifacts["items"].uri)
    assert os.path.getsize(folder)


SOUP = "the soup's"
WRONG = {
    "a pyfunc model": (
        {"model": lambda rows: rows},
        "code from the registry",
    ),
    "no model": ({}, "no model is named"),
    "two models": (
        {"model_id": SOUP, "evaluator_config": {"model": CHAMPION}},
        "the model is named twice",
    ),
    "no such setting": (
        {"model_id": SOUP, "evaluator_config": {"batchsize": 8}},
        "there is no setting batchsize",
    ),
    "a setting of the data": (
        {"model_id": SOUP, "evaluator_config": {"limit": 8}},
        "give limit to mlflow.data.from_lm_eval",
    ),
    "no such version": (
        {"evaluator_config": {"model": f"models:/{MODEL}/99"}},
        f"{MODEL} has no v99",
    ),
    "a path": ({"evaluator_config": {"model": "/tmp/model"}}, "not the URI of a registered"),
    "extra metrics": (
        {"model_id": SOUP, "extra_metrics": [mlflow.metrics.latency()]},
        "lm-eval has metrics of its own",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_in_words(client, outcome, data, case):
    told, words = WRONG[case]
    if "model_id" in told:
        told = told | {"model_id": model_id_of(client, 4)}
    with pytest.raises(SoupError, match=words):
        evaluate(data, **told)


def test_a_logged_model_that_is_not_registered_is_refused_with_the_remedy(client, data):
    logged = mlflow.initialize_logged_model(name="checkpoint")
    with pytest.raises(SoupError, match="source of no registered version") as refusal:
        evaluate(data, model_id=logged.model_id)
    assert f"models:/{logged.model_id}" in refusal.value.fix


def test_other_data_is_refused(client, outcome):
    with pytest.raises(SoupError, match="not that of lm-eval tasks"):
        evaluate([[1.0]], model_id=model_id_of(client, 4))


def test_an_unknown_task_is_refused_when_the_dataset_is_made(client, tasks):
    with pytest.raises(SoupError, match="lm-eval has no task 'toy_digitz'"):
        mlflow.data.from_lm_eval("toy_digitz", include_path=str(tasks))


def test_errors_name_the_arguments_of_python(client, outcome, data, tasks):
    with pytest.raises(SoupError) as caught:
        mlflow.data.from_lm_eval("toy_digitz", include_path=str(tasks))
    assert "include_path FOLDER" in caught.value.fix
    with pytest.raises(SoupError) as caught:
        mlflow.data.from_lm_eval("toy_digits", include_path="/no/such")
    assert caught.value.where == "include_path"
    with pytest.raises(SoupError) as caught:
        evaluate(data, model_id=model_id_of(client, 4), evaluator_config={"batch_size": 0})
    assert str(caught.value).startswith("batch_size 0 is out of range\n  where: batch_size\n")
    chat = {"apply_chat_template": True}
    with pytest.raises(SoupError) as caught:
        evaluate(data, model_id=model_id_of(client, 4), evaluator_config=chat)
    assert caught.value.where == "apply_chat_template"
    assert "--" not in str(caught.value)


def test_whole_commands_stay_as_they_are():
    from mlflow_soup.plugin.words import in_python

    fix = "`lm_eval --tasks X`; mlflow-soup doctor --model x --tasks y; or give --tasks z, --fix"
    with pytest.raises(SoupError) as caught, in_python():
        raise SoupError("--limit 3", where="--cluster, or the model's tag soup.cluster", fix=fix)
    assert (caught.value.what, caught.value.where) == ("limit 3", "cluster")
    assert caught.value.fix == fix.replace("give --tasks", "give tasks")


IMPORTS = """
import sys, warnings
warnings.filterwarnings("error", message="Failure attempting to register")
import mlflow
assert mlflow.data.from_lm_eval.__module__ == "mlflow_soup.plugin.dataset"
ours = sorted(m for m in sys.modules if m.startswith("mlflow_soup"))
assert ours == ["mlflow_soup", "mlflow_soup.plugin", "mlflow_soup.plugin.dataset"], ours
import mlflow.models
assert "lm-eval" in mlflow.models.list_evaluators()
assert not {"torch", "lm_eval", "transformers"} & sys.modules.keys()
"""


def test_mlflow_finds_the_plugin_by_itself_and_its_import_brings_no_library(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_models_of_other_types_are_not_offered_to_it():
    from mlflow_soup.plugin.evaluator import LmEvalEvaluator

    offered = {"causal-lm", "classifier", "regressor", "question-answering", "text", None}
    can = {t for t in offered if LmEvalEvaluator.can_evaluate(model_type=t, evaluator_config={})}
    assert can == {"causal-lm"}


@pytest.mark.filterwarnings("ignore")
def test_the_layout_of_the_registry_makes_no_difference(client, outcome, data, checkpoints):
    """MLflow's own flavour keeps the tokenizer in a folder apart."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints[0])
    model.config._name_or_path = model.name_or_path = ""
    parts = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(checkpoints[0])}
    with mlflow.start_run():
        logged = mlflow.transformers.log_model(
            parts,
            name="model",
            task="text-generation",
            registered_model_name="flavoured",
            pip_requirements=["transformers"],
        )
    flavoured = evaluate(data, model_id=logged.model_id).metrics
    assert flavoured == evaluate(data, model_id=model_id_of(client, 1)).metrics
