"""What somebody deletes in mid-search is named, with an exit code and an advice that fit."""

import pytest

from conftest import MODEL
from mlflow_soup import Spec, errors
from mlflow_soup import run as run_soup
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.registry import tracking
from mlflow_soup.registry.store import Store
from mlflow_soup.workflows import release


def search(client):
    (run,) = tracking.find_runs(client, {"soup.role": "search"})
    return run.info


def delete_files(client):
    client.delete_logged_model(client.get_model_version(MODEL, "2").source.split("/")[1])
    client.delete_model_version(MODEL, "2")


VERSIONS = {
    "version": lambda c: c.delete_model_version(MODEL, "1"),
    "newest": lambda c: c.delete_model_version(MODEL, "2"),
    "version and files": delete_files,
    "model": lambda c: c.delete_registered_model(MODEL),
}
RUNS = {
    "experiment": (
        lambda c: c.delete_experiment(search(c).experiment_id),
        lambda c, info: c.restore_experiment(info.experiment_id),
    ),
    "run": (
        lambda c: c.delete_run(search(c).run_id),
        lambda c, info: c.restore_run(info.run_id),
    ),
}


@pytest.fixture
def deleting(monkeypatch):
    """Sets what happens as the second evaluation ends; the list has one entry for each."""
    score, count = Evaluator.score, []

    def set_up(delete):
        def scored(self, *parts):
            found = score(self, *parts)
            count.append(1)
            if len(count) == 2:
                delete()
            return found

        monkeypatch.setattr(Evaluator, "score", scored)

    return set_up


@pytest.mark.parametrize("what", VERSIONS)
def test_a_parent_deleted_in_mid_search_is_exit_code_4(client, deleting, what):
    deleting(lambda: VERSIONS[what](client))
    with pytest.raises(errors.ParentError, match="no longer holds") as gone:
        run_soup(Spec(pair="v1,v2", method="uniform", promote="alias:champion"))
    assert gone.value.exit_code == 4
    assert MODEL in gone.value.what
    assert "same command again" not in gone.value.fix


@pytest.mark.parametrize("what", RUNS)
def test_what_was_deleted_in_mid_search_is_restored_and_the_search_goes_on(client, deleting, what):
    delete, restore = RUNS[what]
    runs, request = [], Spec(pair="v1,v2", trials=4, promote="alias:champion")
    deleting(lambda: (runs.append(search(client)), delete(client)))
    with pytest.raises(errors.RegistryError, match=f"somebody deleted the {what}") as gone:
        run_soup(request)
    assert f"mlflow {what}s restore" in gone.value.fix
    assert runs[0].run_id in gone.value.what or runs[0].experiment_id in gone.value.what
    restore(client, runs[0])
    assert run_soup(request).promoted


def test_an_experiment_deleted_before_is_named_with_the_way_back(client):
    client.delete_experiment(client.create_experiment("of before"))
    with pytest.raises(errors.RegistryError, match="deleted experiment 'of before'") as gone:
        run_soup(Spec(pair="v1,v2", experiment="of before"))
    assert "mlflow experiments restore" in gone.value.fix


def test_a_soup_deleted_before_it_is_judged_is_exit_code_4(client, merged, monkeypatch):
    get = Store.get_model_version

    def delete_first(self, name, version):
        monkeypatch.setattr(Store, "get_model_version", get)
        found = get(self, name, version)
        self.delete_model_version(name, version)
        return found

    monkeypatch.setattr(Store, "get_model_version", delete_first)
    with pytest.raises(errors.ParentError) as gone:
        release.gate(Spec(version="v4"))
    assert f"{MODEL}" in gone.value.what
