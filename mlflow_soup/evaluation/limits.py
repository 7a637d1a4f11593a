"""Do work that files of unknown origin decide in a process of its own, within limits."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from mlflow_soup.errors import StoreError, brief
from mlflow_soup.evaluation.template_process import lower

Result = TypeVar("Result")

_FAILED, _TOO_MUCH = 3, 4  # exit codes; multiprocessing gives 1 to a process that crashes
_SLOWEST = 10  # seconds that a busy machine may take for one second of processor time
_WORDS = ("File too large", "Cannot allocate memory")  # of the system; torch quotes them, too


class LimitError(Exception):
    """Work took more processor time, memory or disk than it may, or it crashed."""


def try_within(work: Callable[[], object], *, seconds: int, memory: int, file_size: int) -> bool:
    """Do work in a silent fork, to learn whether it ends; what it changes in memory is lost.

    Work that raises an error has ended: the caller does it again and meets the error.

    Args:
        work: the work.
        seconds: of processor time.
        memory: bytes, in addition to those of this process.
        file_size: bytes of each file that the work writes.

    Returns:
        Whether the work raised no error.

    Raises:
        LimitError: the work took more than its limits, or crashed.
    """

    def limited() -> None:
        _hush()
        lower(resource.RLIMIT_CPU, seconds)
        lower(resource.RLIMIT_FSIZE, file_size)
        lower(resource.RLIMIT_CORE, 0)
        used = _data_size()
        if used is not None:
            lower(resource.RLIMIT_DATA, used + memory)
        try:
            work()
        except Exception as error:  # the caller meets it again
            sys.exit(_TOO_MUCH if _is_of_limits(error) else _FAILED)

    process = multiprocessing.get_context("fork").Process(target=limited, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
        process.start()
    try:
        process.join(_SLOWEST * (seconds + 3))
    finally:
        if process.is_alive():  # it waits, or Ctrl-C
            process.kill()
            process.join()
    if process.exitcode not in (0, _FAILED):
        raise LimitError(
            f"it takes more than {seconds} s of processor time, {memory >> 20} MiB of memory, or "
            f"{file_size >> 20} MiB of disk, or it crashes"
        )
    return process.exitcode == 0


def work_within(work: Callable[[], Result], *, seconds: int, memory: int, file_size: int) -> Result:
    """Do work as `try_within` does, and return its result, which pickle can copy.

    An error is handed over, too: what failed in the fork might not end in this process.

    Raises:
        LimitError: the work took more than its limits, or crashed.
        StoreError: the result does not fit on the disk of temporary files.
        Exception: the work raised it; an error that pickle cannot copy is an OSError or a
            RuntimeError with its words.
    """
    with tempfile.TemporaryFile() as file:

        def write() -> None:
            try:
                found: tuple[bool, Any] = True, work()
            except Exception as error:
                if _is_of_limits(error):
                    raise
                found = False, portable(error)
            pickle.dump(found, file, protocol=pickle.HIGHEST_PROTOCOL)
            file.flush()

        if not try_within(write, seconds=seconds, memory=memory, file_size=file_size):
            raise StoreError(
                "there is no room for a temporary file",
                where=tempfile.gettempdir(),
                fix="free some disk space, or let TMPDIR name a folder on another disk; then run "
                "the same command again",
            )
        file.seek(0)
        ended, result = pickle.load(file)
    if not ended:
        raise result
    return cast(Result, result)


def portable(error: Exception) -> Exception:
    """The error, or one with its words that pickle can copy."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if str(again) == str(error):
            return error
    except Exception:  # pickle calls the class of the error
        pass
    return (OSError if isinstance(error, OSError) else RuntimeError)(brief(error))


def _hush() -> None:
    """Prepare a fork: libraries print nothing, and nothing of the process before is finalised."""
    gc.freeze()
    faulthandler.disable()
    torch.set_num_threads(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def _data_size() -> int | None:
    """The bytes that RLIMIT_DATA counts; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return None


def _is_of_limits(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
