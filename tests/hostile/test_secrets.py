"""Planted secrets appear in no output, tag, param, artifact or exception."""

import os
import subprocess
import sys
import textwrap
import traceback
from urllib.parse import quote

import mlflow
import pytest
import yaml
from test_redaction import BODY, PEM, TOKENS

import forked
import mlflow_soup
import toy
from conftest import register
from mlflow_soup import Spec
from mlflow_soup.errors import StoreError
from mlflow_soup.registry.store import pages

PASSWORD = "hunter2-s3cret+ü"
PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0KEY0ID00",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/secret+key/0123456789abcdefghijk",
    "MLFLOW_TRACKING_TOKEN": "pl4nted-tracking-token",
}
VALUES = (PASSWORD, quote(PASSWORD), "hunter2-s3cret", *PLANTED.values())
MODEL = "guarded-llm"


def with_password(uri):
    """The URI with a user and a password, which a server without accounts ignores."""
    return uri.replace("://", f"://alice:{quote(PASSWORD)}@")


def planted(uri):
    return {**os.environ, **PLANTED, "MLFLOW_TRACKING_URI": uri}


def process(*words, uri, program=("-m", "mlflow_soup")):
    """The command in a process of its own, with all secrets planted; what it says."""
    command = [sys.executable, *program, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=planted(uri))
    check(done.stdout + done.stderr)
    return done


def quick_process(*words, uri, **more):
    """The same, but for what it says while it imports."""
    done = forked.play("mlflow_soup", *words, env=planted(uri) | more)
    check(done.stdout + done.stderr)
    return done


def check(text):
    for value in VALUES:
        assert value not in text


def check_bytes(content):
    for value in VALUES:
        assert value.encode() not in content


@pytest.fixture
def guarded(server_client, checkpoints):
    """The server's client, and a model of two versions there."""
    server_client.create_registered_model(MODEL)
    for folder in checkpoints[:2]:
        register(server_client, folder, MODEL)
    yield server_client
    server_client.delete_registered_model(MODEL)


def everything(client):
    """All that a store says of its experiments, runs, versions and logged models."""
    for experiment in pages(client.search_experiments):
        yield from (experiment.name, str(experiment.tags))
        for run in pages(client.search_runs, [experiment.experiment_id]):
            yield from (str(run.to_dictionary()), run.info.run_name or "")
        for model in pages(client.search_logged_models, [experiment.experiment_id]):
            yield str(model.to_dictionary())
    for model in pages(client.search_registered_models):
        yield from (str(model.tags), model.description or "")
    for version in pages(client.search_model_versions):
        yield from (str(version.tags), version.description or "", version.source)


def test_neither_a_good_run_nor_its_mistakes_tell_a_secret(
    guarded, server, server_folder, tmp_path
):
    uri = with_password(server)
    folder = toy.write_tasks(tmp_path / PASSWORD)  # logged as a param
    data = tmp_path / PASSWORD / "nowhere.jsonl"
    task = yaml.safe_load((folder / "letters.yaml").read_text())
    task |= {"task": "toy_lost", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
    (folder / "lost.yaml").write_text(yaml.safe_dump(task))
    common = ("run", "--model", MODEL, "--pair", "v1,v2", "--include-path", str(folder))
    good = (*common, "--tasks", "toy_letters", "--ood-tasks", "toy_digits", "--trials", "4")

    done = process(*good, uri=uri)
    assert done.returncode in (0, 3), done.stderr
    assert f"registered as models:/{MODEL}/3" in done.stdout
    assert f"run: {server}/#/experiments/" in done.stdout  # as a link, still of use
    assert "workflowType=machine_learning" in done.stdout
    assert "Traceback" not in done.stderr
    runs = pages(guarded.search_runs, [e.experiment_id for e in pages(guarded.search_experiments)])
    logged = [r.data.params.get("cfg.include_path") for r in runs]
    assert f"{tmp_path}/…" in logged

    for words, code, said in (
        ((*common, "--tasks", "toy_lost"), 1, "toy_lost could not be loaded"),
        ((*common, "--tasks", "toy_none"), 2, "lm-eval has no task"),
        ((*good, "--model", "nobody"), 4, "no registered model"),
        ((*good, "--model", PASSWORD), 2, "'…' cannot be the name"),
        ((*good, "--alpha", PASSWORD), 2, "is not a valid float"),
        (("lineage", f"models:/{MODEL}/3"), 0, "soup"),
        (("verify", f"models:/{MODEL}/3"), 0, "verified"),
        (("merge", uri, uri, "--weights", "1,0", "--out", "x"), 2, "neither a folder"),
    ):
        done = quick_process(*words, uri=uri)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    done = quick_process(*good, uri=with_password("http://127.0.0.1:9"))
    assert done.returncode == 6
    assert "http://127.0.0.1:9" in done.stderr

    for text in everything(guarded):
        check(text)
    for path in server_folder.rglob("*"):
        if path.is_file():
            check_bytes(path.read_bytes())


BUG = """
    import logging, os, threading, warnings
    from urllib.parse import unquote
    from mlflow_soup import cli
    from mlflow_soup.registry import tracking

    def shout(name):
        logging.getLogger(name).warning("said by %s: %s", name, secret)

    @cli.main.command()
    def bug():
        import botocore.session, lm_eval, mlflow, transformers, urllib3
        logging.basicConfig()
        for name in ("mlflow", "urllib3", "botocore", "lm_eval", "transformers", "mlflow_soup", ""):
            shout(name)
        warnings.warn(f"said by warnings: {secret}")
        thread = threading.Thread(target=lambda: int(f"said by thread: {secret}"))
        thread.start()
        thread.join()
        try:
            int(secret)
        except ValueError:
            raise KeyError(f"said by the bug: {secret}")

    secret = " ".join([os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"],
                       unquote(os.environ["MLFLOW_TRACKING_URI"])])
    cli.main()
"""


def test_a_bug_shows_its_traceback_without_secrets(tmp_path):
    (tmp_path / "bug.py").write_text(textwrap.dedent(BUG))
    program = (str(tmp_path / "bug.py"),)
    done = process("bug", uri=with_password("http://127.0.0.1:9"), program=program)
    assert done.returncode == 1
    for name in ("mlflow", "urllib3", "botocore", "lm_eval", "transformers", "mlflow_soup", ""):
        assert f"said by {name}: … …" in done.stderr
    for place in ("warnings", "thread", "the bug"):
        assert f"said by {place}: … …" in done.stderr
    assert "During handling of the above exception" in done.stderr
    assert "KeyError" in done.stderr


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "mysql://127.0.0.1:9/db"])
def test_a_host_that_prints_our_exceptions_shows_no_secret(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password(uri))
    mlflow.set_tracking_uri(with_password(uri))
    with pytest.raises(StoreError) as caught:
        mlflow_soup.run(Spec(model=MODEL, pair="v1,v2"))
    shown = "".join(traceback.format_exception(caught.value))
    assert "direct cause" in shown
    check(shown)


