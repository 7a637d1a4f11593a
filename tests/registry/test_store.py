"""Which calls are repeated, which never are, and the errors at the end of patience."""

import os
import threading
import time

import boto3
import mlflow
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    TEMPORARILY_UNAVAILABLE,
)
from mlflow.store.artifact.s3_artifact_repo import BOTO_TO_MLFLOW_ERROR

from mlflow_soup import errors
from mlflow_soup.registry import permissions, store
from mlflow_soup.registry.outages import asking, is_denied, is_transient
from mlflow_soup.registry.store import Store


def away():
    """The error of MLflow when no server listens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(MlflowException) as caught:
            MlflowClient("http://127.0.0.1:9").search_experiments()
    return caught.value


def answered(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(str(status), response=response)


def answered_by_s3(status, code="Unknown"):
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


def without_s3():
    quick = Config(retries={"max_attempts": 1}, connect_timeout=1)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "x"}
    dead = boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=quick, **keys)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever boto raises
        dead.list_buckets()
    return caught.value


@pytest.mark.parametrize(
    ("make", "transient"),
    [
        (away, True),
        (without_s3, True),
        (lambda: MlflowException("locked", TEMPORARILY_UNAVAILABLE), True),
        (lambda: MlflowException("QueuePool limit of size 5 reached"), True),
        (lambda: answered(500), True),
        (lambda: answered(503), True),
        (lambda: answered(429), True),
        (lambda: answered(408), True),
        (lambda: answered(404), False),
        (lambda: answered(403), False),
        (lambda: answered_by_s3(503), True),
        (lambda: answered_by_s3(429), True),
        (lambda: answered_by_s3(400, "RequestTimeout"), True),
        (lambda: answered_by_s3(403, "AccessDenied"), False),
        (lambda: requests.exceptions.InvalidURL("http://"), False),
        (lambda: MlflowException("no such param", INVALID_PARAMETER_VALUE), False),
        (lambda: MlflowException("database or disk is full", TEMPORARILY_UNAVAILABLE), False),
        (lambda: OSError(28, "No space left on device"), False),
        (lambda: ValueError("ours"), False),
    ],
)
def test_transient_errors_are_told_from_lasting_ones(make, transient):
    assert is_transient(make()) is transient


def test_an_error_is_transient_if_its_cause_is():
    error = MlflowException("upload failed")
    error.__cause__ = answered(502)
    assert is_transient(error)


class Shaky:
    """A call that fails several times, then answers."""

    def __init__(self, times, error=None):
        self.left, self.calls, self.error = times, 0, error or answered(503)

    def __call__(self):
        self.calls += 1
        if self.calls <= self.left:
            raise self.error
        return "answer"


@pytest.mark.parametrize("uri", ["mysql+nothing://h/d", "oracle://h/d", "sqlite:////proc/no/m.db"])
def test_a_database_that_cannot_be_opened_is_reported(client, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    with pytest.raises(errors.StoreError, match="does not answer"):
        store.connect()


def test_a_hiccup_is_outlasted_and_a_refusal_is_not_repeated(client):
    patient, shaky = Store(30.0), Shaky(3)
    assert patient.persist(shaky, "ask") == "answer"
    assert shaky.calls == 4
    refusing = Shaky(1, answered(404))
    with pytest.raises(requests.HTTPError):
        patient.persist(refusing, "ask")
    assert refusing.calls == 1


def test_ctrl_c_is_not_repeated_though_it_chains_an_outage(client):
    def interrupted():
        calls.append("one")
        try:
            raise answered(503)
        except requests.HTTPError:
            raise KeyboardInterrupt  # noqa: B904  # it comes while the error is handled

    calls = []
    with pytest.raises(KeyboardInterrupt):
        Store(30.0).persist(interrupted, "ask")
    assert calls == ["one"]


def test_the_error_at_the_end_of_patience_says_what_was_tried(client):
    begin = time.monotonic()
    with pytest.raises(errors.StoreError, match="did not answer while trying to ask") as caught:
        Store(0.5).persist(Shaky(1000), "ask")
    assert caught.value.exit_code == 6
    assert 0.5 <= time.monotonic() - begin < 5.0
    once = Shaky(1000)
    with pytest.raises(errors.StoreError):
        Store(30.0).hasty.persist(once, "ask")
    assert once.calls == 1


def test_an_object_is_found_and_not_created_again_if_the_answer_was_lost(client):
    made = []

    def create():
        made.append("it")
        raise answered(500)

    assert Store(30.0).once(lambda: next(iter(made), None), create, "make") == "it"
    assert made == ["it"]


def test_creating_is_repeated_if_nothing_was_created(client):
    shaky = Shaky(2)
    assert Store(30.0).once(lambda: None, shaky, "make") == "answer"


def test_only_one_run_is_created_if_the_answer_is_lost(client, monkeypatch):
    experiment = client.get_experiment_by_name("soups").experiment_id
    create = Store.create_run
    calls = []

    def lose(self, *args, **kwargs):
        made = create(self, *args, **kwargs)
        calls.append(made.info.run_id)
        if len(calls) == 1:
            raise answered(500)
        return made

    monkeypatch.setattr(Store, "create_run", lose)
    run_id = Store(30.0).begin_run(experiment, "one", {"soup.role": "look"})
    assert calls == [run_id]
    assert len(client.search_runs([experiment], "tags.`soup.role` = 'look'")) == 1


def test_mlflows_own_retries_are_off_inside_a_call_and_restored_after_it(client, monkeypatch):
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setenv(name, "5")
    seen, ready, go = [], threading.Event(), threading.Event()

    def slow():
        seen.append(os.environ[name])
        ready.set()
        go.wait(10)
        seen.append(os.environ[name])

    thread = threading.Thread(target=lambda: Store().persist(slow, "wait"))
    thread.start()
    ready.wait(10)
    Store().persist(lambda: seen.append(os.environ[name]), "pass")
    assert os.environ[name] == "0"  # another thread is still inside
    go.set()
    thread.join()
    assert seen == ["0", "0", "0"]
    assert os.environ[name] == "5"
    monkeypatch.delenv(name)
    Store().persist(lambda: None, "pass")
    assert name not in os.environ


def test_calls_that_read_or_change_are_repeated_and_those_that_create_are_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = Store(0.1, "http://127.0.0.1:9")
    repeated = {"search_runs": (["1"],), "set_terminated": ("a",), "delete_run": ("a",)}
    for name, args in repeated.items():
        with pytest.raises(errors.StoreError):
            getattr(store, name)(*args)
    created = {"create_run": ("1",), "create_experiment": ("a",), "create_logged_model": ("1",)}
    created |= {"create_registered_model": ("a",), "create_model_version": ("a", "models:/m-1")}
    for name, args in created.items():
        with pytest.raises(MlflowException):
            getattr(store, name)(*args)


def test_the_error_for_a_forbidden_call_says_what_it_needs_and_who_may_grant_it(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    denied = MlflowException("API request failed with error code 403 != 200", PERMISSION_DENIED)
    permissions.note(denied, permissions.needed(MlflowClient.get_experiment_by_name, "soups"))
    permissions.note(denied, permissions.needed(MlflowClient.create_run, "3", 0))
    with pytest.raises(errors.DeniedError) as caught, asking("begin"):
        raise denied
    assert caught.value.what == "you may not begin: this needs EDIT on experiment 3"
    assert caught.value.where.endswith(", user ada")
    assert "ask whoever has MANAGE on it, or an administrator" in caught.value.fix
    assert caught.value.exit_code == 7


def test_the_error_for_an_unknown_user_names_the_credentials():
    unknown = MlflowException("API request failed with error code 401 != 200")
    with pytest.raises(errors.DeniedError, match="not know this user") as caught, asking("begin"):
        raise unknown
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in caught.value.fix


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_the_error_for_keys_that_s3_refuses_names_no_user_of_mlflow(code):
    """MLflow's client turns it into the code that its server has for a stranger."""
    refusal = MlflowException("Failed to list", BOTO_TO_MLFLOW_ERROR[code])
    refusal.__context__ = ClientError({"Error": {"Code": code}}, "ListObjectsV2")
    with pytest.raises(errors.StoreError, match=code) as caught, asking("begin"):
        raise refusal
    assert "credentials" in caught.value.fix
    assert "MLFLOW_TRACKING" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "args", "need"),
    [
        ("get_run", ("a1",), "READ on the experiment of run a1, if there is such a run"),
        ("log_batch", ("a1", []), "EDIT on the experiment of run a1, if there is such a run"),
        ("delete_tag", ("a1", "x"), "EDIT on the experiment of run a1, if there is such a run"),
        ("get_experiment_by_name", ("soups",), "READ on experiment 'soups'"),
        ("create_logged_model", ("3", "soup"), "EDIT on experiment 3"),
        ("log_model_artifacts", ("m-1", "."), "EDIT on the experiment of logged model m-1"),
        ("get_registered_model", ("toy",), "READ on registered model 'toy', if there is one"),
        ("get_model_version", ("toy", "1"), "READ on registered model 'toy'"),
        ("set_registered_model_alias", ("toy", "a", "1"), "EDIT on registered model 'toy'"),
        ("delete_model_version", ("toy", "1"), "MANAGE on registered model 'toy'"),
        ("create_experiment", ("soups",), ""),
        ("search_runs", (["3"],), ""),
    ],
)
def test_each_call_needs_one_permission(method, args, need):
    assert permissions.needed(getattr(MlflowClient, method), *args) == need


