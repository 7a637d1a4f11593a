import itertools
import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import forked
from conftest import MODEL
from mlflow_soup.cli import main

ROOT = Path(__file__).parent.parent
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())


def test_entry_points_are_the_commands():
    commands = {"main" if name == "run" else name for name in main.commands}
    assert set(PROJECT["entry_points"]) == commands | {"quickstart"}


def test_every_parameter_is_an_option_and_is_passed_on():
    for name, entry in PROJECT["entry_points"].items():
        if name == "quickstart":
            continue
        words = entry["command"].split()
        assert words[0] == "mlflow-soup"
        if name == "merge":  # two parents by name, where the command takes any number
            entry = {**entry, "parameters": {"weights", "out", "digests"}}
        commands = [main.commands[words[1]]]
        if name == "study":  # which of them is a parameter
            assert words[2] == "{study}"
            commands = commands[0].commands.values()
        for parameter, command in itertools.product({*entry["parameters"]} - {"study"}, commands):
            options = {option.name: option for option in command.params}
            assert parameter in options
            # unquoted and with `=`: MLflow quotes the value, and it may begin with a dash
            named = isinstance(options[parameter], click.Option)
            assert (f"--{parameter}=" if named else "") + f"{{{parameter}}}" in words


def test_what_is_left_out_is_not_said():
    done = CliRunner().invoke(main, ["run", "--model=", "--pair="])
    assert done.exit_code == 2
    assert "the request names no versions" in done.stderr


def test_conda_pins_an_exact_python_and_the_tested_set():
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    python, _, pip = environment["dependencies"]
    assert python.count(".") == 2
    assert set(pip["pip"]) == {"--constraint constraints.txt", "mlflow", "."}


def test_the_tested_set_pins_everything_we_depend_on():
    pinned = {
        line.split("==")[0].replace("_", "-").lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("<")[0].strip()
        assert name.replace("_", "-").lower() in pinned


def mlflow_run(manager, *words, programs=Path(sys.executable).parent):
    """`mlflow run .` on the store of this test; its command is the one in a folder."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path}  # set_experiment put the experiment's id there
    return forked.play("mlflow", "run", str(ROOT), "--env-manager", manager, *words, env=env)


def test_the_main_job_as_a_project_finds_its_model_and_logs_to_the_run_mlflow_made(
    client, programs, tmp_path
):
    words = ("-P", "pair=v1,v2", "-P", "trials=4", "-P", "promote=champion")
    words += ("-P", f"output={tmp_path}/out.json")
    done = mlflow_run("local", *words, programs=programs)
    assert done.returncode == 0, done.stderr
    version = client.get_model_version_by_alias(MODEL, "champion")
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["version"]["version"] == int(version.version)
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["soup.gate"] == "passed"
    assert run.data.tags["mlflow.project.entryPoint"] == "main"
    assert run.data.params["trials"] == run.data.params["cfg.trials"] == "4"


def test_a_refusal_fails_the_project_and_says_so_on_the_run(client, programs):
    client.set_registered_model_alias(MODEL, "champion", "1")
    words = ("-P", "pair=v3,v1", "-P", "trials=4", "-P", "margin=0")
    done = mlflow_run("local", *words, programs=programs)
    assert done.returncode == 1
    assert "gate REFUSED" in done.stdout
    experiment = client.get_experiment_by_name("soups").experiment_id
    (run,) = client.search_runs([experiment], "tags.`soup.role` = 'search'")
    assert run.info.status == "FAILED"
    assert run.data.tags["soup.gate"] == "refused"


def test_a_study_as_a_project_logs_to_the_run_mlflow_made(client, programs):
    words = ("-e", "study", "-P", "study=landscape", "-P", "pair=v1,v2", "-P", "points=4")
    done = mlflow_run("local", *words, programs=programs)
    assert done.returncode == 0, done.stderr
    assert "Landscape of v1,v2" in done.stdout
    experiment = client.get_experiment_by_name("soups").experiment_id
    (run,) = client.search_runs([experiment], "tags.`soup.role` = 'study'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.project.entryPoint"] == "study"
    assert run.data.params["cfg.points"] == "4"
    assert "landscape.csv" in {file.path for file in client.list_artifacts(run.info.run_id)}


@pytest.mark.slow
@pytest.mark.parametrize(("manager", "tool"), [("virtualenv", "pyenv"), ("uv", "uv")])
def test_the_project_makes_its_own_environment(client, tmp_path, monkeypatch, manager, tool):
    if shutil.which(tool) is None:
        pytest.skip(f"MLflow's {manager} manager needs {tool}")
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(tmp_path / "environments"))
    done = mlflow_run(manager, "-P", "pair=v1,v2", "-P", "trials=4")
    assert done.returncode == 0, done.stderr
    assert client.get_model_version(MODEL, "4").tags["soup.gate"] == "passed"
