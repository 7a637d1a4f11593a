"""Numbered points of a process at which it can be killed, or told that a disk or the store failed.

They are put around what a test's own child process does; the package knows nothing of them.

    file         before anything that Python does to a file below the watched folders, and after
                 fsync, pwrite and ftruncate
    commit       before and after each commit of a database that changes it
    store        before and after each call of MLflow's store that writes
    evaluation   before and after each

Points between which nothing was changed are the same moment, for who is killed there.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import OperationalError

from mlflow_soup.evaluation.evaluator import Evaluator

_WRITES = ("add_", "copy_", "create_", "delete_", "finalize_", "log_", "record_", "rename_")
_WRITES += ("restore_", "set_", "transition_", "update_")
_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FILES = {  # events of `sys.audit` → where their paths are, and the folder these are relative to
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
}


@dataclass
class Points:
    """All points that are passed, numbered from 0.

    Attributes:
        kinds: those that count; of `moment`, all do.
        at: the number at which `act` is called; none where it is negative.
        act: is told the kind and the name of the point, and need not return.
        names: of the points passed so far.
    """

    kinds: Sequence[str]
    at: int = -1
    act: Callable[[str, str], None] = lambda kind, name: None
    names: list[str] = field(default_factory=list)
    changed: bool = True

    def __call__(self, kind: str, name: str) -> None:
        if "moment" in self.kinds:
            if not self.changed:
                return
            self.changed = False
        elif kind not in self.kinds:
            return
        self.names.append(f"{kind} {name}")
        if len(self.names) - 1 == self.at:
            self.act(kind, name)

    def around(self, kind: str, name: str, call: Callable[[], Any]) -> Any:
        self(kind, f"before {name}")
        result = call()
        # a call of the store changes nothing but by its commits
        self.changed = self.changed or not kind.startswith("store")
        self(f"{kind} answer" if kind == "store" else kind, f"after {name}")
        return result


def kill(kind: str, name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_for_good(kind: str, name: str) -> None:
    """As an operation fails that will fail again."""
    if kind == "file":
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)
    raise MlflowException(f"no permission: {name}", PERMISSION_DENIED)


def fail_once(kind: str, name: str) -> None:
    """As an operation fails that may work the next time, whether or not it was done."""
    if kind == "commit":
        raise OperationalError("COMMIT", None, RuntimeError("database is locked"))
    raise MlflowException(f"lost: {name}", TEMPORARILY_UNAVAILABLE)


def install(points: Points, watched: Sequence[Path]) -> None:
    """Put the points around all that this process does; it stays so until it ends."""
    folders = tuple(f"{folder.resolve()}{os.sep}" for folder in watched)

    def touched(event: str, args: tuple[Any, ...]) -> str | None:
        """The first path that is changed, where one is watched."""
        if event == "open":
            path, mode, flags = args
            writes = flags & _CHANGE if mode is None else set(mode) & set("wxa+")
            places = ((path, None),) if writes else ()
        else:
            places = tuple((args[i], None if d is None else args[d]) for i, d in _FILES[event])
        found = [_absolute(path, folder) for path, folder in places]
        return next((path for path in found if path.startswith(folders)), None)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if (event == "open" or event in _FILES) and (path := touched(event, args)) is not None:
            points("file", f"{event.removeprefix('os.')} {Path(path).name}")
            points.changed = True

    sys.addaudithook(hook)
    for name in ("fsync", "pwrite", "ftruncate"):
        _wrap_file(points, name, folders)
    commit = DefaultDialect.do_commit

    def do_commit(self: Any, connection: Any) -> None:
        def call() -> None:
            commit(self, connection)

        if not connection.in_transaction:
            call()
        else:
            points("commit", "before commit")
            call()
            points.changed = True
            points("commit answer", "after commit")

    DefaultDialect.do_commit = do_commit
    for store in (Tracking, Registry):
        for name in dir(store):
            if name.startswith(_WRITES) and callable(getattr(store, name)):
                _wrap_store(points, store, name)
    evaluate = Evaluator.evaluate
    Evaluator.evaluate = lambda self, *parts: points.around(
        "evaluation", "evaluation", lambda: evaluate(self, *parts)
    )


def _absolute(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path)
    if folder is not None and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)


def _wrap_file(points: Points, name: str, folders: tuple[str, ...]) -> None:
    function = getattr(os, name)

    @wraps(function)
    def call(descriptor: int, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(folders):
            return function(descriptor, *args)
        about = f"{name} {Path(path).name}"
        points("file", about)
        # what came before may have been written past Python
        points.changed = True
        result = function(descriptor, *args)
        points("file answer", about)
        return result

    setattr(os, name, call)


def _wrap_store(points: Points, store: type, name: str) -> None:
    function = getattr(store, name)

    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return points.around("store", name, lambda: function(self, *args, **kwargs))

    setattr(store, name, call)
