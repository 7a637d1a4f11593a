"""What an MLflow user finds by the dataset of a task: the runs that read it, and their models."""

import json
import os

import pytest
import yaml

import toy
from conftest import MODEL
from mlflow_soup import Spec
from mlflow_soup import run as run_soup
from mlflow_soup.evaluation.items import datasets_of, freeze
from mlflow_soup.evaluation.prompts import PLAIN, Prompting
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.registry import tracking
from mlflow_soup.workflows.release import evaluate

HELD_OUT, OOD = "toy_letters", ("toy_digits", "toy_digits_bpb")


def here(client):
    return client.get_experiment_by_name("soups").experiment_id


def runs_on(client, task, context):
    """The roles of the runs that used a dataset, and those runs' digests of it."""
    query = f"dataset.name = '{task}' and dataset.context = '{context}'"
    found = client.search_runs([here(client)], query)
    digests = {d.dataset.digest for run in found for d in inputs_of(run) if d.dataset.name == task}
    return [run.data.tags["soup.role"] for run in found], digests


def inputs_of(run):
    return run.inputs.dataset_inputs


def test_the_dataset_of_a_task_finds_the_runs_that_read_it(client, outcome):
    roles, (digest,) = runs_on(client, HELD_OUT, "held-out")
    trials = len(outcome.trials)
    assert sorted(roles) == sorted(["search", "ood", *["trial"] * trials])
    for task in OOD:
        assert runs_on(client, task, "ood")[0] == ["ood"]
    (ood,) = tracking.find_runs(client, {"soup.role": "ood"})
    used = {d.dataset.name: d.tags[0].value for d in inputs_of(client.get_run(ood.info.run_id))}
    assert used == {HELD_OUT: "held-out", **dict.fromkeys(OOD, "ood")}
    (found,) = inputs_of(client.get_run(outcome.run_id))
    assert json.loads(found.dataset.profile) == {"num_rows": 100}
    assert found.dataset.source_type == "lm_eval"
    assert json.loads(found.dataset.source)["tasks"] == HELD_OUT
    assert len(digest) == 8


def test_one_dataset_serves_every_batch_size_and_another_limit_makes_another(client, outcome):
    request = {"pair": "v1,v2", "method": "uniform", "ood_tasks": ""}
    run_soup(Spec(**request, batch_size=16))
    (digest,) = runs_on(client, HELD_OUT, "held-out")[1]
    run_soup(Spec(**request, limit=50))
    assert len(runs_on(client, HELD_OUT, "held-out")[1] - {digest}) == 1


def test_the_models_of_searches_with_other_batch_sizes_stand_in_one_list(client, outcome):
    evaluate(Spec(version="v4", batch_size=16))
    task = OOD[0]
    (digest,) = runs_on(client, task, "ood")[1]
    found = client.search_logged_models(
        [here(client)],
        datasets=[{"dataset_name": task, "dataset_digest": digest}],
        order_by=[{"field_name": f"metrics.ood/{task}/acc", "ascending": False}],
    )
    scores = [
        next(m.value for m in model.metrics if m.key == f"ood/{task}/acc")
        for model in found
        if any(m.key == f"ood/{task}/acc" for m in model.metrics)
    ]
    sources = {client.get_model_version(MODEL, n).source.removeprefix("models:/") for n in "124"}
    assert {model.model_id for model in found[: len(scores)]} == sources
    assert scores == sorted(scores, reverse=True)
    assert {
        m.dataset_digest for model in found for m in model.metrics if m.dataset_name == task
    } == {digest}


def test_an_ood_run_names_the_models_that_it_scored_and_its_settings(client, outcome):
    (found,) = tracking.find_runs(client, {"soup.role": "ood"})
    run = client.get_run(found.info.run_id)
    scored = {client.get_model_version(MODEL, n).source.removeprefix("models:/") for n in "124"}
    assert {model.model_id for model in run.inputs.model_inputs} == scored
    assert run.data.params["cfg.evaluator.batch_size"] == "32"
    assert run.data.params["cfg.evaluator.device"] == "cpu"


def test_every_run_says_who_made_it_and_from_what(client, outcome):
    search = client.get_run(outcome.run_id).data.tags
    told = {key: search[key] for key in ("mlflow.user", "mlflow.source.name", "mlflow.source.type")}
    for role in ("trial", "ood"):
        for run in tracking.find_runs(client, {"soup.role": role}):
            assert told.items() <= run.data.tags.items()


def test_a_platforms_own_tags_reach_every_run(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", json.dumps({"team": "pretraining"}))
    run_soup(Spec(pair="v1,v2", method="uniform"))
    roles = [r.data.tags["soup.role"] for r in tracking.find_runs(client, {"team": "pretraining"})]
    assert sorted(set(roles)) == ["ood", "search", "trial"]


def test_the_logged_model_of_a_soup_names_method_weights_and_tasks(client, outcome):
    version = client.get_model_version(MODEL, "4")
    params = client.get_logged_model(version.source.removeprefix("models:/")).params
    lam = outcome.soup.recipe.lam
    assert params["method"] == "bayesopt"
    assert [float(w) for w in params["weights"].split(",")] == pytest.approx(lam)
    assert (params["tasks"], params["ood_tasks"]) == (
        "toy_letters",
        ",".join(("toy_digits", "toy_digits_bpb:bits_per_byte")),
    )
    query = "params.method = 'bayesopt' AND params.tasks = 'toy_letters'"
    (model,) = client.search_logged_models([here(client)], query)
    assert model.model_id == version.source.removeprefix("models:/")


def test_the_digest_is_of_what_a_task_asks_and_of_nothing_else(tasks, tmp_path):
    def dataset(text, prompting=PLAIN):
        suite = load_suite(text, include_path=f"{tmp_path}{os.pathsep}{tasks}")
        for task in suite.loaded["tasks"].values():
            freeze(task, prompting, None)
        return datasets_of(suite)

    plain = dataset("toy_letters")["toy_letters"]
    assert plain.count == 100
    assert dataset("toy_letters:acc_norm")["toy_letters"] == plain
    assert dataset("toy_letters", Prompting(cluster="choices"))["toy_letters"] == plain
    asked = Prompting(system_instruction="Go on.")  # as a chat template is: of the evaluator
    assert dataset("toy_letters", asked)["toy_letters"] == plain
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "open"}
    del config["num_fewshot"]
    digests = set()
    for change in ({}, {"doc_to_text": "Q: {{question}}"}, {"fewshot_split": "validation"}):
        toy.write_task(tmp_path / "open.yaml", config | change)
        for shots in (0, 1) if "fewshot_split" in change else (0,):
            digests.add(dataset("open", Prompting(num_fewshot=shots))["open"].digest)
    assert len(digests) == 4
