"""A command run again and again on copies of one prepared store, in forks of one warm process.

Importing MLflow, torch and lm-eval takes ten seconds, a small search two: so they are imported
once, and every command runs in a fork of this process. What it evaluates is written down past all
that is tested here.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from tqdm import tqdm

import forked
import toy
from checker import Database
from conftest import MODEL, fill
from mlflow_soup import cli
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.workers.engine import Engine, Inline
from mlflow_soup.workers.pool import Pool
from mlflow_soup.workers.worker import Mixture

T = TypeVar("T")
WORKERS = 2
_append, _sync = os.write, os.fsync  # before anybody wraps them
fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Store:
    """A prepared database with two versions, to be copied; and the tasks they are scored on."""

    database: Path
    tasks: Path
    workers: int = 1

    @property
    def request(self) -> list[str]:
        """The command that is run: four trials, on few items."""
        said = {
            **{"model": MODEL, "pair": "v1,v2", "trials": 4, "stop": 0, "experiment": "soups"},
            **{"tasks": "toy_letters", "ood-tasks": "toy_digits", "include-path": self.tasks},
            **{"promote": "alias:champion", "store-patience": 0.2, "workers": self.workers},
        }
        return ["run", *(f"--{name}={value}" for name, value in said.items())]


def prepare(root: Path) -> Store:
    """The store, small enough to be copied for each episode."""
    forked.warm()
    trained = toy.train(60)
    tasks = toy.write_tasks(root / "tasks", 16)
    folders = [toy.save(toy.noisy(trained, i, 0.9), root / f"v{i}") for i in (1, 2)]
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    client = MlflowClient()
    client.create_experiment("soups", artifact_location=f"{root}/artifacts")
    mlflow.set_experiment("soups")
    fill(client, folders, tasks)
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_digits")
    store = Store(root / "mlflow.db", tasks)
    _warm_up(store, root / "warm")
    return store


def _warm_up(store: Store, root: Path) -> None:
    """Run the command in this process: forks inherit what is imported and found out by then."""
    place = make_place(store, root)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.environment().items():
            patch.setenv(name, value)
        mlflow.set_tracking_uri(place.environment()["MLFLOW_TRACKING_URI"])
        done = CliRunner().invoke(cli.main, store.request)
        assert done.exit_code == 0, done.output
    shutil.rmtree(root)


@dataclass
class Place:
    """Where one episode happens: a copy of the store, and folders of its own.

    Attributes:
        root: of all of it.
        artifacts, cache, temporary: where new artifacts, the cache and temporary files go.
        database: the copy.
        uri: of the store, where it is not the copy.
    """

    root: Path
    artifacts: Path
    cache: Path
    temporary: Path
    database: Path
    uri: str = ""

    @property
    def watched(self) -> list[Path]:
        return [self.artifacts, self.cache, self.temporary]

    def said(self) -> str:
        """All that the commands have printed."""
        return (self.root / "output.txt").read_text()

    def evaluations(self) -> tuple[Counter[str], Counter[str]]:
        """What was evaluated, how often it was begun and how often ended."""
        begun, ended = Counter[str](), Counter[str]()
        file = self.root / "evaluations.txt"
        for line in file.read_text().splitlines() if file.is_file() else ():
            word, what = line.split()
            (begun if word == "begin" else ended)[what] += 1
        return begun, ended

    def repeated(self) -> int:
        """Evaluations of what was evaluated, or begun, before."""
        begun, _ = self.evaluations()
        return begun.total() - len(begun)

    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri or f"sqlite:///{self.database}",
            "MLFLOW_SOUP_CACHE": str(self.cache),
            "TMPDIR": str(self.temporary),
        }


def make_place(store: Store, root: Path, **elsewhere: Path) -> Place:
    """A copy of the store whose new artifacts are its own; folders may be named elsewhere."""
    root.mkdir(parents=True)
    folders = {name: root / name for name in ("artifacts", "cache", "temporary", "database")}
    folders |= elsewhere
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    place = Place(root, **{**folders, "database": folders["database"] / "mlflow.db"})
    shutil.copy(store.database, place.database)
    with Database(place.database) as database:
        database.rows(
            "UPDATE experiments SET artifact_location = ? WHERE name = 'soups'",
            str(place.artifacts),
        )
        database.commit()
    return place


def record(place: Place) -> None:
    """Write down what this process, or its workers, evaluate: digest of weights and requests."""
    file = os.open(place.root / "evaluations.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(word: str, what: str) -> None:
        _append(file, f"{word} {what}\n".encode())
        _sync(file)

    def recorded(answer: Callable[..., Any]) -> Callable[..., Any]:
        def recording(self: Engine, name: str, evaluator: Evaluator, mixture: Mixture) -> Any:
            digest = hashlib.sha256(f"{evaluator.fingerprint} {mixture.lam}".encode())
            for checkpoint in mixture.checkpoints:
                for weights in checkpoint.root.rglob("*.safetensors"):
                    digest.update(weights.read_bytes())
            note("begin", digest.hexdigest()[:16])
            answers = answer(self, name, evaluator, mixture)
            note("end", digest.hexdigest()[:16])
            return answers

        return recording

    for kind in (Inline, Pool):
        kind.answer = recorded(kind.answer)


def start(
    place: Place,
    command: Sequence[str],
    *before: Callable[[], object],
    environment: Mapping[str, str] = {},
) -> Any:
    """The command line in a fork, as a user has it; `before` is called there first."""

    def work() -> None:
        code = 70
        try:
            os.chdir(place.root)
            os.environ.update({**place.environment(), **environment})
            tempfile.tempdir = None
            out = os.open("output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(out, stream)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
            mlflow.set_tracking_uri(place.environment()["MLFLOW_TRACKING_URI"])
            logging.getLogger().handlers.clear()  # pytest's
            _stop_listening()
            _share_no_locks(tqdm)
            # who forks workers is a child of the process before
            forkserver._forkserver.ensure_running = lambda: None
            for call in before:
                call()
            record(place)
            cli.main(list(command), prog_name="mlflow-soup")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = fork.Process(target=work)
    process.start()
    return process


def _share_no_locks(bars: type[tqdm]) -> None:
    """Give this process locks of its own: those of tqdm are shared by all, also by the killed."""
    bars.set_lock(threading.RLock())
    for kind in bars.__subclasses__():
        _share_no_locks(kind)


def _stop_listening() -> None:
    """Close the ports that this process has inherited: whoever asks there would wait for us."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inherited = socket.socket(fileno=int(number))
            if inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                inherited.close()
            else:
                inherited.detach()


