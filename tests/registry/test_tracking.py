import contextlib
import errno
import json
import os
import time
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import proxy
from mlflow_soup import errors
from mlflow_soup.records import Items, Metric, Score
from mlflow_soup.registry import scores, store, tracking
from mlflow_soup.registry.evaluations import score_metrics
from mlflow_soup.registry.outages import asking


def test_a_score_survives_its_file(tmp_path):
    items = (
        Items("a", "acc,none", 0.5, ("x", "y"), (1.0, 0.0), (0.5, 0.5), ((-1.5, -2.25), (-0.1,))),
        Items("b", "exact_match,strict", -0.5, ("z",), (1 / 3,), (1.0,), ((),)),
        Items(
            "c", "acc_norm,none", 1.0, ("u",), (1.0,), (1.0,), ((-1.0, -2.0),), (0,), ((3.0, 1.0),)
        ),
    )
    metrics = (Metric("a", "acc,none", 0.5, 0.25, higher_is_better=True),)
    score = Score(1 / 7, 0.1, items, metrics, noise=0.05)
    both = scores.Scores({"": score, "acc:letters": Score(0.25, 0.5, items[:2])}, {"seconds": 0.1})
    scores.write(both, tmp_path / "s.parquet")
    assert scores.read(tmp_path / "s.parquet") == both


@pytest.mark.parametrize(
    "change",
    [
        {"noise": "x"},
        {"noise": None},
        {"value": True},
        {"stderr": [0.1]},
        {"metrics": [{"task": 5, "metric": "acc", "value": 1.0, "stderr": 0.0}]},
        {"metrics": [{"task": "a", "metric": "acc", "value": "1", "stderr": 0.0}]},
        {"metrics": {}},
    ],
    ids=str,
)
def test_a_score_whose_numbers_are_none_cannot_be_read(tmp_path, change):
    path = tmp_path / "s.parquet"
    scores.write(scores.Scores({"": Score(0.5, 0.1)}), path)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"soup"])
    about["scores"][0].update(change)
    digest = scores._digest(about, table)
    pq.write_table(
        table.replace_schema_metadata({"soup": json.dumps(about), "sha256": digest}), path
    )
    if change == {"metrics": {}}:
        assert scores.read(path).mean.metrics == ()
    else:
        with pytest.raises(TypeError, match="of another type"):
            scores.read(path)


@pytest.mark.parametrize("noise", [-1.0, 0.2, 1e300, float("nan")])
def test_a_noise_beyond_the_standard_error_is_a_flaw(noise):
    items = (Items("a", "acc,none", 1.0, ("x", "y"), (1.0, 0.0), (0.5, 0.5), ((), ())),)
    assert not Score(0.5, 0.1, items, noise=0.1).flaw
    assert "noise" in Score(0.5, 0.1, items, noise=noise).flaw


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ("acc,none", "piqa/acc"),
        ("exact_match,strict-match", "piqa/exact_match.strict-match"),
    ],
)
def test_mlflow_accepts_our_metric_names(client, metric, key):
    shown = Metric("piqa", metric, 0.5, 0.1, higher_is_better=True)
    assert shown.key == key
    with mlflow.start_run() as run:
        score = Score(0.5, 0.1, metrics=(shown,))
        tracking.log(client, run.info.run_id, metrics=score_metrics(score, "dev"))
    logged = client.get_run(run.info.run_id).data.metrics
    assert logged == {"dev/objective": 0.5, f"dev/{key}": 0.5}


def test_a_child_run_ends_with_the_status_of_its_work(client):
    with mlflow.start_run() as run:
        parent = run.info.run_id
        with tracking.open_child(client, parent, "well", {}) as well:
            pass
        with (
            pytest.raises(ValueError, match="no"),
            tracking.open_child(client, parent, "badly", {}) as badly,
        ):
            raise ValueError("no")
        with (
            pytest.raises(KeyboardInterrupt),
            tracking.open_child(client, parent, "stopped", {}) as stopped,
        ):
            raise KeyboardInterrupt
    found = [client.get_run(r).info.status for r in (well, badly, stopped)]
    assert found == ["FINISHED", "FAILED", "KILLED"]


def test_a_run_that_another_process_ended_keeps_its_status(client):
    for found, left in (("FINISHED", "FINISHED"), ("RUNNING", "FAILED")):
        work = contextlib.ExitStack()
        run_id = work.enter_context(tracking.open_run(client, "soups", {}))
        client.set_terminated(run_id, found)
        work.callback(_overtaken)
        with pytest.raises(errors.OvertakenError):
            work.close()
        assert client.get_run(run_id).info.status == left
        assert mlflow.active_run() is None


