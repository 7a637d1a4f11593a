"""The receiver of webhooks: what it serves while an alias is moved, rightly and not."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
import requests
from click.testing import CliRunner

import forked
import mlflow_soup
from conftest import MODEL, fill, folder_of, free_port, start_server, stop_server
from mlflow_soup import Spec
from mlflow_soup.files.signing import KEY_ENV
from mlflow_soup.records import Version
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import model_id
from mlflow_soup.registry.webhooks import SECRET_ENV, WINDOW_S
from mlflow_soup.workflows import release
from relay import FORGED, Relay, eventually, signed, webhooks_of_server

PIPELINES = Path(__file__).parents[2] / "examples" / "pipelines"
README = (PIPELINES / "README.md").read_text(encoding="utf-8")
SECRET = "the secret of a webhook"
# a served folder that is as plain as can be: what is asked for is a file
PLAIN = f"{sys.executable} -m http.server --bind 127.0.0.1 --directory {{folder}} {{port}}"


@pytest.fixture(scope="session")
def receiver():
    spec = importlib.util.spec_from_file_location("receiver", PIPELINES / "receiver.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["receiver"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


# -- deliveries


@pytest.fixture
def deployment(receiver, tmp_path):
    return receiver.Deployment(MODEL, "champion", tmp_path, PLAIN, "/", "", 600.0)


def moved(version=5, **other):
    """The body of a delivery."""
    data = {"name": MODEL, "alias": "champion", "version": str(version), **other}
    event = {"entity": "model_version_alias", "action": "created", "data": data}
    return json.dumps(event).encode()


def deliver(deployment, name="an-id", body=None, at=0.0, **headers):
    """Deliver; the answer, and whether it woke the worker."""
    body = body or moved()
    given = {**signed(SECRET, name, body, time.time() + at), **headers}
    lower = {key.lower(): value for key, value in given.items()}  # as a request has them
    code = deployment.receive(lower, body, SECRET.encode())
    woke = deployment.awake.is_set()
    deployment.awake.clear()
    return code, woke


def test_a_delivery_wakes_once_however_often_it_is_repeated(deployment):
    assert deliver(deployment) == (204, True)
    assert deliver(deployment) == (204, False)
    assert deliver(deployment, "another-id") == (204, True)
    assert deliver(deployment) == (204, False)
    assert not deployment.refusals


@pytest.mark.parametrize(
    "headers",
    [
        {"X-MLflow-Signature": FORGED},
        {"X-MLflow-Delivery-Id": "another-id"},
        {"X-MLflow-Timestamp": "1"},
        {"X-MLflow-Signature": ""},
    ],
)
def test_a_forged_delivery_is_refused_and_told(deployment, headers):
    assert deliver(deployment, **headers) == (401, False)
    (refusal,) = deployment.refusals
    assert "it is not signed with our secret" in refusal["why"]


@pytest.mark.parametrize("at", [-WINDOW_S - 60, WINDOW_S + 60])
def test_a_delivery_of_another_time_is_refused_and_told(deployment, at):
    assert deliver(deployment, at=at) == (401, False)
    assert deliver(deployment, at=at) == (401, False)
    (refusal,) = deployment.refusals
    assert "too old, or from the future" in refusal["why"]
    assert refusal["times"] == 2


def test_the_id_of_a_delivery_is_kept_as_long_as_it_could_be_replayed(deployment):
    deliver(deployment, at=WINDOW_S - 5)
    (name,) = deployment.seen
    deployment.seen[name] -= 2 * WINDOW_S - 10
    assert deliver(deployment, at=WINDOW_S - 5) == (204, False)
    deployment.seen[name] -= 2 * WINDOW_S + 10
    deliver(deployment, "another-id")
    assert name not in deployment.seen


def test_what_is_about_something_else_wakes_nobody(deployment):
    assert deliver(deployment, body=moved(alias="other")) == (204, False)
    assert deliver(deployment, "b", moved(name="other")) == (204, False)
    tag = moved().replace(b"model_version_alias", b"model_version_tag")
    assert deliver(deployment, "c", tag) == (204, False)


# -- what is served


class Served:
    """A receiver that runs, and what it says."""

    def __init__(self, port, state, *words):
        (line,) = re.findall(r"^python receiver\.py (.*)$", README, re.M)
        self.words = shlex.split(line.replace("my-llm", MODEL))
        self.words += ["--state", str(state), "--port", str(port), "--poll", "3600", *words]
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self):
        self.play = forked.Play(str(PIPELINES / "receiver.py"), *self.words)

    def stop(self):
        self.play.send_signal(signal.SIGTERM)
        return self.play.finish().stderr

    def status(self):
        try:
            return requests.get(f"{self.url}/status", timeout=10).json()
        except requests.ConnectionError:
            return {"served": None, "refusals": []}

    def serves(self, version, seconds=90.0):
        eventually(lambda: self.status()["served"] == version, seconds)

    def refuses(self, words, seconds=90.0):
        eventually(lambda: any(words in r["why"] for r in self.status()["refusals"]), seconds)


class Asking:
    """A client that asks all the while; each answer, or why there was none."""

    def __init__(self, ask):
        self.ask, self.answers, self.failures = ask, [], []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self):
        while not self._end.is_set():
            try:
                self.answers.append(self.ask())
            except Exception as error:
                self.failures.append(repr(error))
            time.sleep(0.02)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(60)
        assert not self.failures
        assert len(self.answers) > 10


@contextlib.contextmanager
def served(*args):
    running = Served(*args)
    try:
        yield running
    finally:
        if running.play.poll() is None:
            running.play.send_signal(signal.SIGTERM)


@pytest.fixture
def quick(programs, monkeypatch):
    """A receiver finds the commands that start at once."""
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv(SECRET_ENV, SECRET)


def promote(version, **request):
    """Another soup of the same parents, promoted."""
    made = mlflow_soup.run(Spec(pair="v1,v2", promote="alias:champion", **request))
    assert made.promotion.version == Version(MODEL, version)


def test_with_a_key_only_what_it_signed_is_served(
    receiver, client, outcome, quick, keys, edit, tmp_path, monkeypatch
):
    private, public = keys
    signature = folder_of(client, outcome.soup.version) / "model.sig"
    edit(signature, b"")  # so that it is taken away in the end
    signature.unlink()
    settings = {"state": tmp_path, "serve": PLAIN, "health": "/", "poll": 600.0}
    of_alias = receiver.Deployment(MODEL, "champion", public_key=str(public), **settings)
    of_alias.attempt(of_alias.follow)
    assert "signature: there is no model.sig" in of_alias.refusals[-1]["why"]
    monkeypatch.setenv(KEY_ENV, str(private))
    request = Spec(version="v4", promote="alias:live", public_key=str(public))
    release.evaluate(request)
    release.sign(request)
    of_alias.attempt(of_alias.follow)  # the entry of the first promotion has no signature
    assert (
        "promotion: none of the keys signed a promotion to @champion"
        in of_alias.refusals[-1]["why"]
    )
    assert of_alias.served is None
    release.promote(request)
    (tmp_path / "exports").mkdir()
    signed_one = receiver.Deployment(MODEL, "live", public_key=str(public), **settings)
    signed_one.attempt(signed_one.follow)
    assert not signed_one.refusals
    assert signed_one.served == 4
    signed_one.server.stop()


def test_a_server_that_does_not_start_is_told_and_the_one_before_answers_on(
    receiver, client, outcome, quick, tmp_path
):
    broken = f"{sys.executable} -c 1"
    (tmp_path / "exports").mkdir()
    running = receiver.Deployment(MODEL, "champion", tmp_path, PLAIN, "/", "", 600.0)
    running.follow()
    before = running.server
    running.serve = broken
    promote(5, method="uniform")
    running.attempt(running.follow)
    assert running.refusals[-1]["why"] == "the server of models:/toy-llm/5 did not become healthy"
    assert running.server is before
    assert running.answer("GET", "/config.json", {}, b"").status_code == 200
    assert [path.name for path in (tmp_path / "exports").iterdir()] == [before.folder.parent.name]
    running.server.stop()
    assert running.served is None
    assert running.answer("GET", "/config.json", {}, b"").status_code == 502


def is_there(number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, 0)
        return True
    return False


def test_what_is_about_to_be_served_ends_with_the_receiver(client, outcome, quick, tmp_path):
    pid, state = tmp_path / "pid", tmp_path / "state"
    slow = f"import os, sys, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    serve = shlex.join([sys.executable, "-c", slow, "{folder}", "{port}"])
    with served(free_port(), state, "--serve", serve, "--health", "/") as receiver:
        eventually(lambda: pid.exists() and pid.read_text(), 90)
        assert is_there(int(pid.read_text()))
        receiver.stop()
    assert not is_there(int(pid.read_text()))
    assert [*(state / "exports").iterdir()] == []


def test_a_command_under_way_ends_with_the_receiver(receiver, deployment, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "mlflow-soup"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    pid = tmp_path / "pid"

    def end():
        eventually(lambda: pid.exists() and pid.read_text())
        deployment.ended.set()

    threading.Thread(target=end).start()
    with pytest.raises(RuntimeError, match="verify models:/x was not awaited"):
        receiver.ask("verify", "models:/x", ended=deployment.ended)
    assert not is_there(int(pid.read_text()))


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        ("no-such-program {folder}", "there is no program 'no-such-program'"),
        ("", "there is no program nothing"),
        ("echo {port} {host}", "has a field that is neither {folder} nor {port}"),
        ("echo {}", "has a field that is neither {folder} nor {port}"),
        ("echo '", "No closing quotation"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused_before_anything_is_made(
    receiver, tmp_path, serve, words
):
    state = tmp_path / "state"
    asked = ["--model", MODEL, "--state", str(state), "--serve", serve]
    done = CliRunner().invoke(receiver.main, asked)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not state.exists()


def test_a_program_that_has_gone_leaves_no_folder(receiver, client, outcome, quick, tmp_path):
    (tmp_path / "exports").mkdir()
    running = receiver.Deployment(MODEL, "champion", tmp_path, "gone {folder}", "/", "", 600.0)
    running.attempt(running.follow)
    assert "there is no program 'gone'" in running.refusals[-1]["why"]
    assert [*(tmp_path / "exports").iterdir()] == []


def test_a_server_is_not_stopped_before_it_has_answered(receiver, deployment, tmp_path):
    (tmp_path / "exports" / "v4").mkdir(parents=True)
    deployment.server = receiver.Server(4, tmp_path / "exports" / "v4", PLAIN)
    assert deployment.server.is_healthy("/", deployment.ended)
    stopping = threading.Thread(target=deployment.server.stop, args=(60,))
    with deployment.in_use():
        stopping.start()
        time.sleep(0.5)
        assert deployment.served == 4
    stopping.join(30)
    assert deployment.served is None
    assert not (tmp_path / "exports").exists()


def test_the_options_that_the_readme_names_are_those_of_the_receiver(receiver):
    named = set(re.findall(r"`(--[a-z-]+)", README.partition("## A receiver")[2]))
    assert {"--serve", "--poll", "--public-key"} <= named
    assert named <= {option for param in receiver.main.params for option in param.opts}


def test_it_swaps_what_is_promoted_and_refuses_what_is_moved_by_hand(
    client, outcome, quick, tmp_path
):
    def ask():
        answer = requests.get(f"{receiver.url}/README.md", timeout=30)
        assert answer.status_code == 200
        return re.search(r"toy-llm v(\d)", answer.text)[1]

    def post(name, body, **headers):
        given = {**signed(SECRET, name, body, time.time()), **headers}
        return requests.post(f"{receiver.url}/hook", data=body, headers=given, timeout=10)

    with served(free_port(), tmp_path / "state", "--serve", PLAIN, "--health", "/") as receiver:
        receiver.serves(4)
        with Asking(ask) as asking:
            promote(5, method="uniform")
            assert post("first", moved(1)).status_code == 204  # an event is only a wake-up call
            receiver.serves(5)
            client.set_registered_model_alias(MODEL, "champion", "4")  # which a promotion knew once
            assert post("forged", moved(4), **{"X-MLflow-Signature": FORGED}).status_code == 401
            receiver.refuses("a delivery: it is not signed with our secret")
            assert post("second", moved(4)).status_code == 204
            receiver.refuses("the last promotion to @champion, 2, is of v5")
            asked = len(asking.answers)
            eventually(lambda: len(asking.answers) > asked + 5)
        assert asking.answers == sorted(asking.answers)
        assert set(asking.answers) == {"4", "5"}
        assert "refused: verify models:/toy-llm@champion exited with 3" in receiver.stop()
        receiver.start()  # the alias is still where somebody moved it
        receiver.serves(5)
        receiver.refuses("the last promotion to @champion, 2, is of v5")
        assert ask() == "5"
        receiver.stop()
        with pytest.raises(requests.ConnectionError):
            ask()


@pytest.fixture
def on_postgres(postgres, checkpoints, tasks, tmp_path, monkeypatch):
    """A client of a server over PostgreSQL that sends webhooks."""
    port = free_port()
    variables = {
        **webhooks_of_server(),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_SOUP_CACHE": str(tmp_path / "cache"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    artifacts = ("--artifacts-destination", str(tmp_path / "artifacts"))
    uri = f"postgresql://{postgres.create('receiver')}"
    process = start_server(tmp_path / "unused.db", port, *artifacts, uri=uri)
    try:
        mlflow.set_tracking_uri(variables["MLFLOW_TRACKING_URI"])
        mlflow.set_experiment("soups")
        fill(Store(), checkpoints, tasks)
        yield Store()
    finally:
        stop_server(process)


class Holding(Relay):
    """Passes deliveries on, or holds them back."""

    holds = False

    def receive(self, headers, body):
        if not self.holds:
            self.post(headers, body)


@pytest.mark.slow
def test_webhooks_of_a_server_on_postgresql_swap_a_model_that_answers_all_the_while(
    on_postgres, quick, tmp_path
):
    client, port = on_postgres, free_port()
    relay = Holding(f"http://127.0.0.1:{port}/hook")
    (told,) = re.findall(r"```python\n(.*?)```", README, re.S)
    told = told.replace("https://receiver.example.com/hook", relay.uri).replace("my-llm", MODEL)
    exec(compile(told, "README.md", "exec"), {})
    (asked,) = re.findall(r"```bash\n(curl.*?)```", README, re.S)
    asked = asked.replace("localhost:8080", f"127.0.0.1:{port}")

    def ask():
        words = {"prompt": "abc abc", "max_tokens": 4}
        answer = requests.post(f"{receiver.url}/v1/completions", json=words, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"].strip()
        return int(re.search(r"/v(\d+)\b", answer.json()["model"])[1])

    with contextlib.closing(relay), served(port, tmp_path / "state") as receiver:
        receiver.refuses("champion")  # nothing is there yet
        assert requests.get(f"{receiver.url}/health", timeout=10).status_code == 503
        promote(4)
        receiver.serves(4)
        with Asking(ask) as asking:
            promote(5, method="uniform")
            receiver.serves(5)
            # by hand, with all that tags can say
            for name, value in client.get_model_version(MODEL, "5").tags.items():
                client.set_model_version_tag(MODEL, "1", name, value)
            client.set_registered_model_alias(MODEL, "champion", "1")
            receiver.refuses("verify models:/toy-llm@champion exited with 2")  # it is no soup
            client.set_registered_model_alias(MODEL, "champion", "4")  # once rightly promoted
            receiver.refuses("the last promotion to @champion, 2, is of v5")
            # deliveries that are forged, late, repeated and out of order
            headers, body = relay.genuine[-1]
            late = signed(SECRET, "late", body, time.time() - WINDOW_S - 5)
            assert relay.codes == [204] * len(relay.genuine)
            relay.post({**headers, "X-MLflow-Signature": FORGED}, body)
            relay.post(late, body)
            assert relay.codes[-2:] == [401, 401]
            receiver.refuses("a delivery: it is not signed with our secret")
            receiver.refuses("a delivery: it is too old, or from the future")
            for headers, body in reversed(relay.genuine):
                relay.post(headers, body)
            assert set(relay.codes[-len(relay.genuine) :]) == {204}
            assert receiver.status()["served"] == 5
            # a soup that was promoted rightly, and whose bytes are changed before it is verified
            relay.holds = True
            before = len(relay.genuine)
            promote(6, seed=1)
            eventually(lambda: len(relay.genuine) > before)
            logged = model_id(client, Version(MODEL, 6))
            (file,) = (tmp_path / "artifacts").glob(f"*/models/{logged}/**/model.safetensors")
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            relay.holds = False
            relay.post(*relay.genuine[-1])
            receiver.refuses("verify models:/toy-llm@champion exited with 3: soup: ")
            assert receiver.status()["served"] == 5
            assert ask() == 5
            file.write_bytes(content)
            client.set_registered_model_alias(MODEL, "champion", "6")  # MLflow calls again
            receiver.serves(6)
            status = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", asked],
                capture_output=True,
                text=True,
                check=True,
            )
            assert '"served":6' in status.stdout
            assert '"text_completion"' in status.stdout
            eventually(lambda: asking.answers[-1:] == [6])
        assert asking.answers == sorted(asking.answers)
        assert set(asking.answers) == {4, 5, 6}
        # what was served is served again, though somebody has moved the alias by hand meanwhile
        receiver.stop()
        client.set_registered_model_alias(MODEL, "champion", "4")
        receiver.start()
        receiver.serves(6)
        receiver.refuses("the last promotion to @champion, 3, is of v6")
        assert ask() == 6
        assert SECRET not in receiver.stop()
