"""Do what the policy says when a checkpoint arrives: each one once, and in order."""

import contextlib
import itertools
import logging
import random
import re
import signal
import threading
import time

import mlflow
import pytest
from mlflow.entities.webhook import WebhookEvent

import forked
import toy
from conftest import MODEL, fill, free_port, register, start_server, stop_server
from mlflow_soup import Spec
from mlflow_soup.cli import read_orders
from mlflow_soup.errors import AwayError, ParentError, SpecError, StoreError
from mlflow_soup.registry import arrivals, naming
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.webhooks import SECRET_ENV
from mlflow_soup.workflows import watch as watching
from relay import FORGED, Relay, eventually, signed, webhooks_of_server

CHEAP = "run --last 2 --method uniform"
SECRET = "the secret of a webhook"


@pytest.fixture(autouse=True)
def policy(request):
    """The cheapest policy: no gate, and the mean of the two newest checkpoints."""
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        client.delete_registered_model_tag(MODEL, "soup.ood_tasks")
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, CHEAP)


def once(since="v3", **named):
    """What a watch says that handles what is there, and the exit code."""
    said = []
    code = watching.watch(Spec(**named), read_orders, said.append, once=True, since=since)
    return said, code


def made(client):
    """The parents of each soup, in the order in which they were registered."""
    found = {int(v.version): v.tags for v in client.search_model_versions(f"name = '{MODEL}'")}
    return [found[n][naming.PARENTS] for n in sorted(found) if naming.PARENTS in found[n]]


def runs(client, role="search"):
    experiment = client.get_experiment_by_name("soups").experiment_id
    return client.search_runs([experiment], f"tags.`{naming.ROLE}` = '{role}'")


def test_each_checkpoint_is_handled_once_and_by_number(client, checkpoints):
    said, code = once(since="v1")
    assert code == 0
    assert said == [
        f"{MODEL} v1: {CHEAP}: nothing is done yet: there are 1 checkpoints",
        f"{MODEL} v2: {CHEAP}: models:/{MODEL}/4",
        f"{MODEL} v3: {CHEAP}: models:/{MODEL}/5",
    ]
    assert once() == ([], 0)  # the soups do not set it off
    for folder in checkpoints[:2]:
        register(client, folder)
    client.set_model_version_tag(MODEL, "6", "soup.digest", "forged")
    assert once()[0] == [f"{MODEL} v7: {CHEAP}: models:/{MODEL}/8"]
    assert made(client) == ["1,2", "2,3", "3,7"]
    assert len(runs(client)) == 3


def test_at_its_first_start_it_handles_the_newest(client):
    assert once(since="")[0] == [f"{MODEL} v3: {CHEAP}: models:/{MODEL}/4"]


def test_several_lines_are_done_in_their_order_and_each_is_told(client):
    client.set_registered_model_alias(MODEL, "best", "1")
    lines = ("run --last 4", CHEAP, "run --pair @best,new --method uniform", "run --pair @no,new")
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, " ;\n".join(lines))
    said, code = once()
    assert code == 4
    assert [line.removeprefix(f"{MODEL} v3: ") for line in said[:3]] == [
        "run --last 4: nothing is done yet: there are 3 checkpoints",
        f"{CHEAP}: models:/{MODEL}/4",
        f"run --pair @best,new --method uniform: models:/{MODEL}/5",
    ]
    assert "run --pair @no,new: failed (4): toy-llm has no alias @no (where: " in said[3]
    assert made(client) == ["2,3", "1,3"]
    assert once() == ([], 0)


def test_it_promotes_where_the_policy_says_so_and_the_gate_passes(client):
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_digits")
    line = f"{CHEAP} --promote alias:champion"
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, line)
    (said,), code = once(since="v2")[0][:1], 0
    assert "gate passed, promoted: alias champion → toy-llm v4" in said
    assert code == 0
    strict = f"{line} --margin 0 --confidence 0.9999"
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, strict)
    register_again(client)
    (said,), code = once()
    assert "gate REFUSED, nothing was promoted to alias:champion" in said
    assert code == 3


