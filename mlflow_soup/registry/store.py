"""MLflow's client, for stores that are away, answer with errors or lose their answers.

MLflow repeats a request whose answer was lost, and so makes two runs or versions of one: its own
retries are off here. What may be repeated is repeated, with jitter, as long as patience lasts; what
creates goes through `Store.once`, which looks before every attempt.
"""

import contextlib
import logging
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from requests import ConnectionError as ConnectionFailed
from sqlalchemy.exc import SQLAlchemyError

from mlflow_soup.errors import StoreError
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import away, is_denied, is_transient, where

logger = logging.getLogger("mlflow_soup")
T = TypeVar("T")
# how long is waited at first and at most between two attempts, in seconds, before jitter
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 15.0
_SAID_S = 20.0  # between two words about a store that is away
_HICCUP_S = 3.0  # a store that is away for longer when it is asked first is not there
# private door: mlflow: variables are read at each request
_PROBE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_HASTY = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_BROKEN_S = 300.0  # for a server that answers "internal error"
_OUR_OWN_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


class _Environment:
    """Environment variables that are set while any thread is inside; the user's come back after."""

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
    """MLflow's client; every call but those that create is repeated as long as patience lasts.

    Args:
        patience_s: how long a store may be away, in seconds; 0 for one quick attempt.
        tracking_uri: of the store; MLflow's current one where it is not said.

    All calls raise:
        StoreError: the store was away for longer.
    """

    def __init__(self, patience_s: float = 0.0, tracking_uri: str | None = None) -> None:
        super().__init__(tracking_uri)
        self.patience_s = patience_s

    @cached_property
    def hasty(self) -> "Store":
        """The same store, asked once: for what can be done later."""
        return Store(tracking_uri=self.tracking_uri)

    def persist(self, call: Callable[[], T], what: str) -> T:
        """The result of a call that may be repeated.

        Raises:
            StoreError: the store was away for longer than patience lasts.
        """
        begin = said = time.monotonic()
        wait = _FIRST_WAIT_S
        while True:
            try:
                with _ALONE, contextlib.nullcontext() if self.patience_s else _QUICK:
                    return call()
            except Exception as error:
                if not is_transient(error):
                    raise
                patience = self.patience_s
                # private door: urllib3: too many 500 error responses
                if "too many 500 error" in str(error):  # a hiccup, or the same again and again
                    patience = min(patience, _BROKEN_S)
                left = begin + patience - time.monotonic()
                if left <= 0:
                    raise away(what, error) from error
                if time.monotonic() - said > _SAID_S:  # a hiccup is nobody's concern
                    logger.warning(
                        "%s does not answer while trying to %s; trying on for %.1f min",
                        *(where(), what, left / 60.0),
                    )
                    said = time.monotonic()
            time.sleep(min(left, wait * random.uniform(0.5, 1.5)))
            wait = min(2.0 * wait, _LONGEST_WAIT_S)

    def once(self, look: Callable[[], T | None], create: Callable[[], T], what: str) -> T:
        """What `look` finds, or else what `create` makes; `create` is never repeated blindly.

        Args:
            look: finds what an attempt has made, by what it was created with.
            create: one attempt; it carries what `look` looks for, in the same transaction.
            what: is done, for errors.

        Raises:
            StoreError: the store was away for longer than patience lasts.
        """

        def attempt() -> T:
            found = look()
            return create() if found is None else found

        return self.persist(attempt, what)

    def discard(self, call: Callable[[], object], what: str) -> None:
        """Delete something; gone is gone, where the answer was lost."""
        try:
            self.persist(call, what)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def download(self, call: Callable[[], T], there: Callable[[], bool], what: str) -> T:
        """What a download gives; MLflow tells in words only why one failed.

        Args:
            call: downloads.
            there: whether the store lists what was asked for.
            what: is done, for errors.

        Raises:
            MlflowException, OSError: it is not there.
            StoreError: it is there, and the store was away for longer than patience lasts.
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
        self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: int | None = None
    ) -> str:
        """A new run, exactly one even where the answer was lost; its id.

        Who may have to begin it again later names the attempt in its tags.
        """
        all_tags = {naming.ATTEMPT: uuid.uuid4().hex, **tags}
        query = f"tags.`{naming.ATTEMPT}` = '{all_tags[naming.ATTEMPT]}'"

        def look() -> Run | None:
            return next(iter(self.search_runs([experiment_id], query)), None)

        def create() -> Run:
            return self.create_run(experiment_id, start_time, all_tags, name)

        return str(self.once(look, create, "create a run").info.run_id)


def _patient(name: str) -> Any:
    method = getattr(MlflowClient, name)

    @wraps(method)
    def call(self: Store, *args: Any, **kwargs: Any) -> Any:
        return self.persist(lambda: method(self, *args, **kwargs), f"call {name}")

    return call


# they are not to be repeated, but called through `once`
_CREATE = ("create_", "copy_", "log_outputs")


for _name in dir(MlflowClient):
    if not _name.startswith(("_", *_CREATE)) and callable(getattr(MlflowClient, _name)):
        setattr(Store, _name, _patient(_name))


def connect(patience_s: float = 0.0) -> Store:
    """A client of the tracking store, which is asked whether it is there; for a moment only.

    Args:
        patience_s: how long it may be away later on, in seconds.

    Raises:
        StoreError: it is not. (MLflow's own retries would take four minutes to say so.)
    """
    # no link to the run in MLflow's own words: they print a password the URI may hold
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    bars = "true" if sys.stderr.isatty() else "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", bars)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # it prints a traceback of what we handle
    # private door: mlflow.store.db.utils logs the errors that it raises
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    try:
        client = Store(patience_s)
        with _Environment({k: v for k, v in _PROBE.items() if k not in os.environ}):
            Store(min(patience_s, _HICCUP_S)).search_experiments(max_results=1)
    # SQLAlchemy's own, or no module: a database that it or this machine does not know
    except (MlflowException, ImportError, StoreError, SQLAlchemyError, OSError) as error:
        # before it is cut: half a password would pass
        reason = redact(str(error.__cause__ if isinstance(error, StoreError) else error))
        raise StoreError(
            f"the MLflow tracking store does not answer: {reason.splitlines()[0][:300]}",
            where=where(),
            fix="start it, or point MLFLOW_TRACKING_URI to the one you mean",
        ) from error
    return client


def pages(search: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Everything that one of MLflow's paged searches finds."""
    page = search(*args, **kwargs)
    found = list(page)
    while page.token:
        page = search(*args, page_token=page.token, **kwargs)
        found += page
    return found
