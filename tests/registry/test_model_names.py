"""Every name that MLflow allows for a registered model works in every command."""

import json
import shlex
from urllib.parse import unquote

import mlflow
import pytest
from click.testing import CliRunner

from conftest import fill, register
from mlflow_soup.cli import main
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Version
from mlflow_soup.registry import links, naming
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_soups, last, versions_of

ODD = 'été (v2) it\'s "x", 50%2C a@b #1 &c;d=e [f](g) $h\\i *j_ <k> | {l} 日本 🙂'
OTHER = "-rf 'other' \"one\", or name like '%"


def command(*words):
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.stderr
    return done.stdout


def every_command(client, checkpoints, tasks):
    fill(client, checkpoints[:2], tasks, ODD)
    own = {"soup.tasks": "toy_letters", "soup.ood_tasks": "toy_digits"}
    client.create_registered_model(OTHER, {**own, "soup.include_path": str(tasks)})
    name = ("--model", ODD)
    said = command("run", *name, "--last", "2", "--method", "uniform", "--promote", "champion")
    assert f"registered as models:/{ODD}/3" in said
    (page,) = (line.split()[-1] for line in said.splitlines() if "version: http" in line)
    assert unquote(page.partition("#")[2]) == f"/models/{ODD}/versions/3"
    assert not set(page) & set(" \"'<>[]()\\|{}")
    said = command("run", *name, "--pair", "1,2", "--method", "uniform")  # found again
    assert f"models:/{ODD}/3" in said
    command("evaluate", *name, "--version", "v3")
    command("gate", *name, "--version", "v3")
    to = ("--promote", f"model:{OTHER}@live")
    said = command("promote", *name, "--version", "v3", *to)
    assert f"{OTHER}@live → {OTHER} v1" in said
    for uri in (f"models:/{ODD}/3", f"models:/{ODD}@champion", f"models:/{OTHER}@live"):
        graph = json.loads(command("lineage", uri, "--format", "json"))
        assert {node["uri"] for node in graph["nodes"][1:]} == {
            f"models:/{ODD}/{n}" for n in (1, 2)
        }
        assert command("verify", uri).endswith(": verified\n")
    assert "no complaints" in command("doctor", *name)


def test_an_odd_name_works_in_every_command_on_a_database(client, checkpoints, tasks):
    every_command(client, checkpoints, tasks)


def test_an_odd_name_works_in_every_command_on_a_server(server_client, checkpoints, tasks):
    every_command(server_client, checkpoints, tasks)


@pytest.mark.parametrize("name", [ODD, OTHER, "a' or name like '%", "\"'", "-", "a%b", "_"])
def test_a_search_finds_the_versions_of_one_model_only(client, checkpoints, name):
    for other in (name, name.replace("'", "x") + "y", name.swapcase() + " ", f"x{name[1:]}x"):
        client.create_registered_model(other)
        register(client, checkpoints[0], other)
    assert [(v.name, int(v.version)) for v in versions_of(client, name)] == [(name, 1)]
    assert last(client, name, 1) == [Version(name, 1)]
    client.set_model_version_tag(name, "1", "soup.key", "it's")
    assert find_soups(client, name, {"soup.key": "it's"}) == [Version(name, 1)]
    assert find_soups(client, name, {"soup.key": "itxs"}) == []


@pytest.mark.parametrize("name", ["a?b", "a`b", "a\nb", "a\u200bb", "x" * 201])
def test_a_name_that_uris_and_texts_cannot_hold_is_refused(client, name):
    client.create_registered_model(name)
    with pytest.raises(SpecError, match="cannot be the name of a registered model here"):
        last(client, name, 2)


@pytest.mark.parametrize("owner", [ODD, OTHER, "12,x", "a%2Cb", "%", "été,"])
def test_the_parents_of_a_soup_read_back_whatever_their_models_are_called(owner):
    parents = (Version("m", 12), Version(owner, 7), Version(owner, 12))
    assert naming.parse_parents("m", naming.format_parents("m", parents)) == parents


def test_a_command_in_an_error_can_be_pasted_into_a_shell():
    assert shlex.split(Version(ODD, 3).options) == ["--model", ODD, "--version", "v3"]
    assert Version("my-llm", 3).options == "--model my-llm --version v3"


def test_links_name_the_workspace(client, monkeypatch):
    page = links.version_path(Version("a b", 1))
    assert page == "/models/a%20b/versions/1"
    with mlflow.start_run() as run:
        plain = links.run_path(client, run.info.run_id)
    monkeypatch.setenv("MLFLOW_WORKSPACE", "")  # is restored in the end
    try:
        mlflow.set_workspace("team-a")
        assert links.version_path(Version("a b", 1)) == f"{page}?workspace=team-a"
        monkeypatch.setenv("MLFLOW_WORKSPACE", "team é")
        assert links.version_path(Version("a b", 1)) == f"{page}?workspace=team%20%C3%A9"
    finally:
        mlflow.set_workspace(None)
    assert links.version_path(Version("a b", 1)) == page
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-b")
    assert links.run_path(client, run.info.run_id) == f"{plain}&workspace=team-b"


def test_links_name_the_store_of_runs_and_the_store_of_models(client, monkeypatch, tmp_path):
    version, run = Version("m", 1), "/experiments/1/runs/2"
    page = links.version_path(version)
    ours = f"sqlite:///{tmp_path}/mlflow.db"
    assert links.link(page) == f"http://127.0.0.1:5000/#{page}"
    assert links.version_link(version) == f"[m v1](#{page})"
    assert links.how_to_look() == f"mlflow ui --backend-store-uri {ours}"
    mlflow.set_registry_uri("https://user:secret@models.example/")
    assert links.link(page) == f"https://models.example/#{page}"
    assert links.link(run) == f"http://127.0.0.1:5000/#{run}"
    assert links.version_link(version) == f"[m v1](https://models.example/#{page})"
    assert links.how_to_look() == f"mlflow ui --backend-store-uri {ours}"
    mlflow.set_registry_uri("sqlite:///a b.db")
    assert links.version_link(version) == f"[m v1](#{page})"
    both = f"mlflow ui --backend-store-uri {ours} --registry-store-uri 'sqlite:///a b.db'"
    assert links.how_to_look() == both
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://runs.example")
    mlflow.set_registry_uri("http://models.example")
    assert links.link(run) == f"http://runs.example/#{run}"
    assert links.link(page) == f"http://models.example/#{page}"
    assert links.how_to_look() == ""


def test_a_soup_is_made_where_runs_and_models_lie_in_two_stores(
    client, checkpoints, tasks, tmp_path
):
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/models.db")
    fill(Store(), checkpoints[:2], tasks, "apart")
    said = command("run", "--model", "apart", "--last", "2", "--method", "uniform")
    assert "registered as models:/apart/3" in said
    assert f"--registry-store-uri sqlite:///{tmp_path}/models.db" in said
    assert command("verify", "models:/apart/3").endswith(": verified\n")
