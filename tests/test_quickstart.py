"""What a newcomer runs first must not break: the built wheel, and a small quickstart with it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

import forked
from mlflow_soup import errors
from mlflow_soup.quickstart import corpus, tasks

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "26", "--items", "24", "--trials", "4"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the tree: wheel from sdist, as pip does it."""
    tree = tmp_path_factory.mktemp("built") / "tree"
    ignored = shutil.ignore_patterns(
        ".*", "*.egg-info", "build", "dist", "site", "mlruns", "*.db*", "__pycache__"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    out = tree.parent / "dist"
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def environment(tmp_path, **more):
    """The variables of a process with a store of its own; it depends on nothing in this one."""
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"} | more
    env.pop("MLFLOW_EXPERIMENT_ID", None)  # where another test's set_experiment left it
    return env


def start(tmp_path, *command, **more):
    """What a command, started in a folder of its own, has printed and how it has ended."""
    env = environment(tmp_path, **more)
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, str(built[0])], check=True, capture_output=True)
    return folder


@pytest.fixture
def quickstart(tmp_path, site):
    """`mlflow-soup quickstart` of the built wheel, outside of the checkout."""

    def run(*words):
        command = [sys.executable, "-m", "mlflow_soup", "quickstart", *words]
        return start(tmp_path, *command, PYTHONPATH=str(site))

    return run


def test_the_sdist_holds_what_a_checkout_needs(built):
    with tarfile.open(built[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    needed = {name for name in tracked if not name.startswith(".")}
    assert needed <= held


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "mlflow_soup"
    assert held == {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


@pytest.mark.slow  # .ci/run does it in a checkout
def test_it_registers_thirteen_checkpoints_and_their_soup_and_does_nothing_twice(
    tmp_path, quickstart
):
    first = quickstart(*QUICK)
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
    assert policy["soup.test_tasks"] == "quickstart_prose_test:acc"
    assert "score on the test set" in first.stdout
    assert "it/s" not in first.stderr
    told = iter(first.stderr.splitlines())  # a line for each stage, in their order
    stages = ["loading libraries", "reading texts of this Python, and writing tasks"]
    stages += ["training the tokenizer", "pretraining: 26 steps, 13 checkpoints"]
    stages += [f"step {2 * n} of 26: quickstart-llm v{n} is registered" for n in range(1, 14)]
    stages += ["the main job: v12 and v13"]
    assert all(stage in told for stage in stages), first.stderr

    again = forked.play(
        "mlflow_soup", "quickstart", *QUICK, cwd=tmp_path, env=environment(tmp_path)
    )
    assert "Traceback" not in again.stderr, again.stderr
    assert again.returncode == first.returncode
    assert "has its 13 versions already" in again.stdout
    assert "an earlier run registered it as models:/quickstart-llm/14" in again.stdout
    assert len(client.search_model_versions("name='quickstart-llm'")) == 14
    assert len(client.search_runs(["0"], "tags.`soup.role` = 'test'")) == 3

    words = ("--only", "landscape-early", "--limit", "8")
    example = str(ROOT / "examples" / "reproduction")
    studied = forked.play(example, *words, cwd=tmp_path, env=environment(tmp_path))
    assert studied.returncode == 0, studied.stderr
    assert "Landscape of v3,v4" in studied.stdout
    results = tmp_path / "reproduction" / "landscape-early"
    assert {file.suffix for file in results.iterdir()} == {".csv", ".md", ".png"}

    words = ("quickstart", *QUICK, "--seed", "1")
    other = forked.play("mlflow_soup", *words, cwd=tmp_path, env=environment(tmp_path))
    assert other.returncode == 2
    assert "is not from this pretraining" in other.stderr


def test_what_is_evaluated_on_was_not_trained_on():
    documents = corpus.read()
    trained = {p for d in documents if d.use is corpus.Use.TRAIN for p in d.prose + d.code}
    evaluated = [d for d in documents if d.use is not corpus.Use.TRAIN]
    assert len(evaluated) > 100
    assert not any(p in trained for d in evaluated for p in d.prose + d.code)
    assert corpus.read() == documents


def test_the_test_set_leaves_the_other_items_as_they_were(tmp_path):
    """The first 2,000 passages choose λ; a larger test set takes none of them."""
    documents = corpus.read()
    few, many = (
        tasks.write(documents, tmp_path / str(n), tasks.Sizes(200, n, 200)) for n in (10, 300)
    )
    for name in ("quickstart_prose", "quickstart_code", "quickstart_code_bpb"):
        assert (few / f"{name}.jsonl").read_bytes() == (many / f"{name}.jsonl").read_bytes()
    with pytest.raises(errors.SpecError, match="items for the test set"):
        tasks.write(documents, tmp_path / "all", tasks.Sizes(200, 100_000, 200))


def test_the_tasks_share_no_document_and_the_right_answer_is_anywhere(tmp_path):
    folder = tasks.write(corpus.read(), tmp_path / "tasks", tasks.Sizes(200, 200, 200))
    rows = {}
    for file in folder.glob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert data.is_absolute()
        rows[task["task"]] = [yaml.safe_load(line) for line in data.read_text().splitlines()]
    names = ("quickstart_prose", "quickstart_prose_test", "quickstart_code")
    sets = [rows[name] for name in names]
    assert [len(items) for items in sets] == [200] * 3
    passages = [{r["passage"] for r in items} for items in sets]
    assert len(set.union(*passages)) == sum(map(len, passages))
    for items in sets:
        answers = [r["answer"] for r in items]
        assert [answers.count(i) for i in range(4)] == [50] * 4
        assert all(len(set(r["choices"])) == 4 for r in items)


@pytest.mark.slow
def test_the_wheel_does_the_whole_quickstart_in_an_empty_environment(built, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    install = [str(environment / "bin" / "pip"), "install", "-q", "-c", "constraints.txt"]
    subprocess.run([*install, str(built[0])], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "elsewhere").mkdir()
    done = start(tmp_path / "elsewhere", str(environment / "bin" / "mlflow-soup"), "quickstart")
    assert done.returncode == 0, done.stdout + done.stderr
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/elsewhere/mlflow.db")
    client = MlflowClient()
    version = client.get_model_version_by_alias("quickstart-llm", "champion")
    assert int(version.version) == 14
    assert version.tags["soup.gate"] == "passed"
    trials = client.search_runs(["0"], "tags.`soup.role` = 'trial'")
    assert 4 <= len(trials) <= 8
    scores = {float(r.data.params["lambda"]): r.data.metrics["dev/objective"] for r in trials}
    assert scores[float(version.tags["soup.lambda"])] > max(scores[0.0], scores[1.0])
