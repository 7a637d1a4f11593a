import contextlib
import errno
import fcntl
import os
import signal
import threading
import time

import mlflow
import pytest

import forked
from conftest import MODEL
from mlflow_soup import errors
from mlflow_soup.registry import lease
from mlflow_soup.registry.ledger import Ledger, open_ledger
from mlflow_soup.registry.store import Store

KEY = "k" * 64


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "GRACE_S", 2.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)


@pytest.fixture
def book(client):
    return open_ledger(client, MODEL)


def entries(book):
    return book.read(f"lease/{KEY[:32]}")


def test_a_lease_ends_when_its_work_ends_or_fails(book, tmp_path):
    with lease.hold(book.client, MODEL, KEY, tmp_path):
        assert lease.held(book, {KEY}, tmp_path) == {KEY}
    assert lease.held(book, {KEY}, tmp_path) == set()
    with pytest.raises(ValueError, match="no"), lease.hold(book.client, MODEL, KEY, tmp_path):
        raise ValueError("no")
    assert [(e.number, e.mark) for e in entries(book)] == [(1, "ended"), (2, "ended")]


def test_a_process_does_not_wait_for_other_requests(book, tmp_path):
    with (
        lease.hold(book.client, MODEL, KEY, tmp_path),
        lease.hold(book.client, MODEL, "other" + KEY, tmp_path),
    ):
        pass


@pytest.mark.parametrize("machines", ["one", "two"])
def test_a_second_process_waits_for_the_same_request_and_says_so(book, tmp_path, caplog, machines):
    order = []
    inside = threading.Event()

    def first():
        with lease.hold(book.client, MODEL, KEY, tmp_path / "a"):
            inside.set()
            time.sleep(3.0)  # longer than grace: its beats keep it
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(30)
    with lease.hold(book.client, MODEL, KEY, tmp_path / ("a" if machines == "one" else "b")):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    words = "on this machine" if machines == "one" else "gives no sign of life"
    (said,) = [r.message for r in caplog.records if "works on the same request" in r.message]
    assert words in said


def _hold(uri, folder, inside):
    mlflow.set_tracking_uri(uri)
    lease.BEAT_S = 0.2
    with lease.hold(Store(), MODEL, KEY, folder):
        inside.set()
        time.sleep(120)


@contextlib.contextmanager
def holder(folder):
    """Another process that holds the lease."""
    inside = forked.context.Event()
    args = (os.environ["MLFLOW_TRACKING_URI"], folder, inside)
    process = forked.warm().Process(target=_hold, args=args)
    process.start()
    assert inside.wait(120)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_another_process_takes_over_at_once_from_a_killed_one_on_this_machine(
    book, tmp_path, monkeypatch
):
    monkeypatch.setattr(lease, "GRACE_S", 60.0)
    with holder(tmp_path) as process:
        process.kill()
        process.join()
        begin = time.monotonic()
        with lease.hold(book.client, MODEL, KEY, tmp_path):
            assert time.monotonic() - begin < lease.GRACE_S
    assert [e.mark == "ended" for e in entries(book)] == [False, True]


def test_another_process_takes_over_after_grace_from_a_killed_one_elsewhere(book, tmp_path, caplog):
    with holder(tmp_path / "there") as process:
        process.kill()
        process.join()
        begin = time.monotonic()
        with lease.hold(book.client, MODEL, KEY, tmp_path / "here"):
            assert time.monotonic() - begin > lease.GRACE_S
    assert "no sign of life" in caplog.text


def test_a_paused_process_learns_that_another_took_over(book, tmp_path):
    with lease.hold(book.client, MODEL, KEY, tmp_path) as held:
        held()
        assert book.append(f"lease/{KEY[:32]}", 2, {"host": "elsewhere", "cache": "other"})
        with pytest.raises(errors.OvertakenError, match="took over") as caught:
            check_for(30.0, held)
    assert caught.value.exit_code == 5
    assert caught.value.where == "the other process runs on elsewhere"


def check_for(seconds, held):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        held()
        time.sleep(0.05)


def test_a_stopped_process_counts_as_dead_and_does_no_harm(book, tmp_path):
    with holder(tmp_path / "there") as process:
        os.kill(process.pid, signal.SIGSTOP)
        with lease.hold(book.client, MODEL, KEY, tmp_path / "here"):
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(1.0)
            assert [e.number for e in entries(book)] == [1, 2]
    assert entries(book)[-1].mark == "ended"


def test_a_process_that_wakes_up_checks_its_lease_before_it_continues(book, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 30.0)  # no beat looks in time
    with lease.hold(book.client, MODEL, KEY, tmp_path) as held:
        assert book.append(f"lease/{KEY[:32]}", 2, {"host": "elsewhere", "cache": "other"})
        held()
        monkeypatch.setattr(lease.time, "time", lambda now=time.time: now() + 100.0)
        with pytest.raises(errors.OvertakenError, match="took over"):
            held()


