"""Scores with their item rows ↔ one Parquet file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_soup.errors import NonFiniteError
from mlflow_soup.records import Items, Metric, Score

_COLUMNS = pa.schema(
    [
        ("term", pa.int32()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("weight", pa.float64()),
        ("id", pa.string()),
        ("value", pa.float64()),
        ("share", pa.float64()),
        ("log_likelihoods", pa.list_(pa.float64())),
        ("gold", pa.int32()),  # null where nothing is known
        ("sizes", pa.list_(pa.float64())),  # null for 1
    ]
)


@dataclass(frozen=True)
class Scores:
    """What one evaluation gave.

    Attributes:
        of: name → score; a mean over tasks alone has the empty name.
        about: numbers that go with them, such as seconds.
        failed: why there is no score; empty where there is.
    """

    of: Mapping[str, Score]
    about: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def mean(self) -> Score:
        """The score without a name.

        Raises:
            NonFiniteError: there is none.
        """
        if self.failed:
            raise NonFiniteError(
                self.failed, where="a score that was measured before", fix="leave these weights out"
            )
        return self.of[""]


def write(scores: Scores, path: Path) -> None:
    """Scores with their item rows as one Parquet file, with a digest; `read` is its inverse."""
    items = [i for score in scores.of.values() for i in score.items]
    rows = [
        (position, i.task, i.metric, i.weight, *row)
        for position, i in enumerate(items)
        for row in zip(
            i.ids,
            i.values,
            i.shares,
            i.log_likelihoods,
            i.gold or [None] * len(i.ids),
            i.sizes or [None] * len(i.ids),
            strict=True,
        )
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    head = [
        {
            "name": name,
            "value": score.value,
            "stderr": score.stderr,
            "metrics": [asdict(m) for m in score.metrics],
            "terms": len(score.items),
        }
        for name, score in scores.of.items()
    ]
    table = pa.table([list(c) for c in columns], schema=_COLUMNS)
    about = {"scores": head, "about": dict(scores.about), "failed": scores.failed}
    metadata = {"soup": json.dumps(about), "sha256": _digest(about, table)}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _digest(about: Any, table: pa.Table) -> str:
    """Of all that a file says: neither disks nor artifact stores tell of a bit that flipped."""
    return hashlib.sha256(json.dumps([about, table.to_pydict()]).encode()).hexdigest()


def read(path: Path) -> Scores:
    """Scores as `write` wrote them.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is no such file, or damaged.
    """
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"soup"])
    if table.schema.metadata[b"sha256"].decode() != _digest(head, table):
        raise ValueError(f"{path} is damaged")
    groups: dict[tuple[int, str, str, float], list[Any]] = {}
    for term, task, its_metric, weight, *row in zip(*table.to_pydict().values(), strict=True):
        groups.setdefault((term, task, its_metric, weight), []).append(row)
    items = []
    for group, rows in groups.items():
        ids, values, shares, likelihoods, gold, sizes = zip(*rows, strict=True)
        known = () if gold[0] is None else gold
        divisors = () if sizes[0] is None else tuple(map(tuple, sizes))
        likelihoods = tuple(map(tuple, likelihoods))
        items.append(Items(*group[1:], ids, values, shares, likelihoods, known, divisors))
    left = iter(items)
    return Scores(
        {
            one["name"]: Score(
                one["value"],
                one["stderr"],
                tuple(islice(left, one["terms"])),
                tuple(Metric(**m) for m in one["metrics"]),
            )
            for one in head["scores"]
        },
        head["about"],
        head.get("failed", ""),
    )