def finish(process: Any, within: float = 180.0) -> int:
    """A command's exit code; that of a signal is negative."""
    process.join(within)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the command did not end")
    return int(process.exitcode)


def run(place: Place, command: Sequence[str], *before: Callable[[], object]) -> int:
    return finish(start(place, command, *before))


def kill_after(process: Any, seconds: float) -> bool:
    """Kill a command, unless it has ended before."""
    process.join(seconds)
    if process.exitcode is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def slow(seconds: float) -> None:
    """Make evaluations as slow as those of a larger model."""
    evaluate = Evaluator.evaluate

    def evaluate_slowly(self: Evaluator, *parts: Any) -> Any:
        time.sleep(seconds)
        return evaluate(self, *parts)

    Evaluator.evaluate = evaluate_slowly


def wait_for(place: Place, begun: int, within: float = 120.0) -> None:
    """Wait until so many evaluations have begun."""
    deadline = time.monotonic() + within
    while place.evaluations()[0].total() < begun:
        assert time.monotonic() < deadline, place.said()
        time.sleep(0.05)


def pause(process: Any, place: Place) -> None:
    """Stop a process while it does not write: it would keep SQLite's lock from everybody else."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with contextlib.closing(sqlite3.connect(place.database, timeout=0)) as database:
                database.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:  # it holds the lock
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)


def spread(work: Callable[[T], Any], jobs: Iterable[T], workers: int = WORKERS) -> list[Any]:
    """What `work` gives for each job, in order; done by forks of this process, side by side."""
    todo = list(enumerate(jobs))
    outbox = fork.SimpleQueue()

    def labour(share: Sequence[tuple[int, T]]) -> None:
        for number, job in share:
            try:
                outbox.put((number, work(job), ""))
            except BaseException:
                outbox.put((number, None, traceback.format_exc()))
        os._exit(0)

    # the costs of neighbours are alike
    processes = [fork.Process(target=partial(labour, todo[i::workers])) for i in range(workers)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failed = []
    for _ in todo:
        number, result, error = outbox.get()
        results[number] = result
        failed += [error] if error else []
    for process in processes:
        process.join()
    assert not failed, "\n".join(failed)
    return [results[number] for number in sorted(results)]


@contextlib.contextmanager
def swept(folder: Path) -> Iterator[Path]:
    """A folder that is deleted in the end."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def room() -> Path:
    """Where episodes are quick: commits to memory need no disk, and a kill spares it too."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="soup-", dir=memory if memory.is_dir() else None))
