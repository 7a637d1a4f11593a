"""lm-eval's index of the tasks that it ships, kept in the cache.

lm-eval takes 6 s to index its 14,000 YAMLs. Only the whole index is right: a tag has members in
several folders, a group too, and of two tasks with one name the first counts.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import lm_eval.tasks._index  # private door
from lm_eval.tasks import TaskManager

from mlflow_soup.errors import SoupError
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.files.durable import replace
from mlflow_soup.files.untrusted import UNREADABLE, read_regular

_LARGEST = 64 << 20  # bytes


def library() -> TaskManager:
    """lm-eval's manager of the tasks that it ships; the caller may add others to its index."""
    manager = TaskManager(include_defaults=False)
    # private door: lm_eval.tasks.TaskManager.task_index
    manager.task_index.update(_index(_installed()))
    return manager


@functools.lru_cache(maxsize=1)
def _index(installed: str | None) -> dict[str, Any]:
    root = Path(lm_eval.tasks.__file__).parent
    if installed is None:
        return dict(TaskManager().task_index)
    kept = cache_folder() / "lm-eval" / f"{installed}.json"
    with contextlib.suppress(*UNREADABLE):
        return _read(kept, root)
    index: dict[str, Any] = TaskManager().task_index
    with contextlib.suppress(SoupError, OSError):  # it only serves speed
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace(kept, lambda path: _write(path, index, root))
    return index


@functools.lru_cache(maxsize=1)
def _installed() -> str | None:
    """A digest of lm-eval's files; None if they may change, as in an editable installation."""
    distribution = importlib.metadata.distribution("lm_eval")
    record = distribution.read_text("RECORD") or ""
    if "tasks/__init__.py" not in record:
        return None
    return hashlib.sha256(record.encode()).hexdigest()[:16]


def _write(path: Path, index: dict[str, Any], root: Path) -> None:
    content = {
        name: [
            entry.kind.name,
            entry.yaml_path and entry.yaml_path.relative_to(root).as_posix(),
            sorted(entry.tags),
        ]
        for name, entry in index.items()
    }
    path.write_text(json.dumps(content))


def _read(path: Path, root: Path) -> dict[str, Any]:
    index = lm_eval.tasks._index
    content = json.loads(read_regular(path, _LARGEST))
    # paths as text: lm-eval makes a Path of the one that it reads, and to make all takes 0.2 s
    return {
        name: index.Entry(name, index.Kind[kind], yaml and f"{root}/{yaml}", tags=set(tags))
        for name, (kind, yaml, tags) in content.items()
    }
