"""Between MLflow, which sends webhooks, and whoever receives them."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from cryptography.fernet import Fernet
from mlflow.webhooks.delivery import _generate_hmac_signature  # what MLflow itself signs with

FORGED = "v1,Zm9yZ2Vk"


def webhooks_of_server() -> dict[str, str]:
    """The variables of a server that may send webhooks to this machine."""
    return {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }


def signed(secret: str, name: str, body: bytes, at: float) -> dict[str, str]:
    """The headers of a delivery that MLflow would have sent at a time."""
    when = str(int(at))
    signature = _generate_hmac_signature(secret, name, when, body.decode())
    return {
        "X-MLflow-Delivery-Id": name,
        "X-MLflow-Timestamp": when,
        "X-MLflow-Signature": signature,
    }


def eventually(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Relay:
    """Takes deliveries from MLflow at `uri`, keeps them, and passes them on.

    Attributes:
        genuine: headers and body of each delivery that MLflow sent.
        codes: what the receiver answered to each post.
        posted: how many posts there were, answered or not.
    """

    def __init__(self, to: str) -> None:
        self._to = urlsplit(to)
        self.genuine: list[tuple[dict[str, str], bytes]] = []
        self.codes: list[int] = []
        self.posted = 0
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kept = {name: v for name, v in self.headers.items() if name.startswith("X-")}
                relay.genuine.append((kept, body))
                relay.receive(kept, body)
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def receive(self, headers: dict[str, str], body: bytes) -> None:
        self.post(headers, body)

    def post(self, headers: dict[str, str], body: bytes) -> None:
        self.posted += 1
        connection = http.client.HTTPConnection(self._to.hostname, self._to.port, timeout=10)
        with contextlib.suppress(OSError):  # the receiver is away
            connection.request("POST", self._to.path, body, headers)
            self.codes.append(connection.getresponse().status)
        connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
