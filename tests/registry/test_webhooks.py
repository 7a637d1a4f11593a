"""The receiver of MLflow's webhooks."""

import contextlib
import http.client
import logging
import socket
import threading
import time

import pytest

import relay
from mlflow_soup.errors import SpecError
from mlflow_soup.registry import webhooks

SECRET = "a secret of the webhook"
BODY = '{"entity": "model_version", "action": "created", "data": {"name": "toy-λ"}}'


def signed(body=BODY, at=None, secret=SECRET, name="an-id"):
    return relay.signed(secret, name, body.encode(), time.time() if at is None else at)


class Receiver:
    def __init__(self, place):
        self.woken = 0
        self.host, _, port = place.rpartition(":")
        self.port = int(port)

    def post(self, headers, body=BODY, method="POST"):
        connection = http.client.HTTPConnection(self.host.strip("[]"), self.port, timeout=10)
        try:
            connection.request(method, "/any", body.encode(), headers)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def receiver():
    woken = threading.Semaphore(0)
    with webhooks.listening("127.0.0.1:0", SECRET.encode(), woken.release) as place:
        found = Receiver(place)
        found.wakes = lambda: woken.acquire(timeout=30)
        found.sleeps = lambda: not woken.acquire(timeout=0.3)
        yield found


def test_a_genuine_delivery_is_answered_at_once_and_wakes(receiver):
    assert receiver.post(signed()) == 204
    assert receiver.wakes()
    assert receiver.sleeps()
    lower = {name.lower(): value for name, value in signed().items()}
    assert receiver.post(lower) == 204
    assert receiver.wakes()


FORGED = {
    "bare": dict,
    "another secret": lambda: signed(secret="the secret of another"),
    "another body": lambda: signed(body="another body"),
    "another id": lambda: signed() | {"X-MLflow-Delivery-Id": "another-id"},
    "another time": lambda: signed() | {"X-MLflow-Timestamp": str(int(time.time()) - 100)},
    "no signature": lambda: signed() | {"X-MLflow-Signature": ""},
    "no ASCII": lambda: signed() | {"X-MLflow-Signature": "v1,ü"},
    "late": lambda: signed(at=time.time() - 400),
    "early": lambda: signed(at=time.time() + 400),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_or_late_delivery_is_refused_and_wakes_nobody(receiver, how):
    assert receiver.post(FORGED[how]()) == 401
    assert receiver.sleeps()


def test_refusals_are_told_once_a_minute_and_without_the_secret(receiver, caplog, monkeypatch):
    monkeypatch.setenv(webhooks.SECRET_ENV, SECRET)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            receiver.post({"X-MLflow-Signature": SECRET})
    assert len(caplog.records) == 1
    assert "from 127.0.0.1: it is not signed with our secret" in caplog.text
    assert SECRET not in caplog.text


def test_what_is_too_large_or_has_no_length_is_refused_unread(receiver):
    assert receiver.post({"Content-Length": str(webhooks.LARGEST + 1)}, "") == 413
    assert receiver.post({"Content-Length": "many"}, "") == 411
    assert receiver.post({}, method="PUT") == 501
    assert receiver.sleeps()


def test_silent_connections_keep_no_delivery_waiting(receiver):
    silent = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(20)]
    assert receiver.post(signed()) == 204
    for connection in silent:
        connection.close()


def test_more_connections_than_allowed_are_closed_and_then_it_goes_on(receiver, monkeypatch):
    monkeypatch.setattr(webhooks._Delivery, "timeout", 0.5)
    silent = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(60)]

    def answers():
        with contextlib.suppress(OSError, http.client.HTTPException):
            return receiver.post(signed()) == 204

    relay.eventually(answers)
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("place", ["8080", "host", ":80", "127.0.0.1:99999", "a b:80", "[x]:1"])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(SpecError, match="is not a host and a port"):
        webhooks.listening(place, b"", bool).__enter__()


def test_a_place_that_is_taken_is_refused(receiver):
    with pytest.raises(SpecError, match=f"nothing can listen on 127.0.0.1:{receiver.port}"):
        webhooks.listening(f"127.0.0.1:{receiver.port}", b"", bool).__enter__()


@pytest.mark.parametrize(("secret", "said"), [("", "is not set"), ("short", "holds 5 characters")])
def test_a_secret_is_asked_for(monkeypatch, secret, said):
    monkeypatch.setenv(webhooks.SECRET_ENV, secret)
    with pytest.raises(SpecError, match=said):
        webhooks.secret_of_environment()
