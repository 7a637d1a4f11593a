"""An opened checkpoint: tensors by name, mapped from safetensors files, headers checked."""

import contextlib
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlflow_soup.errors import ParentError
from mlflow_soup.files.untrusted import (
    open_regular,
    read_header,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# what the kernel mixes
MIXED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# and what it copies where the parents agree
COPIED = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
}
# old Pythia keeps a constant −inf here, in fp16
MAY_BE_INFINITE = ("masked_bias",)
_WIDTHS = {name: dtype.itemsize for name, dtype in (MIXED | COPIED).items()}
Stamp = tuple[int, ...]  # size in bytes, times of change of content and entry in ns, inode


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the header alone."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened but not read.

    Attributes:
        label: how errors name it, `models:/my-llm/12`.
        root: the artifact tree.
        weights: the folder below it with config.json and safetensors.
        tokenizer: the folder with the tokenizer; often the same.
        config: config.json.
        tensors: by name on disk, in the order of the files and of the data in them.
        stamps: of the weight files when they were opened.
    """

    label: str
    root: Path
    weights: Path
    tokenizer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    stamps: Mapping[str, Stamp]
    _mapped: dict[str, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its name, as `tensors` has them; memory-mapped: never write into one."""
        for file, names in groupby(self.tensors, key=lambda name: self.tensors[name].file):
            header, views = self.header(file), []
            with readable(self.label), warnings.catch_warnings():
                # torch says that they cannot be written to; that is as it should be
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                # a file is mapped once: each mapping holds a descriptor, and those are few
                if file not in self._mapped:
                    self._mapped[file] = _map(self.weights / file)
                mapped = self._mapped[file]
                data = 8 + int.from_bytes(mapped[:8], "little")
                for name in names:
                    info, (begin, end) = self.tensors[name], header[name]["data_offsets"]
                    dtype = (MIXED | COPIED)[info.dtype]
                    count = (end - begin) // dtype.itemsize
                    view = _view(mapped, dtype, count, data + begin)
                    views.append((name, view.view(info.shape)))
            yield from views

    def header(self, file: str) -> dict[str, Any]:
        """The JSON that a weight file begins with."""
        return read_weight_header(self.weights / file, self.label)

    def files(self) -> list[str]:
        """The safetensors files, sorted."""
        return sorted(self.stamps)

    def check_unchanged(self) -> None:
        """Refuse a checkpoint that somebody wrote to since it was opened.

        Raises:
            ParentError: a weight file has another size or time of change, or is gone.
        """
        for file, stamp in self.stamps.items():
            path = self.weights / file
            now = stamp_of(path) if path.is_file() else None
            if now != stamp:
                raise ParentError(
                    f"{file} of {self.label} was written to while it was read",
                    where=f"{path}: {stamp[0]} bytes at first, now {now[0] if now else 'gone'}",
                    fix="wait until its training run has saved it, then run the same command again",
                )


def read_weight_header(path: Path, label: str) -> dict[str, Any]:
    """The JSON that a weight file begins with, checked.

    Raises:
        ParentError: the file cannot be read or is damaged.
    """
    try:
        with readable(label):
            return read_header(path, _WIDTHS)
    except ValueError as error:
        raise damaged(path, label, error) from error


def damaged(path: Path, label: str, error: Exception) -> ParentError:
    """The error for a weight file that cannot be what it should be."""
    return ParentError(
        f"{path.name} of {label} is damaged: {error}",
        where=str(path),
        fix="save the checkpoint again, and register that",
    )


def _map(path: Path) -> mmap.mmap:
    """A file's bytes, in no memory but the page cache: it may be larger than all there is.

    safetensors' own mapping could be written to, so the system sets aside memory for all of it.
    """
    with open_regular(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """A tensor over mapped bytes, shape (n,)."""
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)


@contextlib.contextmanager
def readable(label: str) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint's files are read into words.

    Raises:
        ParentError: a file is gone, closed to us, or on a failing disk.
    """
    try:
        yield
    except OSError as error:
        raise ParentError(
            f"{label} cannot be read: {error.strerror}",
            where=str(error.filename or label),
            fix="make its files readable, or save the checkpoint again",
        ) from error


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def shorten(lines: Sequence[str], most: int = 100) -> list[str]:
    """The lines of a report, the last of them a count when there are too many to read."""
    left = len(lines) - most
    return [*lines[:most], f"and {left} more"] if left > 0 else list(lines)
