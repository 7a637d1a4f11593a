"""Which versions of a registered model have arrived, and which of them this machine has handled.

What is handled is a file in the cache of this machine, and not a tag, a run or an entry of the
ledger: others write those, and one forged mark could suppress all that follows. MLflow counts
versions upwards and gives no number twice, so the file holds one number: all versions up to it are
handled. Its name is the digest of the store, the model, and the time at which the model was made:
a model that is deleted and made again counts from 1, and has a file of its own.

The file saves work, and the results do not depend on it. It is written after a version's work is
done. A process that dies in between does that work again, and so does a machine without the file:
`run` then finds its own trials and its own soup in the store, and proves them again.

A version is a soup if it has tag `soup.digest`. `run` writes that tag in the transaction that makes
the version, so no soup is ever seen without it. Whoever forges it suppresses that one version.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow.entities.model_registry import RegisteredModel

from mlflow_soup.errors import ParentError
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.files.durable import on_disk, replace
from mlflow_soup.files.untrusted import UNREADABLE, parse_json, read_regular
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import asking, where_models
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_registered, versions_of

logger = logging.getLogger("mlflow_soup")


@dataclass(frozen=True)
class Progress:
    """How far a watch has come.

    Attributes:
        handled: all versions up to this number are handled.
        version: the version that is being handled; 0 for none.
        done: the lines of the policy that are done for that version.
        tries: how often the next line was begun for it, and not ended.
    """

    handled: int
    version: int = 0
    done: tuple[str, ...] = ()
    tries: int = 0


def watched(client: Store, name: str) -> RegisteredModel:
    """MLflow's record of a model that is watched.

    Raises:
        ParentError: it is gone.
    """
    found = find_registered(client, name)
    if found is None:
        raise ParentError(
            f"there is no registered model {name!r} any more",
            where=where_models(),
            fix="watch another model, or make it again",
        )
    return found


def checkpoints(client: Store, name: str, *, above: int = 0, until: int | None = None) -> list[int]:
    """The numbers of the versions that are not soups, ascending.

    Args:
        client: the store's client.
        name: the registered model.
        above: only larger numbers.
        until: only numbers up to this one; None for all.
    """
    more = f" and version_number > {above}" if above else ""
    more += f" and version_number <= {until}" if until is not None else ""
    with asking(f"list the versions of {name}"):
        found = versions_of(client, name, more)
    return sorted(int(v.version) for v in found if naming.DIGEST not in v.tags)


def progress_file(model: RegisteredModel) -> Path:
    """The file in which this machine keeps its progress on a model."""
    known = {"store": where_models(), "model": model.name, "created": model.creation_timestamp}
    return cache_folder() / "watch" / f"{naming.key_of(known)[:32]}.json"


def read(path: Path) -> Progress | None:
    """The progress in a file; None if there is no file, or it is damaged."""
    try:
        said = parse_json(read_regular(path, 1 << 16))
        found = Progress(**{**said, "done": tuple(said["done"])})
        if not all(type(n) is int for n in (found.handled, found.version, found.tries)):
            raise ValueError("it does not hold numbers")
        return found
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        logger.warning("%s is passed over: %s", path, error)
        return None


def write(path: Path, progress: Progress) -> None:
    """Write the progress to a file, which is complete or absent.

    Raises:
        StoreError: the disk is full or fails.
    """
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda partial: partial.write_text(json.dumps(asdict(progress))))
