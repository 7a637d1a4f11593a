"""Folders in the cache that belong to one tracking store."""

import hashlib
from pathlib import Path

from mlflow_soup.files.cache import cache_folder
from mlflow_soup.registry.outages import where


def lease_folder() -> Path:
    """The folder whose locks show which requests processes on this machine work on."""
    return cache_folder() / "lease" / store_id()


def store_id() -> str:
    """A name for the tracking store's folders: a digest of its URI."""
    return hashlib.sha256(where().encode()).hexdigest()[:16]
