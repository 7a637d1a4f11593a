"""The main job within a program of somebody else: its threads, and its settings of MLflow."""

import threading

import mlflow
import numpy as np
from mlflow.utils.autologging_utils import get_autologging_config
from sklearn.linear_model import LinearRegression

from conftest import MODEL
from mlflow_soup import Spec, run


def fit():
    """What a caller does whose autologging is on."""
    with mlflow.start_run() as here:
        LinearRegression().fit(np.eye(3), np.arange(3.0))
    return here.info.run_id


def test_the_callers_autologging_stays_out_of_our_runs_and_stays_on(client):
    experiment = client.get_experiment_by_name("soups").experiment_id
    before = len(client.search_logged_models([experiment]))
    mlflow.autolog(log_models=True, silent=True)
    mlflow.sklearn.autolog(log_models=True, silent=True)  # whatever it was set to before
    try:
        with mlflow.start_run() as outer:  # of the caller: ours is its child
            outcome = run(Spec(pair="v1,v2", acquisition="gp-hedge"))
        assert get_autologging_config("sklearn", "disable") is False
        left = client.get_run(fit())
    finally:
        mlflow.autolog(disable=True)
        mlflow.sklearn.autolog(disable=True)
    assert left.data.params["fit_intercept"] == "True"  # the caller's own is logged as ever
    runs = client.search_runs([experiment], "tags.`soup.role` LIKE '%'")
    assert {run.data.tags["soup.role"] for run in runs} == {"search", "trial", "ood"}
    for done in (*runs, client.get_run(outer.info.run_id)):
        params = {name for name in done.data.params if not name.startswith("cfg.")}
        assert params <= {"lambda", "method", "weights"}
        assert not any("autologging" in tag for tag in done.data.tags)
        models = [output.model_id for output in done.outputs.model_outputs]
        assert len(models) == (done.info.run_id == outcome.run_id)  # the soup
    assert len(client.search_logged_models([experiment])) == before + 2  # the soup, the caller's


def test_three_threads_of_a_process_make_three_soups(client):
    done: dict[str, object] = {}

    def work(pair: str) -> None:
        try:
            done[pair] = run(Spec(pair=pair, experiment=f"of {pair}", method="uniform"))
        except BaseException as error:
            done[pair] = error

    threads = [threading.Thread(target=work, args=(pair,)) for pair in ("v1,v2", "v2,v3", "v1,v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair, outcome in done.items():
        assert not isinstance(outcome, BaseException), outcome
        made = client.get_model_version(MODEL, str(outcome.soup.version.number))
        assert made.tags["soup.parents"] == pair.replace("v", "")
        at = client.get_experiment(client.get_run(outcome.run_id).info.experiment_id)
        assert at.name == f"of {pair}"
    assert {outcome.soup.version.number for outcome in done.values()} == {4, 5, 6}


def test_autologging_that_the_caller_has_paused_stays_paused(client):
    with mlflow.utils.autologging_utils.disable_autologging():
        mlflow.sklearn.autolog(silent=True)
        try:
            run(Spec(pair="v1,v2", method="uniform"))
            assert client.get_run(fit()).data.params == {}
        finally:
            mlflow.sklearn.autolog(disable=True)
