"""Every error that the package raises, with the exit code of the command.

    SoupError                        exit 1: any error without an exit code of its own
    ├── SpecError (also ValueError)  exit 2: the request is wrong; nothing was changed
    ├── GateError                    exit 3: no passed gate supports the promotion
    ├── MismatchError                exit 3: a soup does not match its manifest
    ├── ParentError                  exit 4: a parent is missing, damaged or unlike the others
    ├── OvertakenError               exit 5: another run moved the target in the meantime
    ├── ObjectiveError               exit 1: an evaluation failed or gave no finite score
    ├── WorkerError                  exit 1: workers ended, or none can take part
    └── RegistryError                exit 1: MLflow refused a request; its exception is chained
        ├── DeniedError              exit 7: MLflow's permissions forbid it, or the user is unknown
        └── StoreError               exit 6: a store or disk cannot be reached, fails, or is full
            └── AwayError            exit 6: a store did not answer before the time limit

    `NonFiniteError` is an ObjectiveError that is caused by a λ and not by the machine. The search
    records it as a failed trial and continues.

A gate that refuses returns a `Verdict` and raises nothing; the commands then exit with code 3.
"""

import re
from typing import Any

from mlflow_soup.redaction import redact, redact_line

_MOST_QUOTED = 300  # characters of another library's text


class SoupError(Exception):
    """What went wrong, where, and how to fix it; without secrets and control characters."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        what, where, fix = redact(what), redact_line(where), redact_line(fix)
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[Any, ...]:  # a fork hands its errors over
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        what = self.what.replace("\n", "\n  | ")  # a name in it cannot pass for the lines below
        return f"{what}\n  where: {self.where}\n    fix: {self.fix}"


def _rebuild(kind: type[SoupError], what: str, where: str, fix: str) -> SoupError:
    return kind(what, where=where, fix=fix)


def brief(error: BaseException) -> str:
    """Another library's error in one line: its kind and the beginning of its text."""
    text = re.sub(r"[ \t\n]+", " ", str(error)).strip()  # other separators are shown as such
    if len(text) > _MOST_QUOTED:
        text = f"{text[:_MOST_QUOTED].rsplit(' ', 1)[0]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class SpecError(SoupError, ValueError):
    """The request is wrong; nothing was changed."""

    exit_code = 2


class GateError(SoupError):
    """The user asked for a promotion that no passed gate supports.

    Attributes:
        verdict: the `records.Verdict` that refuses it; None if there is no verdict that counts.
    """

    exit_code = 3
    verdict: Any = None


class MismatchError(SoupError):
    """A soup does not match its manifest."""

    exit_code = 3


class ParentError(SoupError):
    """A parent is missing, damaged, or does not fit the other parents."""

    exit_code = 4


class OvertakenError(SoupError):
    """Another run moved the target before this run could."""

    exit_code = 5


class ObjectiveError(SoupError):
    """An evaluation failed or gave no finite score."""


class NonFiniteError(ObjectiveError):
    """The log-likelihoods or scores of one λ are not finite."""


class WorkerError(SoupError):
    """Workers ended while they scored, or none can take part (`--workers`)."""


class RegistryError(SoupError):
    """MLflow refused a request; its exception is chained."""


class DeniedError(RegistryError):
    """MLflow's permissions forbid a request, or the server does not know the user."""

    exit_code = 7


class StoreError(RegistryError):
    """A store or disk cannot be reached, fails, or is full."""

    exit_code = 6


class AwayError(StoreError):
    """A store did not answer before the time limit (`--store-patience`)."""
