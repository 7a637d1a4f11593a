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
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
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
_joined = threading.Event()  # set while this process is in a cluster that this module joined


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
        self.waits = "look whether the cluster has room, and whether its nodes reach MLflow"

    def admit(self) -> Future[Admission]:
        """As `Handle.admit`."""
        return _plain(self._actor.admit.remote(self._start))

    def answer(self, request: Request) -> Future[Reply]:
        """As `Handle.answer`."""
        return _plain(self._actor.answer.remote(request))

    def loss(self, error: BaseException) -> str:
        """As `Handle.loss`."""
        return "ended" if isinstance(error, self._ray.exceptions.RayError) else ""

    def kill(self) -> None:
        """As `Handle.kill`."""
        with contextlib.suppress(self._ray.exceptions.RayError):  # the cluster is gone
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


@dataclass(frozen=True)
class Room:
    """What one worker takes of a node: options of an actor, and threads on the CPU."""

    options: dict[str, float]
    threads: int


def join(count: int, *, on_gpus: bool) -> tuple[list[Room], Callable[[], None]]:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine.

    Args:
        count: the number of workers; 0 for as many as there is room for.
        on_gpus: whether each takes a GPU; else each takes its share of the processors.

    Returns:
        What each worker takes, the same for all; and what leaves the cluster again.

    Raises:
        SpecError: Ray is not installed, or too old; or there is less room than asked for.
        StoreError: the cluster cannot be reached.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs longer
    ray = import_module("ray")
    if not ray.is_initialized():
        _connect(ray)
        _joined.set()
    leave = partial(_leave, ray)
    kind, what = ("GPU", "GPUs") if on_gpus else ("CPU", "processors")
    free = int(ray.available_resources().get(kind, 0))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [int(node.get(kind, 0)) for node in nodes]
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
    if on_gpus:
        threads = min(int(n.get("CPU", 1)) // int(n["GPU"]) for n in nodes if n.get("GPU"))
        return [Room({"num_gpus": 1.0}, max(1, threads))] * count, leave
    share = largest_share(have, count, most=free // count)
    return [Room({"num_cpus": float(share)}, share)] * count, leave


def largest_share(processors: Sequence[int], count: int, most: int) -> int:
    """The processors for each of `count` workers, none of which is spread over two nodes.

    Args:
        processors: of each node; together at least `count`.
        count: the number of workers.
        most: the largest share.
    """
    fits = (s for s in range(most, 1, -1) if sum(each // s for each in processors) >= count)
    return next(fits, 1)


def _leave(ray: Any) -> None:
    """Leave the cluster, unless the caller of this package joined it."""
    if _joined.is_set():
        _joined.clear()
        ray.shutdown()


def check_installed() -> None:
    """Refuse to go on without a Ray that is safe to use.

    Raises:
        SpecError: Ray is not installed, or too old.
    """
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
    with _handlers_kept(), _unheard():
        try:
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                configure_logging=False,
                log_to_driver=False,
            )
        except Exception as error:  # Ray raises plain exceptions, too
            raise _unreachable(address, str(error).partition("\n")[0]) from error


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put the signal handlers back that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray replaces none there
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: one of another language, which Python cannot set
                signal.signal(number, handler)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep Ray from printing errors of the cluster to stdout while it is joined."""
    # private door: ray._private.worker.listen_error_messages
    inside: Any = import_module("ray._private.worker")
    listen = inside.listen_error_messages
    inside.listen_error_messages = lambda worker, stopped: None
    try:
        yield
    finally:
        inside.listen_error_messages = listen


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
    if address == "local":
        return StoreError(
            f"Ray does not start on this machine: {why}",
            where="--workers ray, without RAY_ADDRESS",
            fix="free memory and space in /dev/shm and /tmp/ray; or use --workers 4, which needs "
            "no Ray",
        )
    return StoreError(
        f"the Ray cluster cannot be joined: {why}",
        where=f"RAY_ADDRESS={address}",
        fix="start it, or unset RAY_ADDRESS to use the processors of this machine",
    )
