"""Every code block of the tutorial and the how-tos runs, in order, page by page.

A page becomes one bash script: `bash` blocks as they are, `python` blocks as `python - <<…`. A
block with a title, ```` ```yaml title="soup.yaml" ````, is written to that file. `text` blocks show
output. The store holds thirteen checkpoints of a toy model, so that a page takes seconds.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pytest
from markdown_it import MarkdownIt

import toy
from conftest import fill, free_port
from mlflow_soup.cli import main
from mlflow_soup.registry.store import Store

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*(DOCS / "tutorial").glob("*.md"), *(DOCS / "how-to").glob("*.md")])
SLOW = {"install": "builds a wheel, for which pip needs an index"}
MODEL, QUICKSTART_MODEL = "my-llm", "quickstart-llm"
# tests/test_quickstart.py runs the command itself
QUICKSTART = "mlflow-soup quickstart"
QUICKSTART_SOUP = f"mlflow-soup run --model {QUICKSTART_MODEL} --pair v12,v13 --promote champion"


def script(page: Path, instead: Mapping[str, str]) -> str:
    """The blocks of a page as one bash script.

    Args:
        page: a Markdown file.
        instead: what the page says → what the test runs.
    """
    parts = ["set -euo pipefail", "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR"]
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        language, _, rest = token.info.partition(" ")
        if token.type != "fence" or language == "text":
            continue
        text = token.content
        for said, done in instead.items():
            text = text.replace(said, done)
        if title := rest.removeprefix('title="').removesuffix('"'):
            parts.append(f"mkdir -p \"$(dirname '{title}')\"\ncat > '{title}' <<'FILE'\n{text}FILE")
        elif language == "python":
            parts.append(f"python - <<'PYTHON'\n{text}PYTHON")
        else:
            assert language == "bash", f"{page}: a block of {language!r} needs a title"
            parts.append(text)
    return "\n".join(parts) + "\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Few items: what the commands find does not matter, but that the gate passes."""
    return toy.write_tasks(tmp_path_factory.mktemp("tasks"), count=60)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, trained, tasks) -> dict[str, Path]:
    """A database with thirteen versions, for each name of the model in the pages."""
    root = tmp_path_factory.mktemp("documented")
    mlflow.set_tracking_uri(f"sqlite:///{root}/{MODEL}.db")
    client = Store()
    client.create_experiment("soups", artifact_location=f"{root}/artifacts")
    mlflow.set_experiment("soups")
    folders = [toy.save(toy.noisy(trained, i, 0.9), root / f"step-{i}") for i in (1, 2)]
    fill(client, [folders[(number + 1) % 2] for number in range(13)], tasks, MODEL)
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_digits_bpb:bits_per_byte")
    found = {name: root / f"{name}.db" for name in (MODEL, QUICKSTART_MODEL)}
    shutil.copy(found[MODEL], found[QUICKSTART_MODEL])
    mlflow.set_tracking_uri(f"sqlite:///{found[QUICKSTART_MODEL]}")
    Store().rename_registered_model(MODEL, QUICKSTART_MODEL)
    return found


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=f"{page.parent.name}/{page.stem}",
            marks=[pytest.mark.slow] if page.stem in SLOW else [],
        )
        for page in PAGES
    ],
)
def test_the_code_blocks_of_a_page_run(page, stores, programs, tasks, tmp_path):
    own_tasks = f"--include-path {tasks} --tasks toy_letters"
    instead = {
        # no network, no data sets of the hub
        'from_lm_eval("arc_easy,piqa"': f'from_lm_eval("toy_letters", include_path="{tasks}"',
        "arc_easy,piqa": "toy_letters",
        "lambada_openai": "toy_digits_bpb:bits_per_byte",
        '"soup.margin": "0.01"': f'"soup.margin": "0.05", "soup.include_path": "{tasks}"',
        "--promote model:prod-llm@champion": f"--promote model:prod-llm@champion {own_tasks}",
        # no minutes of training
        QUICKSTART: QUICKSTART_SOUP,
        # the environment of the tests stays as it is
        "pip install": "pip install --no-deps --target installed",
        "5000": str(free_port()),
        "mlflow run .": f"warm-mlflow run {ROOT}",
    }
    text = script(page, instead)
    database = stores[QUICKSTART_MODEL if QUICKSTART_MODEL in text else MODEL]
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(database, work / "mlflow.db")
    if page.stem == "tasks":  # which states tasks of its own
        mlflow.set_tracking_uri(f"sqlite:///{work}/mlflow.db")
        Store().delete_registered_model_tag(MODEL, "soup.ood_tasks")
    for number in (1, 2):
        (work / f"step-{number}000").symlink_to(database.parent / f"step-{number}")
    if page.stem == "install":
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, work)
        shutil.copytree(ROOT / "mlflow_soup", work / "mlflow_soup")
    (tmp_path / "page.sh").write_text(text, encoding="utf-8")
    path = [programs, Path(sys.executable).parent, os.environ["PATH"]]
    env = os.environ | {
        "PATH": os.pathsep.join(map(str, path)),
        "MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db",
        "MLFLOW_SOUP_CACHE": str(tmp_path / "cache"),
        "MLFLOW_EXPERIMENT_NAME": "soups",
    }
    env.pop("MLFLOW_EXPERIMENT_ID", None)  # where another test's set_experiment left it
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(
            ["bash", str(tmp_path / "page.sh")],
            cwd=work,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = process.wait()
        with contextlib.suppress(ProcessLookupError):  # the server that a page started
            os.killpg(process.pid, signal.SIGTERM)
        output.seek(0)
        assert code == 0, output.read()


def test_every_command_and_every_study_has_a_block_that_runs():
    together = "".join(script(page, {}) for page in PAGES)
    studies = main.commands["study"].commands
    for name in [*main.commands, *(f"study {study}" for study in studies)]:
        assert f"mlflow-soup {name}" in together