def register_again(client):
    """One more version with the files of the first."""
    first = client.get_model_version(MODEL, "1")
    return client.create_model_version(MODEL, first.source, model_id=first.model_id)


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        (None, "it is missing or empty"),
        ("run --last", "Option '--last' requires an argument"),
        ("run --last 2 --out /tmp/x", "No such option '--out'"),
    ],
)
def test_a_tag_that_cannot_be_followed_ends_the_start(client, tag, said):
    client.delete_registered_model_tag(MODEL, naming.ON_VERSION)
    if tag is not None:
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, tag)
    with pytest.raises(SpecError, match=re.escape(said)) as caught:
        once()
    assert naming.ON_VERSION in caught.value.where
    assert not runs(client)


def test_a_promotion_on_some_of_the_items_ends_the_start(client):
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, "run --last 2 --promote champion")
    with pytest.raises(SpecError, match="does not judge on the first 20 items"):
        once(limit=20)
    assert not runs(client)


@contextlib.contextmanager
def in_a_thread(**named):
    """A watch in a thread; what it says, and what ended it."""
    said, ended, end = [], [], threading.Event()

    def check_and_say(words):
        said.append(words)

    def read(text, model):
        if end.is_set():
            raise KeyboardInterrupt
        return read_orders(text, model)

    def work():
        try:
            watching.watch(Spec(), read, check_and_say, poll_s=0.1, **named)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield said, ended
    finally:
        end.set()
        if not ended:
            register_again(Store())  # which it reads the tag for
        thread.join(120)
        assert not thread.is_alive()  # it would work on in the store of the next test


def test_a_tag_that_breaks_later_holds_the_order_up_until_it_is_mended(client, checkpoints):
    with in_a_thread(since="v3") as (said, ended):
        eventually(lambda: len(said) == 2)
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, "run --lst 2")
        register(client, checkpoints[0])
        register(client, checkpoints[1])
        eventually(lambda: len(said) == 3)
        time.sleep(1.0)
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, CHEAP)
        eventually(lambda: len(said) == 5)
    assert said[0] == f"{MODEL}: watched; {naming.ON_VERSION}: {CHEAP}"
    assert f"{MODEL} v5: waits: tag soup.on_version cannot be followed" in said[2]
    assert [line.split(":")[0] for line in said[3:]] == [f"{MODEL} v5", f"{MODEL} v6"]
    assert made(client) == ["2,3", "3,5", "5,6"]
    assert isinstance(ended[0], KeyboardInterrupt)


def test_without_the_tag_nothing_is_done_and_that_is_told(client):
    with in_a_thread(since="v3") as (said, _):
        eventually(lambda: len(said) == 2)
        client.delete_registered_model_tag(MODEL, naming.ON_VERSION)
        register_again(client)
        eventually(lambda: len(said) == 3)
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, CHEAP)
    assert "v5: there is no tag soup.on_version, so nothing is done" in said[2]


@pytest.mark.parametrize("tag", ["run --last 3 --method uniform", ""])
def test_a_tag_that_is_set_before_the_version_comes_counts(client, monkeypatch, tag):
    once()
    look = arrivals.checkpoints

    def look_late(*args, **named):
        """The watch has read the model; then the tag is set, and a version is registered."""
        monkeypatch.setattr(arrivals, "checkpoints", look)
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, tag)
        register_again(client)
        return look(*args, **named)

    monkeypatch.setattr(arrivals, "checkpoints", look_late)
    (said,), _ = once()
    assert said.startswith(f"{MODEL} v5: {tag or 'there is no tag soup.on_version'}")


def test_a_model_that_is_gone_ends_the_watch(client):
    with in_a_thread(since="v3") as (said, ended):
        eventually(lambda: len(said) == 2)
        client.delete_registered_model(MODEL)
        eventually(lambda: ended)
    assert isinstance(ended[0], ParentError)


