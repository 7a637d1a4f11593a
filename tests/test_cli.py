"""The command: words, exit codes, and what it leaves alone."""

import json
import re
import shlex
import subprocess
import sys

import mlflow
import pytest
import yaml
from click.testing import CliRunner

import forked
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


DIGITS = "toy_digits,toy_digits_bpb:bits_per_byte"  # the policy of the model


@pytest.mark.parametrize(
    ("words", "method"),
    [("run", "bayesopt"), ("study pairs", "uniform"), ("study count", "uniform")],
)
def test_help_tells_the_default_of_the_command(words, method):
    said = CliRunner().invoke(main, [*words.split(), "--help"], terminal_width=1000).output
    (line,) = [line for line in said.splitlines() if "  How one model is made" in line]
    assert line.endswith(f"[default: {method}]")


def test_help_needs_nothing_heavy():
    words = [sys.executable, "-X", "importtime", "-m", "mlflow_soup", "run", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--ood-tasks" in done.stdout
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, flags=re.MULTILINE))
    assert "click" in imported
    assert not imported & {"mlflow", "torch", "transformers", "lm_eval", "numpy", "sklearn"}


def test_the_last_line_is_the_command_that_promotes_what_passed(client, merged):
    last = merged.summary.splitlines()[-1]
    assert last == "next: mlflow-soup promote --model toy-llm --version v4 --promote alias:champion"
    done = command(*shlex.split(last.removeprefix("next: mlflow-soup ")))
    assert done.returncode == 0, done.stderr
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 4


def test_the_main_job_ends_with_words_and_links(client, tasks):
    done = forked.play("mlflow_soup", "run", "--pair", "v1,v2", "--promote", "champion")
    assert done.returncode == 0, done.stderr
    assert "registered as models:/toy-llm/4" in done.stdout
    assert "gate passed" in done.stdout
    assert "promoted: alias champion → toy-llm v4" in done.stdout
    assert "next: " not in done.stdout
    assert "to open these, run: mlflow ui --backend-store-uri sqlite:///" in done.stdout
    assert "it/s" not in done.stderr  # no progress bar where nobody watches
    assert "Traceback" not in done.stderr
    done = command("gate", "--version", "v4", "--margin", "0", "--confidence", "0.999999")
    assert done.returncode == 3
    assert "REFUSED" in done.stdout
    strict = ("--margin", "0", "--confidence", "0.999999")
    done = command("promote", "--version", "v4", "--promote", "alias:other", *strict)
    assert done.returncode == 3
    assert "the gate refuses toy-llm v4" in done.stderr
    done = command("gate", "--version", "v4", "--margin", "0.2")
    assert done.returncode == 2
    assert "--margin 0.2 is looser than the policy of toy-llm, which says 0.05" in done.stderr
    done = command("evaluate", "--version", "v4")
    assert done.returncode == 0, done.stderr
    assert "| soup (toy-llm v4) |" in done.stdout
    assert command("gate", "--version", "v4").returncode == 0
    own = {"soup.tasks": "toy_letters", "soup.ood_tasks": "toy_digits"}
    client.create_registered_model("prod", own)
    to = ("--promote", "model:prod@live", "--include-path", str(tasks))
    done = command("promote", "--version", "v4", *to)
    assert "prod@live → prod v1" in done.stdout


def test_the_power_of_the_gate_is_told_before_anything_is_scored(client):
    done = command("gate", "--power", "--model", MODEL)
    assert done.returncode == 0, done.stderr
    assert "passes a soup that is exactly as good as its rivals in" in done.stdout
    assert re.search(r"\(2 OOD tasks, [1-9]\d+ items, margin 0.05\)", done.stdout)
    assert "times the OOD items, or" in done.stdout
    assert "toy_digits_bpb:bits_per_byte counts as passed" in done.stdout
    assert not client.search_model_versions("tags.`soup.digest` != ''")
    done = command("gate", "--power", "--version", "v1", "--margin", "0.2")
    assert done.returncode == 2
    assert "looser than the policy" in done.stderr


def test_a_refusal_exits_with_3(client):
    strict = ("--margin", "0", "--confidence", "0.9999")
    done = command("run", "--pair", "v3,v1", "--promote", "champion", "--trials", "4", *strict)
    assert done.returncode == 3, done.stderr
    assert "gate REFUSED" in done.stdout
    assert "nothing was promoted to champion" in done.stdout
    assert "promoted: " not in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run"], 2, "the request names no versions"),
        (["run", "--pair", "v1"], 2, "a pair is two versions"),
        (["run", "--pair", "v1,1"], 2, "v1 is named twice"),
        (["run", "--pair", "v1,x"], 2, "'x' is not a version"),
        (["run", "--pair", "v1,v2", "--alpha", "1"], 2, "--alpha 1.0 is out of range"),
        (["run", "--pair", "v1,v2", "--promote", "stage:Live"], 2, "'Live' is not a stage"),
        (["run", "--pair", "v1,v7"], 4, "toy-llm has no v7"),
        (["run", "--pair", "v1,v2", "--model", "none"], 4, "no registered model 'none'"),
        (["promote", "--version", "v1", "--promote", "champion"], 2, "is not a soup"),
        (["gate"], 2, "no version was named"),
        (["lineage", "toy-llm/1"], 2, "'toy-llm/1' is not the URI of a registered version"),
        (["lineage", "models:/toy-llm/Production"], 2, "because stages and latest move"),
        (["lineage", "models:/toy-llm/9"], 4, "toy-llm has no v9"),
        (["lineage", "models:/toy-llm@champion"], 4, "toy-llm has no alias @champion"),
        (["lineage", "models:/none/1"], 4, "no registered model 'none'"),
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