def test_a_beat_that_is_late_does_not_undo_the_end(book, tmp_path, monkeypatch):
    mark, beating, ended = Ledger.mark, threading.Event(), threading.Event()

    def stall(self, series, number, word):
        if word.startswith("beat"):
            beating.set()
            ended.wait(60)
        done = mark(self, series, number, word)
        if word == "ended":
            ended.set()
        return done

    monkeypatch.setattr(Ledger, "mark", stall)
    with lease.hold(book.client, MODEL, KEY, tmp_path):
        (thread,) = (t for t in threading.enumerate() if t.name == "lease")
        assert beating.wait(60)
    thread.join(60)
    assert [e.mark for e in entries(book)] == ["ended"]


def test_a_user_who_may_not_write_to_the_ledger_works_without_a_lease(book, tmp_path, caplog):
    book.client.delete_experiment(book.client.get_run(book.run_id).info.experiment_id)
    with lease.hold(book.client, MODEL, KEY, tmp_path) as check:
        check()
    assert "other processes may do the same work" in caplog.text


def test_a_holder_is_not_dead_because_the_store_was_away(book, tmp_path, monkeypatch):
    read, reads = Ledger.read, []

    def away(self, series):
        reads.append(series)
        if len(reads) == 3:
            time.sleep(2.0 * lease.GRACE_S)  # like a patient client whose store does not answer
        return read(self, series)

    assert book.append(f"lease/{KEY[:32]}", 1, {"host": "there", "cache": "there"})
    monkeypatch.setattr(Ledger, "read", away)
    begin = time.monotonic()
    with lease.hold(book.client, MODEL, KEY, tmp_path):
        assert time.monotonic() - begin > 3.0 * lease.GRACE_S


def test_one_wait_covers_all_holders_elsewhere_and_is_reported(book, tmp_path, caplog, monkeypatch):
    for name in "abc":
        told = {"host": f"pod-{name}", "cache": "of another machine"}
        assert book.append(f"lease/{name * 32}", 1, told)
    keys = {name * 64 for name in "abc"}
    listen, waits = lease._listen, []

    def listen_while_two_change(ledger, lasts):
        waits.append(set(lasts))
        book.mark(f"lease/{'b' * 32}", 1, "ended")
        book.mark(f"lease/{'c' * 32}", 1, "beat 7")
        return listen(ledger, lasts)

    monkeypatch.setattr(lease, "_listen", listen_while_two_change)
    assert lease.held(book, keys, tmp_path) == {"c" * 64}
    assert waits == [keys]
    assert "signs of life from pod-a, pod-b, pod-c" in caplog.text


def test_without_leases_nothing_is_waited_for(book, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "GRACE_S", 60.0)
    begin = time.monotonic()
    assert lease.held(book, {KEY}, tmp_path / "new") == set()
    assert lease.held(book, set(), tmp_path / "newer") == set()
    assert time.monotonic() - begin < lease.GRACE_S


@pytest.fixture
def secret(tmp_path):
    """A file elsewhere that must not be read, and a folder for locks that others can write to."""
    path = tmp_path / "secret"
    path.write_text("machine host password hunter2-s3cret")
    (tmp_path / "shared").mkdir()
    return path


@pytest.mark.parametrize("spoil", ["pipe", "link", "dangling"])
def test_a_lock_that_others_made_is_not_waited_for_or_followed(book, tmp_path, secret, spoil):
    lock = tmp_path / "shared" / f"{KEY[:32]}.lock"
    if spoil == "pipe":
        os.mkfifo(lock)
        with lease.hold(book.client, MODEL, KEY, lock.parent):
            return
    lock.symlink_to(secret if spoil == "link" else tmp_path / "canary")
    with (
        pytest.raises(errors.StoreError) as refused,
        lease.hold(book.client, MODEL, KEY, lock.parent),
    ):
        pytest.fail("the block must not run")
    assert refused.value.where == str(lock)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("spoil", ["pipe", "link", "text", "long", "path"])
def test_a_name_for_the_folder_that_others_wrote_is_replaced(book, tmp_path, secret, spoil):
    path = tmp_path / "shared" / "identity"
    texts = {"text": "hunter2-s3cret", "long": "a" * (1 << 20), "path": "../secret"}
    if spoil in texts:
        path.write_text(texts[spoil])
    else:
        os.mkfifo(path) if spoil == "pipe" else path.symlink_to(secret)
    with lease.hold(book.client, MODEL, KEY, path.parent):
        pass
    (entry,) = entries(book)
    assert len(entry.told["cache"]) == 32
    assert "hunter2" not in str(entry)
    assert secret.read_text().endswith("hunter2-s3cret")


def test_a_folder_without_locks_is_told(book, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with lease.hold(book.client, MODEL, KEY, tmp_path):
        pass
    assert "cannot be locked: No locks available" in caplog.text