def test_a_version_whose_checkpoint_is_damaged_is_told_and_the_next_one_is_handled(
    client, folder, checkpoints
):
    client.set_registered_model_alias(MODEL, "best", "1")
    line = "run --pair @best,new --method uniform"
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, line)
    (folder / "model.safetensors").write_bytes(b"no checkpoint")
    register(client, folder)
    register(client, checkpoints[1])
    said, code = once(since="v4")
    assert code == 4
    assert f"{MODEL} v4: {line}: failed (4): " in said[0]
    assert "\n" not in said[0]
    assert said[1] == f"{MODEL} v5: {line}: models:/{MODEL}/6"
    assert once() == ([], 0)


class Stopped(BaseException):
    """As a signal ends a process."""


def test_work_that_was_done_and_not_noted_is_found_again(client, monkeypatch):
    def stop(path, progress):
        if progress.done:
            raise Stopped
        written(path, progress)

    written = arrivals.write
    monkeypatch.setattr(arrivals, "write", stop)
    with pytest.raises(Stopped):
        once()
    monkeypatch.setattr(arrivals, "write", written)
    assert once()[0] == [f"{MODEL} v3: {CHEAP}: models:/{MODEL}/4"]
    assert made(client) == ["2,3"]


def test_a_line_that_is_done_is_not_repeated_when_the_next_one_was_cut_short(client, monkeypatch):
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, f"{CHEAP}; run --last 3")
    calls = []

    def act(spec):
        calls.append(spec.versions)
        if spec.versions == "v1,v2,v3" and calls.count("v1,v2,v3") == 1:
            raise Stopped
        return "done", 0

    monkeypatch.setattr(watching, "ACTIONS", {"run": act})
    with pytest.raises(Stopped):
        once()
    assert once()[0] == [f"{MODEL} v3: run --last 3: done"]
    assert calls == ["v2,v3", "v1,v2,v3", "v1,v2,v3"]


def test_a_version_on_which_the_process_dies_again_and_again_is_given_up(client, monkeypatch):
    def act(spec):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(watching, "ACTIONS", {"run": act})
    for _ in range(watching.MOST_TRIES):
        with pytest.raises(RuntimeError):
            once()
    said, code = once()
    assert said == [f"{MODEL} v3: {CHEAP}: given up after 5 tries"]
    assert code == 1
    assert once() == ([], 0)


def test_signals_and_outages_are_no_failures_of_a_version(client, monkeypatch):
    away = AwayError("the store is away", where="there", fix="wait")

    failures = [Stopped(), away] * 3

    def act(spec):
        raise failures.pop()

    monkeypatch.setattr(watching, "ACTIONS", {"run": act})
    monkeypatch.setattr(watching._Watcher, "_answers", lambda _: False)
    while failures:
        with pytest.raises((Stopped, AwayError)):
            once()
    path = arrivals.progress_file(arrivals.watched(client, MODEL))
    assert arrivals.read(path) == arrivals.Progress(2, 3)


def test_a_version_whose_files_are_away_is_given_up_in_the_end(client, monkeypatch, caplog):
    tried = []

    def act(spec):
        tried.append(spec.versions)
        raise StoreError("the bucket is gone", where="s3://bucket", fix="make it again")

    monkeypatch.setattr(watching, "ACTIONS", {"run": act})
    monkeypatch.setattr(watching, "_FIRST_PAUSE_S", 0.05)
    with in_a_thread(since="v3") as (said, _):
        eventually(lambda: len(said) == 2)
    assert said[1] == f"{MODEL} v3: {CHEAP}: given up after 5 tries"
    assert tried[:5] == ["v2,v3"] * 5
    assert "the bucket is gone (where: s3://bucket; fix: make it again); the watch goes on" in (
        caplog.text
    )


def test_a_warning_is_said_once_and_that_a_store_is_away_each_time(caplog):
    log = logging.getLogger("mlflow_soup")
    for module, times in (("run", 1), ("store", 3)):
        with watching._saying_once():
            for _ in range(3):
                said = (f"{module}.py", 1, f"what {module} warns of", (), None)
                log.handle(log.makeRecord("mlflow_soup", logging.WARNING, *said))
        assert caplog.text.count(f"what {module} warns of") == times