def test_a_familys_tree_is_printed_by_number_or_alias(client, outcome):
    done = command("lineage", "models:/toy-llm/4")
    assert done.returncode == 0, done.stderr
    first, *parents = done.stdout.splitlines()
    assert first == "toy-llm v4: soup, gate passed, @champion"
    assert [line.split(" × ")[1] for line in parents] == [
        "toy-llm v1: checkpoint",
        "toy-llm v2: checkpoint",
    ]
    for uri in ("models:/toy-llm/v4", "models:/toy-llm@champion"):
        assert command("lineage", uri).stdout == done.stdout
    graph = json.loads(command("lineage", "models:/toy-llm@champion", "--format", "json").stdout)
    assert graph["root"] == "models:/toy-llm/4"
    drawn = command("lineage", "models:/toy-llm/4", "--format", "mermaid").stdout
    assert drawn.startswith("graph TD\n")


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
    path.write_text(yaml.safe_dump({"model": ["v1", "v2"]}))
    done = command("run", "--spec", str(path))
    assert done.returncode == 2
    assert "sets model to ['v1', 'v2'], which is not one text or number" in done.stderr
    path.write_text(yaml.safe_dump({"pear": "v1,v2"}))
    done = command("run", "--spec", str(path))
    assert done.returncode == 2
    assert "'pear', which is not an option" in done.stderr


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ({"pair": [1, 8]}, [], "toy-llm has no v8"),
        ({"pair": ["v1", "v8"], "tasks": ["toy_letters"]}, [], "toy-llm has no v8"),
        ({"pair": "v1,v2"}, ["--versions", "v2,v8"], "toy-llm has no v8"),
        ({"pair": "v1,v2"}, ["--last", "9"], "toy-llm has only 3 versions"),
        ({"last": 9}, ["--pair", "v1,v8"], "toy-llm has no v8"),
        ({"last": 9}, ["--pair", "v1,v2", "--last", "2"], "2 options say which versions"),
        ({"pair": "v1,v2", "last": 2}, [], "2 options say which versions"),
        ({"pair": "v1,v8"}, ["--pair="], "toy-llm has no v8"),  # as `mlflow run -P spec=…` does
        ({"pair": "v1,v2"}, ["--pair=", "--last", "9"], "toy-llm has only 3 versions"),
    ],
)
def test_the_command_line_says_which_versions_in_place_of_the_file(
    client, tmp_path, file, words, said
):
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump(file))
    done = command("run", "--spec", str(path), *words)
    assert done.returncode in (2, 4)
    assert said in done.stderr


def test_options_may_be_spelt_with_underscores_as_mlflow_projects_pass_them(client):
    done = command("run", "--pair=v1,v2", "--model=", "--ood_tasks", f"{DIGITS},toy_letters")
    assert done.returncode == 2
    assert "held-out and out-of-domain tasks overlap: toy_letters" in done.stderr


def test_folders_are_merged_and_verified_without_mlflow(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older, newer = map(str, checkpoints[:2])
    words = ("--weights", "3/10,7/10", "--out", "soup", "--digests", "yes")
    done = process("merge", older, newer, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"soup = 0.3 × {older} + 0.7 × {newer}\n"
    assert done.stderr == ""  # no progress bar where nobody watches
    done = process("verify", "soup")
    assert done.returncode == 0, done.stderr
    *findings, verdict = done.stdout.splitlines()
    assert [line.split()[0] for line in findings] == ["skipped", *["ok"] * 7]
    assert verdict == "soup: verified"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["soup"]  # no mlflow.db, no mlruns
    path = tmp_path / "soup" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = process("verify", "soup")
    assert done.returncode == 3
    assert "MISMATCH  soup: " in done.stdout
    assert "NOT what its manifest says" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (("--weights", "a,b"), 2, "is not a list of weights"),
        (("--weights", "0.3,0.3"), 2, "the weights sum to 0.6"),
        (("--weights", "0.5,0.5", "--out", "."), 2, "exists already"),
        (("--weights", "0.5,0.5", "--out", "/proc/soup"), 2, "cannot be written"),
    ],
)
def test_a_wrong_merge_is_refused_in_words(checkpoints, tmp_path, words, code, complaint):
    done = command("merge", *map(str, checkpoints[:2]), "--out", str(tmp_path / "soup"), *words)
    assert done.returncode == code
    assert complaint in done.stderr
    assert "fix: " in done.stderr
    assert not (tmp_path / "soup").exists()


def test_what_cannot_be_verified_is_told_by_its_exit_code(client, outcome, checkpoints, tmp_path):
    assert command("verify", str(checkpoints[0])).returncode == 2  # no soup
    assert command("verify", str(tmp_path / "nowhere")).returncode == 4
    assert command("verify", "models:/toy-llm/99").returncode == 4
    assert command("verify", "models:/nobody/1").returncode == 4
    assert command("verify", "models:/toy-llm/Production").returncode == 2
    assert command("verify", "models:/toy-llm/4").returncode == 0
    client.delete_model_version(MODEL, "1")
    done = command("verify", "models:/toy-llm/4")
    assert done.returncode == 4
    assert "missing   parent models:/toy-llm/1: toy-llm has no v1" in done.stdout
    client.set_model_version_tag(MODEL, "4", "soup.lambda", "0.99")
    assert command("verify", "models:/toy-llm/4").returncode == 3  # worse than missing
