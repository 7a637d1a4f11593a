"""An opened checkpoint: tensors by name, memory-mapped from safetensors files."""

import contextlib
import logging
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

logger = logging.getLogger("mlflow_soup")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# dtypes that the kernel mixes
MIXED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# dtypes that are never mixed: the tensors are copied, and the parents must agree on them
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
# ends of tensor names; old Pythia keeps a constant −inf in these tensors, in fp16
MAY_BE_INFINITE = ("masked_bias",)
_WIDTHS = {name: dtype.itemsize for name, dtype in (MIXED | COPIED).items()}
Stamp = tuple[int, ...]  # size in bytes, mtime and ctime in ns, inode


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's file, dtype and shape, as the header gives them."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; the headers are read, the tensors are not.

    Attributes:
        label: the name of the checkpoint in errors, `models:/my-llm/12`.
        root: the artifact tree.
        weights: the folder in the tree with config.json and the safetensors files.
        tokenizer: the folder with the tokenizer; often the same folder.
        config: the content of config.json.
        tensors: tensor name on disk → its header entry, in the order of the files and of the data.
        stamps: weight file → its stamp when it was opened.
        passed_over: weights in the tree, and an index, that transformers does not read either.
    """

    label: str
    root: Path
    weights: Path
    tokenizer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    stamps: Mapping[str, Stamp]
    passed_over: tuple[Path, ...] = ()
    _mapped: dict[str, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its name, in the order of `tensors`.

        The tensors are memory-mapped read-only: writing into one crashes the process.
        """
        for file, names in groupby(self.tensors, key=lambda name: self.tensors[name].file):
            header, views = self.header(file), []
            with readable(self.label), warnings.catch_warnings():
                # torch warns that the buffers are read-only; they are read-only on purpose
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                # map each file once: a mapping holds a file descriptor, and their number is limited
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
        """The JSON header of a weight file."""
        return read_weight_header(self.weights / file, self.label)

    def files(self) -> list[str]:
        """The names of the safetensors files, sorted."""
        return sorted(self.stamps)

    def tell_passed_over(self) -> None:
        """Warn of weights in the tree that are not merged."""
        for path in self.passed_over:
            logger.warning(
                "%s of %s is passed over, as transformers does; the weights are %s",
                path.relative_to(self.root),
                self.label,
                ", ".join(shorten(self.files(), 3)),
            )

    def check_unchanged(self) -> None:
        """Refuse a checkpoint whose weight files changed after it was opened.

        Raises:
            ParentError: a weight file has another size or time of change, or does not exist.
        """
        for file, stamp in self.stamps.items():
            path = self.weights / file
            now = stamp_of(path) if path.is_file() else None
            if now != stamp:
                raise ParentError(
                    f"{file} of {self.label} was changed while it was read",
                    where=f"{path}: {stamp[0]} bytes at first, now {now[0] if now else 'missing'}",
                    fix="wait until the training run has saved it, then run the same command again",
                )


def read_weight_header(path: Path, label: str) -> dict[str, Any]:
    """The JSON header of a weight file, checked.

    Raises:
        ParentError: the file cannot be read or is damaged.
    """
    try:
        with readable(label):
            return read_header(path, _WIDTHS)
    except ValueError as error:
        raise damaged(path, label, error) from error


def damaged(path: Path, label: str, error: Exception) -> ParentError:
    """The error for a damaged weight file."""
    return ParentError(
        f"{path.name} of {label} is damaged: {error}",
        where=str(path),
        fix="save the checkpoint again, then register the new copy",
    )


def unreadable(path: Path, label: str, error: Exception) -> ParentError:
    """The error for a file beside the weights that cannot be read."""
    return ParentError(
        f"{path.name} of {label} cannot be read: {error}",
        where=str(path),
        fix="save the checkpoint again, then register the new copy",
    )


def _map(path: Path) -> mmap.mmap:
    """Map a file's bytes read-only; the file may be larger than the memory.

    The mapping uses the page cache only. safetensors makes a writable mapping, for which the system
    reserves memory for the whole file.
    """
    with open_regular(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """A tensor over mapped bytes, shape (count,)."""
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)


@contextlib.contextmanager
def readable(label: str) -> Iterator[None]:
    """Turn an OSError while a checkpoint is read into a ParentError.

    Raises:
        ParentError: a file is missing, may not be read, or lies on a failing disk.
    """
    try:
        yield
    except OSError as error:
        raise ParentError(
            f"{label} cannot be read: {error.strerror}",
            where=str(error.filename or label),
            fix="make the files of the checkpoint readable, or save it again",
        ) from error


def stamp_of(path: Path) -> Stamp:
    """The current stamp of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def shorten(lines: Sequence[str], most: int = 100) -> list[str]:
    """The first `most` lines of a report, and a line that counts the rest if there are more."""
    left = len(lines) - most
    return [*lines[:most], f"and {left} more"] if left > 0 else list(lines)