def test_a_second_watch_waits_for_the_first(client, monkeypatch):
    with in_a_thread(since="v3") as (first, _):
        eventually(lambda: len(first) == 2)
        second = forked.Play("mlflow_soup", "watch", "--poll", "0.1")
        waits = "another process on this machine works on the same request"
        eventually(lambda: waits in second.said("stderr"), 120)
        assert second.said() == ""
    eventually(lambda: f"{MODEL}: watched" in second.said())
    second.send_signal(signal.SIGTERM)
    done = second.finish()
    assert done.returncode == 0
    assert "the watch has ended; the same command goes on" in done.stderr
    assert done.stderr.startswith("watch: the registered model, every 0.1 s; loading libraries\n")


def test_sigterm_ends_a_search_cleanly_and_the_next_start_continues_it(client):
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, "run --last 2 --stop 0 --trials 30")
    first = forked.Play("mlflow_soup", "watch", "--since", "v2", "--poll", "0.1")
    eventually(lambda: len(runs(client, "trial")) > 4)
    first.send_signal(signal.SIGTERM)
    done = first.finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1  # that it watches
    assert "Traceback" not in done.stderr
    assert {run.info.status for run in runs(client)} == {"KILLED"}
    client.set_registered_model_tag(MODEL, naming.ON_VERSION, "run --last 2 --stop 0 --trials 6")
    second = forked.play("mlflow_soup", "watch", "--once")
    assert second.returncode == 0, second.stderr
    assert [line.split(":")[0] for line in second.stdout.splitlines()] == [
        f"{MODEL} v2",
        f"{MODEL} v3",
    ]
    assert made(client) == ["1,2", "2,3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--poll", "0"], "--poll 0 is out of range"),
        (["--poll", "nan"], "--poll nan is out of range"),
        (["--listen", "127.0.0.1:0"], f"{SECRET_ENV} is not set"),
        (["--since", "newest"], "'newest' is not a version"),
        (["--model", "none"], "no registered model 'none'"),
    ],
)
def test_a_wrong_request_is_refused_in_words(client, words, said):
    done = forked.play("mlflow_soup", "watch", *words)
    assert done.returncode in (2, 4)
    assert said in done.stderr
    assert "fix:" in done.stderr


class Disturbing(Relay):
    """Loses, delays and repeats deliveries.

    Args:
        port: of the watch.
        seed: of what it does.
    """

    def __init__(self, port, seed=0):
        super().__init__(f"http://127.0.0.1:{port}/")
        self.chance, self.lost = random.Random(seed), 0

    def receive(self, headers, body):
        what = self.chance.choice(["lose", "delay", "pass", "repeat"])
        if what == "lose":
            self.lost += 1
            return
        if what == "delay":
            time.sleep(3.0)
        for _ in range(3 if what == "repeat" else 1):
            self.post(headers, body)

    def disturb(self):
        """Post one delivery that is repeated, late or forged."""
        headers, body = self.chance.choice(self.genuine)
        kind = self.chance.choice(["repeat", "late", "forge", "change"])
        if kind == "late":
            headers = signed(SECRET, headers["X-MLflow-Delivery-Id"], body, time.time() - 3600)
        elif kind == "forge":
            headers = {**headers, "X-MLflow-Signature": FORGED}
        elif kind == "change":
            body = body.replace(b'"version"', b'"Version"')
        self.post(headers, body)


