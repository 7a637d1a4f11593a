"""One process at a time works on a request; another one waits for it, or takes over if it is dead.

A lease saves work, and nothing depends on it. If two processes hold it at once, because one was
taken for dead, they still register one version (`registry.register`) and promote once (`ledger`).
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mlflow_soup.errors import OvertakenError, RegistryError, SoupError, StoreError
from mlflow_soup.files.durable import Lock, on_disk, replace, try_lock
from mlflow_soup.files.untrusted import read_hex
from mlflow_soup.registry.ledger import Entry, Ledger, open_ledger
from mlflow_soup.registry.store import Store

logger = logging.getLogger("mlflow_soup")
BEAT_S = 15.0
GRACE_S = 90.0  # a holder on another machine counts as dead after so long without a beat
LOOK_S = 2.0  # between two looks of a waiting process
_ENDED = "ended"


class Lease:
    """A lease that this process holds."""

    def __init__(self, ledger: Ledger, series: str, number: int) -> None:
        self._ledger, self._series, self._number = ledger, series, number
        self._stopped, self._lost = threading.Event(), ""
        self._seen = time.time()  # not monotonic: that stands still while the machine sleeps

    def check(self) -> None:
        """Stop if another process took over because it saw no beat of this one for too long.

        Each beat looks for that. After a pause, such as a laptop's sleep, `check` looks itself.

        Raises:
            OvertakenError: another process works on the same request now.
        """
        if not self._lost and time.time() - self._seen > 2.0 * BEAT_S:
            self._look("beat after a pause")
        if self._lost:
            raise OvertakenError(
                "another process took over the request, because this one gave no sign of life",
                where=f"the other process runs on {self._lost}",
                fix="wait for that process, then run the same command again: it finds the result",
            )

    def _look(self, beat: str) -> None:
        """Write a beat, and see whether another process has the lease by now."""
        hasty = self._ledger.hasty
        with contextlib.suppress(SoupError):  # while the store is away, nobody can take over
            hasty.mark(self._series, self._number, beat)
            if self._stopped.is_set():  # this beat took so long that it was written over the mark
                hasty.mark(self._series, self._number, _ENDED)
            last = hasty.read(self._series)[-1]
            self._seen = time.time()
            if last.number != self._number:
                self._lost = str(last.told.get("host", "unknown"))

    def _beat(self) -> None:
        """Write a beat every few seconds; this runs in a thread of its own."""
        beats = 0
        while not self._lost and not self._stopped.wait(BEAT_S):
            beats += 1
            self._look(f"beat {beats}")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write beats while the block runs, and end the lease afterwards."""
        thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(BEAT_S)
            # without the mark, a waiting process sees that the beats stopped
            with contextlib.suppress(SoupError):
                self._ledger.hasty.mark(self._series, self._number, _ENDED)


@contextlib.contextmanager
def hold(client: Store, name: str, key: str, folder: Path) -> Iterator[Callable[[], None]]:
    """Wait until no other process works on a request, then hold its lease.

    A user who may not write to the ledger works without a lease, because it only saves work.

    Args:
        client: the store's client.
        name: the registered model.
        key: the request's key.
        folder: the folder for locks on this machine; it is made if it does not exist.

    Yields:
        A check that raises an OvertakenError if another process took over.
    """
    said = False
    while True:
        with _locked(folder, key) as ours:
            if ours:
                lease = _begin(client, name, key, folder)
                if lease is None:
                    yield lambda: None
                    return
                with lease.kept():
                    yield lease.check
                return
        if not said:
            logger.warning(
                "another process on this machine works on the same request; this process "
                "waits (lsof %s shows which it is)",
                _lock_of(folder, key),
            )
        said = True
        time.sleep(LOOK_S)


def _begin(client: Store, name: str, key: str, folder: Path) -> Lease | None:
    """A new lease; None if the store refuses it."""
    try:
        return _claim(open_ledger(client, name), key, folder)
    except StoreError:
        raise
    except RegistryError as error:
        logger.warning("%s; other processes may do the same work at the same time", error.what)
        return None


