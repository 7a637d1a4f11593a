"""A fast writer for large files.

The page cache costs a large file more than the disk does (2 s of CPU per GB, against 0.1 s past
it), so weights are written with O_DIRECT where the file system supports it.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mlflow_soup.files.durable import on_disk

BLOCK = 4096  # O_DIRECT's unit, of memory, offset and length
BUFFER = 16 << 20  # bytes handed to the disk at a time; a multiple of BLOCK
_BUFFERS = 3  # one is filled, one is written, one waits
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it, macOS has not
Sink = Callable[[memoryview], None]


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
