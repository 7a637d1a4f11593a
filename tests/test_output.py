"""JSON output: what its page describes, what the store holds, and what a CI step may rely on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import forked
from conftest import MODEL, make_keys
from mlflow_soup.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "json.md"
SOUP = {"uri": "models:/toy-llm/4", "name": MODEL, "version": 4}
STRICT = ("--margin", "0", "--confidence", "0.999999")

# -- the page as a schema --------------------------------------------------------------------------


def read_page():
    """Heading of a table in the page → key → type, as it is written there."""
    tables = {}
    for part in re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, flags=re.MULTILINE))
        for base in re.findall(r"^A \[\w+\]\(#(\w+)\), and$", text, flags=re.MULTILINE):
            rows = {**tables[base], **rows}
        for name in heading.split(" and "):
            tables[name] = rows
    return tables


TABLES = read_page()
HEAD = TABLES["What holds for every document"]
PLAIN = {
    "text": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "whole number": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "cell": lambda v: v is None or isinstance(v, str | int | float),
}


def fits(value, kind):
    """Whether a value is of a type as the page writes it."""
    if " or " in kind:
        return any(fits(value, one) for one in kind.split(" or "))
    if kind.startswith("list of "):
        return isinstance(value, list) and all(fits(v, kind[8:]) for v in value)
    if kind.startswith("object of "):
        return isinstance(value, dict) and all(fits(v, kind[10:]) for v in value.values())
    if link := re.fullmatch(r"\[\w+\]\(#(\w+)\)", kind):
        return isinstance(value, dict) and not wrong(value, TABLES[link[1]])
    return PLAIN[kind](value)


def wrong(document, table):
    """The keys of a document that the table does not describe, or that are not as it says."""
    odd = sorted({*document} ^ {*table})
    return odd or [key for key, kind in table.items() if not fits(document[key], kind)]


# -- commands --------------------------------------------------------------------------------------


def command(*words):
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def answer(*words, code=0):
    """The document that a command prints, and the same in a file."""
    done = command(*words, "--format", "json", "--output", "out.json")
    assert done.exit_code == code, done.stderr
    assert done.stdout == Path("out.json").read_text(encoding="utf-8")
    assert done.stdout.endswith("}\n")
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    assert document["exit_code"] == code
    return document


ANSWERS = {
    "run": ["run", "--pair", "v1,v2", "--promote", "champion"],
    "evaluate": ["evaluate", "--version", "v4"],
    "gate": ["gate", "--version", "v4"],
    "gate --power": ["gate", "--power", "--model", MODEL],
    "promote": ["promote", "--version", "v4", "--promote", "alias:live"],
    "sign": ["sign", "--version", "v4"],
    "verify": ["verify", "models:/toy-llm@champion"],
    "doctor": ["doctor"],
    "study": ["study", "landscape", "--pair", "v1,v2", "--points", "4"],
    "track": ["track", "--versions", "v1,v2"],
    "lineage": ["lineage", "models:/toy-llm@champion"],
    "merge": ["merge", *(f"models:/toy-llm/{n}" for n in (1, 2)), "--weights", "1/3,2/3"],
    "export": ["export", "models:/toy-llm@champion"],
}


def test_the_page_describes_every_command_that_answers():
    assert {name for name, command in main.commands.items() if not is_able(command)} == {
        *("watch", "study")
    }
    assert all(map(is_able, main.commands["study"].commands.values()))
    described = {name.split(" --")[0] for name in ANSWERS} | {"quickstart"}
    assert described == {*main.commands} - {"watch"}
    assert {*ANSWERS, "quickstart"} <= {*TABLES}


def is_able(command):
    return {"--format", "--output"} <= {opt for param in command.params for opt in param.opts}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_document_is_as_the_page_says(client, outcome, tmp_path, monkeypatch, name):
    if name == "sign":
        monkeypatch.setenv("MLFLOW_SOUP_KEY", str(make_keys(tmp_path, "gate")[0]))
    words = ANSWERS[name]
    if name in ("merge", "export"):
        words = [*words, "--out", "made"]
    document = answer(*words)
    assert wrong(document, HEAD | TABLES[name]) == []
    assert document["error"] is None
    assert document["command"] == ("study landscape" if name == "study" else words[0])


def test_a_document_unlike_the_page_is_noticed():
    gain = dict.fromkeys(TABLES["gain"], 0) | {"against": SOUP}
    assert wrong(gain, TABLES["gain"]) == []
    assert wrong({**gain, "more": 1}, TABLES["gain"]) == ["more"]
    assert wrong({**gain, "against": {**SOUP, "version": "4"}}, TABLES["gain"]) == ["against"]
    assert wrong({**gain, "value": True}, TABLES["gain"]) == ["value"]


def test_the_main_job_tells_what_the_store_holds(client):
    client.set_registered_model_alias(MODEL, "champion", "1")
    done = forked.play("mlflow_soup", *ANSWERS["run"], "--format", "json", "--output", "out.json")
    assert done.returncode == 0, done.stderr
    assert "trial 1/6" in done.stderr
    found = json.loads(done.stdout)
    assert done.stdout == Path("out.json").read_text()
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert found["version"] == found["promotion"]["version"] == SOUP
    assert found["version"]["version"] == int(version.version)
    assert found["promotion"]["previous"]["uri"] == "models:/toy-llm/1"
    assert found["digest"] == version.tags["soup.digest"]
    metrics = client.get_run(found["run_id"]).data.metrics
    assert round(found["gains"][0]["value"], 6) == metrics["search/gain"]
    assert round(found["gains"][0]["stderr"], 6) == metrics["search/gain_stderr"]
    assert found["held_out"]["value"] == metrics["dev/objective"]
    assert found["lambda"] == found["parents"][1]["weight"] == metrics["search/chosen_lambda"]
    assert [parent["version"]["version"] for parent in found["parents"]] == [1, 2]
    for trial in found["trials"]:
        run = client.get_run(trial["run_id"])
        assert trial["held_out"]["value"] == run.data.metrics["dev/objective"]
    assert found["verdict"]["passed"]
    assert client.get_run(found["ood"]["run_id"]).data.tags["soup.gate"] == "passed"
    own, *others = found["ood"]["models"]
    assert own["version"] == SOUP
    assert [model["role"] for model in others] == ["parent", "parent", "champion"]
    assert not [key for key in client.get_run(found["run_id"]).data.params if "output" in key]
    again = json.loads(command(*ANSWERS["run"], "--format", "json").stdout)
    assert again["promotion"] == found["promotion"]  # also what it replaced


def test_a_refusal_is_told_with_the_verdict(client, outcome):
    gate = answer("gate", "--version", "v4", *STRICT, code=3)
    assert gate["error"] is None
    assert not gate["verdict"]["passed"]
    failed = [check for check in gate["verdict"]["checks"] if not check["passed"]]
    assert failed
    assert all(check["bound"] < check["required"] for check in failed)
    words = ("promote", "--version", "v4", "--promote", "alias:other", *STRICT)
    promote = answer(*words, code=3)
    assert wrong(promote, HEAD | {"verdict": TABLES["gate"]["verdict"]}) == []
    assert promote["verdict"] == gate["verdict"]
    assert promote["error"]["kind"] == "GateError"
    said = command(*words)
    assert said.exit_code == 3
    assert promote["error"]["what"] in said.stderr
    assert said.stdout == ""


def test_words_and_a_file_go_together(client, outcome):
    done = command("gate", "--version", "v4", "--output", "out.json")
    assert done.stdout.startswith("toy-llm v4: gate passed")
    assert json.loads(Path("out.json").read_text())["version"] == SOUP
    assert [path.name for path in Path.cwd().glob("*out.json*")] == ["out.json"]


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "kind", "what"),
    [
        (["run"], 2, "SpecError", "names no versions"),
        (["run", "--pair", "v1,v7"], 4, "ParentError", "toy-llm has no v7"),
        (["run", "--pears", "v1,v2"], 2, "UsageError", "No such option '--pears'"),
        (["run", "--spec", "none.yaml"], 2, "SpecError", "none.yaml cannot be read"),
        (["run", "--trials", "many"], 2, "UsageError", "'many' is not a valid integer"),
        (["study", "pairs"], 2, "SpecError", "no versions were named"),
        (["verify", "nowhere"], 4, "ParentError", "there is no folder nowhere"),
        (["merge", "v1"], 2, "UsageError", "Missing option '--weights'"),
    ],
)
def test_a_failure_is_a_document_and_words(client, words, code, kind, what):
    Path("out.json").write_text('{"version": "of an earlier call"}')
    found = answer(*words, code=code)
    assert wrong(found, HEAD) == []
    assert found["error"]["kind"] == kind
    assert what in found["error"]["what"]
    plain = command(*words)
    assert plain.exit_code == code
    assert plain.stderr == command(*words, "--format", "json").stderr
    assert plain.stdout == ""


@pytest.mark.parametrize("make", ["folder", "link", "device", "nowhere", "long"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_touched(client, make):
    before = len(client.search_model_versions())
    Path("precious").write_text("kept")
    Path("folder").mkdir()
    Path("link").symlink_to("precious")
    file = {"device": "/dev/null", "nowhere": "nowhere/out.json", "long": "x" * 250}.get(make, make)
    words = (*ANSWERS["run"], "--format", "json", "--output", file)
    done = command(*words)
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert "the output cannot be written" in found["error"]["what"]
    assert file in found["error"]["where"]
    assert "the output cannot be written" in done.stderr
    assert Path("precious").read_text() == "kept"
    assert Path("link").is_symlink()
    assert Path("/dev/null").exists()
    assert not Path("nowhere").exists()
    experiment = client.get_experiment_by_name("soups").experiment_id
    assert not client.search_runs([experiment])
    assert len(client.search_model_versions()) == before


def test_no_output_is_asked_for_by_an_empty_name(client):
    done = command("lineage", "models:/toy-llm/1", "--output=")  # as MLflow Projects pass it
    assert done.exit_code == 0, done.stderr


PROGRAM = """
import logging, os, signal, shutil, subprocess, sys, time, weakref
import click, cloup
from mlflow_soup import cli, output

