"""Fetch the files of a registered version; check cached files before they are used again."""

import contextlib
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

from mlflow.entities import FileInfo, LoggedModelStatus
from mlflow.utils.file_utils import local_file_uri_to_path  # private door
from mlflow.utils.uri import is_local_uri  # private door

from mlflow_soup.errors import ParentError, SoupError, StoreError, brief
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.files.durable import temporary
from mlflow_soup.files.untrusted import read_hex
from mlflow_soup.records import Version
from mlflow_soup.registry.outages import denied, is_forbidden, refusal_by_s3, where
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import logged_model, place_of


def _tree_digest(folder: Path) -> str:
    """One digest of all files below a folder, names included."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def pull(client: Store, version: Version, *, fresh: bool = False) -> Path:
    """The folder of a version's files on this machine; callers must not write into it.

    For a local store it is the store's own folder. From a remote store the files are downloaded
    once into the cache, where each folder is named by the digest of its content, which is checked
    before each use.

    Args:
        client: the store's client.
        version: the version to pull.
        fresh: download the files even if they are cached, to see what the store holds now.

    Raises:
        ParentError: the version's files are gone or incomplete.
        DeniedError: the user may not read them.
        StoreError: the files could not be fetched.
    """
    try:
        logged = logged_model(client, version)
        # MLflow serves its files whatever its status is
        if logged is not None and logged.status != LoggedModelStatus.READY:
            what = f"the upload of {version} was never completed: its logged model is"
            raise ParentError(
                f"{what} {logged.status}",
                where=f"{where()}, {logged.model_id}",
                fix="register the checkpoint again",
            )
        folder = fetch_tree(client, place_of(client, version), fresh=fresh)
        if not folder.is_dir():
            raise ParentError(
                f"the files of {version} are gone",
                where=str(folder),
                fix="register the checkpoint again",
            )
        return folder
    except SoupError:
        raise
    except Exception as error:  # each artifact store raises errors of its own
        if is_forbidden(error):
            raise denied(f"fetch {version}", error) from error
        raise StoreError(
            f"the files of {version} could not be fetched: {brief(refusal_by_s3(error) or error)}",
            where=where(),
            fix="check the artifact store and its credentials, then run the same command again",
        ) from error


def fetch_tree(client: Store, place: str, *, fresh: bool) -> Path:
    """The folder of the files below a URI, as `pull` describes it; a local one may be gone.

    Args:
        client: the store's client.
        place: the URI, as `place_of` gives it.
        fresh: as for `pull`.
    """
    if is_local_uri(place):
        return Path(local_file_uri_to_path(place))
    cache = cache_folder()
    listing = _listing_of(client, place)
    entry = hashlib.sha256(json.dumps([place, listing]).encode()).hexdigest()
    pointer = cache / "source" / entry
    with contextlib.suppress(OSError, ValueError):
        folder = cache / "content" / read_hex(pointer)
        if not fresh and folder.is_dir() and _tree_digest(folder) == folder.name:
            return folder
        if not fresh:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
    for below in ("source", "content", "temporary"):
        (cache / below).mkdir(parents=True, exist_ok=True)
    with temporary(cache / "temporary" / "pull") as ours:
        fetched = ours / "tree"
        fetched.mkdir()
        _download(client, place, fetched)
        folder = cache / "content" / _tree_digest(fetched)
        if folder.is_dir() and _tree_digest(folder) != folder.name:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
        try:
            fetched.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        (ours / "pointer").write_text(folder.name)
        (ours / "pointer").replace(pointer)
    return folder


def _download(client: Store, place: str, folder: Path) -> None:
    """Download all files below a URI into an empty folder."""

    def download() -> None:
        client.artifacts(place).download_artifacts("", str(folder))

    client.download(download, lambda: bool(_listing_of(client, place)), f"fetch {place}")


def _listing_of(client: Store, place: str) -> list[tuple[str, int]]:
    """Name and size of every file below a URI."""

    def listed(below: str | None) -> list[FileInfo] | None:
        return client.artifacts(place).list_artifacts(below)

    files: list[tuple[str, int]] = []
    pending: list[str | None] = [None]
    while pending:
        ask = partial(listed, pending.pop())
        for info in client.persist(ask, f"list the files of {place}") or []:
            if info.is_dir:
                pending.append(info.path)
            else:
                files.append((info.path, info.file_size or 0))
    return sorted(files)
