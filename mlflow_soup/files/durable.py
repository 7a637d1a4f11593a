"""Files and folders that are complete or absent, and that survive a power cut once they exist."""

import contextlib
import enum
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mlflow_soup.errors import SpecError, StoreError

logger = logging.getLogger("mlflow_soup")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that a power cut loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(folder: Path, where: str = "--out") -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` at the end, and deleted on an error.

    It lies beside `folder` under a hidden name. The next call for the same `folder` removes a
    temporary folder that a killed process left.

    Args:
        folder: the folder to make; must not exist, or must be empty.
        where: the option or place that errors name.

    Raises:
        SpecError: `folder` exists and is not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    taken = _taken(folder, where)
    check_absent(folder, where)
    try:
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
        except OSError as error:  # another process made the folder first
            raise taken from error
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def check_absent(folder: Path, where: str = "--out") -> None:
    """Refuse a folder for `staged` that exists and is not empty; nothing is made.

    Args:
        folder: the folder.
        where: the option or place that errors name.

    Raises:
        SpecError: it exists and is not empty, or cannot be looked at.
    """
    folder = Path(os.path.abspath(folder))
    try:
        there = folder.is_symlink() or folder.exists()
        if there and (folder.is_symlink() or folder == Path.cwd() or any(folder.iterdir())):
            raise _taken(folder, where)
    except NotADirectoryError as error:
        raise _taken(folder, where) from error
    except OSError as error:
        raise _unwritable(folder, where, error) from error


def _taken(folder: Path, where: str) -> SpecError:
    return SpecError(
        f"{folder} exists already",
        where=where,
        fix="name a folder that does not exist, or delete this one",
    )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that may hold a whole model; it is deleted at the end.

    It lies in a folder of this user in TMPDIR, which nobody else can write to; see `temporary`.

    Raises:
        StoreError: the user's folder cannot be made, or is not private.
    """
    ours = Path(tempfile.gettempdir(), f"mlflow-soup-{os.geteuid()}")
    with on_disk(ours):
        with contextlib.suppress(FileExistsError):
            ours.mkdir(0o700)
        found = ours.lstat()  # somebody else may have made it, in a folder that all may write to
        private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
        if not private or found.st_uid != os.geteuid():
            raise StoreError(
                f"{ours} is not a folder that only this user can use",
                where=str(ours),
                fix="delete it, or set TMPDIR to a folder of yours, then run the same command "
                "again",
            )
    with temporary(ours / "scratch") as folder:
        yield folder


@contextlib.contextmanager
def temporary(name: Path) -> Iterator[Path]:
    """A hidden folder beside `name`; it is deleted at the end.

    The next call removes a folder that a killed process of this user left.

    Raises:
        StoreError: the folder cannot be made.
    """
    with on_disk(name.parent):
        partial, lock = _claim(name)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _claim(folder: Path) -> tuple[Path, int]:
    """A hidden folder beside `folder`, and the lock that keeps other processes from removing it."""
    pattern = f".{folder.name}.partial-"
    for left in folder.parent.glob(f"{glob.escape(pattern)}*"):
        # it is no folder, or another process removed it just now
        with contextlib.suppress(OSError), _opened(left) as lock:
            if os.fstat(lock).st_uid == os.geteuid() and try_lock(lock, left) is Lock.OURS:
                shutil.rmtree(left)
    while True:
        partial = folder.parent / (pattern + secrets.token_hex(4))
        partial.mkdir()
        # another process may remove the folder before it is locked
        with contextlib.suppress(FileNotFoundError), _opened(partial) as lock:
            if try_lock(lock, partial) is not Lock.THEIRS and partial.exists():
                return partial, os.dup(lock)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder.

    Raises:
        OSError: it is a link, a pipe, a file or a device; none of these is opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(folder, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Lock(enum.Enum):
    """Who holds a lock: this process, another one, or nobody because there are no locks."""

    OURS = enum.auto()
    THEIRS = enum.auto()
    NONE = enum.auto()


def try_lock(descriptor: int, path: Path) -> Lock:
    """Try to lock an open file or folder; its lock ends when all its descriptors are closed.

    A file system without locks is told as a warning.

    Args:
        descriptor: the open file or folder.
        path: what the warning names.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.THEIRS
    except OSError as error:
        logger.warning("%s cannot be locked: %s", path, error.strerror)
        return Lock.NONE
    return Lock.OURS


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn an OSError while a file is written into a StoreError.

    Raises:
        StoreError: the disk is full or fails.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space" if full else "repair the disk or its permissions"
        raise StoreError(
            f"{path.name} cannot be written: {error.strerror}",
            where=str(path),
            fix=f"{way_out}, or choose another folder (set TMPDIR for temporary files, "
            "MLFLOW_SOUP_CACHE for the cache), then run the same command again",
        ) from error


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is complete or absent, and that survives a power cut once it exists.

    Args:
        path: the file; an existing file is replaced.
        write: writes the whole content to the path that it gets, a temporary one beside `path`.

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
    """Refuse a folder that cannot be made or written to; the check leaves nothing behind.

    Args:
        folder: the folder; may exist already.
        where: the option or place that errors name.

    Raises:
        SpecError: `folder` is a file, lies below a file, or is read-only.
    """
    folder = Path(os.path.abspath(folder))
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _unwritable(folder, where, error) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start a write that the file system has no space for.

    Args:
        folder: the folder to write into; exists.
        needed: the number of bytes to write.

    Raises:
        StoreError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{needed / 1e6:,.1f} MB are needed, but only {free / 1e6:,.1f} MB are free",
            where=str(folder),
            fix="free some space, or write to another disk (set TMPDIR for temporary files)",
        )