CLOUD = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


def test_an_artifact_store_that_is_away_is_an_error_without_keys(client, tasks, tmp_path):
    client.create_experiment("cloud", artifact_location="s3://bucket/soups")
    client.create_registered_model("far-llm")
    for number in (1, 2):
        client.create_model_version("far-llm", f"s3://bucket/far/{number}")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    words = ("run", "--pair", "v1,v2", "--experiment", "cloud", "--store-patience", "0")
    asked = ("--model", "far-llm", "--tasks", "toy_letters", "--include-path", str(tasks))
    for more in (("--model", "toy-llm"), asked):
        done = quick_process(*words, *more, uri=uri, **CLOUD)
        assert done.returncode in (4, 6), done.stderr
        assert "Traceback" not in done.stderr
    check_bytes((tmp_path / "mlflow.db").read_bytes())


# test_redaction.py tries each token in six places. Commands pass all of them to the same filter, so
# few kinds are enough here: plain, with points, with dashes, a URI, and all capitals
FEW = ("aws sts", "anthropic", "azure sas", "vault", "discord")


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(token, id=name, marks=[] if name in FEW else pytest.mark.slow)
        for name, token in TOKENS.items()
    ],
)
def test_a_command_that_fails_on_a_token_does_not_repeat_it(tmp_path, token):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({f"x-{token}": "1"}))
    merge = ("merge", token, f"models:/{token}", "--weights", token, "--out", f"x{token}")
    for words in (merge, ("run", "--spec", "spec.yaml"), ("run", f"--{token}"), ("verify", token)):
        done = forked.play("mlflow_soup", *words, cwd=tmp_path)
        assert done.returncode not in (0, 1), done.stderr
        assert token.partition("?")[2] or token not in done.stdout + done.stderr


VARIABLES = {
    "GITHUB_PAT": "hunter2-s3cret",
    "MYSQL_PWD": "hunter2-s3cret",
    "STRIPE_KEY_LIVE": "hunter2-s3cret",
    "NETRC": "machine host login alice password hunter2-s3cret",
    "PIP_INDEX_URL": "https://hunter2-s3cret-0123@host/simple",
    "CONFIG_JSON": '{"private_key": "hunter2-s3cret", "type": "service_account"}',
    "STORAGE": "DefaultEndpointsProtocol=https;AccountKey=hunter2-s3cret;EndpointSuffix=b",
    "SERVER_CERT": PEM.format("", "").replace(BODY[:64], "hunter2-s3cret" * 4),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_command_that_fails_on_what_a_variable_holds_does_not_repeat_it(tmp_path, name):
    planted = {**os.environ, name: VARIABLES[name]}
    secret = "hunter2-s3cret" * (4 if name == "SERVER_CERT" else 1)
    secret += "-0123" if name == "PIP_INDEX_URL" else ""
    for words in (("merge", secret, secret, "--weights", "1/2,1/2", "--out", "x"), ("run", secret)):
        done = forked.play("mlflow_soup", *words, cwd=tmp_path, env=planted)
        assert done.returncode in (2, 4), done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert "…" in done.stderr


@pytest.mark.parametrize(
    "location",
    ["s3://alice:hunter2-s3cret@bucket/far", "s3://alice:hunter2-s3cret/far", "s3://a:hunter2@b"],
)
def test_a_password_in_the_location_of_artifacts_is_not_shown(client, tasks, location):
    client.create_experiment("cloud", artifact_location=location)
    client.create_registered_model("far-llm")
    for number in (1, 2):
        client.create_model_version("far-llm", f"{location}/{number}")
    words = ("run", "--pair", "v1,v2", "--store-patience", "0", "--experiment", "cloud")
    asked = ("--tasks", "toy_letters", "--include-path", str(tasks), "--limit", "10")
    for model in (MODEL.replace("guarded", "toy"), "far-llm"):
        env = {**os.environ, **CLOUD, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        done = forked.play("mlflow_soup", *words, "--model", model, *asked, env=env)
        assert done.returncode in (1, 4, 6), done.stderr
        assert "Invalid bucket name" in done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stdout + done.stderr
