"""Evaluations on this machine that MLflow does not hold yet; they survive outages and crashes.

The name of an entry is the digest of the weights and of the way they were scored
(`naming.MEASURED`), so that any request for the same evaluation finds it. It is written before
MLflow is told, and deleted once MLflow has it.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_soup.files.durable import check_space, on_disk, replace
from mlflow_soup.registry import scores
from mlflow_soup.registry.scores import Scores

ROOM = 64 << 20  # bytes that must be free before an evaluation begins, for its rows
_FORGOTTEN_S = 90 * 24 * 3600


@dataclass(frozen=True)
class Journal:
    """A folder of entries; each is complete or absent."""

    folder: Path

    def open(self) -> None:
        """Make the folder, and delete entries that MLflow never got within three months.

        Raises:
            StoreError: the folder cannot be made.
        """
        with on_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process deleted it just now
                    if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                        path.unlink()

    def read(self, measured: str) -> Scores | None:
        """An entry; None if it is absent or damaged."""
        try:
            return scores.read(self._path(measured))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def recall(self, measured: str, evaluate: Callable[[], Scores]) -> Scores:
        """An entry; if there is none, evaluate, and write the result before it is returned.

        Raises:
            StoreError: the disk has no room; this is checked before the evaluation.
        """
        found = self.read(measured)
        if found is None:
            check_space(self.folder, ROOM)
            found = evaluate()
            replace(self._path(measured), lambda path: scores.write(found, path))
        return found

    def drop(self, measured: str) -> None:
        """Delete an entry that MLflow has by now."""
        self._path(measured).unlink(missing_ok=True)

    def _path(self, measured: str) -> Path:
        return self.folder / f"{measured}.parquet"
