"""Merge registered checkpoints into a better one, and promote it only if it holds out of domain.

import mlflow_soup
outcome = mlflow_soup.run(mlflow_soup.Spec(model="my-llm", pair="v12,v13"))
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_soup.errors import SoupError
    from mlflow_soup.records import Outcome
    from mlflow_soup.request.spec import Spec
    from mlflow_soup.workflows.export import export
    from mlflow_soup.workflows.merge import merge_checkpoints
    from mlflow_soup.workflows.run import run
    from mlflow_soup.workflows.study import run_study
    from mlflow_soup.workflows.verify import verify

__all__ = [
    "Outcome",
    "SoupError",
    "Spec",
    "export",
    "merge_checkpoints",
    "run",
    "run_study",
    "verify",
]
# imported when they are first asked for: mlflow and torch take seconds, and `import mlflow` itself
# imports this package, for its plugins
_HOMES = {
    "Outcome": "records",
    "SoupError": "errors",
    "Spec": "request.spec",
    "export": "workflows.export",
    "merge_checkpoints": "workflows.merge",
    "run": "workflows.run",
    "run_study": "workflows.study",
    "verify": "workflows.verify",
}


def _redact(record: logging.LogRecord) -> bool:
    from mlflow_soup.redaction import redact_record

    return redact_record(record)


logging.getLogger("mlflow_soup").addFilter(_redact)


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mlflow_soup.{_HOMES[name]}"), name)
