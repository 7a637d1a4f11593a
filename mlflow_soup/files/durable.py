"""Files and folders that are complete or absent, and survive a power cut once they are there."""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow_soup.errors import SpecError, StoreError


def sync(path: Path) -> None:
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
                sync(path)
        try:
            partial.rename(folder)
        except OSError as error:  # another was quicker
            raise taken from error
        sync(folder.parent)
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
            sync(partial)
            partial.replace(path)
            sync(path.parent)
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
