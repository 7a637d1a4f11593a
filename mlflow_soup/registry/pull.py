"""Fetch the files of a registered version, and check them before they are used again."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import LoggedModelStatus
from mlflow.utils.file_utils import local_file_uri_to_path  # private door
from mlflow.utils.uri import is_local_uri  # private door

from mlflow_soup.errors import ParentError, SoupError, StoreError
from mlflow_soup.records import Version
from mlflow_soup.registry.cache import cache_folder
from mlflow_soup.registry.outages import where
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import model_id


def _tree_digest(folder: Path) -> str:
    """Digest of every file below a folder with its name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def pull(client: Store, version: Version, *, fresh: bool = False) -> Path:
    """A version's artifact tree on this machine; never to be written into.

    In a local store it is the tree itself, without a copy. From elsewhere it is downloaded once
    into a cache whose entries are named by their content and checked before they are used again.

    Args:
        client: of the store.
        version: what to pull.
        fresh: download it even if it is cached, to see what the store holds now.

    Raises:
        ParentError: its files are not there.
        StoreError: they could not be fetched.
    """
    try:
        if logged_id := model_id(client, version):
            status = client.get_logged_model(logged_id).status
            if status != LoggedModelStatus.READY:  # MLflow serves it all the same
                raise ParentError(
                    f"{version} was never uploaded completely: its logged model is {status}",
                    where=f"{where()}, {logged_id}",
                    fix="register the checkpoint again",
                )
        source = client.get_model_version_download_uri(version.name, str(version.number))
        if is_local_uri(source):
            folder = Path(local_file_uri_to_path(source))
            if not folder.is_dir():
                raise ParentError(
                    f"the files of {version} are gone", where=str(folder), fix="register it again"
                )
            return folder
        return _pull_remote(client, version, source, fresh)
    except SoupError:
        raise
    except Exception as error:  # each artifact store has its own, for sources of any kind
        raise StoreError(
            f"{version} could not be fetched: {error}",
            where=where(),
            fix="check the artifact store and its credentials, then run the same command again",
        ) from error


def download_tree(client: Store, uri: str, folder: Path) -> Path:
    """All artifacts below a `models:/` URI, into an empty folder, which is returned."""

    def download() -> str:
        return str(download_artifacts(uri, dst_path=str(folder)))

    client.download(download, lambda: bool(_listing_of(client, uri)), f"fetch {uri}")
    # private door: mlflow: registered_model_meta
    (folder / "registered_model_meta").unlink(missing_ok=True)  # written by MLflow as it serves
    return folder


def _pull_remote(client: Store, version: Version, source: str, fresh: bool) -> Path:
    cache = cache_folder()
    listing = _listing_of(client, version.uri)
    entry = hashlib.sha256(json.dumps([source, listing]).encode()).hexdigest()
    pointer = cache / "source" / entry
    if pointer.is_file() and not fresh:
        folder = cache / "content" / pointer.read_text()
        if folder.is_dir() and _tree_digest(folder) == folder.name:
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # spoilt
    for below in ("source", "content", "temporary"):
        (cache / below).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache / "temporary") as temporary:
        fetched = Path(temporary) / "tree"
        fetched.mkdir()
        download_tree(client, version.uri, fetched)
        folder = cache / "content" / _tree_digest(fetched)
        with contextlib.suppress(FileExistsError):
            if not folder.exists():
                fetched.rename(folder)
        (Path(temporary) / "pointer").write_text(folder.name)
        (Path(temporary) / "pointer").replace(pointer)
    return folder


def _listing_of(client: Store, uri: str) -> list[tuple[str, int]]:
    """Name and size of every file below a `models:/` URI."""
    files: list[tuple[str, int]] = []
    pending = [uri]
    while pending:
        place = pending.pop()
        what = f"list the files of {uri}"
        for info in client.persist(partial(list_artifacts, artifact_uri=place), what) or []:
            if info.is_dir:
                pending.append(f"{uri}/{info.path}")
            else:
                files.append((info.path, info.file_size or 0))
    return sorted(files)