@cli.main.command(cls=output.Answering)
@output.options()
@click.pass_obj
def speak(answer, /):
    print("a library speaks")
    os.write(1, b"one in C speaks\\n")
    subprocess.run(["echo", "a program speaks"])
    answer.say(f"words with {os.environ['SOME_PASSWORD']}")
    exec(os.environ.get("DEED", ""))
    told = {chr(181): float("nan"), os.environ["SOME_PASSWORD"]: os.environ["SOME_PASSWORD"]}
    answer.give({"told": told, "numbers": [float("-inf"), 0.1 + 0.2, 14]}, 3)

cli.main()
"""

# a signal in the callback of a weak reference, where Python drops what its handler raises
DROPPED = "weakref.finalize(type('T', (), {{}})(), os.kill, os.getpid(), signal.{}); time.sleep(60)"
LOGGED = """
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    logging.getLogger("any.library").error("a reset failed", exc_info=True)
    raise
"""


def speak(*words, deed=""):
    """A command that prints what libraries print, does a deed, and answers."""
    env = os.environ | {"SOME_PASSWORD": "hunter22hunter22", "DEED": deed, "PYTHONUTF8": "0"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "speak", *words],
        capture_output=True,
        env=env | {"LC_ALL": "C"},
        check=False,
    )


def test_stdout_is_one_document_whoever_speaks():
    done = speak("--format", "json")
    assert done.returncode == 3
    found = json.loads(done.stdout.decode("utf-8"))
    assert found["numbers"] == [None, 0.1 + 0.2, 14]
    assert found["told"]["µ"] is None
    assert b"hunter22" not in done.stdout
    for voice in (b"a library speaks", b"one in C speaks", b"a program speaks"):
        assert voice in done.stderr
        assert voice in speak().stdout
    assert b"hunter22" not in speak().stdout


@pytest.mark.parametrize(
    ("deed", "code", "kind"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "Interrupted"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "Interrupted"),
        (LOGGED, 130, "Interrupted"),
        (DROPPED.format("SIGTERM"), 143, "Interrupted"),
        (DROPPED.format("SIGHUP"), 129, "Interrupted"),
        (DROPPED.format("SIGINT"), 130, "Interrupted"),
        ("raise RuntimeError('at hunter22hunter22')", 1, "Defect"),
        ("shutil.rmtree('room')", 6, "StoreError"),  # where the file would go
    ],
)
def test_a_command_that_is_cut_short_says_so(tmp_path, monkeypatch, deed, code, kind):
    monkeypatch.chdir(tmp_path)
    file = Path("room", "out.json")
    file.parent.mkdir()
    file.write_text("{}")
    done = speak("--format", "json", "--output", str(file), deed=deed)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert wrong(found, HEAD) == []
    assert (found["exit_code"], found["error"]["kind"]) == (code, kind)
    assert (b"Traceback" in done.stderr) == (kind == "Defect")
    assert b"hunter22" not in done.stdout + done.stderr
    if kind != "StoreError":
        assert json.loads(file.read_text()) == found


def test_a_killed_command_leaves_no_file_of_an_earlier_call(tmp_path):
    file = tmp_path / "out.json"
    file.write_text('{"version": "of an earlier call"}')
    done = speak("--output", str(file), deed="os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
