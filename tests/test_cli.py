"""The command: words, exit codes, and what it leaves alone."""

import os
import subprocess
import sys

import mlflow
import pytest
import yaml
from click.testing import CliRunner

from conftest import MODEL
from mlflow_soup.cli import main


def process(*words):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "mlflow_soup", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def command(*words):
    """The same in this process, which has imported torch and MLflow already."""
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def test_help_needs_nothing_heavy():
    before = os.times().children_user
    done = process("run", "--help")
    assert done.returncode == 0
    assert "--ood-tasks" in done.stdout
    assert os.times().children_user - before < 0.5


def test_the_main_job_ends_with_words_and_links(client):
    done = process("run", "--pair", "v1,v2", "--promote", "champion")
    assert done.returncode == 0, done.stderr
    assert "registered as models:/toy-llm/4" in done.stdout
    assert "gate passed" in done.stdout
    assert "promoted: alias champion → toy-llm v4" in done.stdout
    assert "to open these, run: mlflow ui --backend-store-uri sqlite:///" in done.stdout
    assert "it/s" not in done.stderr  # no progress bar where nobody watches
    assert "Traceback" not in done.stderr
    done = command("gate", "--version", "v4", "--margin", "0", "--confidence", "0.999999")
    assert done.returncode == 3
    assert "REFUSED" in done.stdout
    done = command("promote", "--version", "v4", "--promote", "alias:other")
    assert done.returncode == 3
    assert "has not passed the gate" in done.stderr
    done = command("evaluate", "--version", "v4")
    assert done.returncode == 0, done.stderr
    assert "| soup (toy-llm v4) |" in done.stdout
    assert command("gate", "--version", "v4").returncode == 0
    done = command("promote", "--version", "v4", "--promote", "model:prod@live")
    assert "prod@live → prod v1" in done.stdout


def test_a_refusal_exits_with_3(client):
    done = command("run", "--pair", "v3,v1", "--promote", "champion", "--trials", "4")
    assert done.returncode == 3, done.stderr
    assert "gate REFUSED" in done.stdout
    assert "promoted" not in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "no pair was named"),
        (["run", "--pair", "v1"], 2, "a pair is two versions"),
        (["run", "--pair", "v1,1"], 2, "v1 is in the pair twice"),
        (["run", "--pair", "v1,x"], 2, "'x' names no version"),
        (["run", "--pair", "v1,v2", "--alpha", "1"], 2, "--alpha 1.0 is out of range"),
        (["run", "--pair", "v1,v2", "--promote", "stage:Live"], 2, "'Live' is no stage"),
        (["run", "--pair", "v1,v7"], 4, "toy-llm has no v7"),
        (["run", "--pair", "v1,v2", "--model", "none"], 4, "no registered model 'none'"),
        (["promote", "--version", "v1", "--promote", "champion"], 2, "is no soup"),
        (["gate"], 2, "no version was named"),
        (["run", "--pairs", "v1,v2"], 2, "No such option"),
    ],
)
def test_a_mistake_is_answered_with_one_clear_error(client, words, code, said):
    done = command(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if not said.startswith("No such"):
        assert done.stderr.count("error:") == 1
        assert "fix:" in done.stderr


def test_a_server_that_is_not_there_exits_with_6():
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    done = command("run", "--pair", "v1,v2")
    assert done.returncode == 6
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_knobs_can_stand_in_a_file_which_the_command_line_overrides(client, tmp_path):
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump({"pair": "v1,v2", "alpha": 2, "model": MODEL}))
    done = command("run", "--spec", str(path))
    assert done.returncode == 2
    assert "--alpha 2.0 is out of range" in done.stderr
    done = command("run", "--spec", str(path), "--alpha", "3")
    assert "--alpha 3.0 is out of range" in done.stderr
    path.write_text(yaml.safe_dump({"pear": "v1,v2"}))
    done = command("run", "--spec", str(path))
    assert done.returncode == 2
    assert "'pear', which is no knob" in done.stderr


def test_options_may_be_spelt_with_underscores_as_mlflow_projects_pass_them(client):
    done = command("run", "--pair=v1,v2", "--model=", "--ood_tasks", "toy_letters")
    assert done.returncode == 2
    assert "toy_letters is held-out and out of domain at once" in done.stderr