def test_a_download_is_repeated_only_if_the_store_lists_the_file(client):
    failing = Shaky(2, MlflowException("The following failures occurred while downloading"))
    assert Store(30.0).download(failing, lambda: True, "fetch") == "answer"
    failing = Shaky(2, MlflowException("The following failures occurred while downloading"))
    with pytest.raises(MlflowException, match="failures"):
        Store(30.0).download(failing, lambda: False, "fetch")
    assert failing.calls == 1


def test_a_read_only_database_is_not_waited_for(client, tmp_path):
    experiment = client.get_experiment_by_name("soups").experiment_id
    uri = f"sqlite:///file:{tmp_path}/mlflow.db?mode=ro&uri=true"
    begin = time.monotonic()
    with pytest.raises(errors.RegistryError, match="refused to write"), asking("write"):
        Store(60.0, uri).begin_run(experiment, "one", {})
    assert time.monotonic() - begin < 20.0


@pytest.mark.parametrize(
    ("words", "denied"),
    [
        ("attempt to write a readonly database", True),
        ("(1142, \"INSERT command denied to user 'x'\")", True),
        ("failed with error code 403 != 200", True),
        ("no such table: runs", True),
        ("database is locked", False),
        ("run 4034f401 failed", False),
    ],
)
def test_a_denial_is_recognised_by_its_message(words, denied):
    assert is_denied(MlflowException(words)) is denied


def test_patience_with_internal_errors_is_shorter(client, monkeypatch):
    monkeypatch.setattr(store, "_BROKEN_S", 0.0)
    broken = Shaky(1, requests.exceptions.RetryError("too many 500 error responses"))
    with pytest.raises(errors.StoreError, match="too many 500"):
        Store(30.0).persist(broken, "ask")
    assert Store(30.0).persist(Shaky(1), "ask") == "answer"


def test_the_error_of_an_outage_says_what_was_tried_and_why_it_failed(client):
    refused = requests.ConnectionError("connection refused by http://u:hunter2@h")
    with pytest.raises(errors.StoreError) as caught, asking("register a soup"):
        Store().persist(Shaky(1, refused), "call log_batch")
    assert caught.value.what == (
        "the MLflow store did not answer while trying to register a soup: "
        "connection refused by http://h"
    )


def test_deleting_what_is_gone_succeeds(client):
    client.discard(lambda: client.delete_model_version("toy-llm", "99"), "delete")
    with pytest.raises(MlflowException):
        client.discard(lambda: client.delete_model_version("toy-llm", "x"), "delete")