def _overtaken():
    raise errors.OvertakenError("too late", where="here", fix="none")


def test_a_run_that_mlflow_run_made_is_used(client, monkeypatch):
    experiment = client.get_experiment_by_name("soups").experiment_id
    made = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with tracking.open_run(client, "ignored", {"soup.role": "search"}) as run_id:
        assert run_id == made
    assert client.get_run(made).data.tags["soup.role"] == "search"
    assert client.get_experiment_by_name("ignored") is None


def test_an_experiment_can_be_named(client):
    with tracking.open_run(client, "elsewhere", {}) as run_id:
        pass
    experiment = client.get_run(run_id).info.experiment_id
    assert client.get_experiment(experiment).name == "elsewhere"


def test_a_refusal_of_mlflow_becomes_our_error_with_its_reason():
    with (
        pytest.raises(errors.RegistryError, match="refused to do this: because") as caught,
        asking("do this"),
    ):
        raise MlflowException("because")
    assert isinstance(caught.value.__cause__, MlflowException)


def test_all_pages_of_a_search_are_read(client):
    with mlflow.start_run() as run:
        for i in range(5):
            with tracking.open_child(client, run.info.run_id, str(i), {"soup.key": "k"}):
                pass
    small = MlflowClientWithSmallPages(client)
    assert len(tracking.find_runs(small, {"soup.key": "k"})) == 5


class MlflowClientWithSmallPages:
    """The real client, with two runs per page."""

    def __init__(self, client):
        self.search_experiments = client.search_experiments
        self._client = client

    def search_runs(self, *args, **kwargs):
        return self._client.search_runs(*args, max_results=2, **kwargs)


def test_a_store_that_goes_away_is_told_apart_from_one_that_refuses(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = MlflowClient("http://user:hunter2@127.0.0.1:9")
    with pytest.raises(errors.StoreError) as caught, asking("look"):
        gone.search_experiments()
    assert caught.value.exit_code == 6
    with pytest.raises(errors.RegistryError) as refused, asking("look"):
        client.get_run("no such run")
    assert not isinstance(refused.value, errors.StoreError)
    assert refused.value.exit_code == 1


def test_a_server_that_went_away_does_not_delay_the_exit(server, server_client):
    between = proxy.Proxy(int(server.rpartition(":")[2]))
    mlflow.set_tracking_uri(between.uri)
    began = time.monotonic()
    work = contextlib.ExitStack()
    work.enter_context(asking("work"))
    run_id = work.enter_context(tracking.open_run(store.Store(), "soups", {}))
    between.close()
    work.callback(store.Store().get_run, run_id)
    with pytest.raises(errors.StoreError):
        work.close()
    assert time.monotonic() - began < 20  # MLflow's own retries take four minutes


def test_connecting_outlasts_a_hiccup(server, server_client, monkeypatch):
    monkeypatch.setattr(store, "_HICCUP_S", 60.0)
    answers = iter([proxy.LOST, proxy.BUSY])
    between = proxy.Proxy(int(server.rpartition(":")[2]), lambda *_: next(answers, None))
    mlflow.set_tracking_uri(between.uri)
    assert store.connect(patience_s=60.0).search_experiments()
    between.close()


def test_the_error_of_a_full_disk_names_the_file():
    with (
        pytest.raises(errors.StoreError, match="no space left") as caught,
        asking("log"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert caught.value.exit_code == 6


def test_the_error_of_a_failing_disk_names_the_file():
    with pytest.raises(errors.StoreError, match="a disk refused to log: Input") as caught:
        asking("log")(_read_badly)()
    assert caught.value.where == "/data/model"
    with pytest.raises(FileNotFoundError), asking("log"):  # our own fault
        Path("/no/such/file").read_text()


def _read_badly():
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/model")


@pytest.mark.parametrize("value", ["a'b", "' or '", "a\\", "'", "%", "a;b", '"', "x" * 300])
def test_a_value_with_filter_syntax_finds_its_run_and_no_other(client, value):
    experiment = client.get_experiment_by_name("soups").experiment_id
    ours, _ = (client.begin_run(experiment, v, {"soup.digest": v}) for v in (value, "b" + value))
    (found,) = tracking.find_runs(client, {"soup.digest": value})
    assert found.info.run_id == ours
    assert found.info.run_name == value[:250]


def test_runs_are_found_by_status_too(client):
    experiment = client.get_experiment_by_name("soups").experiment_id
    ended, running = (client.begin_run(experiment, "x", {"soup.key": "k"}) for _ in "ab")
    client.set_terminated(ended)
    for tags in ({}, {"soup.key": "k"}):
        (found,) = tracking.find_runs(client, tags, status="RUNNING")
        assert found.info.run_id == running
