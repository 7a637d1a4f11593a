"""Serve what an alias of MLflow points to, and swap it when mlflow-soup promotes another version.

A webhook of MLflow only wakes the receiver. It then asks the registry where the alias points, has
`mlflow-soup verify --promoted` check that version, exports it, starts a server for the folder, and
sends requests there once it is healthy. Until then, and whenever something is refused, the version
before goes on answering. README.md says how to start it.
"""

import contextlib
import json
import logging
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import requests
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from mlflow import MlflowClient

from mlflow_soup.files import durable
from mlflow_soup.registry import webhooks

logger = logging.getLogger("receiver")
START_S, DRAIN_S, ANSWER_S = 600.0, 120.0, 600.0  # to be healthy; to end; to answer a request
PASSED_ON = ("content-type", "accept", "authorization")


def ask(*words: str, ended: threading.Event) -> dict[str, Any]:
    """The JSON that a command of mlflow-soup answers; an error says why it did not exit with 0."""
    command = ["mlflow-soup", *words, "--format", "json"]
    process, answer = subprocess.Popen(command, stdout=subprocess.PIPE), None
    while answer is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            answer, _ = process.communicate(timeout=0.2)
        if ended.is_set():
            stop(process)
            raise RuntimeError(f"{shlex.join(words[:2])} was not awaited: the receiver ends")
    said = dict(json.loads(answer))
    if process.returncode == 0:
        return said
    wrong = [f for f in said.get("findings", ()) if f["verdict"] not in ("ok", "skipped")]
    why = [f"{f['what']}: {f['details'][0]}" for f in wrong] or [said["error"]["what"]]
    what = f"{shlex.join(words[:2])} exited with {process.returncode}"
    raise RuntimeError(f"{what}: {'; '.join(why)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; after ten seconds, by force."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def words_of(command: str, folder: Path, port: int) -> list[str]:
    """The words of a command that serves a folder.

    Raises:
        ValueError: it names no program, or another field than {folder} and {port}.
    """
    try:
        words = [word.format(folder=folder, port=port) for word in shlex.split(command)]
    except (LookupError, AttributeError) as error:
        raise ValueError(
            f"{command!r} has a field that is neither {{folder}} nor {{port}}"
        ) from error
    if not words or shutil.which(words[0]) is None:
        program = repr(words[0]) if words else "nothing"
        raise ValueError(f"there is no program {program}: install it, or name another command")
    return words


class Server:
    """A process that serves a folder, and the number of requests that it is answering."""

    def __init__(self, version: int, folder: Path, command: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.version, self.folder, self.busy = version, folder, 0
        self.url = f"http://127.0.0.1:{port}"
        words = words_of(command, folder, port)
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def is_healthy(self, path: str, ended: threading.Event) -> bool:
        """Whether it answers; it is given time to start, unless the receiver ends."""
        end = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < end and not ended.is_set():
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}{path}", timeout=5).ok:
                    return True
            time.sleep(0.2)
        return False

    def stop(self, patience: float = 0.0) -> None:
        """End it after the requests that it is answering, and remove its folder."""
        end = time.monotonic() + patience
        while self.busy and time.monotonic() < end:
            time.sleep(0.1)
        stop(self.process)
        shutil.rmtree(self.folder.parent, ignore_errors=True)


@dataclass
class Deployment:
    """What is served now. One thread changes it; others answer requests and deliveries."""

    model: str
    alias: str
    state: Path
    serve: str
    health: str
    public_key: str
    poll: float
    server: Server | None = None
    refusals: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=100))
    seen: dict[str, float] = field(default_factory=dict)  # the id of a delivery → when it came
    awake: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    worker: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def served(self) -> int | None:
        """The version that is served; None if its process has ended, or none was started."""
        alive = self.server is not None and self.server.process.poll() is None
        return self.server.version if self.server is not None and alive else None

    def begin(self) -> None:
        """Work in a thread until `end`."""
        self.worker = threading.Thread(target=self.work, daemon=True)
        self.worker.start()

    def end(self) -> None:
        """End what is served, what is about to be served, and the command that is under way."""
        self.ended.set()
        self.awake.set()
        if self.worker is not None:
            self.worker.join()
        if self.server is not None:
            self.server.stop()

    def work(self) -> None:
        """Serve again what was served before, and then follow the alias until the end."""
        shutil.rmtree(self.state / "exports", ignore_errors=True)  # of a receiver that was killed
        (self.state / "exports").mkdir(parents=True)
        if (self.state / "served.json").exists():
            self.attempt(self.serve_again)
        while not self.ended.is_set():
            self.attempt(self.follow)
            self.awake.wait(self.poll)
            self.awake.clear()

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; if it fails, tell it, and go on with what is served."""
        try:
            step()
        except Exception as error:
            self.refuse(str(error) or repr(error))

    def serve_again(self) -> None:
        """Serve what was served before a restart, though the alias may have been moved by hand."""
        version = json.loads((self.state / "served.json").read_text())["version"]
        self.swap(f"models:/{self.model}/{version}")

    def follow(self) -> None:
        """Serve what the alias points to now, whatever an event said."""
        found = MlflowClient().get_model_version_by_alias(self.model, self.alias)
        if self.served != int(found.version):
            self.swap(f"models:/{self.model}@{self.alias}", "--promoted")

    def swap(self, uri: str, *asked: str) -> None:
        """Verify and export a version, start its server, and send all requests there."""
        keys = ("--public-key", self.public_key) if self.public_key else ()
        checked = ask("verify", uri, *asked, *keys, ended=self.ended)
        if checked["status"] != "verified" and not keys:
            raise RuntimeError(f"{checked['uri']} was not merged again: it needs --public-key")
        version = checked["version"]["version"]  # the one that was checked: an alias moves
        with contextlib.ExitStack() as undo:
            place = Path(tempfile.mkdtemp(dir=self.state / "exports"))
            undo.callback(shutil.rmtree, place, ignore_errors=True)
            folder = place / f"v{version}"
            ask("export", checked["uri"], "--out", str(folder), *keys, ended=self.ended)
            new = Server(version, folder, self.serve)
            undo.callback(new.stop)
            if not new.is_healthy(self.health, self.ended):
                raise RuntimeError(f"the server of {checked['uri']} did not become healthy")
            undo.pop_all()
        with self.lock:
            old, self.server = self.server, new
        record = json.dumps({"version": version})
        durable.replace(self.state / "served.json", lambda path: path.write_text(record))
        logger.info("%s is served", checked["uri"])
        if old is not None:
            old.stop(DRAIN_S)

    def refuse(self, why: str) -> None:
        """Tell what is refused, in the log and at `/status`; the same again is only counted."""
        with self.lock:
            if not self.refusals or self.refusals[-1]["why"] != why:
                self.refusals.append({"why": why, "times": 0})
                logger.warning("refused: %s", why)
            self.refusals[-1]["times"] += 1
            self.refusals[-1]["last"] = time.time()

    def receive(self, headers: Mapping[str, str], body: bytes, secret: bytes) -> int:
        """The answer to a delivery; one that is genuine, new and about our alias wakes `work`."""
        now = time.time()
        if why := webhooks.refusal(headers, body, secret, now):
            self.refuse(f"a delivery: {why}")
            return 401
        name, event = headers["x-mlflow-delivery-id"], json.loads(body)
        # the id of a repeated delivery is that of the first; what is older was refused above
        self.seen = {n: at for n, at in self.seen.items() if now - at < 2 * webhooks.WINDOW_S}
        ours = {"name": self.model, "alias": self.alias}.items() <= event["data"].items()
        if ours and event["entity"] == "model_version_alias" and name not in self.seen:
            self.awake.set()
        self.seen[name] = now
        return 204

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Server | None]:
        """The server for a request; it is not stopped before the block ends."""
        with self.lock:
            server = self.server
            if server is not None:
                server.busy += 1
        try:
            yield server
        finally:
            with self.lock:
                if server is not None:
                    server.busy -= 1

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        """What the served model answers to a request."""
        with self.in_use() as server:
            if server is None:
                return Response("nothing is served yet; /status says why\n", 503)
            passed_on = {name: headers[name] for name in PASSED_ON if name in headers}
            try:
                answered = requests.request(
                    method, f"{server.url}{path}", headers=passed_on, data=body, timeout=ANSWER_S
                )
            except requests.RequestException:
                return Response("the served model does not answer\n", 502)
        kind = answered.headers.get("content-type")
        return Response(answered.content, answered.status_code, media_type=kind)


def application(deployment: Deployment, secret: bytes) -> FastAPI:
    """Deliveries at `/hook`, the state at `/status`, and the served model everywhere else."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        deployment.begin()
        yield
        deployment.end()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.post("/hook")
    async def hook(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > webhooks.LARGEST:
            return Response(status_code=413)
        return Response(None, deployment.receive(request.headers, await request.body(), secret))

    @app.get("/status")
    def status() -> dict[str, Any]:
        return {"served": deployment.served, "refusals": [*deployment.refusals]}

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def model(request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        place, body = f"{request.url.path}{query}", await request.body()
        return await run_in_threadpool(
            deployment.answer, request.method, place, request.headers, body
        )

    return app


def _a_command(context: click.Context, parameter: click.Parameter, text: str) -> str:
    try:
        words_of(text, Path("folder"), 1)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


@click.command()
@click.option("--model", required=True)
@click.option("--alias", default="champion", show_default=True)
@click.option("--state", required=True, type=click.Path(path_type=Path, resolve_path=True))
@click.option(
    "--serve",
    default="transformers serve {folder} --host 127.0.0.1 --port {port}",
    show_default=True,
    callback=_a_command,
    help="The command that serves a folder.",
)
@click.option("--health", default="/health", show_default=True, help="Its path that answers 200.")
@click.option("--public-key", default="", help="Serve only what is signed by this key.")
@click.option("--poll", default=600.0, show_default=True, help="Seconds between two looks.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True)
def main(host: str, port: int, **named: Any) -> None:
    """Serve MODEL@ALIAS. MLFLOW_SOUP_WEBHOOK_SECRET holds the secret of the webhook."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    app = application(Deployment(**named), webhooks.secret_of_environment())
    uvicorn.run(app, host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
