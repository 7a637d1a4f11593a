"""Receive MLflow's webhooks: a genuine delivery wakes whoever waits, and says nothing else.

A delivery has no authority. Its body is compared with its signature and then forgotten, and the
registry is asked what is new. So a delivery that comes twice, late or out of order changes nothing,
and polling finds what a lost one was about. It is answered at once, before any work begins.
"""

import base64
import contextlib
import hashlib
import hmac
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from mlflow_soup.errors import SpecError

logger = logging.getLogger("mlflow_soup")
SECRET_ENV = "MLFLOW_SOUP_WEBHOOK_SECRET"
WINDOW_S = 300.0  # between the time of a delivery and ours; MLflow repeats one within seconds
LARGEST = 1 << 20  # bytes of a delivery: a version has descriptions and tags of kilobytes
_SHORTEST = 16  # characters of the secret
_CONNECTIONS = 32  # at once; MLflow opens ten
_PATIENCE_S = 10.0  # with a connection that sends nothing
_SAID_S = 60.0  # between two warnings about refused deliveries
_PLACE = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>\d{1,5})", re.A
)


def refusal(headers: Mapping[str, str], body: bytes, secret: bytes, now: float) -> str:
    """Why a delivery is not genuine; empty if it is.

    MLflow signs `ID.TIME.BODY` by HMAC-SHA256 with the secret of the webhook.

    Args:
        headers: of the request.
        body: of the request.
        secret: the secret of the webhook.
        now: seconds since 1970.
    """
    said = {what.lower(): value for what, value in headers.items()}
    name, at, signature = (
        said.get(f"x-mlflow-{what}", "") for what in ("delivery-id", "timestamp", "signature")
    )
    signed = f"{name}.{at}.".encode(errors="surrogateescape") + body
    digest = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest())
    if not hmac.compare_digest(signature.encode(errors="surrogateescape"), b"v1," + digest):
        return "it is not signed with our secret"
    if not re.fullmatch(r"\d{1,12}", at, re.A) or abs(now - int(at)) > WINDOW_S:
        return "it is too old, or from the future"
    return ""


def secret_of_environment() -> bytes:
    """The secret of the webhook.

    Raises:
        SpecError: there is none, or it is short.
    """
    secret = os.environ.get(SECRET_ENV, "")
    if len(secret) < _SHORTEST:
        raise SpecError(
            f"{SECRET_ENV} holds {len(secret)} characters"
            if secret
            else f"{SECRET_ENV} is not set",
            where="--listen",
            fix=f"set it to the secret of the webhook in MLflow, of {_SHORTEST} characters or more",
        )
    return secret.encode()


@contextlib.contextmanager
def listening(place: str, secret: bytes, wake: Callable[[], None]) -> Iterator[str]:
    """Receive deliveries in threads while the block runs; yield the place, `127.0.0.1:8080`.

    Args:
        place: HOST:PORT; port 0 is any that is free.
        secret: the secret of the webhook.
        wake: called for each genuine delivery, from any thread.

    Raises:
        SpecError: the place cannot be read, or is not free.
    """
    match = _PLACE.fullmatch(place)
    if match is None or int(match["port"]) > 65535:
        raise SpecError(
            f"{place!r} is not a host and a port",
            where="--listen",
            fix="write --listen 127.0.0.1:8080, or [::1]:8080",
        )
    host, port = match["v6"] or match["host"], int(match["port"])
    try:
        server = _Receiver(host, port, secret, wake)
    except OSError as error:
        raise SpecError(
            f"nothing can listen on {place}: {error.strerror or error}",
            where="--listen",
            fix="name an address of this machine, and a port that is free",
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, args=(0.1,), name="webhooks", daemon=True
    )
    thread.start()
    try:
        yield f"{f'[{host}]' if match['v6'] else host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_PATIENCE_S)


class _Receiver(ThreadingMixIn, TCPServer):
    """A server of few threads; that of `http.server` would ask a name server for its own name."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int, secret: bytes, wake: Callable[[], None]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.secret, self.wake = secret, wake
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._refused, self._said = 0, float("-inf")
        super().__init__((host, port), _Delivery)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that breaks."""

    def refuse(self, host: str, why: str) -> None:
        """Warn of a refused delivery, once a minute."""
        self._refused += 1
        if time.monotonic() - self._said > _SAID_S:
            logger.warning("refused %d deliveries; the last from %s: %s", self._refused, host, why)
            self._refused, self._said = 0, time.monotonic()


class _Delivery(BaseHTTPRequestHandler):
    server: _Receiver
    server_version, sys_version = "mlflow-soup", ""
    timeout = _PATIENCE_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length, re.A):
            return self._answer(411)
        if int(length) > LARGEST:
            self.server.refuse(self.client_address[0], f"it has {int(length)} bytes")
            return self._answer(413)
        body = self.rfile.read(int(length))
        why = refusal(dict(self.headers), body, self.server.secret, time.time())
        if why:
            self.server.refuse(self.client_address[0], why)
            return self._answer(401)
        self._answer(204)
        self.server.wake()

    def _answer(self, code: int) -> None:
        self.send_response(code)
        if code != 204:
            self.send_header("Content-Length", "0")
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
