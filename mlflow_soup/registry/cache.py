"""Folders on this machine: the cache of pulled versions, and the locks of running requests."""

import hashlib
import os
from pathlib import Path

from platformdirs import user_cache_path

from mlflow_soup.errors import SpecError
from mlflow_soup.registry.outages import where

CACHE_ENV = "MLFLOW_SOUP_CACHE"


def cache_folder() -> Path:
    """The folder for pulled versions and their measurements.

    `MLFLOW_SOUP_CACHE` names it; otherwise it is `mlflow-soup` in the user's cache folder.

    Raises:
        SpecError: the user has no home directory.
    """
    if named := os.environ.get(CACHE_ENV):
        return Path(named)
    try:
        return user_cache_path("mlflow-soup")
    except RuntimeError as error:  # a container's user may have no home
        raise SpecError(
            f"the cache has no folder: {error}",
            where=f"{CACHE_ENV} is not set",
            fix=f"name one: {CACHE_ENV}=/var/cache/mlflow-soup",
        ) from error


def lease_folder() -> Path:
    """The folder whose locks show which requests processes on this machine work on."""
    return cache_folder() / "lease" / store_id()


def store_id() -> str:
    """A name for the tracking store's folders: a digest of its URI."""
    return hashlib.sha256(where().encode()).hexdigest()[:16]
