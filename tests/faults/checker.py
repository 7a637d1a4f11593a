"""What a search has left, read from the database and the artifacts alone: no MLflow, none of ours.

Only the names of tags are taken from the package.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.numpy import safe_open

_STATUS = {1: "PENDING", 2: "READY", 3: "FAILED"}


@dataclass(frozen=True)
class Left:
    """What must be the same however often the search was cut short.

    Attributes:
        trials: number, weights, score and digest of the item rows of each committed trial.
        soups: request → digests of the versions that were registered for it.
        champion: digest of what the alias points to.
    """

    trials: tuple[tuple[int, str, float, str], ...]
    soups: tuple[tuple[str, tuple[str, ...]], ...]
    champion: str


class Database:
    """A store's SQLite file."""

    def __init__(self, path: Path) -> None:
        # for writing: the journal of who was killed in a commit has to be rolled back
        self._file = sqlite3.connect(path)

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, query: str, *values: object) -> list[Any]:
        return self._file.execute(query, values).fetchall()

    def commit(self) -> None:
        self._file.commit()

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.rows("SELECT key, value FROM tags WHERE run_uuid = ?", run_id))

    def runs(self, role: str, status: str = "%") -> list[Any]:
        """Id and folder of the runs with a role that were not deleted."""
        return self.rows(
            "SELECT run_uuid, artifact_uri FROM runs JOIN tags USING (run_uuid) WHERE key = "
            "'soup.role' AND value = ? AND status LIKE ? AND lifecycle_stage = 'active'",
            *(role, status),
        )

    def soups(self) -> Iterator[tuple[str, int, dict[str, str], Path | None]]:
        """Name, number, tags and folder of each version that is a soup and was not deleted."""
        for name, number, source in self.rows(
            "SELECT name, version, source FROM model_versions "
            "WHERE current_stage != 'Deleted_Internal'"
        ):
            tags = dict(
                self.rows(
                    "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?",
                    *(name, number),
                )
            )
            if "soup.request" in tags:
                found = self.rows(
                    "SELECT artifact_location FROM logged_models WHERE model_id = ? AND "
                    "status = 2 AND lifecycle_stage = 'active'",
                    source.removeprefix("models:/"),
                )
                folder = Path(found[0][0].removeprefix("file://")) if found else None
                yield name, number, tags, folder


def tensors_digest(folder: Path) -> str:
    """The canonical digest of the safetensors files in a folder, computed anew."""
    rows = []
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        for name, about in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in about["data_offsets"])
                digest = hashlib.sha256(content[begin:end]).hexdigest()
                rows.append(json.dumps([name, about["dtype"], about["shape"], digest]))
        with safe_open(file, "np") as opened:  # it is one
            assert len(opened.keys()) == len(json.loads(content[8 : 8 + size])) - 1
    return "sha256:" + hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _items(folder: str) -> str:
    """Digest of a trial's item rows."""
    table = pq.read_table(Path(folder.removeprefix("file://")) / "items.parquet")
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest()


def look(path: Path) -> Left:
    """What a database and its artifacts hold."""
    with Database(path) as database:
        trials = []
        for run_id, folder in database.runs("trial", "FINISHED"):
            params = dict(database.rows("SELECT key, value FROM params WHERE run_uuid = ?", run_id))
            ((score,),) = database.rows(
                "SELECT value FROM latest_metrics WHERE run_uuid = ? AND key = 'dev/objective'",
                run_id,
            )
            number = int(database.tags(run_id)["soup.number"])
            trials.append((number, params["weights"], score, _items(folder)))
        soups: dict[str, list[str]] = {}
        digests = {}
        for name, number, tags, folder in database.soups():
            soups.setdefault(tags["soup.request"], []).append(tags["soup.digest"])
            digests[name, number] = tensors_digest(folder) if folder else "gone"
        alias = database.rows(
            "SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'"
        )
        champion = digests[alias[0]] if alias else ""
    versions = tuple((request, tuple(found)) for request, found in soups.items())
    return Left(tuple(sorted(trials)), versions, champion)


def problems(path: Path, expected: Left | None = None) -> list[str]:
    """All that is amiss once a search has ended, or that is not as expected."""
    found = []
    with Database(path) as database:
        if database.rows("PRAGMA integrity_check") != [("ok",)]:
            found.append("the database is damaged")
        numbers = Counter(
            (database.tags(run_id)["soup.key"], database.tags(run_id)["soup.number"])
            for run_id, _ in database.runs("trial", "FINISHED")
        )
        found += [
            f"trial {number} is there {n} times" for (_, number), n in numbers.items() if n > 1
        ]
        for role in ("search", "trial", "ood"):
            found += [
                f"{role} run {run_id} is RUNNING" for run_id, _ in database.runs(role, "RUNNING")
            ]
        if len(done := database.runs("ood", "FINISHED")) > 1:
            found.append(f"{len(done)} OOD runs are FINISHED")
        for model_id, status in database.rows(
            "SELECT model_id, status FROM logged_models WHERE lifecycle_stage = 'active'"
        ):
            if _STATUS.get(status) == "PENDING":
                found.append(f"logged model {model_id} is PENDING")
        by_request = Counter(tags["soup.request"] for *_, tags, _ in database.soups())
        found += [f"{n} versions of one request" for n in by_request.values() if n > 1]
        for name, number, tags, folder in database.soups():
            if folder is None:
                found.append(f"{name} {number} has no files that are READY")
            elif tensors_digest(folder) != tags["soup.digest"]:
                found.append(f"{name} {number} holds other bytes than its tag says")
    found += unverified(path)
    if not found and expected is not None and (left := look(path)) != expected:
        found.append(f"left {left}, expected {expected}")
    return found


def unverified(path: Path) -> list[str]:
    """Aliases that point to a soup whose gate has not passed it, or whose bytes are others."""
    found = []
    with Database(path) as database:
        for name, number, tags, folder in database.soups():
            for (alias,) in database.rows(
                "SELECT alias FROM registered_model_aliases WHERE name = ? AND version = ?",
                *(name, number),
            ):
                if tags.get("soup.gate") != "passed":
                    found.append(f"{name}@{alias} points to {number}, which no gate passed")
                if folder is None or tensors_digest(folder) != tags["soup.digest"]:
                    found.append(f"{name}@{alias} points to {number}, whose bytes are others")
    return found
