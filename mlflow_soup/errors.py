"""Everything that can go wrong, and how a pipeline tells it apart.

    SoupError                        exit 1: anything without a code of its own
    ├── SpecError (also ValueError)  exit 2: the request is wrong, nothing was touched
    ├── GateError                    exit 3: a promotion that no passed gate stands behind
    ├── MismatchError                exit 3: a soup is not what its manifest says
    ├── ParentError                  exit 4: a parent is missing, damaged, or of another shape
    ├── OvertakenError               exit 5: another run moved the target meanwhile
    ├── ObjectiveError               exit 1: an evaluation failed or gave no finite score
    └── RegistryError                exit 1: MLflow refused; its exception is chained
        └── StoreError               exit 6: a store cannot be reached, or has no space
            └── AwayError            exit 6: it did not answer for as long as patience lasts

    `NonFiniteError` is the one ObjectiveError that belongs to a λ rather than to the machine: the
    search keeps it as a failed trial and moves on.

A gate that refuses is a `Verdict`, not an exception; the commands turn it into exit code 3.
"""

from mlflow_soup.redaction import redact


class SoupError(Exception):
    """What went wrong, where, and what to do about it; never with a password."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        what, where, fix = redact(what), redact(where), redact(fix)
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n    fix: {self.fix}"


class SpecError(SoupError, ValueError):
    """The request is wrong; nothing was touched."""

    exit_code = 2


class GateError(SoupError):
    """A promotion was asked for that no passed gate stands behind."""

    exit_code = 3


class MismatchError(SoupError):
    """A soup is not what its manifest says."""

    exit_code = 3


class ParentError(SoupError):
    """A parent is missing, damaged, or of another shape than its sibling."""

    exit_code = 4


class OvertakenError(SoupError):
    """Another run moved the target while this one was about to."""

    exit_code = 5


class ObjectiveError(SoupError):
    """An evaluation failed or gave no finite score."""


class NonFiniteError(ObjectiveError):
    """A λ whose log-likelihoods or scores are not finite."""


class RegistryError(SoupError):
    """MLflow refused; its exception is chained."""


class StoreError(RegistryError):
    """A store cannot be reached, or has no space left."""

    exit_code = 6


class AwayError(StoreError):
    """A store did not answer for as long as patience lasts."""
