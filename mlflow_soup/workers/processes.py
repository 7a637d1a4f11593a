"""Workers as processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from multiprocessing.connection import wait

from mlflow_soup.workers.worker import Admission, Reply, Request, Start, Worker

_context = multiprocessing.get_context("forkserver")
# importing torch, transformers and lm-eval takes seconds: one process does it for all workers
_context.set_forkserver_preload([__name__])
_worker: Worker  # of a process that `_open` made one


def _begin() -> None:
    """Prepare the process of a worker: quiet, deaf to Ctrl-C, and gone when its driver is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it, and ends its workers
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    driver = multiprocessing.parent_process()
    assert driver is not None

    def follow() -> None:
        wait([driver.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def _open(start: Start) -> Admission:
    global _worker
    _worker = Worker(start)
    return _worker.admission


def _answer(request: Request) -> Reply:
    return _worker.answer(request)


class Process:
    """A worker in a process of its own.

    Args:
        number: which of the workers it is, from 1.
        start: how it starts.
    """

    def __init__(self, number: int, start: Start) -> None:
        self._start = start
        self._pool = ProcessPoolExecutor(1, mp_context=_context, initializer=_begin)
        self._pid: Future[int] = self._pool.submit(os.getpid)
        self.words = f"worker {number}"

    def admit(self) -> Future[Admission]:
        """As `Handle.admit`."""
        return self._pool.submit(_open, self._start)

    def answer(self, request: Request) -> Future[Reply]:
        """As `Handle.answer`."""
        return self._pool.submit(_answer, request)

    def is_gone(self, error: BaseException) -> bool:
        """As `Handle.is_gone`."""
        return isinstance(error, BrokenExecutor | CancelledError)

    def kill(self) -> None:
        """As `Handle.kill`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(
            BrokenExecutor, CancelledError, ProcessLookupError
        ):  # it has ended
            os.kill(self._pid.result(timeout=30.0), signal.SIGKILL)
        self._pool.shutdown(wait=True)
