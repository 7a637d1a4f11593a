"""Merge registered checkpoints into a better one, and promote it only if it holds out of domain.

import mlflow_soup
outcome = mlflow_soup.run(mlflow_soup.Spec(model="my-llm", pair="v12,v13"))
"""

import logging
from typing import TYPE_CHECKING, Any

from mlflow_soup.errors import SoupError
from mlflow_soup.records import Outcome
from mlflow_soup.redaction import redact_record
from mlflow_soup.request.spec import Spec

if TYPE_CHECKING:
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

logging.getLogger("mlflow_soup").addFilter(redact_record)


def __getattr__(name: str) -> Any:
    """Import what works when it is first asked for: mlflow and torch take seconds."""
    if name == "run":
        from mlflow_soup.workflows import run

        return run.run
    if name == "run_study":
        from mlflow_soup.workflows import study

        return study.run_study
    if name == "merge_checkpoints":
        from mlflow_soup.workflows.merge import merge_checkpoints

        return merge_checkpoints
    if name == "export":
        from mlflow_soup.workflows import export

        return export.export
    if name == "verify":
        from mlflow_soup.workflows import verify

        return verify.verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
