"""Write scores with their item rows to one Parquet file, and read them back."""

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
from mlflow_soup.files.untrusted import open_regular, parse_json
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
        ("gold", pa.int32()),  # null if unknown
        ("sizes", pa.list_(pa.float64())),  # null for 1
    ]
)


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation.

    Attributes:
        of: name → score; if the mean over tasks is the only score, its name is empty.
        about: numbers about the evaluation, such as its seconds.
        failed: the reason why there is no score; empty if there is one.
    """

    of: Mapping[str, Score]
    about: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def mean(self) -> Score:
        """The score with the empty name.

        Raises:
            NonFiniteError: the evaluation failed.
        """
        if self.failed:
            raise NonFiniteError(
                self.failed, where="an earlier evaluation", fix="leave these weights out"
            )
        return self.of[""]


def write(scores: Scores, path: Path) -> None:
    """Write scores with their item rows and a digest to a Parquet file; `read` is its inverse."""
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
            "noise": score.noise,
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
    """Digest of a file's content: neither disks nor artifact stores report a flipped bit."""
    return hashlib.sha256(json.dumps([about, table.to_pydict()]).encode()).hexdigest()


def read(path: Path) -> Scores:
    """The scores that `write` wrote to a file.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is damaged, or `write` did not write it.
    """
    with open_regular(path) as file:
        table = pq.read_table(file)
    head = parse_json(table.schema.metadata[b"soup"])
    if table.schema.metadata[b"sha256"].decode() != _digest(head, table):
        raise ValueError(f"{path} is damaged")
    for one in head["scores"]:
        numbers = [one["value"], one["stderr"], one.get("noise", 0.0)]
        numbers += [n for metric in one["metrics"] for n in (metric["value"], metric["stderr"])]
        names = [t for metric in one["metrics"] for t in (metric["task"], metric["metric"])]
        if {*map(type, numbers)} - {float, int} or {*map(type, names)} - {str}:
            raise TypeError(f"{path} holds a name or a number of another type")
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
                one.get("noise", 0.0),
            )
            for one in head["scores"]
        },
        head["about"],
        head.get("failed", ""),
    )
