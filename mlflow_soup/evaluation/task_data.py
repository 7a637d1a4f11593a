"""Read the data of a user's task as plain columns, within limits.

A data set can declare how its columns are decoded: an image is opened, wherever its path leads.
Nothing is decoded here. Files beside a task's YAML are read in a process of its own first, because
a small file can unpack to a large one, and deep JSON crashes the reader.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.limits import LimitError, work_within
from mlflow_soup.files.untrusted import open_regular

LOCAL = ("json", "csv", "text", "parquet")  # formats of data beside a task's YAML
LARGEST = 1 << 30  # bytes of all files of a task, and of the columns of each split
MEMORY = 2 << 30  # bytes
SECONDS = 120  # of processor time


class Empty(Exception):
    """The files of a data set are empty."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the data set of a task from a folder without leave; lm-eval's `custom_dataset`."""

    kind: str  # a format of `LOCAL`, or a data set of the Hub
    name: str | None  # the configuration of the data set
    options: Mapping[str, Any]  # arguments of `datasets.load_dataset`
    where: str  # the task's YAML, for errors

    def __call__(self, **_: Any) -> Any:
        """The splits of the data set, as `datasets.load_dataset` gives them, nothing decoded.

        Raises:
            Empty: the files are empty, which not every version of datasets reads.
            SpecError: the files are not regular, or reading them takes more than the limits.
            OSError: the data cannot be found or read.
        """
        if self.kind in LOCAL:
            found = _read_files(self.kind, self.name, self.options, self.where)
        else:
            found = datasets.load_dataset(self.kind, self.name, **self.options)
        return datasets.DatasetDict({split: _undecoded(data) for split, data in found.items()})


def _read_files(kind: str, name: str | None, options: Mapping[str, Any], where: str) -> Any:
    files = list(_named_files(options))
    size = 0
    for file in files:
        try:
            with open_regular(file.resolve()) as handle:
                size += os.fstat(handle.fileno()).st_size
        except ValueError as error:
            raise _refusal(f"{file} cannot be read: {error}", where) from error
    if not size:
        raise Empty
    if size > LARGEST:
        raise _refusal(f"its data have {size} bytes, but at most {LARGEST} are read", where)
    if kind == "parquet":
        # the file itself may declare that a column is decoded
        schema = pyarrow.parquet.read_schema(files[0]).remove_metadata()
        options = {**options, "features": datasets.Features.from_arrow_schema(schema)}
    builder = datasets.load_dataset_builder(kind, name, **options)

    def prepare() -> None:
        builder.download_and_prepare(max_shard_size=2 * LARGEST)

    # private door: datasets: a prepared data set lies in cache_dir
    if not os.path.exists(builder.cache_dir):
        try:
            work_within(prepare, seconds=SECONDS, memory=MEMORY, file_size=LARGEST)
        except LimitError as error:
            shutil.rmtree(f"{builder.cache_dir}.incomplete", ignore_errors=True)
            raise _refusal(f"its data cannot be read: {error}", where) from error
    prepare()
    return builder.as_dataset()


def _named_files(options: Mapping[str, Any]) -> Iterator[Path]:
    """The files that the arguments of `load_dataset` name; all of `data_dir` if they name none."""
    folder = Path(options.get("data_dir") or "").expanduser()
    names = list(texts(options.get("data_files")))
    if names:
        yield from (folder / name for name in names)
    elif options.get("data_dir"):
        yield from (path for path in sorted(folder.rglob("*")) if not path.is_dir())


def texts(value: Any) -> Iterator[str]:
    """All values of nested dicts and lists, as text."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)
    elif value is not None:
        yield str(value)


def _undecoded(data: Any) -> Any:
    plainly = _plain_features(data.features)
    return data if plainly == data.features else data.cast(plainly)


def _plain_features(feature: Any) -> Any:
    """The same features, without those that open what a column names."""
    if isinstance(feature, dict):
        return type(feature)({key: _plain_features(inner) for key, inner in feature.items()})
    if isinstance(feature, list):
        return [_plain_features(inner) for inner in feature]
    if hasattr(feature, "decode"):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_plain_features(feature.feature))
    return feature


def _refusal(what: str, where: str) -> SpecError:
    return SpecError(
        what,
        where=where,
        fix="give the task's data as JSON, CSV, text or Parquet files, smaller than "
        f"{LARGEST >> 20} MiB in all, and not packed",
    )
