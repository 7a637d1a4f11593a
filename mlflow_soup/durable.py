"""Files that are complete or not there: a folder under a temporary name, and a fast file writer.

The page cache costs a large file more than the disk does (2 s of CPU per GB, against 0.1 s past
it), so weights are written with O_DIRECT where the file system takes it.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import mmap
import os
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mlflow_soup.errors import SpecError, StoreError

BLOCK = 4096  # O_DIRECT's unit, of memory, offset and length
BUFFER = 16 << 20  # bytes handed to the disk at a time; a multiple of BLOCK
_BUFFERS = 3  # one is filled, one is written, one waits
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it, macOS has not
Sink = Callable[[memoryview], None]


def _sync(path: Path) -> None:
    """Make a file or a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(folder: Path, where: str = "--out") -> Iterator[Path]:
    """A folder to write into that becomes `folder` when all is in it, and is dropped on an error.

    It lies beside `folder` under a hidden name. One that a killed process left there is removed
    by the next that writes to the same place.

    Args:
        folder: must not exist, or be empty.
        where: how errors name it.

    Raises:
        SpecError: there is something at `folder`, or it cannot be written there.
    """
    folder = Path(os.path.abspath(folder))
    taken = SpecError(
        f"{folder} is there already",
        where=where,
        fix="name a folder that does not exist, or delete this one",
    )
    try:
        there = folder.is_symlink() or folder.exists()
        if there and (folder.is_symlink() or folder == Path.cwd() or any(folder.iterdir())):
            raise taken
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial, lock = _claim(folder)
    except NotADirectoryError as error:
        raise taken from error
    except OSError as error:
        raise _unwritable(folder, where, error) from error
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            with on_disk(path):
                _sync(path)
        try:
            partial.rename(folder)
        except OSError as error:  # another was quicker
            raise taken from error
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for what is as large as a model; it is dropped in the end.

    One that a killed process left is removed by the next that asks for one.
    """
    partial, lock = _claim(Path(tempfile.gettempdir(), "mlflow-soup"), mode=0o700)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(folder: Path, mode: int = 0o777) -> tuple[Path, int]:
    """A hidden folder beside `folder`, and the lock that keeps others from sweeping it."""
    pattern = f".{folder.name}.partial-"
    for left in folder.parent.glob(f"{glob.escape(pattern)}*"):
        with contextlib.suppress(OSError):  # not ours to sweep, or swept by another just now
            lock = _lock(left)
            try:
                shutil.rmtree(left)
            finally:
                os.close(lock)
    while True:
        partial = folder.parent / (pattern + secrets.token_hex(4))
        partial.mkdir(mode)
        # another may sweep it before it is locked
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(partial)
            if partial.exists():
                return partial, lock
            os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds a lock on a folder; it goes with the process.

    Raises:
        BlockingIOError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written into words.

    Raises:
        StoreError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space" if full else "mend the disk or its permissions"
        raise StoreError(
            f"{path.name} cannot be written: {error.strerror}",
            where=str(path),
            fix=f"{way_out}, or choose another place (temporary files: TMPDIR; what is kept: "
            "MLFLOW_SOUP_CACHE), then run the same command again",
        ) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is complete or not there, and survives a power cut once it is.

    Args:
        path: the file; what was there before is replaced.
        write: writes all of it to another path, beside it.

    Raises:
        StoreError: the disk is full or fails.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with on_disk(path):
        try:
            write(partial)
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _unwritable(folder: Path, where: str, error: OSError) -> SpecError:
    return SpecError(
        f"{folder} cannot be written: {error.strerror}",
        where=where,
        fix="name a folder that you may write to",
    )


def check_writable(folder: Path, where: str = "--out") -> None:
    """Refuse a folder that could not be made and written to, and leave nothing there.

    Args:
        folder: may be there already.
        where: how errors name it.

    Raises:
        SpecError: it is a file, below one, or no place to write.
    """
    folder = Path(os.path.abspath(folder))
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _unwritable(folder, where, error) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the file system has no room for.

    Args:
        folder: the one to fill; exists.
        needed: bytes.

    Raises:
        StoreError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free",
            where=str(folder),
            fix="free some space, or write elsewhere (temporary files: TMPDIR)",
        )


class FileWriter:
    """A file written front to back, from tensors laid over its buffers, by a thread of its own.

    Ask for `room`, fill what you got, go on; leave the `with` block, and the file is on the disk.

    Args:
        path: must not exist.
        digest: also compute the file's SHA-256, in the writing thread.

    Raises:
        StoreError: the disk is full or fails.
    """

    def __init__(self, path: Path, *, digest: bool = False) -> None:
        self.path = path
        self.sha256 = hashlib.sha256() if digest else None
        with on_disk(self.path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # tmpfs of old kernels and some network mounts refuse it: an open that asks for it fails
        # there too, but leaves an empty file
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT)
        # a page more than is written at a time: a value may lie across the end
        self._free = deque(mmap.mmap(-1, BUFFER + BLOCK) for _ in range(_BUFFERS))
        self._buffer = self._free.popleft()
        self._used = self._written = 0
        self._sinks: list[tuple[Sink, slice]] = []
        self._writing: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> Self:
        return self

    def room(self, dtype: torch.dtype, most: int, sink: Sink | None = None) -> Tensor:
        """A tensor over the next bytes of the file, of shape (n,), 0 < n ≤ most; to be filled.

        Args:
            dtype: of the tensor.
            most: elements wanted; there may be room for fewer.
            sink: gets these bytes, in the writing thread, once they are filled.
        """
        if self._used >= BUFFER:
            self._hand_over()
        size = dtype.itemsize
        count = min(most, -(-(BUFFER - self._used) // size))
        view = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=self._used)
        if sink is not None:
            self._sinks.append((sink, slice(self._used, self._used + count * size)))
        self._used += count * size
        return view

    def put(self, content: bytes) -> None:
        """Write these bytes."""
        done = 0
        while done < len(content):
            view = self.room(torch.uint8, len(content) - done)
            view.numpy()[:] = memoryview(content)[done : done + len(view)]
            done += len(view)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                while self._used >= BUFFER:
                    self._hand_over()
                self._start_writing(self._used)
                self._drain(0)
                with on_disk(self.path):
                    os.ftruncate(self._file, self._written)  # O_DIRECT writes whole blocks
                    os.fsync(self._file)
        finally:
            self._thread.shutdown(cancel_futures=True)
            os.close(self._file)

    def _hand_over(self) -> None:
        """Give a full buffer to the thread; what overhangs its end begins the next one."""
        full, overhang = self._buffer, self._used - BUFFER
        self._start_writing(BUFFER)
        self._drain(_BUFFERS - 1)
        self._buffer = self._free.popleft()
        self._buffer[:overhang] = full[BUFFER : BUFFER + overhang]
        self._used = overhang

    def _start_writing(self, length: int) -> None:
        job = self._thread.submit(self._write, self._buffer, length, self._written, self._sinks)
        self._writing.append((job, self._buffer))
        self._written += length
        self._sinks = []

    def _drain(self, most: int) -> None:
        """Wait until at most so many buffers are being written."""
        while len(self._writing) > most:
            job, buffer = self._writing.popleft()
            with on_disk(self.path):
                job.result()
            self._free.append(buffer)

    def _write(
        self, buffer: mmap.mmap, length: int, offset: int, sinks: list[tuple[Sink, slice]]
    ) -> None:
        with memoryview(buffer) as view:
            for sink, part in sinks:
                sink(view[part])
            if self.sha256 is not None:
                self.sha256.update(view[:length])
            end = -(-length // BLOCK) * BLOCK
            done = 0
            while done < end:
                try:
                    done += os.pwrite(self._file, view[done:end], offset + done)
                except OSError as error:
                    flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                    if error.errno != errno.EINVAL or not flags & _DIRECT:
                        raise
                    # the file system took the flag, and does not take these writes
                    fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
