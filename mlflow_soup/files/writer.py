"""A fast writer for large files.

For a large file, the page cache is slower than the disk: it takes 2 s of CPU per GB, direct writes
take 0.1 s. So weights are written with O_DIRECT where the file system supports it.
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

BLOCK = 4096  # O_DIRECT requires memory, offset and length to be multiples of this
BUFFER = 16 << 20  # bytes per write; a multiple of BLOCK
_BUFFERS = 3  # one is filled, one is written, one waits
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it, macOS does not
Sink = Callable[[memoryview], None]


class FileWriter:
    """A new file, written from front to back by a separate thread.

    The caller asks for `room`, fills the tensor that it gets, and asks again. At the end of the
    `with` block the file is on the disk.

    Args:
        path: the file; must not exist.
        digest: if True, the writing thread also computes the file's SHA-256.

    Raises:
        StoreError: the disk is full or fails.
    """

    def __init__(self, path: Path, *, digest: bool = False) -> None:
        self.path = path
        self.sha256 = hashlib.sha256() if digest else None
        with on_disk(self.path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # the flag is set after opening: some file systems (tmpfs of old kernels, some network
        # mounts) refuse it, and there os.open with O_DIRECT would fail but leave an empty file
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT)
        # one block more than one write: a value may cross the end of the buffer
        self._free = deque(mmap.mmap(-1, BUFFER + BLOCK) for _ in range(_BUFFERS))
        self._buffer = self._free.popleft()
        self._used = self._written = 0
        self._sinks: list[tuple[Sink, slice]] = []
        self._writing: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> Self:
        return self

    def room(self, dtype: torch.dtype, most: int, sink: Sink | None = None) -> Tensor:
        """A tensor over the next bytes of the file, shape (n,), 0 < n ≤ most; the caller fills it.

        Args:
            dtype: the tensor's dtype.
            most: how many elements the caller wants; the tensor may have fewer.
            sink: a function that the writing thread calls with the filled bytes.
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
        """Append the bytes to the file."""
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
        """Give a full buffer to the thread; the bytes past its end are moved to the next buffer."""
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
        """Wait until at most `most` buffers are being written."""
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
                    # the file system accepted the flag but refuses this direct write
                    fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
