"""Workers as actors of a Ray cluster.

Each pulls the parents that its node lacks into the node's own cache, with the node's own
credentials: neither tensors nor secrets pass through Ray. Whoever is in a Ray cluster may run code
there, so a cluster is trusted like this machine.
"""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Any

from mlflow_soup.errors import ParentError, SpecError, StoreError
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.records import Version
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.store import connect
from mlflow_soup.request.names import parse_uri
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers.worker import Admission, Reply, Request, Source, Start, Worker, find_here

LEAST = (2, 52)  # older ones run the code of anybody who reaches their port (CVE-2025-62593)
_PATIENCE = 1800.0  # seconds that a node waits for a store while it pulls a parent


def find_or_pull(source: Source) -> Checkpoint:
    """A parent on this node: the driver's files on a shared disk, or a copy in the node's cache.

    Raises:
        ParentError: the store holds other weights than the search began with.
        StoreError: this node cannot reach the store.
    """
    if source.root.is_dir():
        with contextlib.suppress(ParentError):
            return find_here(source)
    name, ref = parse_uri(source.uri, "a parent")
    assert ref.number is not None
    with _alone_on_node(source):
        folder = pull(connect(_PATIENCE), Version(name, ref.number))
    found = find_checkpoint(folder, source.uri)
    if digest(found) != source.digest:
        raise ParentError(
            f"a node of the cluster gets other weights for {source.uri} than this process",
            where=str(found.root),
            fix="set MLFLOW_TRACKING_URI, and the credentials, to the same store on each node",
        )
    return found


@contextlib.contextmanager
def _alone_on_node(source: Source) -> Iterator[None]:
    """Let one worker of this node pull a parent, while the others wait to find it in the cache."""
    folder = cache_folder() / "lock"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / source.digest.rpartition(":")[2]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Remote:
    """What runs in the process of an actor."""

    def admit(self, start: Start) -> Admission:
        """Start the worker."""
        self._worker = Worker(start, find_or_pull)
        return self._worker.admission

    def answer(self, request: Request) -> Reply:
        """As `Worker.answer`."""
        return self._worker.answer(request)


class Actor:
    """A worker in an actor of its own.

    Args:
        number: which of the workers it is, from 1.
        start: how it starts.
        options: the resources that it takes.
    """

    def __init__(self, number: int, start: Start, options: dict[str, float]) -> None:
        self._ray, self._start = import_module("ray"), start
        # a new actor takes the place of one that ends: the pool counts what ends
        fixed = {"max_restarts": 0, "max_task_retries": 0}
        self._actor = self._ray.remote(Remote).options(**fixed, **options).remote()
        self.words = f"worker {number} of the cluster"

    def admit(self) -> Future[Admission]:
        """As `Handle.admit`."""
        return _plain(self._actor.admit.remote(self._start))

    def answer(self, request: Request) -> Future[Reply]:
        """As `Handle.answer`."""
        return _plain(self._actor.answer.remote(request))

    def is_gone(self, error: BaseException) -> bool:
        """As `Handle.is_gone`."""
        return isinstance(error, self._ray.exceptions.RayError)

    def kill(self) -> None:
        """As `Handle.kill`."""
        self._ray.kill(self._actor)


def _plain(reference: Any) -> Future[Any]:
    """The future of a reference; it has the worker's own error, not Ray's with its stack."""
    found: Future[Any] = Future()

    def take(future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            found.set_result(future.result())
        else:
            found.set_exception(getattr(error, "cause", None) or error)

    reference.future().add_done_callback(take)
    return found


def join(count: int, *, on_gpus: bool) -> tuple[list[dict[str, float]], Callable[[], None]]:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine.

    Args:
        count: the number of workers; 0 for as many as there is room for.
        on_gpus: whether each takes a GPU; else each takes its share of the processors.

    Returns:
        The resources that each worker takes, and what leaves the cluster again.

    Raises:
        SpecError: Ray is not installed, or too old; or there is less room than asked for.
        StoreError: the cluster cannot be reached.
    """
    _check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs longer
    ray = import_module("ray")
    if ray.is_initialized():
        leave: Callable[[], None] = lambda: None  # noqa: E731  # whoever joined it leaves it
    else:
        _connect(ray)
        leave = ray.shutdown
    kind, what = ("GPU", "GPUs") if on_gpus else ("CPU", "processors")
    free = int(ray.available_resources().get(kind, 0))
    if count > free or not free:
        leave()
        raise SpecError(
            f"the Ray cluster has {free} free {what}, fewer than {count or 1} workers",
            where="--workers",
            fix=f"ask for at most {free}, or wait until other jobs leave"
            if free
            else "start nodes that have some, or wait until other jobs leave",
        )
    count = count or free
    share = {"num_gpus": 1.0} if on_gpus else {"num_cpus": float(free // count)}
    return [share] * count, leave


def _check_installed() -> None:
    try:
        installed = version_of("ray")
    except PackageNotFoundError as error:
        raise SpecError(
            "Ray is not installed",
            where="--workers ray",
            fix="pip install 'mlflow-soup[ray]'",
        ) from error
    if tuple(map(int, installed.split(".")[:2])) < LEAST:
        raise SpecError(
            f"Ray {installed} runs the code of anybody who reaches it (CVE-2025-62593)",
            where="--workers ray",
            fix="pip install 'ray>={}.{}', here and on each node".format(*LEAST),
        )


def _connect(ray: Any) -> None:
    """Connect to a cluster, without Ray's own words and signal handlers.

    Raises:
        StoreError: there is none.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            configure_logging=False,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises plain exceptions, too
        raise _unreachable(address, str(error).partition("\n")[0]) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Ask whether anything listens: Ray waits two minutes, and then ends this process.

    Raises:
        StoreError: nothing does.
        SpecError: the address is of another kind.
    """
    host, _, port = address.rpartition(":")
    if address in ("local", "auto"):
        return
    if not host or not port.isdigit() or "/" in host:
        raise SpecError(
            f"RAY_ADDRESS={address} cannot be read",
            where="the environment variable RAY_ADDRESS",
            fix="give HOST:PORT of the head node as `ray start --head` prints it, or auto",
        )
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, why: str) -> StoreError:
    return StoreError(
        f"the Ray cluster cannot be joined: {why}",
        where=f"RAY_ADDRESS={address}",
        fix="start it, or unset RAY_ADDRESS to use the processors of this machine",
    )
