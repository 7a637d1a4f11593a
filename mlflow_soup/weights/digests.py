"""Digests of a checkpoint's files and tensors.

The digest of a file is its SHA-256, as `sha256sum` prints it. The canonical digest covers all
tensors and does not depend on how they are split into files:

    sha256 over sorted (name, dtype, shape, sha256(little-endian bytes)), one JSON array per line
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlflow_soup.errors import ParentError
from mlflow_soup.records import Digests
from mlflow_soup.weights.checkpoint import MAY_BE_INFINITE, Checkpoint, TensorInfo, readable
from mlflow_soup.weights.mix import Scratch, is_finite


def raw(tensor: Tensor) -> Any:
    """The bytes of a tensor as a NumPy array, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def canonical(infos: Mapping[str, TensorInfo], contents: Mapping[str, str]) -> str:
    """The canonical digest, `sha256:…`.

    Args:
        infos: tensor name → its header entry.
        contents: tensor name → SHA-256 of the tensor's bytes.
    """
    rows = sorted(
        json.dumps([name, info.dtype, list(info.shape), contents[name]])
        for name, info in infos.items()
    )
    return "sha256:" + hashlib.sha256("\n".join(rows).encode()).hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


class Digesting:
    """The digests of a checkpoint, computed by threads; hashlib releases Python's global lock.

    Args:
        checkpoint: the checkpoint.
        pool: the threads.
        files: if True, digest the files too, not only the tensors.
    """

    def __init__(self, checkpoint: Checkpoint, pool: Executor, *, files: bool = True) -> None:
        self._checkpoint = checkpoint
        self._files = {
            file: pool.submit(of_file, checkpoint.weights / file)
            for file in (checkpoint.files() if files else ())
        }
        self._tensors = {name: pool.submit(of_tensor, t) for name, t in checkpoint.read()}

    def result(self) -> Digests:
        """The digests, once the threads have finished.

        Raises:
            ParentError: a file cannot be read.
        """
        with readable(self._checkpoint.label):
            contents = {name: future.result() for name, future in self._tensors.items()}
            files = {file: future.result() for file, future in self._files.items()}
        return Digests(canonical(self._checkpoint.tensors, contents), contents, files)


@contextlib.contextmanager
def threads() -> Iterator[Executor]:
    """A pool with one thread per core; on an error, jobs that have not started are dropped."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="digest")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def digest_all(checkpoint: Checkpoint) -> Digests:
    """The digests of a checkpoint's files and tensors."""
    with threads() as pool:
        return Digesting(checkpoint, pool).result()


def digest(checkpoint: Checkpoint) -> str:
    """The canonical digest of a checkpoint, which must not hold NaN or infinity.

    Raises:
        ParentError: a tensor holds NaN or infinity (those of `MAY_BE_INFINITE` may).
    """
    with threads() as pool:
        digesting = Digesting(checkpoint, pool, files=False)
        scratch = Scratch()
        for name, tensor in checkpoint.read():
            if not is_finite(tensor.reshape(-1), scratch):
                check_may_be_infinite(checkpoint, name)
        return digesting.result().canonical


def check_may_be_infinite(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a tensor with NaN or infinity, unless its name is in `MAY_BE_INFINITE`.

    Raises:
        ParentError: the name is not in it.
    """
    if not name.endswith(MAY_BE_INFINITE):
        raise ParentError(
            f"{name!r} of {checkpoint.label} holds NaN or infinity",
            where=str(checkpoint.weights / checkpoint.tensors[name].file),
            fix="merge another version; the training of this one may have diverged",
        )
