"""Tell passing errors of stores and disks from lasting ones, and turn both into our errors.

`store.Store.persist` repeats the calls that failed with a passing one.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

import mlflow
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from mlflow.exceptions import MlflowException
from requests import HTTPError, RequestException
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from mlflow_soup.errors import (
    AwayError,
    DeniedError,
    ParentError,
    RegistryError,
    SoupError,
    StoreError,
)
from mlflow_soup.redaction import redact
from mlflow_soup.registry import permissions
from mlflow_soup.registry.permissions import IF_ANY

# private door: sqlite: words of a full disk and of denials
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"  # MLflow's error code
_SLOW = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException")  # S3's error codes
# reasons that do not pass, though MLflow may call the store "temporarily unavailable"
_DENIED = re.compile(
    r"read-?\s?only|no such (table|column)|denied|unable to open|forbidden|\b40[13]\b", re.I
)
# private door: mlflow: words for what is deleted
_DELETED = re.compile(r"deleted (experiment) '|(experiment|run) \w+ must be in the 'active' state")
_VERSION = re.compile(r"Model Version|Registered Model|Logged model|Model '")
_CODES = (401, 403)
_STRANGER = ("UNAUTHENTICATED", "UNAUTHORIZED")
_FORBIDDEN = ("PERMISSION_DENIED", *_STRANGER)
_REFUSED = re.compile(r"failed with error code (40[13])\b")  # a server's answer, in MLflow's words
_PROXY = "/mlflow-artifacts/"  # in the address of an artifact that a server keeps itself
_BUSY = ("TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED")
# messages of SQLite, Python and PostgreSQL, MySQL
_FULL = ("disk is full", "No space left", "could not extend file", "The table is full")
# errors of a disk that fails or must not be written to
_BROKEN = (errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE, errno.ENODEV, errno.EACCES)


def where() -> str:
    """The tracking store's URI without secrets, for errors."""
    return redact(str(mlflow.get_tracking_uri()))


def where_models() -> str:
    """The URI of the store of registered models without secrets: MLFLOW_REGISTRY_URI may differ."""
    return redact(str(mlflow.get_registry_uri()))


def is_server(store: str = "") -> bool:
    """Whether a store is a server, with users and permissions maybe; by default that of runs."""
    return (store or str(mlflow.get_tracking_uri())).startswith(("http://", "https://"))


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, the cause of that, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def is_full(error: BaseException) -> bool:
    """Whether our disk or the database's has no space left."""
    return any(
        (isinstance(e, OSError) and e.errno == errno.ENOSPC)
        or (isinstance(e, MlflowException) and any(word in str(e.message) for word in _FULL))
        for e in chain(error)
    )


def is_denied(error: MlflowException) -> bool:
    """Whether the store denies access, which does not change with time."""
    return _DENIED.search(str(error.message)) is not None


def is_forbidden(error: BaseException) -> bool:
    """Whether MLflow's permissions, and no disk or database, deny access."""
    return _denial(error) != 0


def _denial(error: BaseException) -> int:
    """403 where MLflow's permissions forbid it, 401 where it does not know the user, else 0."""
    if refusal_by_s3(error):
        return 0
    if isinstance(error, HTTPError) and error.response is not None:
        ours = _PROXY in str(error.response.url)
        return error.response.status_code if ours and error.response.status_code in _CODES else 0
    if not isinstance(error, MlflowException):
        return 0
    if said := _REFUSED.search(str(error.message)):
        return int(said[1])
    return 401 if error.error_code in _STRANGER else 403 if error.error_code in _FORBIDDEN else 0


