"""Add a file to the artifact tree of a registered version, and read it back."""

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from mlflow_soup.errors import SpecError
from mlflow_soup.records import Version
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import model_id

_COPY = re.compile(r"models:/(.+)/([0-9]+)")
_OF_RUN = re.compile(r"runs:/([0-9a-f]+)/(.+)")


@dataclass(frozen=True)
class Tree:
    """The artifact tree of a version: that of a logged model, or a folder of a run.

    Attributes:
        model_id: the logged model; empty for a run.
        run_id: the run; empty for a logged model.
        folder: the folder among the run's artifacts.
    """

    model_id: str = ""
    run_id: str = ""
    folder: str = ""


def tree_of(client: Store, version: Version) -> Tree:
    """The artifact tree of a version, or of the one that it is a copy of.

    Raises:
        SpecError: the files lie where MLflow adds none.
    """
    with asking(f"look up {version}"):
        found = client.get_model_version(version.name, str(version.number))
        source = str(found.source or "")
        if logged_id := model_id(client, version):
            return Tree(logged_id)
        if copy := _COPY.fullmatch(source):
            return tree_of(client, Version(copy[1], int(copy[2])))
        if of_run := _OF_RUN.fullmatch(source):
            return Tree(run_id=of_run[1], folder=of_run[2].strip("/"))
        run_id = str(found.run_id or "")
        root = _artifacts_of(client, run_id)
    if root and source.startswith(root):
        return Tree(run_id=run_id, folder=source.removeprefix(root).strip("/"))
    raise SpecError(
        f"MLflow cannot add a file to {version}: it is neither a logged model nor a folder of a "
        "run's artifacts",
        where=source,
        fix="name a version that mlflow-soup run registered",
    )


def _artifacts_of(client: Store, run_id: str) -> str:
    """Where a run's artifacts are, with a slash at the end; empty if there is no such run."""
    try:
        return client.get_run(run_id).info.artifact_uri.rstrip("/") + "/" if run_id else ""
    except MlflowException:
        return ""


def add_file(client: Store, tree: Tree, file: Path) -> None:
    """Add a local file to the top of a tree; a file of this name is replaced."""
    if tree.model_id:
        client.log_model_artifact(tree.model_id, str(file))
    else:
        client.log_artifact(tree.run_id, str(file), tree.folder or None)


def read_file(client: Store, version: Version, name: str) -> bytes:
    """The bytes of a file at the top of a version's tree, as the store returns them."""
    with tempfile.TemporaryDirectory() as folder:
        fetch = partial(download_artifacts, f"{version.uri}/{name}", dst_path=folder)
        return Path(client.persist(fetch, f"fetch {name} of {version}")).read_bytes()
