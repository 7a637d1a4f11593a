"""An MLflow client for stores that may be away, answer with errors, or lose their answers.

MLflow repeats a request whose answer was lost, and so makes two runs or versions instead of one.
So MLflow's own retries are off here. The client repeats harmless calls, with jitter, as long as its
patience lasts. Calls that create something go through `Store.once`, which looks for the result of
earlier attempts before each new one.
"""

import contextlib
import logging
import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property, wraps
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import artifact_repository_registry  # private door
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from requests import ConnectionError as ConnectionFailed
from sqlalchemy.exc import SQLAlchemyError

from mlflow_soup.errors import StoreError
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming, permissions
from mlflow_soup.registry.outages import (
    NOT_FOUND,
    away,
    denied,
    is_denied,
    is_forbidden,
    is_transient,
    where,
)

logger = logging.getLogger("mlflow_soup")
T = TypeVar("T")
# the first and the longest wait between two attempts, in seconds, before jitter
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
_SAID_S = 20.0  # between two warnings about a store that is away
_HICCUP_S = 3.0  # if the first call fails for longer, there is no store
# private door: mlflow: variables are read at each request
_PROBE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_HASTY = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_BROKEN_S = 300.0  # patience with a server that answers "internal error"
_OUR_OWN_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


class _Environment:
    """Sets environment variables while any thread is inside; the last one restores the user's."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables, self._before = variables, dict[str, str | None]()
        self._inside, self._lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = {name: os.environ.get(name) for name in self._variables}
                os.environ.update(self._variables)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for name, value in self._before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


_ALONE, _QUICK = _Environment(_OUR_OWN_RETRIES), _Environment(_HASTY)


class Store(MlflowClient):
    """MLflow's client; it repeats all calls except those that create something.

    Args:
        patience_s: how long the store may be away, in seconds; 0 allows one quick attempt.
        tracking_uri: the store's URI; MLflow's current one by default.
        known: what another client remembers of this store, see `remember`; the two share it.

    All calls raise:
        StoreError: the store was away for longer.
    """

    def __init__(
        self,
        patience_s: float = 0.0,
        tracking_uri: str | None = None,
        known: dict[Hashable, Any] | None = None,
    ) -> None:
        super().__init__(tracking_uri)
        self.patience_s = patience_s
        self._known = {} if known is None else known

    @cached_property
    def hasty(self) -> "Store":
        """The same store without patience, for calls that may fail."""
        return Store(tracking_uri=self.tracking_uri, known=self._known)

    def remember(self, what: Hashable, ask: Callable[[], T]) -> T:
        """What `ask` returns; it is asked once. Only for what nobody can change in the store."""
        if what not in self._known:
            self._known[what] = ask()
        known: T = self._known[what]
        return known

    def experiment_of(self, run_id: str) -> str:
        """The id of the experiment of a run."""
        return self._where(run_id)[0]

    def _where(self, run_id: str) -> tuple[str, str]:
        """The experiment of a run, and the URI of its artifacts."""

        def ask() -> tuple[str, str]:
            info = self.get_run(run_id).info
            return str(info.experiment_id), str(info.artifact_uri)

        return self.remember(("run", run_id), ask)

    def put(self, run_id: str, file: str, folder: str) -> None:
        """Log a file as an artifact of a run, as `log_artifact` does with one more request.

        Args:
            run_id: the run.
            file: the file on this machine.
            folder: the folder among the run's artifacts; empty for none.
        """
        with _noting(MlflowClient.log_artifact, run_id, file, folder):

            def put() -> None:
                self.artifacts_of(run_id).log_artifact(file, folder or None)

            self.persist(put, "call log_artifact")

    def artifacts(self, uri: str) -> ArtifactRepository:
        """MLflow's access to the files below a URI. Neither this nor its calls are repeated."""
        return artifact_repository_registry.get_artifact_repository(
            uri, tracking_uri=self.tracking_uri
        )

    def artifacts_of(self, run_id: str) -> ArtifactRepository:
        """As `artifacts`, for those of a run."""
        return self.artifacts(self._where(run_id)[1])

    def persist(self, call: Callable[[], T], what: str) -> T:
        """Repeat a call while the store is away, and return its result.

        Args:
            call: has the same effect when it is repeated.
            what: completes "while trying to …" in errors.

        Raises:
            StoreError: the store was away for longer than patience lasts.
        """
        # not tenacity: its stop rules end patience too early or too late, and it repeats a Ctrl-C
        begin = said = time.monotonic()
        wait = _FIRST_WAIT_S
        while True:
            try:
                with _ALONE, contextlib.nullcontext() if self.patience_s else _QUICK:
                    return call()
            except Exception as error:
                if not is_transient(error):
                    raise
                left = begin + self._patience_after(error) - time.monotonic()
                if left <= 0:
                    raise away(what, error) from error
                if time.monotonic() - said > _SAID_S:  # a hiccup passes in silence
                    logger.warning(
                        "%s does not answer while we try to %s; retrying for %.1f more minutes",
                        *(where(), what, left / 60.0),
                    )
                    said = time.monotonic()
            time.sleep(min(left, wait * random.uniform(0.5, 1.5)))
            wait = min(2.0 * wait, _LONGEST_WAIT_S)

    def _patience_after(self, error: Exception) -> float:
        """Seconds of patience; fewer for a server that answers "internal error", maybe for good."""
        # private door: urllib3: too many 500 error responses
        broken = "too many 500 error" in str(error)
        return min(self.patience_s, _BROKEN_S) if broken else self.patience_s

    def once(
        self,
        look: Callable[[], T | None],
        create: Callable[[], T],
        what: str,
        *,
        tried: bool = True,
    ) -> T:
        """What `look` finds, or else what `create` makes; each attempt looks before it creates.

        Args:
            look: finds the result of an earlier attempt, by a tag that it was created with.
            create: one attempt; it writes that tag in the same transaction.
            what: completes "while trying to …" in errors.
            tried: whether there may be an earlier attempt; if not, the first one does not look.

        Raises:
            StoreError: the store was away for longer than patience lasts.
        """

        def attempt() -> T:
            nonlocal tried
            found = look() if tried else None
            tried = True
            return create() if found is None else found

        return self.persist(attempt, what)

    def discard(self, call: Callable[[], object], what: str) -> None:
        """Delete something; it may be gone already, if the answer of an attempt was lost."""
        try:
            self.persist(call, what)
        except MlflowException as error:
            if error.error_code != NOT_FOUND:
                raise

    def download(self, call: Callable[[], T], there: Callable[[], bool], what: str) -> T:
        """Repeat a download while the store is away, and return its result.

        MLflow's error does not say whether a file is missing or the store is away, so this lists
        the store.

        Args:
            call: downloads.
            there: whether the store lists the files.
            what: completes "while trying to …" in errors.

        Raises:
            MlflowException, OSError: the files are not in the store.
            StoreError: they are, but the store was away for longer than patience lasts.
        """

        def attempt() -> T:
            try:
                return call()
            except MlflowException as error:
                if is_transient(error) or is_denied(error) or not there():
                    raise
                raise ConnectionFailed(str(error.message)) from error

        return self.persist(attempt, what)

    def begin_run(
        self,
        experiment_id: str,
        name: str,
        tags: Mapping[str, str],
        start_time: int | None = None,
        *,
        tried: bool = False,
    ) -> str:
        """Create exactly one run, even if an answer is lost, and return its id.

        A caller that may repeat this call names the attempt in the tags, and says in `tried`
        whether it has called before.
        """
        all_tags = {naming.ATTEMPT: uuid.uuid4().hex, **tags}
        query = f"tags.`{naming.ATTEMPT}` = '{all_tags[naming.ATTEMPT]}'"

        def look() -> Run | None:
            return next(iter(self.search_runs([experiment_id], query)), None)

        def create() -> Run:
            return self.create_run(experiment_id, start_time, all_tags, naming.run_name(name))

        info = self.once(look, create, "create a run", tried=tried).info
        where = str(info.experiment_id), str(info.artifact_uri)
        self.remember(("run", str(info.run_id)), lambda: where)
        return str(info.run_id)


