"""Folders on this machine: the cache of pulled versions, and the leases of running requests."""

import hashlib
import os
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.registry.outages import where

CACHE_ENV = "MLFLOW_SOUP_CACHE"


def cache_folder() -> Path:
    """Where pulled versions and what was measured of them are kept on this machine."""
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlflow-soup")
    except RuntimeError as error:  # a container's user without a home
        raise SpecError(
            f"there is no folder for what is kept on this machine: {error}",
            where=f"{CACHE_ENV} is not set",
            fix=f"name one: {CACHE_ENV}=/var/cache/mlflow-soup",
        ) from error


def lease_folder() -> Path:
    """Where processes on this machine see which requests are worked on."""
    return cache_folder() / "lease" / store_id()


def store_id() -> str:
    """A name for the tracking store, for folders that belong to it."""
    return hashlib.sha256(where().encode()).hexdigest()[:16]
