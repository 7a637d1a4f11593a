"""The driver of workers is interrupted or killed: nothing is left behind, and all goes on."""

import random
import signal
import subprocess
import time

import pytest

import forked
from conftest import MODEL, use
from mlflow_soup import Spec, run

WORDS = ("run", "--pair", "v1,v2", "--workers", "2", "--trials", "6")
LONG = (*WORDS[:-1], "40", "--stop", "0")


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """Workers and commands are forked from one process; it must be the one with all imports."""
    forked.warm()


def below(pid):
    """The processes below a process, with their beginnings: a number may be used again."""
    said = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in said.splitlines()]
    found = {pid}
    while more := {child for child, parent in pairs if parent in found} - found:
        found |= more
    return {process: began(process) for process in found - {pid}}


def began(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def are_gone(processes, within=20.0):
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(began(pid) == time_ for pid, time_ in processes.items() if time_):
            return True
        time.sleep(0.2)
    return False


def start_scoring(client):
    """A long command, once a trial of it has ended; and the processes below it."""
    played = forked.Play("mlflow_soup", *LONG)
    until = time.monotonic() + 300
    while time.monotonic() < until and not trials(client):
        assert played.poll() is None, played.finish().stderr
        time.sleep(0.1)
    return played, below(played._process.pid)


def trials(client):
    ids = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(ids, "tags.`soup.role` = 'trial' and attributes.status = 'FINISHED'")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_no_worker_outlives_its_driver(client, number, code):
    played, processes = start_scoring(client)
    assert len(processes) >= 2 + 2  # two workers, what they are forked from, and what counts them
    played.send_signal(number)
    done = played.finish()
    assert done.returncode == code
    assert are_gone(processes)
    assert "Traceback" not in done.stderr
    again = forked.play("mlflow_soup", *WORDS)
    assert again.returncode == 0, again.stderr
    assert "leaked" not in again.stderr
    found = trials(client)
    assert len({run_.data.tags["soup.number"] for run_ in found}) == len(found)


def test_a_script_that_calls_run_needs_no_guard(client, tmp_path):
    script = tmp_path / "search.py"
    lines = (
        "from mlflow_soup import Spec, run",
        'print(run(Spec(pair="v1,v2", method="uniform", workers="2")).soup.version.number)',
    )
    script.write_text("\n".join(lines))
    done = forked.play(str(script))
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


@pytest.mark.slow
def test_killed_at_random_times_it_ends_as_one_process_does(filled, tmp_path, monkeypatch, figures):
    folders = [tmp_path / name for name in ("inline", "killed")]
    for folder in folders:
        folder.mkdir()
    with monkeypatch.context() as patch:
        use(filled, folders[0], patch)
        whole = run(Spec(pair="v1,v2", trials=6, promote="alias:champion"))
    client = use(filled, folders[1], monkeypatch)
    draw, kills, seen = random.Random(0), 0, {}
    while True:
        played = forked.Play("mlflow_soup", *WORDS, "--promote", "alias:champion")
        played._process.join(draw.uniform(2.0, 12.0) + kills)
        if played.poll() is not None:
            break
        seen |= below(played._process.pid)
        played.send_signal(signal.SIGKILL)
        played.finish()
        kills += 1
    done = played.finish()
    assert done.returncode == 0, done.stderr
    assert are_gone(seen)
    version = client.get_model_version_by_alias(MODEL, "champion")
    assert version.tags["soup.digest"] == whole.soup.digest
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4
    values = {
        int(r.data.tags["soup.number"]): r.data.metrics["dev/objective"] for r in trials(client)
    }
    assert values == {t.number: t.held_out.value for t in whole.trials}
    assert len(trials(client)) == len(whole.trials)
    figures["driver of two workers, killed"] = {"kills": kills, "evaluations": len(values)}
