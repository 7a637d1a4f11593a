"""The folder on this machine for what takes long to fetch, to measure or to find."""

import os
from pathlib import Path

from platformdirs import user_cache_path

from mlflow_soup.errors import SpecError

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
