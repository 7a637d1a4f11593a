"""Promotions on a real MLflow server over a real PostgreSQL, with both of its drivers."""

import contextlib
from collections.abc import Iterator

import mlflow
import pytest

from conftest import DRIVERS, MODEL, fill, free_port, start_server, stop_server
from mlflow_soup import Spec
from mlflow_soup.registry.store import Store
from mlflow_soup.workflows import release
from mlflow_soup.workflows.run import run as run_soup

pytestmark = pytest.mark.slow


@pytest.fixture(params=DRIVERS)
def on_postgres(request, postgres, checkpoints, tasks, tmp_path, monkeypatch) -> Iterator[Store]:
    """A client of a server over PostgreSQL, with the toy model of the other tests."""
    driver, port = request.param, free_port()
    uri = f"{driver}://{postgres.create(driver[-8:])}"
    artifacts = ("--artifacts-destination", str(tmp_path / "artifacts"))
    process = start_server(tmp_path / "unused.db", port, *artifacts, uri=uri)
    with contextlib.ExitStack() as stack:
        stack.callback(stop_server, process)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_SOUP_CACHE", str(tmp_path / "cache"))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
        mlflow.set_experiment("soups")
        fill(Store(), checkpoints, tasks)
        yield Store()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_stage_is_moved_and_what_it_replaces_is_archived(on_postgres):
    client = on_postgres
    client.transition_model_version_stage(MODEL, "1", "Production", False)
    outcome = run_soup(Spec(pair="v1,v2", trials=4, promote="stage:Production"))
    assert outcome.promoted == "stage Production → toy-llm v4"
    stages = {int(v.version): v.current_stage for v in client.search_model_versions()}
    assert (stages[1], stages[4]) == ("Archived", "Production")
    version = release.promote(Spec(version="v4", promote="alias:champion"))[1].version
    assert client.get_model_version_by_alias(MODEL, "champion").version == str(version.number)
    tags = client.get_model_version(MODEL, "4").tags
    assert [part.rpartition(" ")[0] for part in tags["soup.promotions"].split("; ")] == [
        "stage Production",
        "alias champion",
    ]
