"""The workflow for GitHub Actions: checked by GitHub's linters, and run step by step."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mlflow_soup
from actions import Runner
from conftest import MODEL, folder_of, make_keys
from mlflow_soup import Spec
from mlflow_soup.files.signing import KEY_ENV, open_verifier
from mlflow_soup.registry import promotion
from mlflow_soup.registry.ledger import open_ledger
from mlflow_soup.registry.versions import find_registered

PIPELINES = Path(__file__).parents[2] / "examples" / "pipelines"
WORKFLOW = PIPELINES / "soup.yml"
CONTENT = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
README = (PIPELINES / "README.md").read_text(encoding="utf-8")
LINTERS = re.search(r"```bash\n(actionlint.*?)```", README, re.S)[1].splitlines()
HONEST = {"model": MODEL, "pair": "v1,v2"}
PIPX = '#!/bin/sh\n[ "$1 $2" = "install mlflow-soup[sign]" ]\n'  # and nothing else; it is installed


def lint(line, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("line", LINTERS, ids=lambda line: line.split()[0])
def test_the_linters_find_nothing(line):
    ended = lint(line, PIPELINES)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("line", LINTERS, ids=lambda line: line.split()[0])
def test_the_linters_see_an_input_in_a_script_and_a_word_that_is_wrong(line, tmp_path):
    text = WORKFLOW.read_text().replace('--pair "$PAIR"', "--pair ${{ inputs.pair }}")
    (tmp_path / "soup.yml").write_text(text.replace("timeout-minutes: 60", "timeout: 60"))
    assert lint(line, tmp_path).returncode != 0


def test_the_readme_names_what_the_workflow_reads():
    text = WORKFLOW.read_text()
    for kind in ("vars", "secrets"):
        read = set(re.findall(rf"{kind}\.(\w+)", text))
        assert read
        for name in read:
            assert f"| `{name}` |" in README, name


def test_only_the_job_that_people_approve_sees_the_secret():
    for name, job in CONTENT["jobs"].items():
        assert ("secrets." in json.dumps(job)) == (job.get("environment") == "production"), name
    assert "secrets." not in json.dumps({k: v for k, v in CONTENT.items() if k != "jobs"})


@pytest.fixture
def runner(client, programs, tmp_path):
    """A machine on which installing takes no time, with a person who approves."""
    tools = tmp_path / "tools"
    tools.mkdir()
    pipx = tools / "pipx"
    pipx.write_text(PIPX)
    pipx.chmod(pipx.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join(map(str, (tools, programs, os.environ["PATH"])))
    variables = {
        "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"],
        "MLFLOW_EXPERIMENT_NAME": "soups",
        "SOUP_TARGET": "alias:champion",
        "SOUP_PACKAGE": "mlflow-soup[sign]",
        "SOUP_PUBLIC_KEY": "",
    }
    environ = {**os.environ, "PATH": path}
    return Runner(variables, {}, tmp_path / "jobs", environ)


def aliases(client):
    found = find_registered(client, MODEL).aliases
    return {alias: int(number) for alias, number in found.items()}


def results(done):
    return {name: job.result for name, job in done.items()}


def test_the_honest_pair_ends_with_the_champion_promoted(client, runner):
    asked = []
    runner.approve = lambda place: not asked.append((place, aliases(client)))
    done = runner.run(WORKFLOW, HONEST)
    assert set(results(done).values()) == {"success"}, {n: job.said for n, job in done.items()}
    assert done["run"].outputs == {"version": "v4"}
    assert asked == [("production", {})]
    assert aliases(client) == {"champion": 4}
    assert "gate passed" in done["gate"].summary
    promoted = json.loads((runner.root / "promote" / "promoted.json").read_text())
    assert promoted["promotion"]["version"]["uri"] == f"models:/{MODEL}/4"
    (entry,) = open_ledger(client, MODEL).read("promotion/alias champion")
    assert entry.mark == promotion.MADE


def test_with_a_key_the_soup_its_scores_and_the_promotion_are_signed(client, runner, tmp_path):
    private, public = make_keys(tmp_path, "gate")
    runner.variables = {**runner.variables, "SOUP_PUBLIC_KEY": public.read_text()}
    runner.secrets = {"production": {"MLFLOW_SOUP_KEY": private.read_text()}}
    done = runner.run(WORKFLOW, HONEST)
    assert set(results(done).values()) == {"success"}, {n: job.said for n, job in done.items()}
    assert done["promote"].codes["Measure with the key, and sign"] == 0
    assert aliases(client) == {"champion": 4}
    assert next(mlflow_soup.verify(f"models:/{MODEL}/4", public_key=public)).verdict == "ok"
    (entry,) = open_ledger(client, MODEL).read("promotion/alias champion")
    verifier = open_verifier([public])
    assert promotion.is_signed(verifier, MODEL, "promotion/alias champion", entry)


def test_without_the_secret_of_its_key_nothing_is_promoted(client, merged, runner, keys):
    runner.variables = {**runner.variables, "SOUP_PUBLIC_KEY": keys[1].read_text()}
    done = runner.run(WORKFLOW, HONEST)
    assert results(done) == {"run": "success", "gate": "success", "promote": "failure"}
    assert done["promote"].codes == {"Install": 0, "Measure with the key, and sign": 2}
    assert KEY_ENV in done["promote"].said
    assert aliases(client) == {}


def test_a_soup_that_the_gate_refuses_stops_there_and_its_version_is_told(client, runner):
    client.set_registered_model_tag(MODEL, "soup.method", "uniform")
    client.set_registered_model_alias(MODEL, "champion", "1")
    done = runner.run(WORKFLOW, HONEST | {"pair": "v3,v1"})
    assert results(done) == {"run": "failure", "gate": "skipped", "promote": "skipped"}
    assert done["run"].codes == {"Install": 0, "Merge and search": 3, "Hand the version on": 0}
    assert done["run"].outputs == {"version": "v4"}
    assert "version=v4" in done["run"].summary
    assert aliases(client) == {"champion": 1}


def test_where_no_soup_is_better_than_its_parents_nothing_is_judged(client, runner):
    client.set_registered_model_tag(MODEL, "soup.method", "best")  # chooses among the parents
    done = runner.run(WORKFLOW, HONEST | {"pair": "v2,v3"})
    assert results(done) == {"run": "success", "gate": "skipped", "promote": "skipped"}
    assert "no soup is better than its parents" in done["run"].summary
    assert done["run"].outputs == {"version": ""}


def test_nothing_is_promoted_that_nobody_approves(client, merged, runner):
    runner.approve = lambda place: False
    done = runner.run(WORKFLOW, HONEST)
    assert results(done) == {"run": "success", "gate": "success", "promote": "skipped"}
    assert aliases(client) == {}


def test_what_is_typed_in_is_never_run(client, merged, runner):
    for pair in ("v1,v2; touch run", "$(touch run)", "`touch run`", '"; touch run; "'):
        done = runner.run(WORKFLOW, HONEST | {"pair": pair})
        assert done["run"].codes["Merge and search"] == 2
        assert done["run"].outputs == {"version": ""}
        assert not (runner.root / "run" / "run").exists()
        shutil.rmtree(runner.root)


def rewrite(**version):
    """Somebody changes the JSON before the version is read from it."""

    def before(job, step, folder):
        if step == "Hand the version on":
            path = folder / "soup.json"
            document = json.loads(path.read_text())
            document["version"] |= version
            path.write_text(json.dumps(document))

    return before


FORGED = {
    "a version that is no soup": ({"version": 3}, "gate", "is not a soup"),
    "a version that does not exist": ({"version": 9}, "gate", "v9"),
    "a text that would write another output": ({"version": "4\nother=1"}, "run", "AssertionError"),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_json_that_somebody_changed_promotes_nothing(client, merged, runner, how):
    version, stopped, said = FORGED[how]
    runner.before = rewrite(**version)
    done = runner.run(WORKFLOW, HONEST)
    assert [name for name, job in done.items() if job.result == "failure"] == [stopped]
    assert done["promote"].result == "skipped"
    assert said in done[stopped].said
    assert aliases(client) == {}


def test_a_refused_soup_is_not_promoted_by_a_forged_tag_and_a_forged_json(client, runner):
    client.set_registered_model_alias(MODEL, "champion", "1")
    made = mlflow_soup.run(Spec(pair="v3,v1", method="uniform"))
    assert not made.verdict.passed
    refused = made.soup.version
    client.set_model_version_tag(MODEL, str(refused.number), "soup.gate", "passed")
    runner.before = rewrite(version=refused.number)
    done = runner.run(WORKFLOW, HONEST)
    assert results(done) == {"run": "success", "gate": "failure", "promote": "skipped"}
    assert done["gate"].codes["Judge"] == 3
    assert f"v{refused.number}" in done["gate"].said
    assert aliases(client) == {"champion": 1}


def while_people_approve(does):
    return lambda job, step, folder: does() if (job, step) == ("promote", "Promote") else None


def test_an_alias_that_somebody_moves_meanwhile_is_not_moved_on(client, merged, runner):
    def move():
        client.set_registered_model_alias(MODEL, "champion", "3")

    runner.before = while_people_approve(move)
    done = runner.run(WORKFLOW, HONEST)
    assert results(done) == {"run": "success", "gate": "success", "promote": "failure"}
    assert done["promote"].codes["Promote"] == 3  # v4 was not judged against v3
    assert aliases(client) == {"champion": 3}


def test_bytes_that_somebody_changes_meanwhile_are_not_promoted(client, merged, runner, edit):
    file = folder_of(client, merged.soup.version) / "model.safetensors"

    def change():
        content = file.read_bytes()
        edit(file, content[:-1] + bytes([content[-1] ^ 1]))

    runner.before = while_people_approve(change)
    done = runner.run(WORKFLOW, HONEST)
    assert results(done) == {"run": "success", "gate": "success", "promote": "failure"}
    assert done["promote"].codes["Promote"] == 3
    assert aliases(client) == {}
