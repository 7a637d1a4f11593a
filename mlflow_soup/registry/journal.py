"""Evaluations that MLflow does not hold yet, on this machine: they outlive store and process.

An entry is named by what was scored and how (`lineage.MEASURED`), so that it is found again by
whoever asks for the same. It is written before MLflow is told, and dropped once MLflow has it.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_soup.files.durable import check_space, on_disk, replace
from mlflow_soup.registry import scores
from mlflow_soup.registry.scores import Scores

ROOM = 64 << 20  # bytes that must be free before an evaluation begins: its rows have to be kept
_FORGOTTEN_S = 90 * 24 * 3600


@dataclass(frozen=True)
class Journal:
    """A folder of entries, each complete or not there."""

    folder: Path

    def open(self) -> None:
        """Make the folder, and sweep what was written three months ago and never told.

        Raises:
            StoreError: it cannot be made.
        """
        with on_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # dropped by another just now
                    if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                        path.unlink()

    def read(self, measured: str) -> Scores | None:
        """An entry; None if there is none, or it is damaged."""
        try:
            return scores.read(self._path(measured))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def recall(self, measured: str, evaluate: Callable[[], Scores]) -> Scores:
        """An entry, evaluated and written before it is returned where there was none.

        Raises:
            StoreError: the disk has no room for it; said before anything is evaluated.
        """
        found = self.read(measured)
        if found is None:
            check_space(self.folder, ROOM)
            found = evaluate()
            replace(self._path(measured), lambda path: scores.write(found, path))
        return found

    def drop(self, measured: str) -> None:
        """Forget an entry that MLflow has by now."""
        self._path(measured).unlink(missing_ok=True)

    def _path(self, measured: str) -> Path:
        return self.folder / f"{measured}.parquet"
