"""The quickstart, small: what a newcomer runs first must not break."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

import forked

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "26", "--items", "60", "--trials", "4"]


def started(program, *words, cwd, env):
    """What a newcomer types: `python examples/quickstart`."""
    command = [sys.executable, program, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def quickstart(tmp_path, *words, example="quickstart", run=forked.play):
    """The example on a store of its own; nothing of it depends on this process."""
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    env.pop("MLFLOW_EXPERIMENT_ID", None)  # where another test's set_experiment left it
    done = run(str(ROOT / "examples" / example), *words, cwd=tmp_path, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_it_registers_thirteen_checkpoints_and_their_soup_and_does_nothing_twice(tmp_path):
    first = quickstart(tmp_path, *QUICK, run=started)
    assert first.returncode in (0, 3), first.stderr  # after 26 steps the gate may well refuse
    assert "registered as models:/quickstart-llm/14" in first.stdout
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient()
    versions = {
        int(v.version): v.tags for v in client.search_model_versions("name='quickstart-llm'")
    }
    assert sorted(versions) == list(range(1, 15))
    assert [versions[n]["tokens_seen"] for n in (1, 13)] == ["2048", "26624"]
    assert versions[14]["soup.parents"] == "12,13"
    policy = client.get_registered_model("quickstart-llm").tags
    assert Path(policy["soup.include_path"]).is_dir()
    assert "it/s" not in first.stderr

    again = quickstart(tmp_path, *QUICK)
    assert again.returncode == first.returncode
    assert "has its 13 versions already" in again.stdout
    assert "was registered before as models:/quickstart-llm/14" in again.stdout
    assert len(client.search_model_versions("name='quickstart-llm'")) == 14

    words = ("--only", "landscape-early", "--limit", "8")
    studied = quickstart(tmp_path, *words, example="reproduction")
    assert studied.returncode == 0, studied.stderr
    assert "Landscape of v3,v4" in studied.stdout
    results = tmp_path / "reproduction" / "landscape-early"
    assert {file.suffix for file in results.iterdir()} == {".csv", ".md", ".png"}

    other = quickstart(tmp_path, *QUICK, "--seed", "1")
    assert other.returncode == 1
    assert "is not from this pretraining" in other.stderr


@pytest.fixture(scope="module")
def parts():
    """The example's own modules, as `python examples/quickstart` sees them."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    try:
        import corpus
        import tasks

        yield corpus, tasks
    finally:
        sys.path.pop(0)


def test_what_is_evaluated_on_was_not_trained_on(parts):
    corpus, _ = parts
    documents = corpus.read()
    trained = {p for d in documents if d.use is corpus.Use.TRAIN for p in d.prose + d.code}
    evaluated = [d for d in documents if d.use is not corpus.Use.TRAIN]
    assert len(evaluated) > 100
    assert not any(p in trained for d in evaluated for p in d.prose + d.code)
    assert corpus.read() == documents


def test_the_tasks_share_no_document_and_the_right_answer_is_anywhere(parts, tmp_path):
    corpus, tasks = parts
    folder = tasks.write(corpus.read(), tmp_path / "tasks", tasks.Sizes(items=200, code_items=200))
    rows = {}
    for file in folder.glob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert data.is_absolute()
        rows[task["task"]] = [yaml.safe_load(line) for line in data.read_text().splitlines()]
    prose, code = rows["quickstart_prose"], rows["quickstart_code"]
    assert len(prose) == len(code) == 200
    assert not {r["passage"] for r in prose} & {r["passage"] for r in code}
    for items in (prose, code):
        answers = [r["answer"] for r in items]
        assert [answers.count(i) for i in range(4)] == [50] * 4
        assert all(len(set(r["choices"])) == 4 for r in items)


@pytest.mark.slow
def test_the_whole_quickstart_ends_with_a_promoted_soup_that_beats_both_parents(tmp_path):
    done = quickstart(tmp_path, run=started)
    assert done.returncode == 0, done.stdout + done.stderr
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient()
    version = client.get_model_version_by_alias("quickstart-llm", "champion")
    assert int(version.version) == 14
    assert version.tags["soup.gate"] == "passed"
    trials = client.search_runs(["0"], "tags.`soup.role` = 'trial'")
    assert 4 <= len(trials) <= 8
    scores = {float(r.data.params["lambda"]): r.data.metrics["dev/objective"] for r in trials}
    assert scores[float(version.tags["soup.lambda"])] > max(scores[0.0], scores[1.0])
