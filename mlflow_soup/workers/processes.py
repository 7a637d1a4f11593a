"""Workers as processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from tqdm import tqdm

from mlflow_soup.evaluation.limits import portable
from mlflow_soup.workers.worker import Admission, Reply, Request, Start, Worker

_context = multiprocessing.get_context("forkserver")
_SECONDS_TO_END = 30.0  # that a killed process may take, say for a disk that does not answer


class _Ended(Exception):
    """The process of a worker has ended; how, in words."""


def _serve(connection: Connection, start: Start) -> None:
    """Tell the driver what admits the worker, then answer it until it ends."""
    _begin()
    try:
        worker = Worker(start)
    except Exception as error:
        connection.send(portable(error))
        return
    connection.send(worker.admission)
    with contextlib.suppress(EOFError):  # the driver has closed its end
        while True:
            request = connection.recv()
            said: Reply | Exception
            try:
                said = worker.answer(request)
            except Exception as error:
                said = portable(error).with_traceback(None)  # its frames hold tensors
            connection.send(said)


def _begin() -> None:
    """Prepare the process of a worker: quiet, deaf to Ctrl-C, and gone when its driver is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it, and ends its workers
    tqdm.set_lock(threading.RLock())  # else it makes a semaphore, which a kill would leave behind
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    driver = multiprocessing.parent_process()
    assert driver is not None

    def follow() -> None:
        wait([driver.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep a process that starts from running the user's script again: it needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Process:
    """A worker in a process of its own.

    Args:
        number: which of the workers it is, from 1.
        start: how it starts.
    """

    def __init__(self, number: int, start: Start) -> None:
        self.words = f"worker {number}"
        self.waits = "look whether the machine is busy, or waits for its disk"
        self._connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, start))
        # importing torch, transformers and lm-eval takes seconds: one process does it for all
        _context.set_forkserver_preload([__name__])
        with _without_main():
            self._process.start()
        theirs.close()
        self._listener = ThreadPoolExecutor(1)

    def admit(self) -> Future[Admission]:
        """As `Handle.admit`."""
        return self._listener.submit(self._hear)

    def answer(self, request: Request) -> Future[Reply]:
        """As `Handle.answer`."""
        return self._listener.submit(self._ask, request)

    def loss(self, error: BaseException) -> str:
        """As `Handle.loss`."""
        return str(error) if isinstance(error, _Ended) else ""

    def _ask(self, request: Request) -> Any:
        with self._noticing():
            self._connection.send(request)
        return self._hear()

    def _hear(self) -> Any:
        with self._noticing():
            said = self._connection.recv()
        if isinstance(said, Exception):
            raise said
        return said

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """Say how the process ended when the connection to it breaks."""
        try:
            yield
        except (EOFError, OSError) as error:
            self._process.join(_SECONDS_TO_END)
            code = self._process.exitcode or 0
            how = f"was ended by signal {-code}" if code < 0 else "ended"
            killed = code == -signal.SIGKILL
            raise _Ended(how + killed * ", as the system does when memory runs out") from error

    def kill(self) -> None:
        """As `Handle.kill`."""
        self._process.kill()
        self._process.join(_SECONDS_TO_END)
        self._listener.shutdown(wait=False, cancel_futures=True)  # it hears that the process ended