def held(ledger: Ledger, keys: set[str], folder: Path) -> set[str]:
    """The keys of the requests that a process works on now, on any machine.

    This waits up to `GRACE_S` seconds, once for all of them, for beats from other machines.

    Args:
        ledger: the registered model's ledger.
        keys: the keys of the requests in question.
        folder: the folder for locks on this machine, as in `hold`.
    """
    found, silent = set[str](), dict[str, Entry]()
    for key in sorted(keys):
        last = next(iter(ledger.read(_series(key))[::-1]), None)
        if last is None or last.mark == _ENDED:
            continue
        with _locked(folder, key) as ours:
            if not ours:
                found.add(key)
            elif last.told.get("cache") != _identity(folder):
                silent[key] = last
    if silent:
        hosts = sorted({str(last.told.get("host", "unknown")) for last in silent.values()})
        logger.warning("waiting up to %.0f s for signs of life from %s", GRACE_S, ", ".join(hosts))
    heard = _listen(ledger, silent)
    return found | {key for key, newest in heard.items() if newest.mark != _ENDED}


def _listen(ledger: Ledger, lasts: Mapping[str, Entry]) -> dict[str, Entry]:
    """Request → the newest entry of its lease, for each lease that changes before grace is over.

    Clocks of other machines are not trusted: we count the seconds in which we see no beat. The
    count starts again after an outage of the store, in which the holder could not write beats.
    """
    heard: dict[str, Entry] = {}
    quiet = 0.0
    while quiet <= GRACE_S and len(heard) < len(lasts):
        begin = time.monotonic()
        time.sleep(LOOK_S)
        for key in lasts.keys() - heard.keys():
            newest = ledger.read(_series(key))[-1]
            if (newest.number, newest.mark) != (lasts[key].number, lasts[key].mark):
                heard[key] = newest
        took = time.monotonic() - begin
        quiet = quiet + took if took < 5.0 * LOOK_S + 1.0 else 0.0
    return heard


def _series(key: str) -> str:
    return f"lease/{key[:32]}"


def _lock_of(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.lock"


@contextlib.contextmanager
def _locked(folder: Path, key: str) -> Iterator[bool]:
    """Whether we got the lock, which the system releases however the process ends."""
    path = _lock_of(folder, key)
    # not filelock: it cannot lock another user's file, and fails on a file system without locks
    with on_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        # others may share the folder: a link is refused, and a pipe is not waited for
        flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    try:
        yield try_lock(descriptor, path) is not Lock.THEIRS
    finally:
        os.close(descriptor)


def _claim(ledger: Ledger, key: str, folder: Path) -> Lease:
    """The next lease of a request, after the last one has ended or its holder is dead."""
    series, here, said = _series(key), _identity(folder), False
    while True:
        last = next(iter(ledger.read(series)[::-1]), None)
        if last is not None and last.mark != _ENDED:
            if not said and last.told.get("cache") != here:
                logger.warning(
                    "a process on %s works on the same request; this process waits until it ends, "
                    "or gives no sign of life for %.0f s",
                    *(last.told.get("host", "another machine"), GRACE_S),
                )
                said = True
            if not _is_dead(ledger, key, last, here):
                continue
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "cache": here}
        owner |= {"at": int(time.time()), "nonce": secrets.token_hex(8)}
        number = last.number + 1 if last else 1
        if ledger.append(series, number, owner):
            return Lease(ledger, series, number)


def _is_dead(ledger: Ledger, key: str, last: Entry, here: str) -> bool:
    """Whether the holder of a lease writes no beat during grace; False once its entry changes."""
    if last.told.get("cache") == here:
        return True  # a live holder would have the lock that we have
    if _listen(ledger, {key: last}):
        return False
    host = last.told.get("host", "another machine")
    logger.warning("the process on %s gave no sign of life: this one takes over", host)
    return True


def _identity(folder: Path) -> str:
    """A random name for the folder, the same for all processes that share it."""
    path = folder / "identity"
    with on_disk(path):
        try:
            return read_hex(path)
        except (FileNotFoundError, ValueError):
            replace(path, lambda partial: partial.write_text(secrets.token_hex(16)))
        return read_hex(path)
