"""A reverse proxy in front of a server, which loses, delays and spoils what it passes on."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# what a plan may answer for a request; None passes it on
LOST = "lost before it was served"
UNANSWERED = "served, and the answer lost"
BROKEN = "served, and 500 answered"
BUSY = "served, and 503 answered"
LATE = "served half a second later"
FAULTS = (LOST, UNANSWERED, BROKEN, BUSY, LATE)
Plan = Callable[[str, str], str | None]


class Proxy:
    """Passes requests on to another port of this machine, but for what the plan has for them.

    Args:
        port: of the server behind it.
        plan: method and path → one of `FAULTS`, or None.
    """

    def __init__(self, port: int, plan: Plan = lambda method, path: None) -> None:
        self.plan, self.passed = plan, Counter[str]()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.plan(self.command, self.path)
                proxy.passed[fault or "passed on"] += 1
                if fault == LOST:
                    return
                if fault == LATE:
                    time.sleep(0.5)
                behind = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    behind.request(self.command, self.path, body, dict(self.headers))
                    answer = behind.getresponse()
                    content = answer.read()
                except OSError:
                    return
                finally:
                    behind.close()
                if fault == UNANSWERED:
                    return
                if fault in (BROKEN, BUSY):
                    self.send_error(500 if fault == BROKEN else 503)
                    return
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                # of an answer to HEAD, the length is that of what GET would give
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _pass_on

            def log_message(self, *args: Any) -> None:
                pass

        self._handler = Handler
        self.port = 0
        self._open()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _open(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Nobody is there any more: connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Connections are refused inside the block."""
        self.close()
        try:
            yield
        finally:
            self._open()
