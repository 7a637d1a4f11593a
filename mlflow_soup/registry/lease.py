"""One process at a time works on a request; whoever asks for the same waits, or takes over.

A lease spares work and guards nothing: two that hold it at once, because one was taken for dead,
still register one version (`registry.register`) and promote once (`ledger`).
"""

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mlflow_soup.errors import OvertakenError, RegistryError, SoupError, StoreError
from mlflow_soup.files.durable import on_disk, replace
from mlflow_soup.registry.ledger import Entry, Ledger, open_ledger
from mlflow_soup.registry.store import Store

logger = logging.getLogger("mlflow_soup")
BEAT_S = 15.0
GRACE_S = 90.0  # without a beat before a holder on another machine counts as dead
LOOK_S = 2.0  # between two looks of one who waits
_ENDED = "ended"


class Lease:
    """A lease that is held."""

    def __init__(self, ledger: Ledger, series: str, number: int) -> None:
        self._ledger, self._series, self._number = ledger, series, number
        self._stopped, self._lost = threading.Event(), ""
        self._seen = time.time()  # it goes on while the machine sleeps

    def check(self) -> None:
        """Stop when another took over meanwhile: it found no sign of life for too long.

        Who was asleep and has just woken up asks the store; else the last beat tells.

        Raises:
            OvertakenError: another works on the same request now.
        """
        if not self._lost and time.time() - self._seen > 2.0 * BEAT_S:
            self._look("beat after a pause")
        if self._lost:
            raise OvertakenError(
                "another process took over, since this one gave no sign of life",
                where=self._lost,
                fix="wait for it; the same command then finds its result",
            )

    def _look(self, beat: str) -> None:
        """Give a sign of life, and see whether another has the lease by now."""
        hasty = self._ledger.hasty
        with contextlib.suppress(SoupError):  # a store that is away is away for all
            hasty.mark(self._series, self._number, beat)
            last = hasty.read(self._series)[-1]
            self._seen = time.time()
            if last.number != self._number:
                self._lost = str(last.told.get("host", "unknown"))

    def _beat(self) -> None:
        """A sign of life every few seconds, in a thread of its own."""
        beats = 0
        while not self._lost and not self._stopped.wait(BEAT_S):
            beats += 1
            self._look(f"beat {beats}")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Give signs of life while the block runs, and say when it ends."""
        thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(BEAT_S)
            with contextlib.suppress(SoupError):  # who waits will see that the beats have ended
                self._ledger.hasty.mark(self._series, self._number, _ENDED)


@contextlib.contextmanager
def hold(client: Store, name: str, key: str, folder: Path) -> Iterator[Callable[[], None]]:
    """Work on a request alone, after whoever does it now.

    Who may not write to the ledger works without a lease: it only spares work.

    Args:
        client: of the store.
        name: the registered model.
        key: of the request.
        folder: on this machine, where processes see each other at once; made if not there.

    Yields:
        A check that raises an OvertakenError when another took over meanwhile.
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
                "another process on this machine works on the same request: waiting for it "
                "(lsof %s tells which)",
                _lock_of(folder, key),
            )
        said = True
        time.sleep(LOOK_S)


def _begin(client: Store, name: str, key: str, folder: Path) -> Lease | None:
    """A lease; None where the store refuses one."""
    try:
        return _claim(open_ledger(client, name), key, folder)
    except StoreError:
        raise
    except RegistryError as error:
        logger.warning("%s; others may do the same work meanwhile", error.what)
        return None


def held(ledger: Ledger, keys: set[str], folder: Path) -> set[str]:
    """The requests that anybody works on now; listens once for signs of life from other machines.

    Args:
        ledger: of the registered model.
        keys: of the requests that are asked about.
        folder: as of `hold`.
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
        logger.warning(
            "listening to %s for up to %.0f s: are they still at work?", ", ".join(hosts), GRACE_S
        )
    heard = _listen(ledger, silent)
    return found | {key for key, newest in heard.items() if newest.mark != _ENDED}


def _listen(ledger: Ledger, lasts: Mapping[str, Entry]) -> dict[str, Entry]:
    """What each request's lease shows anew, until all have or grace is over.

    Clocks of other machines are not trusted: what counts is how long we see no beat, while the
    store is there; when it was away for us it was so for the holder.
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
    """Whether we have a lock that goes with the process, however it ends."""
    path = _lock_of(folder, key)
    with on_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked: %s", path, error.strerror)
        yield ours
    finally:
        os.close(descriptor)


def _claim(ledger: Ledger, key: str, folder: Path) -> Lease:
    """The next lease of a request, once the last one has ended or its holder is dead."""
    series, here, said = _series(key), _identity(folder), False
    while True:
        last = next(iter(ledger.read(series)[::-1]), None)
        if last is not None and last.mark != _ENDED:
            if not said and last.told.get("cache") != here:
                logger.warning(
                    "%s works on the same request: waiting for it, or until it gives no sign of "
                    "life for %.0f s",
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
    """Whether the holder of a lease gives no sign of life; False as soon as anything happens."""
    if last.told.get("cache") == here:
        return True  # else it would have the lock that we have
    if _listen(ledger, {key: last}):
        return False
    logger.warning("no sign of life from %s", last.told.get("host", "its holder"))
    return True


def _identity(folder: Path) -> str:
    """A name for this folder, that processes which share it have in common."""
    path = folder / "identity"
    if not path.is_file():
        replace(path, lambda partial: partial.write_text(secrets.token_hex(16)))
    with on_disk(path):
        return path.read_text()