@pytest.mark.slow
def test_checkpoints_of_a_training_loop_are_handled_once_over_restarts_of_watch_and_server(
    trained, checkpoints, tasks, tmp_path, monkeypatch, figures
):
    port, listen = free_port(), free_port()
    environment = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_SOUP_CACHE": str(tmp_path / "cache"),
        SECRET_ENV: SECRET,
        **webhooks_of_server(),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    artifacts = ("--artifacts-destination", str(tmp_path / "artifacts"))
    servers = [start_server(tmp_path / "mlflow.db", port, *artifacts)]
    watches = []
    relay = Disturbing(listen)

    def start_watch(poll, patience=30.0):
        words = ("--poll", str(poll), "--listen", f"127.0.0.1:{listen}", "--since", "v2")
        words += ("--store-patience", str(patience))
        watches.append(forked.Play("mlflow_soup", "watch", *words))
        eventually(lambda: f"{MODEL}: watched" in watches[-1].said())

    def told():
        lines = [line for play in texts() for line in play.splitlines()]
        return [int(line.split(" v")[1].split(":")[0]) for line in lines if " v" in line[:14]]

    def texts():
        return [*done, *([watches[-1].said()] if len(done) < len(watches) else [])]

    done: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: stop_server(servers[-1]))
        stack.callback(relay.close)
        mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
        mlflow.set_experiment("soups")
        client = Store(patience_s=120.0)
        fill(client, checkpoints[:2], tasks)
        client.delete_registered_model_tag(MODEL, "soup.ood_tasks")
        client.set_registered_model_tag(MODEL, naming.ON_VERSION, CHEAP)
        event = WebhookEvent.from_str("model_version.created")
        client.create_webhook("soup", relay.uri, [event], secret=SECRET)
        start_watch(3600)  # only webhooks wake it
        eventually(lambda: told() == [2])
        registered, stop = [1, 2], threading.Event()

        def train():
            """Register a checkpoint every few seconds; while the server is away, wait for it."""
            for seed in itertools.count(10):
                if stop.wait(3.0):
                    return
                folder = toy.save(toy.noisy(trained, seed, 0.9), tmp_path / f"step-{seed}")
                while not stop.is_set():
                    with contextlib.suppress(Exception):
                        registered.append(register(client, folder))
                        break
                    time.sleep(1.0)

        loop = threading.Thread(target=train)
        loop.start()
        stack.callback(loop.join, 120)
        stack.callback(stop.set)
        eventually(lambda: len(told()) >= 3, 120)
        before = len(told())
        for _ in range(40):
            relay.disturb()
        # the watch is restarted: it ends at once, whatever it does
        watches[-1].send_signal(signal.SIGTERM)
        ended = watches[-1].finish()
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        assert SECRET not in ended.stdout + ended.stderr
        done.append(ended.stdout)
        time.sleep(8.0)  # checkpoints go on arriving
        start_watch(2, 0.02)  # a patience that the outage outlasts
        eventually(lambda: len(told()) >= before + 2, 120)
        # the server is restarted: what waits to be delivered is lost
        stop_server(servers[-1], signal.SIGKILL)
        time.sleep(5.0)
        for _ in range(20):
            relay.disturb()
        servers.append(start_server(tmp_path / "mlflow.db", port, *artifacts))
        missed = len(told())
        eventually(lambda: len(told()) >= missed + 2, 180)
        # the watch is killed
        watches[-1].send_signal(signal.SIGKILL)
        with contextlib.suppress(ValueError):
            done.append(watches[-1].finish().stdout)
        start_watch(2)
        for _ in range(100 - relay.posted if relay.posted < 100 else 0):
            relay.disturb()
        stop.set()
        loop.join(120)
        checkpoints_ = arrivals.checkpoints(client, MODEL)
        assert set(registered) <= set(checkpoints_)
        eventually(lambda: told()[-1] == checkpoints_[-1], 180)
        watches[-1].send_signal(signal.SIGTERM)
        ended = watches[-1].finish()
        assert ended.returncode == 0, ended.stderr
        done.append(ended.stdout)
        # in order, and once; the process that was killed may have noted a version and not told it
        assert told() == sorted(set(told()))
        assert len(checkpoints_[1:]) - len(told()) <= 1
        assert not [line for text in done for line in text.splitlines() if "failed" in line]
        assert made(client) == [f"{a},{b}" for a, b in itertools.pairwise(checkpoints_)]
        assert relay.posted >= 100
        figures["deliveries"] = {
            "checkpoints": len(checkpoints_),
            "from MLflow": len(relay.genuine),
            "lost": relay.lost,
            "posted": relay.posted,
            **{str(code): relay.codes.count(code) for code in sorted(set(relay.codes))},
        }
