"""Merge registered checkpoints into a better one, and promote it only if it holds out of domain.

import mlflow_soup
outcome = mlflow_soup.run(mlflow_soup.Spec(model="my-llm", pair="v12,v13"))
"""

import logging
from typing import TYPE_CHECKING, Any

from mlflow_soup.errors import SoupError
from mlflow_soup.records import Outcome
from mlflow_soup.redaction import redact_record
from mlflow_soup.spec import Spec

if TYPE_CHECKING:
    from mlflow_soup.pipeline import run
    from mlflow_soup.provenance import merge_checkpoints
    from mlflow_soup.study import run_study
    from mlflow_soup.verification import verify

__all__ = ["Outcome", "SoupError", "Spec", "merge_checkpoints", "run", "run_study", "verify"]

logging.getLogger("mlflow_soup").addFilter(redact_record)


def __getattr__(name: str) -> Any:
    """Import what works when it is first asked for: mlflow and torch take seconds."""
    if name == "run":
        from mlflow_soup import pipeline

        return pipeline.run
    if name == "run_study":
        from mlflow_soup import study

        return study.run_study
    if name == "merge_checkpoints":
        from mlflow_soup import provenance

        return provenance.merge_checkpoints
    if name == "verify":
        from mlflow_soup import verification

        return verification.verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