def _patient(name: str) -> Any:
    method = getattr(MlflowClient, name)

    @wraps(method)
    def call(self: Store, *args: Any, **kwargs: Any) -> Any:
        with _noting(method, *args):
            if name.startswith(_CREATE):
                return method(self, *args, **kwargs)
            return self.persist(lambda: method(self, *args, **kwargs), f"call {name}")

    return call


@contextlib.contextmanager
def _noting(method: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Note on the error of a forbidden call which permission the call needs."""
    try:
        yield
    except Exception as error:  # artifact stores raise errors of their own
        if is_forbidden(error):
            permissions.note(error, permissions.needed(method, *args))
        raise


# these must not be repeated; call them through `once`
_CREATE = ("create_", "copy_", "log_outputs")


for _name in dir(MlflowClient):
    if not _name.startswith("_") and callable(getattr(MlflowClient, _name)):
        setattr(Store, _name, _patient(_name))


def connect(patience_s: float = 0.0) -> Store:
    """A client of the tracking store, after a short check that the store answers.

    Args:
        patience_s: how long the store may be away in later calls, in seconds.

    Raises:
        DeniedError: the store is a server that does not know the user.
        StoreError: the store does not answer. (MLflow's own retries would take four minutes.)
    """
    # private door: mlflow.store.db.utils logs the errors that it raises
    _quieten_mlflow()
    try:
        client = Store(patience_s)
        with _Environment({k: v for k, v in _PROBE.items() if k not in os.environ}):
            Store(min(patience_s, _HICCUP_S)).search_experiments(max_results=1)
    # ImportError, SQLAlchemyError: an unknown kind of database, or one without a driver here
    except (MlflowException, ImportError, StoreError, SQLAlchemyError, OSError) as error:
        # redacted before it is cut: the filter would not know half a password
        if is_forbidden(error):
            raise denied("use the store", error) from error
        reason = redact(str(error.__cause__ if isinstance(error, StoreError) else error))
        raise StoreError(
            f"the MLflow tracking store does not answer: {reason.splitlines()[0][:300]}",
            where=where(),
            fix="start the store, or set MLFLOW_TRACKING_URI to the one that you mean",
        ) from error
    return client


def _quieten_mlflow() -> None:
    """Keep MLflow from printing passwords, and what we report ourselves."""
    # its link to a run shows the password of the tracking URI
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    bars = "true" if sys.stderr.isatty() else "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", bars)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # it prints the tracebacks of errors that we handle
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def equals(what: str, value: str) -> str:
    """The clause of a search that finds a value; it may find others, so compare again.

    MLflow's filters have no escapes, but a _ after LIKE stands for any character.
    """
    plain = re.sub(r"[^\w ./:,+-]", "_", value)
    return f"{what} {'=' if plain == value else 'LIKE'} '{plain}'"


def pages(search: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """All results of one of MLflow's paged searches."""
    page = search(*args, **kwargs)
    found = list(page)
    while page.token:
        page = search(*args, page_token=page.token, **kwargs)
        found += page
    return found