def refusal_by_s3(error: BaseException) -> ClientError | None:
    """What S3 answered, if it refused our keys: MLflow gives that the codes of its own denials."""
    if isinstance(error, MlflowException) and error.error_code in _FORBIDDEN:
        return next((cause for cause in chain(error) if isinstance(cause, ClientError)), None)
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: the store is away, overloaded, or has failed."""
    if is_full(error):
        return False
    for cause in chain(error):
        if isinstance(cause, HTTPError) and cause.response is not None:
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
        if isinstance(cause, InvalidURL | InvalidSchema | MissingSchema):
            return False
        if isinstance(cause, RequestException | ConnectionError | HTTPClientError):
            return True
        if isinstance(cause, ClientError):
            if cause.response.get("Error", {}).get("Code") in _SLOW:
                return True
            status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            return status == 429 or status >= 500
        # a server answers BAD_REQUEST when all its database connections are in use
        if isinstance(cause, MlflowException) and (
            # private door: sqlalchemy: QueuePool limit
            cause.error_code in _BUSY or "QueuePool limit" in str(cause.message)
        ):
            return not is_denied(cause)
    return False


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn errors of MLflow into ours, which say what the program tried; also a decorator.

    Args:
        what: completes "while trying to …".

    Raises:
        StoreError: the store was away too long, or a disk is full or fails.
        DeniedError: MLflow's permissions forbid it.
        ParentError: the store no longer holds a version.
        RegistryError: MLflow refused.
    """
    try:
        yield
    except AwayError as error:  # it names only the one call
        raise away(what, error.__cause__) from error.__cause__
    except (MlflowException, OSError, BotoCoreError, ClientError, Boto3Error) as error:
        place = next(filter(None, (getattr(e, "filename", "") for e in chain(error))), "")
        if is_full(error):
            raise StoreError(
                f"no space left while trying to {what}",
                where=str(place or where()),
                fix="free some space, then run the same command again: it continues",
            ) from error
        if is_transient(error):
            raise away(what, error) from error
        refusal = refusal_by_s3(error)
        if refusal or isinstance(error, BotoCoreError | ClientError | Boto3Error):
            raise StoreError(
                f"the artifact store refused to {what}: {refusal or error}",
                where=where(),
                fix="check the store's credentials, then run the same command again: it continues",
            ) from error
        if isinstance(error, OSError) and error.errno in _BROKEN:
            raise StoreError(
                f"a disk refused to {what}: {error.strerror}",
                where=str(place or where()),
                fix="repair the disk or its permissions, then run the same command again",
            ) from error
        if not isinstance(error, MlflowException | RequestException):
            raise
        if is_forbidden(error):
            raise denied(what, error) from error
        if isinstance(error, MlflowException) and (deleted := _deleted(what, error)):
            raise deleted from error
        raise RegistryError(
            f"MLflow refused to {what}: {error}",
            where=where(),
            fix="check the store and your permissions in it, then run the same command again",
        ) from error


def _deleted(what: str, error: MlflowException) -> SoupError | None:
    """The error for what somebody has deleted; None if MLflow says something else."""
    said = str(error.message)
    if found := _DELETED.search(said):
        kind = found[1] or found[2]
        return RegistryError(
            f"somebody deleted the {kind} that is needed to {what}: {said}",
            where=where(),
            fix=f"restore it (mlflow {kind}s restore --help), or name another experiment "
            "(--experiment NAME); then run the command again",
        )
    if error.error_code == NOT_FOUND and _VERSION.search(said):
        return ParentError(
            f"the store no longer holds what is needed to {what}: {said}",
            where=where(),
            fix="name versions that are registered: MLflow cannot restore a deleted one",
        )
    return None


def denied(what: str, error: BaseException) -> DeniedError:
    """The error for what MLflow's permissions forbid.

    Args:
        what: completes "you may not …".
        error: MLflow's; it has a note of what the call needs, if `store.Store` made the call.
    """
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if _denial(error) == 401:
        return DeniedError(
            f"the server does not know this user and password, so you may not {what}",
            where=f"{where()}, {f'user {user}' if user else 'no user is named'}",
            fix="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    need = permissions.noted(error)
    more = "; if there is none, check the name, or create it" if need.endswith(IF_ANY) else ""
    return DeniedError(
        f"you may not {what}: {f'this needs {need}' if need else error}",
        where=f"{where()}, user {user}" if user else where(),
        fix="ask whoever has MANAGE on it, or an administrator of the server, to grant it" + more
        if need
        else "ask an administrator of the server which permission is missing",
    )


def away(what: str, error: BaseException | None) -> AwayError:
    """The error for a store that did not answer in time."""
    # redacted before it is cut: the filter would not know half a password
    reason = (redact(str(error)).splitlines() or [""])[0][:300]
    return AwayError(
        f"the MLflow store did not answer while trying to {what}: {reason}",
        where=where(),
        fix="wait until the store answers, then run the same command again: it continues",
    )
